"""compare and bench: what caches are worth, and what they cost."""

import os
from dataclasses import asdict
from typing import Annotated

import torch
import typer

from ..demo import KERNELS, PAPER_KERNELS
from ..hf.architecture import sizes
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.fastgen import token_kinds
from ..layer.features import RHO_HIDDEN
from ..loading import AUTO, check_length, dtype_named, load_kernels, load_model, load_shape, load_texts
from ..measuring import bench as benchmark
from ..measuring import compare as comparison
from ..setting import best_policy, policy_named
from ..text import windows as cut_windows
from ..training import RECIPES
from . import options
from .app import about, app, errors, evicting, report, spelled


@app.command()
def compare(
    model: options.ModelOption = "",
    kernels: Annotated[
        list[str],
        typer.Option(help=options.WHICH_KERNELS + "May be repeated. Those of the package by default."),
    ] = [],
    policy: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Of all rows; best: H2O uniform, the best by head. {options.POLICY_NAMES}."),
    ] = options.BEST,
    budgets: Annotated[
        str, typer.Option(help="What each KV head keeps: tokens, or a share of the length, separated by commas.")
    ] = "5%",
    text: options.TextOption = [],
    length: options.LengthOption = 1024,
    windows: Annotated[int, typer.Option(min=2, help="Windows that are measured.")] = 64,
    int8: options.Int8Option = False,
    device: options.DeviceOption = "cpu",
    dtype: options.DtypeOption = AUTO,
    seed: options.SeedOption = 0,
    as_json: options.JsonOption = False,
) -> None:
    """Full cache, bare policy, Baseline+ and LESS side by side: perplexity, bytes held, tokens per second."""
    best = policy == options.BEST
    policies = [evicting("h2o" if best else policy, budget, length) for budget in budgets.split(",")]
    dtype_named(dtype, model)
    texts, source = load_texts(text, "", "test")
    network, tokenizer = load_model(model, device, dtype)
    check_length(network, length)
    names = {str(KERNELS): "ours", str(PAPER_KERNELS): "the paper's", "": "ours"}
    candidates = {
        names.get(name, name): load_kernels(network, name, seed)
        for name in kernels or ([""] if model else [str(PAPER_KERNELS), str(KERNELS)])
    }
    learned = {name: candidate for name, candidate in candidates.items() if candidate is not None}
    by_head = None
    if best and learned:
        most = max(learned.values(), key=lambda one: ("rho" in one.sizes, bool(one.curves)))
        by_head = [best_policy(most, rule.budget) for rule in policies]
    chosen = cut_windows(tokenizer, texts, length, windows, seed)

    with errors.status("decoding, all caches in turns ...") as status:

        def done(row):
            status.update(f"{row.cache} {row.policy or ''}: perplexity {row.perplexity:.2f} ...")

        kinds = token_kinds(tokenizer) if policies[0].needs == "kinds" else None
        rows = comparison.compare(network, chosen, policies, learned, done, kinds, int8, by_head)
    if not learned:
        errors.print("No kernels for this model, so no LESS: train some with `less-kv train`.")
    record = {
        "rows": [asdict(row) for row in rows],
        "text": source,
        "tokens": chosen[:, 1:].numel(),
        "windows": windows,
        "length": length,
        "int8": int8,
        "chunking": "streaming (one token at a time)",
        "device": device,
        "seed": seed,
        **about(model, network.dtype),
    }
    title = f"{model or 'embedded'} model, {windows} windows of {length} tokens{', int8' if int8 else ''}"
    gaps = ", ".join(dict.fromkeys(row.gap_of for row in rows if row.gap_of))
    report(
        record,
        as_json,
        comparison.table(rows, f"{title}, {source}"),
        f"gap recovered: of the perplexity that {gaps or 'the bare policy'}, bare and uniform, loses to the full cache",
        "equal memory: of the loss that Baseline+ (the bare policy with as many bytes) still has; by head: budgets from a table",
        f"perplexity: {record['chunking']}; tokens/s: decoding in {spelled(network.dtype)} on {device}, caches in turns",
    )


@app.command()
def bench(
    model: options.ShapeOption = "",
    kernels: Annotated[str, typer.Option(help="Folder or hub name of kernels; random ones by default.")] = "",
    policy: options.PolicyOption = "h2o",
    budget: options.BudgetOption = "5%",
    batch: Annotated[str, typer.Option(help="Sequences that are decoded together, separated by commas.")] = "1,8",
    length: Annotated[int, typer.Option(min=32, max=options.LONGEST, help="Tokens before the measured ones.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each cache: 8 tokens, or a prompt.")] = 4,
    compile: Annotated[bool, typer.Option(help="Measure compiled code, too: a minute more.")] = True,
    device: options.DeviceOption = "cpu",
    dtype: options.DtypeOption = AUTO,
    as_json: options.JsonOption = False,
) -> None:
    """Speed and memory of full caches, the bare policy and LESS, in turns, on random tokens: decoding, prefill."""
    rule = policy_named(policy, budget, length)
    if rule.needs == "kinds":
        raise LessError(f"bench measures policies of fixed shape, and {policy} is none: choose another policy")
    try:
        batches = [int(number) for number in batch.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1 or max(batches) > options.LONGEST:
        raise LessError(f"--batch takes whole numbers of at least 1, separated by commas, not {batch!r}")
    torch.manual_seed(0)
    network = load_shape(model, device, dtype)
    check_length(network, length + benchmark.steps_of(rounds))
    learned = load_kernels(network, kernels) if kernels else None
    if learned is None:
        hidden, rho = RECIPES["exponential"].hidden, RHO_HIDDEN if rule.needs == "rho" else None
        learned = LessKernels(**sizes(network), hidden=hidden, family="exponential", rho=rho).requires_grad_(False)
    learned = learned.to(network.device)
    with errors.status("measuring, all caches in turns ...") as status:
        rows = benchmark.bench(network, rule, learned, batches, length, rounds, compile, status.update)
    hardware = torch.cuda.get_device_name(device) if network.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    record = {
        "rows": [asdict(row) for row in rows],
        "policy": repr(rule),
        "kernels": kernels or "random",
        **{name: learned.sizes[name] for name in ("family", "rank", "hidden")},
        "length": length,
        "device": hardware,
        "threads": torch.get_num_threads(),
        **about(model, network.dtype),
    }
    title = f"{model or 'embedded'} model, {length} tokens, {rule}, {spelled(network.dtype)}"
    note = f"medians, on {hardware}, {record['threads']} threads; speed: against the first line of each part"
    report(record, as_json, benchmark.table(rows, title), note)
