"""train, allocate and import-official: kernels and budget tables."""

import math
import os
import shutil
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..budgets import table as budget_table
from ..hf.architecture import less_layers
from ..kernels import LessKernels, make_folder
from ..layer.checks import LessError
from ..layer.features import MOST
from ..loading import check_length, load_kernels, load_model, load_texts
from ..measuring import versions
from ..setting import POLICIES
from ..text import windows as cut_windows
from ..training import allocation, recipe_of
from ..training import train as train_kernels
from ..training.costs import Costs
from ..training.head_costs import MEASURES, check_policy
from ..training.recipe import CURVE_WINDOWS
from ..training.stages import joint_rules, need_rho
from .app import app, check_free, evicting
from .options import (
    BudgetOption,
    DatasetOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    FamilyName,
    FamilyOption,
    HiddenOption,
    LengthOption,
    ModelOption,
    OverwriteOption,
    PolicyName,
    PolicyOption,
    RankOption,
    SeedOption,
    TextOption,
)

MeasureName = Enum("MeasureName", {name: name for name in MEASURES}, type=str)  # type: ignore[misc]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the kernels.")] = Path("less-kernels"),
    model: ModelOption = "",
    text: TextOption = [],
    dataset: DatasetOption = "",
    policy: PolicyOption = PolicyName("h2o"),
    budget: BudgetOption = "5%",
    length: LengthOption = 1024,
    sequences: Annotated[int, typer.Option(min=1, help="Windows to train on.")] = 512,
    validation: Annotated[int, typer.Option(min=1, help="Windows that choose the best epoch and judge the joint stage.")] = 32,
    family: FamilyOption = FamilyName("exponential"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each layer alone; 10 (paper: 40) by default.")] = None,
    joint_steps: Annotated[int | None, typer.Option(min=0, help="Of all layers together; 150 (paper: 0) by default.")] = None,
    table_steps: Annotated[int | None, typer.Option(min=0, help="The same under budget tables; 100 (paper: 0).")] = None,
    at_once: Annotated[
        int, typer.Option(min=0, help="Steps of all layers at once instead of epochs: for large models, nothing on disk.")
    ] = 0,
    rho_steps: Annotated[
        int, typer.Option(min=0, help="Steps of rho, which says what is worth keeping: for the policy retention.")
    ] = 0,
    rho_rate: Annotated[float | None, typer.Option(min=0.0, help="Of rho's training; 0.01 by default.")] = None,
    round_of: Annotated[int | None, typer.Option("--round", min=1, help="Windows read at a time; 32 by default.")] = None,
    joint_uses: Annotated[
        int | None, typer.Option(min=1, help="Joint steps for which a window is streamed once; 1 by default, more suits a GPU.")
    ] = None,
    start: Annotated[str, typer.Option(help="Folder or hub name of kernels to go on with; new ones by default.")] = "",
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Windows in a step.")] = 2,
    rank: RankOption = 8,
    hidden: HiddenOption = None,
    curves: Annotated[bool, typer.Option(help="Measure each KV head at each budget at the end, for budget tables.")] = True,
    disk: Annotated[float, typer.Option(min=0.0, help="Gigabytes that recordings may take: layers are recorded in turns.")] = 20,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype("float32"),
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Trains kernels for a model; figures and budget curves are saved with them.

    Each layer alone, as in the paper; then, unless --family paper, all together. Or --at-once: time is linear in layers.
    Unfinished work lies in OUT/.training: called again with the same options, training goes on there. Under torchrun, processes
    share out the layers.
    """
    check_free(out, overwrite)
    rule = evicting(policy.value, budget, length)
    if not rule.one_leaves:
        raise LessError(f"training needs a policy that evicts one token at a time, and {policy.value} does not: train with h2o")
    if not math.isfinite(disk):
        raise LessError(f"--disk is a number of gigabytes, not {disk}")
    curves = curves and not rule.pooled
    if table_steps and not curves:
        reason = f"heads of {policy.value} have no budgets of their own" if rule.pooled else "--no-curves leaves them out"
        raise LessError(f"--table-steps needs budget tables, and {reason}: leave one of the two out")
    steps = dict(epochs=epochs, joint_steps=joint_steps, table_steps=table_steps)
    if at_once or start:
        if epochs:
            raise LessError("--at-once and --start are instead of --epochs: leave it out")
        steps = {name: number or 0 for name, number in steps.items()} | dict(together_steps=at_once)
    several = dict(rho_steps=rho_steps, rho_rate=rho_rate, together_windows=round_of, joint_uses=joint_uses)
    recipe = recipe_of(family.value, rank=rank, seed=seed, batch=batch, hidden=hidden, **steps, **several)
    need_rho(rule, bool(rho_steps or start))
    joint_rules(rule, recipe, length)
    own = not (text or dataset)  # the standard library's, which has a split for validation
    texts, source = load_texts(text, dataset, "train", 8 * length * (sequences + validation))
    device = _join_torchrun(device)
    network, tokenizer = load_model(model, device, dtype.value)
    check_length(network, length)
    make_folder(out)  # what cannot be written should be known before the training
    training = cut_windows(tokenizer, texts, length, sequences if own else sequences + validation, seed)
    held_out = training[sequences:]
    if own:
        held_out = cut_windows(tokenizer, load_texts([], "", "validation")[0], length, validation, seed)
    work = out / ".training"
    begin = load_kernels(network, start) if start else None
    if not work.exists():
        print("measuring what this training takes, by a few steps of each stage ...", flush=True)
    learned = train_kernels(network, training[:sequences], held_out, rule, recipe, work, disk * 1e9, curves, begin, _tell)
    if learned is None:
        return
    learned.about |= {"model": model or "embedded", "text": source, "versions": versions()}
    learned.save_pretrained(out)
    shutil.rmtree(work)
    if "rho" in learned.about:
        means = {name: sum(each) / len(each) for name, each in learned.about["rho"].items()}
        print("rho: cross-entropy {before:.3f} -> {after:.3f} nats, at least {least:.3f}".format(**means))
    together = learned.about.get("together", {"budgets": [], "left": []})
    for tokens, left in zip(together["budgets"], together["left"]):
        print(f"{tokens} tokens: of what the bare policy costs, layers leave {sum(left) / len(left):.3f} on average")
    for index, figures in zip(less_layers(network), learned.about.get("validation", [])):
        print(f"layer {index}: error {figures['less'] / figures['bare']:.3f} of the bare policy's")
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
    policy: PolicyOption = PolicyName("h2o"),
    by: Annotated[
        MeasureName | None,
        typer.Option(help="kl, the default: divergence of the predictions; gradient: its estimate, cheaper."),
    ] = None,
    length: LengthOption = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows that are measured.")] = CURVE_WINDOWS,
    refine: Annotated[
        str, typer.Option(help="Budgets whose tables are refined by trial, separated by commas; curves there are used again.")
    ] = "",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype("float32"),
    seed: SeedOption = 0,
) -> None:
    """Measures what each KV head costs at each budget under a policy, with kernels and without, and stores it with the kernels.

    Caches with these kernels and a policy of the kind then give each head the budget that does most, as many in all.
    """
    if kernels in ("", "none"):
        raise LessError("budget tables come with kernels: say which with --kernels")
    if out is None and not Path(kernels).is_dir():
        raise LessError(f"{kernels} is no folder, so say with --out where the kernels with their curves shall go")
    rule = POLICIES[policy.value]
    check_policy(rule)
    refined = [evicting(policy.value, budget, length) for budget in refine.split(",") if budget]
    texts, _ = load_texts(text, dataset, "train", 8 * length * windows)
    network, tokenizer = load_model(model, device, dtype.value)
    check_length(network, length)
    learned = load_kernels(network, kernels, seed)
    make_folder(out or kernels)  # what cannot be written should be known before the measuring
    chosen = cut_windows(tokenizer, texts, length, windows, seed)
    curves = allocation.allocate(network, chosen, rule, learned, out or kernels, by.value if by else None, refined)
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


def _join_torchrun(device):
    """Joins the other processes if torchrun started several; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # one may wait long for the others' layers
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def _tell(costs: Costs) -> None:
    print(f"this training takes {costs}, by a probe; interrupted, it goes on where it was", flush=True)
