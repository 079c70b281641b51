"""The command `less-kv`. Bad input ends in one sentence and exit code 2."""

import json
import math
import os
import platform
import shutil
import sys
from dataclasses import asdict, replace
from datetime import timedelta
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from .budgets import table as budget_table
from .demo import KERNELS, MODEL, PAPER_KERNELS, corpus
from .hf import LessCache
from .hf.architecture import check_kernels, check_model, less_layers, sizes
from .hub import CONFIG
from .kernels import LessKernels, make_folder
from .layer.checks import LessError
from .layer.fastgen import token_kinds
from .layer.features import FAMILIES, MOST, Control, Features
from .measuring import bench as benchmark
from .measuring.compare import baseline_plus, held_bytes, plot
from .measuring.compare import compare as compare_caches
from .measuring.plan import SHAPES, config_of
from .measuring.plan import plan as plan_costs
from .setting import POLICIES, Setting, policy_named
from .text import dataset_texts
from .text import windows as cut_windows
from .training import RECIPES, Recipe
from .training import train as train_kernels
from .training.head_costs import MEASURES, check_policy, measure
from .training.stages import CURVE_WINDOWS
from .training.tables import refine as refine_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LESS: text generation in constant memory. Without options each command runs on the embedded model.",
)
errors = Console(stderr=True)
LONGEST = 2**31 - 1  # positions are int32


PolicyName = Enum("PolicyName", {name: name for name in POLICIES}, type=str)
FamilyName = Enum("FamilyName", {name: name for name in RECIPES}, type=str)
MeasureName = Enum("MeasureName", {name: name for name in MEASURES}, type=str)
Dtype = Enum("Dtype", {name: name for name in ("float32", "bfloat16", "float16")}, type=str)

ModelOption = Annotated[str, typer.Option("--model", help="Folder or hub name of a model; the embedded one unless given.")]
ShapeOption = Annotated[
    str, typer.Option("--model", help=f"Folder or hub name of a model, or {', '.join(SHAPES)}; the embedded one unless given.")
]
KernelsOption = Annotated[
    str,
    typer.Option(
        "--kernels",
        help="Folder or hub name of kernels for the model; none; or performer, fourier or elu: controls without training. "
        "Embedded model: its own unless given.",
    ),
]
PolicyOption = Annotated[PolicyName, typer.Option("--policy", help="Which tokens are kept.")]
TextOption = Annotated[list[Path], typer.Option("--text", help="Text file, may be repeated; the standard library unless given.")]
DatasetOption = Annotated[
    str, typer.Option("--dataset", help="NAME[,CONFIG[,SPLIT[,COLUMN]]] of a data set instead of files (needs datasets).")
]
LengthOption = Annotated[int, typer.Option("--length", min=32, max=LONGEST, help="Tokens in a window.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the model, and of the keys and values held.")]
FamilyOption = Annotated[FamilyName, typer.Option("--family", help="The kernels: exponential ones, or the paper's.")]
HiddenOption = Annotated[
    int | None, typer.Option("--hidden", min=0, max=MOST, help="Hidden width of the kernels; 32 (paper: 512) unless given.")
]
RankOption = Annotated[int, typer.Option("--rank", min=1, max=MOST, help="Features of the low-rank state.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of everything random.")]


