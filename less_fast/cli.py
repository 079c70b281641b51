"""The command `less-kv`: it parses, calls and prints. What is wrong with the input is said in one sentence, with exit code 2."""

import json
import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import transformers
import typer
from rich.console import Console
from safetensors import SafetensorError
from typer.core import TyperGroup

from .budgets import table as budget_table
from .chat import Conversation
from .demo import KERNELS, PAPER_KERNELS
from .hf import LessCache
from .hf.architecture import less_layers, sizes
from .hf.positions import can_move, trained_length
from .hub import CONFIG
from .kernels import LessKernels, make_folder
from .layer.checks import LessError
from .layer.fastgen import token_kinds
from .layer.features import MOST, RHO_HIDDEN
from .layer.policies import Policy
from .loading import DTYPES, SHAPES, check_length, first_line, load_config, load_kernels, load_model, load_shape, load_texts
from .measuring import bench as benchmark
from .measuring import compare as comparison
from .measuring import plan as planning
from .measuring import versions
from .measuring.caches import describe, describe_briefly
from .measuring.pictures import check_picture
from .setting import POLICIES, policy_named
from .text import Printer, beginning
from .text import windows as cut_windows
from .training import RECIPES, Recipe, allocation
from .training import train as train_kernels
from .training.costs import Costs
from .training.head_costs import MEASURES, check_policy
from .training.recipe import CURVE_WINDOWS

LONGEST = 2**31 - 2  # positions are int32
COLDEST = 0.001  # logits that are divided by less leave float32


class Commands(TyperGroup):
    """All commands. Of what they refuse, or the system, one sentence is shown, or with --debug the traceback."""

    def invoke(self, ctx: Any) -> Any:
        cause: Exception
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os._exit(0)  # the reader of our output has gone
        except (LessError, OSError, SafetensorError) as error:
            sentence, cause = " ".join(str(error).split()), error
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            sentence, cause = "there is not so much memory here: take a smaller budget, batch or length", error
        if ctx.params["debug"]:
            traceback.print_exception(cause)
        print(f"less-kv: {sentence}", file=sys.stderr)
        sys.exit(2)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True)

PolicyName = Enum("PolicyName", {name: name for name in POLICIES}, type=str)  # type: ignore[misc]
FamilyName = Enum("FamilyName", {name: name for name in RECIPES}, type=str)  # type: ignore[misc]
MeasureName = Enum("MeasureName", {name: name for name in MEASURES}, type=str)  # type: ignore[misc]
Dtype = Enum("Dtype", {name: name for name in DTYPES}, type=str)  # type: ignore[misc]

WHICH_MODEL = "Folder, GGUF file or hub name of a model, or smollm2"
ModelOption = Annotated[str, typer.Option("--model", help=f"{WHICH_MODEL}; the embedded one by default.")]
ShapeOption = Annotated[str, typer.Option("--model", help=f"{WHICH_MODEL}, or {', '.join(SHAPES)}; the embedded one by default.")]
WHICH_KERNELS = "Folder or hub name of kernels for the model; none; or performer, fourier or elu: controls without training. "
KernelsOption = Annotated[str, typer.Option("--kernels", help=WHICH_KERNELS + "Those that come with the package by default.")]
BenchKernelsOption = Annotated[
    str, typer.Option("--kernels", help="Folder or hub name of kernels for the model, with their tables; random ones by default.")
]
PolicyOption = Annotated[PolicyName, typer.Option("--policy", help="Which tokens are kept.")]
BudgetOption = Annotated[str, typer.Option("--budget", help="What each KV head keeps: tokens, or a share of the length.")]
TextOption = Annotated[list[Path], typer.Option("--text", help="Text file, may be repeated; the standard library by default.")]
DatasetOption = Annotated[
    str, typer.Option("--dataset", help="NAME[,CONFIG[,SPLIT[,COLUMN]]] of a data set instead of files (needs datasets).")
]
LengthOption = Annotated[int, typer.Option("--length", min=32, max=LONGEST, help="Tokens in a window.")]
TokensOption = Annotated[str, typer.Option("--budget", help="Tokens that each KV head keeps.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the decoding step first: for long texts on a CPU.")]
Int8Option = Annotated[
    bool, typer.Option("--int8", help="Hold keys and values in eight bits, so that a slot takes half as many bytes.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the model, and of the keys and values held.")]
