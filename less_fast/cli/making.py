"""train, allocate and import-official: kernels and budget tables."""

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..budgets import table as budget_table
from ..kernels import LessKernels, make_folder
from ..layer.checks import LessError
from ..layer.features import RHO_HIDDEN
from ..loading import AUTO, check_length, dtype_named, load_kernels, load_model, load_texts
from ..measuring import versions
from ..setting import policy_named
from ..text import windows as cut_windows
from ..training import recipe_of, tables
from ..training import train as train_kernels
from ..training.checks import check_streamed, number
from ..training.head_costs import check_policy
from ..training.plan import JUDGES
from ..training.stages import rules_in_turns
from .app import app, check_free, evicting
from .options import (
    BudgetOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    OverwriteOption,
    PolicyOption,
    SeedOption,
    TextOption,
)

MOST = 256  # windows of a training


@app.command()
def train(
    model: ModelOption = "",
    text: TextOption = [],
    out: Annotated[Path, typer.Option(help="Folder for the kernels.")] = Path("less-kernels"),
    hours: Annotated[float, typer.Option(min=0.0, help="Time limit: what does not fit is left out.")] = 6.0,
    family: Annotated[str, typer.Option(metavar="NAME", help="exponential, the default, or paper: the paper's own recipe.")] = "",
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="What they are trained for; retention (paper: h2o) by default.")
    ] = "",
    budget: BudgetOption = "5%",
    length: LengthOption = 1024,
    start: Annotated[str, typer.Option(help="Folder or hub name of kernels to go on with.")] = "",
    seed: SeedOption = 0,
    dtype: DtypeOption = AUTO,
    overwrite: OverwriteOption = False,
) -> None:
    """Trains kernels for a model, on a GPU if there is one. It measures the model and the machine, says what it will do, and does
    it: rho, which says what is worth keeping; each layer; all layers together; budgets by head.

    Unfinished work lies in OUT/.training: called again with the same options, training goes on there.
    """
    check_free(out, overwrite)
    number("--hours", hours, 0, 1e6)
    rule = evicting(policy or ("h2o" if family == "paper" else "retention"), budget, length)
    check_streamed(rule)
    recipe = recipe_of(family or "exponential", seed=seed, rho=RHO_HIDDEN if rule.needs == "rho" else None)
    rules_in_turns(rule, recipe, length)
    dtype_named(dtype, model)
    texts, source = load_texts(text, "", "train")
    network, tokenizer = load_model(model, "cuda" if torch.cuda.is_available() else "cpu", dtype)
    check_length(network, length)
    make_folder(out)  # what cannot be written should be known before the training
    begin = load_kernels(network, start) if start else None
    if begin is not None:
        theirs = {name: begin.sizes[name] for name in ("rank", "hidden", "rho") if name in begin.sizes}
        if isinstance(theirs["rank"], list):  # 0 for layers that LESS does not serve
            theirs["rank"] = max(theirs["rank"])
        recipe = recipe_of(family or begin.sizes["family"], seed=seed, **{"rho": recipe.rho} | theirs)
    windows = cut_windows(tokenizer, texts, length, seed=seed)[: MOST + MOST // JUDGES]
    judges = max(1, len(windows) // (JUDGES + 1))
    if text and len(windows) < 2:
        raise LessError(f"the text has a single window of {length} tokens, and another one judges: give more text")
    if text:
        training, held_out = windows[judges:], windows[:judges]
    else:  # the standard library's, which has a split for validation
        of_validation = load_texts([], "", "validation")[0]
        training, held_out = windows[:MOST], cut_windows(tokenizer, of_validation, length, judges, seed)
    work = out / ".training"
    learned = train_kernels(network, training, held_out, rule, recipe, work, begin, hours, lambda line: print(line, flush=True))
    learned.about |= {"model": model or "embedded", "text": source, "versions": versions()}
    learned.save_pretrained(out)
    shutil.rmtree(work)
    if "rho" in learned.about:
        means = {name: sum(each) / len(each) for name, each in learned.about["rho"].items()}
        print("rho: cross-entropy {before:.3f} -> {after:.3f} nats, at least {least:.3f}".format(**means))
    for tokens, left in zip(learned.about["layers"]["budgets"], learned.about["layers"]["left"]):
        shares = ", ".join(f"{share:.2f}" for share in left)
        print(f"layers, {tokens} tokens: of what the bare policy costs they leave {shares}")
    for stage, spread in (("joint", "uniform"), ("tables", "by head")):
        figures = learned.about.get(stage, {"budgets": [], "before": [], "after": []})
        for tokens, before, after in zip(figures["budgets"], figures["before"], figures["after"]):
            print(f"all layers, {tokens} tokens, {spread}: divergence from the full cache {before:.3f} -> {after:.3f} nats")
    print(f"saved to {out}")


@app.command()
def allocate(
    kernels: Annotated[str, typer.Option(help="Folder or hub name of the kernels.")],
    out: Annotated[Path | None, typer.Option(help="Folder for kernels and curves; where they are by default.")] = None,
    model: ModelOption = "",
    text: TextOption = [],
    dataset: DatasetOption = "",
    policy: PolicyOption = "h2o",
    length: LengthOption = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows that are measured.")] = 8,
    refine: Annotated[
        str, typer.Option(help="Budgets whose tables are refined by trial, separated by commas; curves there are used again.")
    ] = "",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = AUTO,
    seed: SeedOption = 0,
) -> None:
    """Measures what each KV head costs at each budget under a policy, with kernels and without, and stores it with the kernels.

    Caches with these kernels and a policy of the kind then give each head the budget that does most, as many in all.
    """
    if kernels in ("", "none"):
        raise LessError("budget tables come with kernels: say which with --kernels")
    if out is None and not Path(kernels).is_dir():
        raise LessError(f"{kernels} is no folder, so say with --out where the kernels with their curves shall go")
    rule = policy_named(policy, 32)  # curves are of all budgets
    check_policy(rule)
    refined = [evicting(policy, budget, length) for budget in refine.split(",") if budget]
    dtype_named(dtype, model)
    texts, _ = load_texts(text, dataset, "train", 8 * length * windows)
    network, tokenizer = load_model(model, device, dtype)
    check_length(network, length)
    learned = load_kernels(network, kernels, seed)
    make_folder(out or kernels)  # what cannot be written should be known before the measuring
    chosen = cut_windows(tokenizer, texts, length, windows, seed)
    curves = tables.allocate(network, chosen, rule, learned, out or kernels, refined)
    for share in (2, 5, 10):
        tokens = length * share // 100
        if budgets := budget_table(curves, tokens * curves.heads, less=True):
            print(f"{tokens} tokens ({share} %), by layer: {budgets}")
    print(f"saved to {out or kernels}")


@app.command()
def import_official(
    folder: Annotated[Path, typer.Argument(help="Folder of layer_*.pth files, as the authors' train_kernels.py writes them.")],
    out: Annotated[Path, typer.Option(help="Folder for the kernels.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Turns the authors' checkpoints, for Llama or Falcon, into a folder of kernels."""
    check_free(out, overwrite)
    learned = LessKernels.from_official(folder)
    learned.save_pretrained(out)
    print(f"{len(learned.layers)} layers of {learned.sizes['query_heads']} query heads saved to {out}")