@app.command()
def compare(
    model: ModelOption = "",
    kernels: Annotated[
        list[str],
        typer.Option(
            "--kernels",
            help="Folder or hub name of kernels for the model, may be repeated; none; or performer, fourier or elu: controls "
            "without training. Embedded model: its own, exponential and the paper's, unless given.",
        ),
    ] = [],
    policy: PolicyOption = PolicyName.h2o,
    budgets: Annotated[
        str, typer.Option(help="What each KV head keeps: tokens, or a share of the length, separated by commas.")
    ] = "2%,5%,10%",
    text: TextOption = [],
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows that are measured.")] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a PNG picture (needs matplotlib).")] = None,
):
    """Full cache, bare policy, Baseline+ and LESS side by side: perplexity, bytes held, tokens per second."""
    if not kernels and not model:
        kernels = [str(KERNELS), str(PAPER_KERNELS)]
    if length < 32:
        raise LessError(f"--length must be at least 32 tokens, not {length}")
    if windows < 2:
        raise LessError(f"--windows must be at least 2 for a standard error, not {windows}")
    if policy.value == "full":
        raise LessError("--policy full evicts nothing, so there is nothing to compare: choose another policy")
    policies = [policy_named(policy.value, budget, length) for budget in budgets.split(",")]
    too_large = [rule.budget for rule in policies if rule.budget >= length]
    if too_large:
        raise LessError(f"a budget of {too_large[0]} tokens evicts nothing from windows of {length}: choose a smaller one")
    if picture:
        _check_plot(picture)
    contents = [_read(file) for file in text]
    network, tokenizer = _load(model, device, dtype)
    learned = {_named(some): _load_kernels(network, model, some, seed) for some in kernels}
    learned = {name: some for name, some in learned.items() if some is not None}
    contents = contents or [content for _, content in corpus.documents("test")]
    chosen = cut_windows(tokenizer, contents, length, windows, seed)
    source = ", ".join(file.name for file in text) or f"held-out standard library ({corpus.digest('test')})"

    with errors.status("decoding, all caches in turns ...") as status:

        def done(row):
            status.update(f"{row.cache} {row.policy or ''}: perplexity {row.perplexity:.2f} ...")

        kinds = token_kinds(tokenizer) if policies[0].kinds else None
        rows = compare_caches(network, chosen, policies, learned, done, kinds)
    if not learned:
        errors.print("No kernels for this model, so no LESS: train some with `less-kv train`.")
    record = {
        "rows": [asdict(row) for row in rows],
        "model": model or "embedded",
        "text": source,
        "tokens": chosen[:, 1:].numel(),
        "windows": windows,
        "length": length,
        "chunking": "streaming (one token at a time)",
        "seed": seed,
        "device": device,
        "dtype": dtype.value,
        "versions": _versions(),
    }
    title = f"{record['model']} model, {windows} windows of {length} tokens, {policy.value}"
    _report(record, rows, as_json, _print_table, picture, plot, title)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The beginning of the text; - reads it from standard input.")],
    model: ModelOption = "",
    kernels: KernelsOption = "",
    policy: PolicyOption = PolicyName.h2o,
    budget: Annotated[str, typer.Option(help="Tokens that each KV head keeps.")] = "51",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the decoding step first: for long texts on a CPU.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
):
    """Streams text in constant memory, then says what the cache holds."""
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise LessError("the prompt is empty")
    if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise LessError("the prompt holds bytes that are no UTF-8 text")
    rule = policy_named(policy.value, budget, None)
    network, tokenizer = _load(model, device, dtype)
    learned = _load_kernels(network, model, kernels, seed)
    kinds = token_kinds(tokenizer) if rule.kinds else None
    cache = LessCache.for_model(network, rule, learned, token_kinds=kinds, compile=compile)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(network.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    print(prompt, end="", flush=True)
    out = network.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    seen, groups = int(cache.get_seq_length()), [group for layer in cache.less_layers for group in layer.state.groups]
    full = sum(2 * group.k.shape[1] * group.k.shape[3] * seen * group.k.itemsize for group in groups) + cache.memory()["others"]
    kept = sorted({min(group.policy.budget or seen, seen) for group in groups})
    kept = " to ".join(map(str, dict.fromkeys([kept[0], kept[-1]])))
    ranks = sorted({rank for layer in learned.layers for rank in layer.ranks}) if learned else []
    others = f"folded into {' to '.join(map(str, ranks[:1] + ranks[1:][-1:]))} features" if learned else "forgotten"
    errors.print(
        f"{out.shape[1]} tokens, {seen} through the cache: each KV head keeps {'at most ' * rule.kinds}{kept}, the others "
        f"are {others}; {held_bytes(cache):,} bytes held, a full cache would hold {full:,}"
    )


@app.command()
def bench(
    model: ShapeOption = "",
    policy: PolicyOption = PolicyName.h2o,
    budget: Annotated[str, typer.Option(help="What each KV head keeps: tokens, or a share of the length.")] = "5%",
    family: FamilyOption = FamilyName.exponential,
    rank: RankOption = 8,
    hidden: HiddenOption = None,
    batch: Annotated[str, typer.Option(help="Sequences that are decoded together, separated by commas.")] = "1,8",
    length: Annotated[int, typer.Option(min=32, max=LONGEST, help="Tokens of each sequence before the measured ones.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each cache, of 8 tokens or one prompt each.")] = 4,
    compile: Annotated[bool, typer.Option(help="Measure compiled code, too; compiling takes a minute or more.")] = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a PNG picture (needs matplotlib).")] = None,
):
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
    if picture:
        _check_plot(picture)
    torch.manual_seed(seed)
    network = _load_shape(model, device, dtype)
    shape = sizes(network)
    hidden = _recipe(family, hidden).hidden
    learned = LessKernels(**shape, rank=rank, hidden=hidden, family=family.value).requires_grad_(False).to(network.device)
    contenders = {"bare": None, "LESS": learned}
    layer = {name: size for name, size in shape.items() if name != "layers"}
    rows = []
    with errors.status("measuring, all caches in turns ...") as status:
        for many in batches:
            status.update(f"attention steps and decoding, batch {many} ...")
            steps = {"bare": (rule, None), "LESS": (rule, learned.layers[0])}
            rows += benchmark.attention_steps(layer, steps, many, length, rounds, network.dtype, network.device, compile)
            rows += benchmark.decode(network, rule, contenders, many, length, rounds, compile)
        status.update("prefill ...")
        rows += benchmark.prefill(network, rule, contenders, 1, length, rounds)
    record = {
        "rows": [asdict(row) for row in rows],
        "model": model or "embedded",
        "policy": repr(rule),
        "family": family.value,
        "rank": rank,
        "hidden": hidden,
        "length": length,
        "device": torch.cuda.get_device_name(device) if network.device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "dtype": dtype.value,
        "seed": seed,
        "versions": _versions(),
    }
    title = f"{record['model']} model, {length} tokens, {rule}, {record['device']}"
    _report(record, rows, as_json, _print_bench, picture, benchmark.plot, title)


@app.command()
def plan(
    model: ShapeOption = "",
    policy: PolicyOption = PolicyName.h2o,
    budget: Annotated[str, typer.Option(help="What each KV head keeps: tokens, or a share of the length.")] = "5%",
    family: FamilyOption = FamilyName.exponential,
    rank: Annotated[int, typer.Option(min=0, max=MOST, help="Features of the low-rank state; 0 plans the bare policy.")] = 8,
    hidden: HiddenOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded together.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each sequence, prompt and generated.")] = 4096,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of weights, keys and values.")] = Dtype.float16,
    memory: Annotated[float, typer.Option(min=0.0, help="Gigabytes (10^9 bytes) on the device; 0: not asked.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
):
    """What a model costs with the full cache and with LESS, by counting, without running or loading it."""
    if policy.value == "full":
        raise LessError("--policy full is the full cache itself: choose another policy")
    rule = policy_named(policy.value, budget, length)
    if not math.isfinite(memory):
        raise LessError(f"--memory is a number of gigabytes, not {memory}")
    try:
        config = config_of(model or str(MODEL))
    except Exception as error:  # whatever transformers says of a file that is broken
        raise LessError(f"no config of a model at {model}: {_first_line(error)}") from None
    hidden = _recipe(family, hidden).hidden
    limits = dict(memory=int(memory * 1e9) or None, family=family.value)
    costs = plan_costs(config, rule, rank, hidden, batch, length, getattr(torch, dtype.value), **limits)
    if as_json:
        print(json.dumps({"model": model or "embedded", "policy": repr(rule), "batch": batch, "length": length} | asdict(costs)))
        return
    table = Table(title=f"{model or 'embedded'} in {dtype.value}, {length:,} tokens, batch {batch}, {rule}")
    for heading in ("", "full cache", "LESS" if rank else "bare policy"):
        table.add_column(heading, justify="right" if heading else "left")
    for what, full, less in [
        ("weights of the model", costs.weights, costs.weights),
        ("weights of the kernels", 0, costs.kernels),
        ("held for each sequence", costs.full, costs.less),
        ("moved by a decoding step of the batch", costs.full_moved, costs.less_moved),
    ]:
        table.add_row(what, _bytes(full), _bytes(less))
    if memory:
        table.add_row(f"largest batch in {memory:g} GB", f"{costs.full_batch:,}", f"{costs.less_batch:,}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"A step with this cache moves less than with the full one from {costs.break_even:,} tokens on.")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the kernels.")] = Path("less-kernels"),
    model: ModelOption = "",
    text: TextOption = [],
    dataset: DatasetOption = "",
    policy: PolicyOption = PolicyName.h2o,
    budget: Annotated[str, typer.Option(help="What each KV head keeps: tokens, or a share of the length.")] = "5%",
    length: LengthOption = 1024,
    sequences: Annotated[int, typer.Option(min=1, help="Windows to train on.")] = 512,
    validation: Annotated[int, typer.Option(min=1, help="Windows that choose the best epoch and judge the joint stage.")] = 32,
    family: FamilyOption = FamilyName.exponential,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each layer alone; 10 (paper: 40) unless given.")] = None,
    joint_steps: Annotated[int | None, typer.Option(min=0, help="Of all layers together; 150 (paper: 0) unless given.")] = None,
    table_steps: Annotated[int | None, typer.Option(min=0, help="The same under budget tables; 100 (paper: 0).")] = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Windows in a step.")] = 2,
    rank: RankOption = 8,
    hidden: HiddenOption = None,
    curves: Annotated[bool, typer.Option(help="Measure each KV head at each budget at the end, for budget tables.")] = True,
    disk: Annotated[float, typer.Option(min=0.0, help="Gigabytes that recordings may take: layers are recorded in turns.")] = 20,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace kernels that are in the folder already.")] = False,
):
    """Trains kernels for a model; figures and budget curves are saved with them.

    Each layer alone, as in the paper; then, unless --family paper, all together. Unfinished work lies in OUT/.training: called
    again with the same options, training goes on there. Under torchrun, processes share out the layers.
    """
    if (out / CONFIG).exists() and not overwrite:
        raise LessError(f"{out} holds a {CONFIG} already: choose another --out, or say --overwrite")
    if policy.value == "full":
        raise LessError("--policy full evicts nothing, so there is nothing to learn: choose another policy")
    if not POLICIES[policy.value].one_leaves:
        raise LessError(f"training needs a policy that evicts one token at a time, and {policy.value} does not: train with h2o")
    if not math.isfinite(disk):
        raise LessError(f"--disk is a number of gigabytes, not {disk}")
    rule = policy_named(policy.value, budget, length)
    if rule.budget > length - 2:
        raise LessError(f"a budget of {rule.budget} tokens evicts nothing from windows of {length}: choose a smaller one")
    texts = [_read(file) for file in text]
    device = _join_torchrun(device)
    network, tokenizer = _load(model, device, dtype)
    training, held_out = _training_windows(tokenizer, texts, dataset, length, sequences, validation, seed)
    make_folder(out)  # what cannot be written should be known before the training
    recipe = replace(_recipe(family, hidden), rank=rank, seed=seed, batch=batch)
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs, halve_every=recipe.halve_every and max(1, epochs // 4))
    if joint_steps is not None:
        recipe = replace(recipe, joint_steps=joint_steps)
    if table_steps is not None:
        recipe = replace(recipe, table_steps=table_steps)
    work, curves = out / ".training", curves and not rule.pooled
    learned = train_kernels(network, training, held_out, rule, recipe, work, disk * 1e9, curves)
    if learned is None:
        return
    learned.about |= {"model": model or "embedded", "text": _source(text, dataset, "train"), "versions": _versions()}
    learned.save_pretrained(out)
    shutil.rmtree(work)
    for index, figures in enumerate(learned.about["validation"]):
        print(f"layer {index}: error {figures['less'] / figures['bare']:.3f} of the bare policy's")
    for stage, how in (("joint", "uniform"), ("tables", "by head")):
        found = learned.about.get(stage, {"budgets": [], "before": [], "after": []})
        for tokens, before, after in zip(found["budgets"], found["before"], found["after"]):
            print(f"all layers, {tokens} tokens, {how}: divergence from the full cache {before:.3f} -> {after:.3f} nats")
    print(f"saved to {out}")


@app.command()
def allocate(
    kernels: Annotated[str, typer.Option("--kernels", help="Folder or hub name of the kernels.")],
    out: Annotated[Path | None, typer.Option(help="Folder for kernels and curves; where they are unless given.")] = None,
    model: ModelOption = "",
    text: TextOption = [],
    dataset: DatasetOption = "",
    policy: PolicyOption = PolicyName.h2o,
    by: Annotated[
        MeasureName, typer.Option("--by", help="kl: divergence of the predictions; error: change of the layer's output, cheaper.")
    ] = MeasureName.kl,
    length: LengthOption = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows that are measured.")] = CURVE_WINDOWS,
    refine: Annotated[
        str, typer.Option(help="Budgets whose tables are refined by trial, separated by commas; curves there are used again.")
    ] = "",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
):
    """Measures what each KV head costs at each budget under a policy, with kernels and without, and stores it with the kernels.

    Caches with these kernels and a policy of the kind then give each head the budget that does most, as many in all.
    """
    if kernels in ("", "none"):
        raise LessError("budget tables come with kernels: say which with --kernels")
    if out is None and not Path(kernels).is_dir():
        raise LessError(f"{kernels} is no folder, so say with --out where the kernels with their curves shall go")
    rule = POLICIES[policy.value]
    check_policy(rule)
    rules = [policy_named(policy.value, budget, length) for budget in refine.split(",") if budget]
    texts = [_read(file) for file in text]
    network, tokenizer = _load(model, device, dtype)
    learned = _load_kernels(network, model, kernels, seed)
    chosen, _ = _training_windows(tokenizer, texts, dataset, length, windows, 0, seed)
    make_folder(out or kernels)  # what cannot be written should be known before the measuring
    found = learned.curves.get(type(rule).__name__)
    if found is None or not rules:
        with tqdm(desc="curves", unit="budget") as progress:

            def tell(done, of):
                progress.total = of
                progress.update(done - progress.n)

            found = learned.curves[type(rule).__name__] = measure(network, chosen, rule, learned, by=by.value, progress=tell)
        learned.save_pretrained(out or kernels)
    heads = sum(len(layer) for layer in found.bare)
    for one in tqdm(rules, desc="refining", unit="budget", disable=not rules):
        for kind, rule, some in (("less", one, learned), ("bare", baseline_plus(network, one, learned), None)):
            if budgets := budget_table(found, rule.budget * heads, kind == "less"):
                better, _ = refine_table(network, chosen, Setting.of(sizes(network), less_layers(network), rule, some, budgets))
                found.refined.setdefault(kind, {})[str(rule.budget * heads)] = better
        learned.save_pretrained(out or kernels)
    for share in (2, 5, 10):
        tokens = length * share // 100
        if budgets := budget_table(found, tokens * heads, less=True):
            print(f"{tokens} tokens ({share} %), by layer: {budgets}")
    print(f"saved to {out or kernels}")


@app.command()
def import_official(
    folder: Annotated[Path, typer.Argument(help="Folder of layer_*.pth files, as the authors' train_kernels.py writes them.")],
    out: Annotated[Path, typer.Option(help="Folder for the kernels.")],
    overwrite: Annotated[bool, typer.Option(help="Replace kernels that are in the folder already.")] = False,
):
    """Turns the authors' checkpoints, for Llama or Falcon, into a folder of kernels."""
    if (out / CONFIG).exists() and not overwrite:
        raise LessError(f"{out} holds a {CONFIG} already: choose another --out, or say --overwrite")
    found = LessKernels.from_official(folder)
    found.save_pretrained(out)
    print(f"{len(found.layers)} layers of {found.sizes['query_heads']} query heads saved to {out}")


def _join_torchrun(device: str) -> str:
    """Joins the other processes where torchrun started several; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # one may wait long for the others' layers
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def _training_windows(tokenizer, texts, dataset, length, count, validation, seed):
    """Windows to train on and to validate on: of the texts or data set given, else of the standard library's own splits."""
    if dataset:
        texts = dataset_texts(dataset, 8 * length * (count + validation))
    if texts:
        both = cut_windows(tokenizer, texts, length, count + validation, seed)
        return both[:count], both[count:]
    return tuple(
        cut_windows(tokenizer, (content for _, content in corpus.documents(split)), length, many, seed)
        for split, many in (("train", count), ("validation", validation))
    )


def _source(text, dataset, split) -> str:
    return dataset or ", ".join(file.name for file in text) or f"standard library, {split} ({corpus.digest(split)})"


def _recipe(family: FamilyName, hidden: int | None) -> Recipe:
    """How the family is trained, with another hidden width where one is given."""
    recipe = RECIPES[family.value]
    return recipe if hidden is None else replace(recipe, hidden=hidden)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LessError(f"no such file: {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LessError(f"cannot read {file} as UTF-8 text: {error}") from None


def _device(device: str) -> torch.device:
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:
        raise LessError(f"no device {device!r} here: {_first_line(error)}") from None
    return place


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _load(model: str, device: str, dtype: Dtype):
    """The model, checked for NaN, and its tokenizer."""
    where = model or str(MODEL)
    place = _device(device)
    try:
        network = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype.value)).to(place).eval()
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # whatever transformers says of a file that is broken
        raise LessError(f"no usable model at {where}: {_first_line(error)}") from None
    check_model(network)
    broken = [name for name, weight in network.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise LessError(f"the model at {where} holds NaN or infinite weights ({broken[0]})")
    return network, tokenizer


def _load_shape(model: str, device: str, dtype: Dtype):
    """The model, or one of a named shape with random weights."""
    if model not in SHAPES:
        return _load(model, device, dtype)[0]
    with _device(device):
        return AutoModelForCausalLM.from_config(SHAPES[model], dtype=getattr(torch, dtype.value)).eval().requires_grad_(False)


def _named(kernels: str) -> str:
    """What to call them: the embedded ones by their family."""
    return {str(KERNELS): "exponential", str(PAPER_KERNELS): "paper"}.get(kernels, kernels)


def _load_kernels(network, model: str, kernels: str, seed: int) -> LessKernels | None:
    """The kernels that fit the model; None for the bare policy."""
    if kernels == "none" or (model and not kernels):
        return None
    if issubclass(FAMILIES.get(kernels, Features), Control) and not Path(kernels).exists():
        torch.manual_seed(seed)
        return LessKernels(**sizes(network), family=kernels).requires_grad_(False).to(network.device)
    learned = LessKernels.from_pretrained(kernels or KERNELS)
    check_kernels(network, learned)
    return learned.to(network.device)


def _report(record, rows, as_json: bool, print_table, picture: Path | None, draw, title: str):
    """Writes the picture, where one is wanted, aside and then under its name; prints the record or the table."""
    if picture:
        aside = picture.with_name(f".new.{picture.name}")
        draw(rows, aside, title)
        aside.rename(picture)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        print_table(record, rows)


def _check_plot(picture: Path):
    try:
        import matplotlib  # noqa: F401  asked for before anything is computed
    except ImportError:
        raise LessError("--plot needs matplotlib: pip install 'less-kv[plot]'") from None
    if picture.suffix.lower() != ".png" or not picture.absolute().parent.is_dir():
        raise LessError(f"--plot writes a .png file into an existing folder, not {picture}")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} bytes"


