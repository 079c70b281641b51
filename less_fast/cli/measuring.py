"""compare, bench and plan: what caches are worth, and what they cost."""

import math
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
from ..layer.features import MOST, RHO_HIDDEN
from ..loading import DTYPES, check_length, load_config, load_kernels, load_model, load_shape, load_texts
from ..measuring import bench as benchmark
from ..measuring import compare as comparison
from ..measuring import plan as planning
from ..measuring.pictures import check_picture
from ..setting import best_policy, policy_named
from ..text import windows as cut_windows
from ..training import recipe_of
from .app import about, app, errors, evicting, report
from .options import (
    BEST,
    LONGEST,
    WHICH_KERNELS,
    BenchKernelsOption,
    BudgetOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    FamilyName,
    FamilyOption,
    HiddenOption,
    Int8Option,
    JsonOption,
    ModelOption,
    PlotOption,
    PolicyName,
    PolicyOption,
    PolicyOrBest,
    RankOption,
    SeedOption,
    ShapeOption,
    TextOption,
)


@app.command()
def compare(
    model: ModelOption = "",
    kernels: Annotated[
        list[str],
        typer.Option(help=WHICH_KERNELS + "May be repeated. Those of the package by default."),
    ] = [],
    policy: Annotated[
        PolicyOrBest, typer.Option(metavar="NAME", help="One policy, uniform and by head; best: H2O uniform, the best by head.")
    ] = PolicyOrBest(BEST),
    budgets: Annotated[
        str, typer.Option(help="What each KV head keeps: tokens, or a share of the length, separated by commas.")
    ] = "5%",
    text: TextOption = [],
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows that are measured.")] = 64,
    int8: Int8Option = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype("float32"),
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    picture: PlotOption = None,
) -> None:
    """Full cache, bare policy, Baseline+ and LESS side by side: perplexity, bytes held, tokens per second."""
    if length < 32:
        raise LessError(f"--length must be at least 32 tokens, not {length}")
    if windows < 2:
        raise LessError(f"--windows must be at least 2 for a standard error, not {windows}")
    best = policy.value == BEST
    policies = [evicting("h2o" if best else policy.value, budget, length) for budget in budgets.split(",")]
    check_picture(picture)
    texts, source = load_texts(text, "", "test")
    network, tokenizer = load_model(model, device, dtype.value)
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

        kinds = token_kinds(tokenizer) if policies[0].kinds else None
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
        **about(model, dtype, seed),
    }
    title = f"{model or 'embedded'} model, {windows} windows of {length} tokens{', int8' if int8 else ''}"
    if picture:
        comparison.plot(rows, picture, f"{title}, {policy.value}")
    gaps = ", ".join(dict.fromkeys(row.gap_of for row in rows if row.gap_of))
    report(
        record,
        as_json,
        comparison.table(rows, f"{title}, {source}"),
        f"gap recovered: of the perplexity that {gaps or 'the bare policy'}, bare and uniform, loses to the full cache",
        "equal memory: of the loss that Baseline+ (the bare policy with as many bytes) still has; by head: budgets from a table",
        f"perplexity: {record['chunking']}; tokens/s: decoding in {dtype.value} on {device}, caches in turns",
    )