FamilyOption = Annotated[FamilyName, typer.Option("--family", help="The kernels: exponential ones, or the paper's.")]
HiddenOption = Annotated[
    int | None, typer.Option("--hidden", min=0, max=MOST, help="Hidden width of the kernels; 32 (paper: 512) by default.")
]
RankOption = Annotated[int, typer.Option("--rank", min=1, max=MOST, help="Features of the low-rank state.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of everything random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Write a PNG picture (needs matplotlib).")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace kernels that are in the folder already.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of what is refused.")] = False) -> None:
    """LESS: text generation in constant memory. Without options each command but chat runs on the embedded model."""


@app.command()
def compare(
    model: ModelOption = "",
    kernels: Annotated[
        list[str],
        typer.Option(help=WHICH_KERNELS + "May be repeated. Those that come with the package by default."),
    ] = [],
    policy: PolicyOption = PolicyName("h2o"),
    budgets: Annotated[
        str, typer.Option(help="What each KV head keeps: tokens, or a share of the length, separated by commas.")
    ] = "2%,5%,10%",
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
    policies = [_evicting(policy, budget, length) for budget in budgets.split(",")]
    check_picture(picture)
    texts, source = load_texts(text, "", "test")
    network, tokenizer = load_model(model, device, dtype.value)
    check_length(network, length)
    names = {str(KERNELS): "exponential", str(PAPER_KERNELS): "paper", "": "shipped"}
    candidates = {
        names.get(name, name): load_kernels(network, name, seed)
        for name in kernels or ([""] if model else [str(KERNELS), str(PAPER_KERNELS)])
    }
    learned = {name: candidate for name, candidate in candidates.items() if candidate is not None}
    chosen = cut_windows(tokenizer, texts, length, windows, seed)

    with errors.status("decoding, all caches in turns ...") as status:

        def done(row):
            status.update(f"{row.cache} {row.policy or ''}: perplexity {row.perplexity:.2f} ...")

        kinds = token_kinds(tokenizer) if policies[0].kinds else None
        rows = comparison.compare(network, chosen, policies, learned, done, kinds, int8)
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
        **_about(model, dtype, seed),
    }
    title = f"{model or 'embedded'} model, {windows} windows of {length} tokens{', int8' if int8 else ''}"
    if picture:
        comparison.plot(rows, picture, f"{title}, {policy.value}")
    _report(
        record,
        as_json,
        comparison.table(rows, f"{title}, {source}"),
        "gap recovered: of the perplexity that the bare policy loses; equal memory: of the loss that Baseline+ still has",
        f"perplexity: {record['chunking']}; tokens/s: decoding in {dtype.value} on {device}, caches in turns",
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The beginning of the text; - reads it from standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Say the prompt by the model's chat template; print the answer.")] = False,
    model: ModelOption = "",
    kernels: KernelsOption = "",
    policy: PolicyOption = PolicyName("h2o"),
    budget: TokensOption = "51",
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = 0.7,
    compile: CompileOption = False,
    int8: Int8Option = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype("float32"),
    seed: SeedOption = 0,
) -> None:
    """Streams text in constant memory, then says what the cache holds.

    A text longer than model and kernels were trained for stays within that length (LessCache.for_model, context), if positions
    can move.
    """
    prompt = _utf8(_standard_input().read if prompt == "-" else lambda: prompt)
    if not prompt:
        raise LessError("the prompt is empty: give some text")
    network, tokenizer, cache_for = _loaded(model, kernels, policy, budget, compile, int8, device, dtype, seed)
    options = _sampling(temperature, seed) | {"max_new_tokens": max_new_tokens}
    if chat:
        cache = cache_for(math.inf)
        conversation = Conversation(network, tokenizer, cache)
        with _settings_of_the_model():
            conversation.answer(prompt, streamer=Printer(tokenizer), **options)
        errors.print(f"{conversation.ids.shape[1]} tokens, {describe(cache)}")
        return
    ids = torch.tensor([beginning(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=network.device)
    length = ids.shape[1] + max_new_tokens
    check_length(network, length)
    cache = cache_for(length)
    print(prompt, end="", flush=True)
    with _settings_of_the_model():
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            streamer=Printer(tokenizer, ids[0].tolist()),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    errors.print(f"{out.shape[1]} tokens, {describe(cache)}")


@app.command()
def chat(
    model: Annotated[str, typer.Option("--model", help=f"{WHICH_MODEL}: one that was trained to chat.")] = "smollm2",
    system: Annotated[str, typer.Option("--system", help="What the model is told before the first turn.")] = "",
    kernels: KernelsOption = "",
    policy: PolicyOption = PolicyName("h2o"),
    budget: TokensOption = "256",
    max_new_tokens: NewTokensOption = 512,
    temperature: TemperatureOption = 0.7,
    compile: CompileOption = False,
    int8: Int8Option = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype("float32"),
    seed: SeedOption = 0,
) -> None:
    """Talks in constant memory: each line is a turn, of which only what is new goes through the model.

    Ctrl-C cuts an answer off; Ctrl-D, or /quit, ends. Lines may come through a pipe. Beyond the length that the model was trained
    for the cache stays within it, if positions can move.
    """
    system = _utf8(lambda: system)
    network, tokenizer, cache_for = _loaded(model, kernels, policy, budget, compile, int8, device, dtype, seed)
    cache = cache_for(math.inf)
    conversation = Conversation(network, tokenizer, cache, system)
    options = _sampling(temperature, seed) | {"max_new_tokens": max_new_tokens}
    for line in _lines():
        with _settings_of_the_model(), _cut_off_by_ctrl_c() as criterion:
            conversation.answer(line, streamer=Printer(tokenizer), stopping_criteria=[criterion], **options)
        errors.print(describe_briefly(cache), style="dim", highlight=False)


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
    length: Annotated[int, typer.Option(min=32, max=LONGEST, help="Tokens of each sequence before the measured ones.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each cache, of 8 tokens or one prompt each.")] = 4,
    compile: Annotated[bool, typer.Option(help="Measure compiled code as well; compiling takes a minute or more.")] = True,
    int8: Int8Option = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype("float32"),
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    picture: PlotOption = None,
) -> None:
    """Speed and memory of full caches, the bare policy and LESS, in turns: attention step, decoding, prefill.

    Weights of named shapes and of the kernels are random, and caches are filled with random tokens: speed does not depend on
    values.
    """
    rule = policy_named(policy.value, budget, length)
    if rule.budget is None or rule.kinds:
        raise LessError(f"bench measures policies of fixed shape, and {policy.value} is none: choose another policy")
    try:
        batches = [int(number) for number in batch.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1 or max(batches) > LONGEST:
        raise LessError(f"--batch takes whole numbers of at least 1, separated by commas, not {batch!r}")
    hidden = _recipe(family, hidden=hidden).hidden
    check_picture(picture)
    torch.manual_seed(seed)
    network = load_shape(model, device, dtype.value)
    check_length(network, length + benchmark.steps_of(rounds))
    learned = load_kernels(network, kernels, seed) if kernels else None
    if learned is None:
        rho = RHO_HIDDEN if rule.learned else None
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
        **_about(model, dtype, seed),
    }
    title = f"{model or 'embedded'} model, {length} tokens, {rule}{', int8' if int8 else ''}"
    if picture:
        benchmark.plot(rows, picture, f"{title}, {record['device']}")
    note = (
        f"medians, on {record['device']}, {record['threads']} threads; speed: against the first line of each part; of the limit: "
        f"the least time that the bytes to be moved, or the operations, take here (more than 100 %: they lie in the cache)"
    )
    _report(record, as_json, benchmark.table(rows, f"{title}, {dtype.value}"), note)


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
    rule, hidden = policy_named(policy.value, budget, length), _recipe(family, hidden=hidden).hidden
    config, limit = load_config(model), int(memory * 1e9) or None
    costs = planning.plan(config, rule, rank, hidden, batch, length, DTYPES[dtype.value], limit, family.value, int8)
    title = f"{model or 'embedded'} in {dtype.value}, {length:,} tokens, batch {batch}, {rule}{', int8' if int8 else ''}"
    _report(
        {"model": model or "embedded", "policy": repr(rule), "int8": int8, "batch": batch, "length": length, **asdict(costs)},
        as_json,
        planning.table(costs, title, ("full cache", "LESS" if rank else "bare policy"), memory),
        f"A step with this cache moves less than with the full one from {costs.break_even:,} tokens on.",
    )


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
    _check_free(out, overwrite)
    rule = _evicting(policy, budget, length)
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
    recipe = _recipe(family, rank=rank, seed=seed, batch=batch, hidden=hidden, **steps, **several)
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
    refined = [_evicting(policy, budget, length) for budget in refine.split(",") if budget]
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
    _check_free(out, overwrite)
    learned = LessKernels.from_official(folder)
    learned.save_pretrained(out)
    print(f"{len(learned.layers)} layers of {learned.sizes['query_heads']} query heads saved to {out}")


def _loaded(model, kernels, policy, budget, compile, int8, device, dtype, seed):
    """The model, its tokenizer, and a function that makes a cache for texts of so many tokens: beyond what the model and the
    kernels were trained for it stays within that, if the model's positions allow it."""
    rule = policy_named(policy.value, budget, None)
    network, tokenizer = load_model(model, device, dtype.value)
    learned = load_kernels(network, kernels, seed)
    kinds = token_kinds(tokenizer) if rule.kinds else None

    def cache_for(length):
        trained = trained_length(network, learned)
        fits = trained is not None and length > trained >= (rule.budget or math.inf)
        context = trained if fits and can_move(network) else None
        return LessCache.for_model(network, rule, learned, token_kinds=kinds, compile=compile, context=context, int8=int8)

    return network, tokenizer, cache_for


def _sampling(temperature, seed):
    if 0 < temperature < COLDEST:
        raise LessError(f"--temperature is 0, which takes the likeliest token, or at least {COLDEST}, not {temperature}")
    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _utf8(read: Callable[[], str]) -> str:
    """The text that `read` reads. LessError if it is none."""
    try:
        text = read()
        text.encode()
    except UnicodeDecodeError as error:
        raise LessError(f"the input is no {error.encoding} text: write it so, or set PYTHONIOENCODING=utf-8") from error
    except UnicodeError as error:
        raise LessError("the prompt holds bytes that are no UTF-8 text") from error
    return text


def _standard_input() -> TextIO:
    """LessError if it was closed."""
    if sys.stdin is None:
        raise LessError("standard input is closed: give a prompt on the command line, or through a pipe")
    return sys.stdin


def _lines() -> Iterator[str]:
    """What the user says, line by line, without empty ones, until the end of the input or /quit."""
    asks = _standard_input().isatty()
    while True:
        try:
            line = _utf8(lambda: input("> " if asks else "")).strip()
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if asks else "")
            return
        if line == "/quit":
            return
        if line:
            yield line


@contextmanager
def _cut_off_by_ctrl_c() -> Iterator[Callable]:
    """A stopping criterion for `generate`, which Ctrl-C meets between two tokens; pressed again, it is KeyboardInterrupt."""
    pressed = []

    def note(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda ids, scores, **_: torch.full((len(ids),), bool(pressed), device=ids.device)  # (N,)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _settings_of_the_model() -> Iterator[None]:
    """What `generate` of transformers refuses, by the model's own settings, is refused in one sentence."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, LessError):
            raise
        raise LessError(f"this model does not generate with these settings: {first_line(error)}") from error


def _join_torchrun(device):
    """Joins the other processes if torchrun started several; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # one may wait long for the others' layers
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def _tell(costs: Costs) -> None:
    print(f"this training takes {costs}, by a probe; interrupted, it goes on where it was", flush=True)


def _recipe(family: FamilyName, **changes: Any) -> Recipe:
    """How the family is trained, with other fields if they are not None."""
    recipe, changes = RECIPES[family.value], {name: value for name, value in changes.items() if value is not None}
    if changes.get("hidden") == 0 and recipe.family == "paper":
        raise LessError("--hidden 0 is for exponential kernels: the paper's need a hidden width of at least 1")
    if recipe.halve_every and changes.get("epochs"):
        changes["halve_every"] = max(1, changes["epochs"] // 4)
    return replace(recipe, **changes)


def _evicting(policy: PolicyName, budget: str, length: int) -> Policy:
    """The policy. LessError if it evicts nothing from windows of the length that a query could miss."""
    if policy.value == "full":
        raise LessError("--policy full evicts nothing: choose another policy")
    rule = policy_named(policy.value, budget, length)
    if rule.budget > length - 2:
        raise LessError(f"a budget of {rule.budget} tokens evicts nothing from windows of {length}: choose a smaller one")
    return rule


def _check_free(out, overwrite):
    if (out / CONFIG).exists() and not overwrite:
        raise LessError(f"{out} holds a {CONFIG} already: choose another --out, or say --overwrite")


def _report(record, as_json, table, *notes):
    """Prints the record as JSON, or the table with notes below it."""
    if as_json:
        print(json.dumps(record, indent=2))
        return
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(*notes, sep="\n")


def _about(model, dtype, seed):
    """What every record says."""
    return {"model": model or "embedded", "dtype": dtype.value, "seed": seed, "versions": versions()}


def main() -> None:
    """The entry point. What is neither done nor refused is a bug: it ends in a traceback and a line that asks to report it."""
    for name in ("stdout", "stderr"):  # what a console cannot show it shows as a question mark
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  closed: nobody reads it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except Exception:
        traceback.print_exc()
        print("less-kv: this is a bug: please report it with the command and the lines above", file=sys.stderr)
        sys.exit(1)