def _print_table(record, rows):
    table = Table(title=f"{record['model']} model, {record['windows']} windows of {record['length']} tokens, {record['text']}")
    for heading in ("cache", "policy"):
        table.add_column(heading)
    for heading in ("budget", "perplexity", "± s.e.", "gap recovered", "equal memory", "bytes/sequence", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.cache == "bare":
            table.add_section()
        table.add_row(
            {"less": f"LESS, {row.kernels}", "baseline+": "Baseline+"}.get(row.cache, row.cache),
            row.policy or "",
            "all" if row.budget is None else f"{row.budget}{', by head' * (row.budgets == 'by head')}",
            f"{row.perplexity:.2f}",
            f"{row.stderr:.2f}",
            "" if row.recovered is None else f"{row.recovered:.1%} ± {row.recovered_stderr:.1%}",
            "" if row.removed is None else f"{row.removed:.1%} ± {row.removed_stderr:.1%}",
            f"{row.bytes:,}",
            f"{row.tokens_per_second:,.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print("gap recovered: of the perplexity that the bare policy loses; equal memory: of the loss that Baseline+ still has")
    print(f"perplexity: {record['chunking']}; tokens/s: decoding in {record['dtype']} on {record['device']}, caches in turns")


def _print_bench(record, rows):
    table = Table(title=f"{record['model']} model, {record['length']} tokens, {record['policy']}, {record['dtype']}")
    for heading in ("", "cache"):
        table.add_column(heading)
    for heading in ("batch", "ms", "quartiles", "tokens/s", "speed", "bytes/sequence", "peak"):
        table.add_column(heading, justify="right")
    first = None
    for row in rows:
        if first is None or (row.what, row.batch) != (first.what, first.batch):
            first = row
            table.add_section()
        table.add_row(
            row.what if row is first else "",
            row.cache,
            str(row.batch),
            f"{row.seconds * 1e3:,.2f}",
            " to ".join(f"{x * 1e3:,.2f}" for x in row.quartiles),
            f"{row.tokens_per_second:,.0f}",
            f"{first.seconds / row.seconds:.2f}x",
            f"{row.bytes:,}",
            "" if row.peak is None else _bytes(row.peak),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"medians, on {record['device']}, {record['threads']} threads; speed: against the first line of each part")


def _versions():
    try:
        ours = version("less-kv")
    except PackageNotFoundError:  # run from a checkout: python -m less_fast
        ours = "not installed"
    return {
        "less-kv": ours,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main():
    """The entry point: what is wrong with the input is said in one sentence on stderr, with exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except BrokenPipeError:
        os._exit(0)  # the reader of our output has gone
    except (LessError, OSError, SafetensorError) as error:
        _refuse(str(error))
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        _refuse("there is not so much memory here: take a smaller budget, batch or length")


def _refuse(sentence: str):
    print("less-kv: " + " ".join(sentence.split()), file=sys.stderr)
    sys.exit(2)