@app.command()
def bench(
    model: ShapeOption = "",
    kernels: BenchKernelsOption = "",
    policy: PolicyOption = PolicyName("h2o"),
    budget: BudgetOption = "5%",
    family: FamilyOption = FamilyName("exponential"),
    rank: RankOption = 8,
    hidden: HiddenOption = None,
    batch: Annotated[str, typer.Option(help="Sequences that are decoded together, separated by commas.")] = "1,8",
    length: Annotated[int, typer.Option(min=32, max=LONGEST, help="Tokens before the measured ones.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each cache: 8 tokens, or a prompt.")] = 4,
    compile: Annotated[bool, typer.Option(help="Measure compiled code, too: a minute more.")] = True,
    int8: Int8Option = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype("float32"),
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    picture: PlotOption = None,
) -> None:
    """Speed and memory of full caches, the bare policy and LESS, in turns, on random tokens: a step, decoding, prefill."""
    rule = policy_named(policy.value, budget, length)
    if rule.needs == "kinds":
        raise LessError(f"bench measures policies of fixed shape, and {policy.value} is none: choose another policy")
    try:
        batches = [int(number) for number in batch.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1 or max(batches) > LONGEST:
        raise LessError(f"--batch takes whole numbers of at least 1, separated by commas, not {batch!r}")
    hidden = recipe_of(family.value, hidden=hidden).hidden
    check_picture(picture)
    torch.manual_seed(seed)
    network = load_shape(model, device, dtype.value)
    check_length(network, length + benchmark.steps_of(rounds))
    learned = load_kernels(network, kernels, seed) if kernels else None
    if learned is None:
        rho = RHO_HIDDEN if rule.needs == "rho" else None
        learned = LessKernels(**sizes(network), rank=rank, hidden=hidden, family=family.value, rho=rho).requires_grad_(False)
    learned = learned.to(network.device)
    with errors.status("measuring, all caches in turns ...") as status:
        rows = benchmark.bench(network, rule, learned, batches, length, rounds, compile, status.update, int8)
    record = {
        "rows": [asdict(row) for row in rows],
        "policy": repr(rule),
        "int8": int8,
        "kernels": kernels or "random",
        **{name: learned.sizes[name] for name in ("family", "rank", "hidden")},
        "length": length,
        "device": torch.cuda.get_device_name(device) if network.device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        **about(model, dtype, seed),
    }
    title = f"{model or 'embedded'} model, {length} tokens, {rule}{', int8' if int8 else ''}"
    if picture:
        benchmark.plot(rows, picture, f"{title}, {record['device']}")
    note = (
        f"medians, on {record['device']}, {record['threads']} threads; speed: against the first line of each part; of the limit: "
        f"the least time that the bytes to be moved, or the operations, take here (more than 100 %: they lie in the cache)"
    )
    report(record, as_json, benchmark.table(rows, f"{title}, {dtype.value}"), note)


@app.command()
def plan(
    model: ShapeOption = "",
    policy: PolicyOption = PolicyName("h2o"),
    budget: BudgetOption = "5%",
    family: FamilyOption = FamilyName("exponential"),
    rank: Annotated[int, typer.Option(min=0, max=MOST, help="Features of the low-rank state; 0 plans the bare policy.")] = 8,
    hidden: HiddenOption = None,
    batch: Annotated[int, typer.Option(min=1, max=LONGEST, help="Sequences that are decoded together.")] = 1,
    length: Annotated[int, typer.Option(min=1, max=LONGEST, help="Tokens of each sequence, prompt and generated.")] = 4096,
    dtype: Annotated[Dtype, typer.Option(help="Of weights, keys and values.")] = Dtype("float16"),
    int8: Int8Option = False,
    memory: Annotated[float, typer.Option(min=0.0, help="Gigabytes (10^9 bytes) on the device; 0: not asked.")] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """What a model costs with the full cache and with LESS, by counting, without running or loading it."""
    if policy.value == "full":
        raise LessError("--policy full is the full cache itself: choose another policy")
    if hidden is not None and not rank:
        raise LessError("--rank 0 plans the bare policy, which has no kernels: leave --hidden out")
    if not math.isfinite(memory):
        raise LessError(f"--memory is a number of gigabytes, not {memory}")
    rule, hidden = policy_named(policy.value, budget, length), recipe_of(family.value, hidden=hidden).hidden
    config, limit = load_config(model), int(memory * 1e9) or None
    costs = planning.plan(config, rule, rank, hidden, batch, length, DTYPES[dtype.value], limit, family.value, int8)
    title = f"{model or 'embedded'} in {dtype.value}, {length:,} tokens, batch {batch}, {rule}{', int8' if int8 else ''}"
    report(
        {"model": model or "embedded", "policy": repr(rule), "int8": int8, "batch": batch, "length": length, **asdict(costs)},
        as_json,
        planning.table(costs, title, ("full cache", "LESS" if rank else "bare policy"), memory),
        f"A step with this cache moves less than with the full one from {costs.break_even:,} tokens on.",
    )
