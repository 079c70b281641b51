"""How fast LESS is against what it has to beat, on a CPU: `python -m paper_checks.performance [PART ...]`.

Prints each ratio of medians beside its bar, and writes the raw figures to paper_checks/results/performance.json; the contenders
of a part take turns in one run, and parts that are not asked for stay there as they were. SPEED.md says what the figures
mean, and what was not worth it. All but the last four are measured if none is named: real models come from packages of their
own, and take longer to compile than all else. `--quick` runs them at a small size, with little compiled, to see that they run.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

from less_fast import H2O, Lambda, LayerKernels, LayerState, LessKernels, Retention
from less_fast.demo import KERNELS
from less_fast.files import write_text
from less_fast.hf.architecture import sizes
from less_fast.hf.shipped import kernels_for
from less_fast.layer.step import compiled, extend
from less_fast.loading import AUTO, load_model
from less_fast.measuring import versions
from less_fast.measuring.bench import Row, decode, in_turns, maker, peak_of, prefill, row
from less_fast.measuring.caches import fill

from . import script

MODES = ("", ", compiled")  # the second only where code is compiled
MODEL = dict(
    vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=32768,
)  # fmt: skip


@dataclass
class Bar:
    """A measured figure and what it should be."""

    what: str
    measured: float
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        return (self.least is None or self.measured >= self.least) and (self.most is None or self.measured <= self.most)

    def __str__(self) -> str:
        limit = f"at least {self.least:g}" if self.most is None else f"at most {self.most:g}"
        return f"| {self.what} | {self.measured:.2f}{'' if self.holds else ' (does not hold)'} | {limit} |"


def layer_of(heads: int, hidden: int | None = None):
    """Sizes of a layer with heads of 64, or kernels for it."""
    shape = dict(query_heads=heads, kv_heads=heads, head_dim=64)
    return LayerKernels(**shape, hidden=hidden).requires_grad_(False) if hidden else shape


def half_and_half(budget: int) -> H2O:
    return H2O(1, 1).with_budget(budget)


def seconds_of(rows: list[Row]) -> dict[str, float]:
    return {row.cache: row.seconds for row in rows}


@torch.inference_mode()
def attention_steps(layer: dict, contenders: dict[str, tuple], batch: int, length: int, rounds: int, compile: bool) -> list[Row]:
    """One token through one attention layer: full attention over `length` tokens beside each of the contenders.

    layer: query_heads, kv_heads and head_dim; contenders: by name a policy (one, or one for each KV head) and kernels or None.
    """
    D = layer["head_dim"]
    keys, values = torch.randn(2, batch, layer["kv_heads"], length, D)  # (N, Hkv, T, D)
    q, k, v = (torch.randn(batch, layer[heads], 1, D) for heads in ("query_heads", "kv_heads", "kv_heads"))  # (N, H, 1, D)
    steps = {"full": partial(scaled_dot_product_attention, q, keys, values, enable_gqa=True)}
    size = {"full": keys.nbytes + values.nbytes}
    for name, (policy, kernels) in contenders.items():
        state = LayerState.allocate(policy, batch, **layer, kernels=kernels)
        fill(state, length)
        size[name] = size[f"{name}, compiled"] = sum(state.memory().values())
        steps[name] = partial(extend, state, q, k, v)
        if compile:
            steps[f"{name}, compiled"] = partial(compiled(state, q), state, q, k, v)
    spent = in_turns(steps, rounds, q.device)
    return [row("attention step", name, batch, length, seconds, size[name] // batch) for name, seconds in spent.items()]


def attention_step(length: int, rounds: int, compile: bool):
    """One token, 8 sequences, 8 heads, a budget of 5 %."""
    policy = half_and_half(length // 20)
    contenders = {"bare": (policy, None), "paper": (policy, layer_of(8, 512)), "narrow": (policy, layer_of(8, 64))}
    rows = attention_steps(layer_of(8), contenders, 8, length, rounds, compile)
    took = seconds_of(rows)
    for mode in MODES[: 1 + compile]:
        yield Bar(f"attention step, full / LESS (the paper's kernels){mode}", took["full"] / took["paper" + mode], least=10)
        yield Bar(f"attention step, full / LESS (hidden 64){mode}", took["full"] / took["narrow" + mode], least=20)
    yield rows


def unequal_budgets(length: int, rounds: int, compile: bool):
    """32 heads that keep 5 % each, against one head that keeps a third of all that and 31 that share the rest."""
    total = 32 * (length // 20)
    rest = (total - total // 3) // 31
    tables = {"uniform": [length // 20] * 32, "unequal": [total - 31 * rest] + [rest] * 31}
    kernels = layer_of(32, 512)
    contenders = {name: (tuple(map(half_and_half, table)), kernels) for name, table in tables.items()}
    rows = attention_steps(layer_of(32), contenders, 8, length, rounds, compile)
    took, held = seconds_of(rows), {row.cache: row.bytes for row in rows}
    for mode in MODES[: 1 + compile]:
        yield Bar(f"attention step, unequal / uniform budgets{mode}", took["unequal" + mode] / took["uniform" + mode], most=1.3)
    yield Bar("bytes held, unequal / uniform budgets", held["unequal"] / held["uniform"], most=1.1)
    yield rows


def retention_step(rounds: int, compile: bool):
    """One token through a layer of the embedded model with its kernels, 51 tokens kept: the policy that asks rho, against H2O."""
    kernels, raw = LessKernels.from_pretrained(KERNELS).layers[0], []
    contenders = {"H2O": (half_and_half(51), kernels), "Retention": (Retention(32, 4).with_budget(51), kernels)}
    for batch in (1, 8):
        rows = attention_steps(layer_of(4), contenders, batch, 1024, rounds, compile)
        took = seconds_of(rows)
        for mode in MODES[: 1 + compile]:
            what = f"attention step with LESS, 4 heads, batch {batch}, Retention / H2O{mode}"
            yield Bar(what, took["Retention" + mode] / took["H2O" + mode], most=1)
        raw += rows
    yield raw


def end_to_end(length: int, rounds: int, compile: bool):
    """A Llama of 6 layers and hidden size 512 decodes 8 sequences with a budget of 5 %."""
    model, kernels = model_and_kernels()
    narrow = LessKernels(**sizes(model), hidden=64).requires_grad_(False)
    learned = {"bare": None, "LESS (the paper's kernels)": kernels, "LESS (hidden 64)": narrow}
    contenders = {name: maker(model, half_and_half(length // 20), own) for name, own in learned.items()}
    rows = decode(model, contenders, 8, length, rounds, compile)
    took = seconds_of(rows)
    for name in [name for name in took if name.startswith("LESS")]:
        yield Bar(f"decoding, StaticCache / {name}", took["StaticCache"] / took[name], least=3)
        yield Bar(f"decoding, DynamicCache / {name}", took["DynamicCache"] / took[name], least=12)
    yield rows


def by_head(lengths: tuple[int, ...], rounds: int, compile: bool):
    """The embedded model with its kernels: budgets by head, from their table, against uniform ones and against the full cache."""
    model, _ = load_model("")
    kernels, raw = LessKernels.from_pretrained(KERNELS), []
    for length, least in zip(lengths, (1.3, 3.0)):
        less = partial(maker, model, half_and_half(length // 20), kernels)
        for batch in (1, 8):
            contenders = {"LESS": less(budgets="uniform"), "LESS by head": less()}
            rows = decode(model, contenders, batch, length, rounds, compile)
            took = seconds_of(rows)
            what = f"decoding, embedded model, {length} tokens, batch {batch}"
            for mode in ("", ", step compiled")[: 1 + compile]:
                yield Bar(f"{what}, by head / uniform{mode}", took["LESS by head" + mode] / took["LESS" + mode], most=1.1)
            if batch == 8 and compile:
                ratio = took["StaticCache, compiled"] / took["LESS by head, step compiled"]
                yield Bar(f"{what}, StaticCache, compiled / LESS by head, step compiled", ratio, least=least)
            raw += rows
    yield raw


def real_model(length: int, least: float, rounds: int):
    """SmolLM2 decodes 4 sequences with its kernels and a budget of 5 %, by head; beside it what this machine can do at most."""
    model, _ = load_model("smollm2")
    kernels = kernels_for(model)
    contenders = {"LESS by head": maker(model, half_and_half(length // 20), kernels)}
    rows = decode(model, contenders, 4, length, rounds, compile=True)
    took, what = seconds_of(rows), f"decoding, SmolLM2, {length} tokens, batch 4"
    for mode, static in {"": "", ", step compiled": ", compiled", ", compiled": ", compiled"}.items():
        ratio = took[f"StaticCache{static}"] / took[f"LESS by head{mode}"]
        yield Bar(f"{what}, StaticCache{static} / LESS by head{mode}", ratio, least=least)
    least_seconds = limit(rows[-1], model, kernels, *machine())
    yield Bar(f"{what}, LESS by head, compiled / its limit", rows[-1].seconds / least_seconds, most=1.3)
    yield [*rows, {"what": "limit", "length": length, "seconds": least_seconds}]


def coder(batches: tuple[int, ...], lengths: tuple[int, ...], whole: set[tuple[int, int]], rounds: int):
    """Qwen2.5-Coder-1.5B decodes with its kernels and a budget of 5 %: by head, exact and in eight bits, and beside that uniform
    budgets and H2O. whole: the batches and lengths at which compiled code is measured, too."""
    model, _ = load_model("qwen2.5-coder-1.5b", dtype=AUTO)
    kernels, raw, most = kernels_for(model), [], machine(model.dtype)
    asked = {(1, 1024): (0.95, None), (8, 4096): (1.5, 1.2), (8, 16384): (3, 2)}
    for batch, length in product(batches, lengths):
        by_head = partial(maker, model, Retention(32, 4).with_budget(length // 20), kernels)
        contenders = {
            "by head": by_head(),
            "int8 by head": by_head(int8=True),
            "uniform": by_head(budgets="uniform"),
            "H2O uniform": maker(model, half_and_half(length // 20), kernels, budgets="uniform"),
        }
        rows = decode(model, contenders, batch, length, rounds, compile=(batch, length) in whole)
        took, held, what = seconds_of(rows), {row.cache: row.bytes for row in rows}, f"Qwen, {batch} x {length}"
        own = min((row for row in rows if row.cache.startswith("by head")), key=lambda row: row.seconds)
        static = min(seconds for name, seconds in took.items() if name.startswith("StaticCache"))
        dynamic_least, static_least = asked.get((batch, length), (None, None))
        if dynamic_least:
            yield Bar(f"{what}, DynamicCache / the quickest by head", took["DynamicCache"] / own.seconds, least=dynamic_least)
        if static_least:
            yield Bar(f"{what}, the quicker StaticCache / the quickest by head", static / own.seconds, least=static_least)
        for mode in [mode for mode in ("", ", step compiled", ", compiled") if f"by head{mode}" in took]:
            yield Bar(f"{what}, by head / uniform{mode}", took[f"by head{mode}"] / took[f"uniform{mode}"], most=1.1)
            yield Bar(f"{what}, Retention / H2O{mode}", took[f"uniform{mode}"] / took[f"H2O uniform{mode}"], most=1.15)
        least = limit(own, model, kernels, *most)
        if batch == 8:
            yield Bar(f"{what}, the quickest by head / its limit", own.seconds / least, most=1.5)
        if length == 16384:
            yield Bar(f"{what}, bytes of DynamicCache / by head", held["DynamicCache"] / held["by head"], least=15)
        raw += [*rows, {"what": "limit", "batch": batch, "length": length, "seconds": least}]
    yield raw


def coder_prompts(length: int, longest: int, rounds: int):
    """The same model reads a prompt, and one so long that its memory tells."""
    model, _ = load_model("qwen2.5-coder-1.5b", dtype=AUTO)
    kernels, policies = kernels_for(model), (half_and_half(length // 20), Retention(32, 4).with_budget(length // 20))
    contenders = {type(policy).__name__: maker(model, policy, kernels) for policy in policies}
    rows = prefill(model, contenders, 1, length, rounds)
    took = seconds_of(rows)
    for name in contenders:
        yield Bar(f"prompt, Qwen, {length} tokens, {name} / DynamicCache", took[name] / took["DynamicCache"], most=1.1)
    cache, ids = contenders["Retention"](), torch.randint(model.config.vocab_size, (1, longest))
    with torch.inference_mode():
        start = time.perf_counter()
        peak = peak_of(lambda: model(input_ids=ids, past_key_values=cache, logits_to_keep=1), model.device)
        seconds = [time.perf_counter() - start]
    yield Bar(f"prompt, Qwen, {longest} tokens, Retention, peak beside the weights, GB", peak / 1e9, most=4)
    yield [*rows, row("prefill", "Retention", 1, longest, seconds, sum(cache.memory().values()), longest, peak)]


def machine(dtype: torch.dtype = torch.float32, size: int = 4096) -> tuple[float, float]:
    """What this machine can do at most in a second: bytes moved, by a copy, and multiplications with additions, by a product of
    matrices (size x size); the best of five rounds."""
    one, other, out = torch.ones(3, size, size, dtype=dtype)
    steps = {"copy": partial(out.copy_, one), "product": partial(torch.mm, one, other, out=out)}
    best = {name: min(seconds) for name, seconds in in_turns(steps, 5, one.device, burst=1).items()}
    return 2 * one.nbytes / best["copy"], size**3 / best["product"]


def limit(row: Row, model, kernels: LessKernels, moved: float, computed: float) -> float:
    """Seconds of a decoding step at least: weights, kernels and what is held move once, each weight is multiplied once for every
    sequence."""
    table = model.get_input_embeddings().weight
    looked_up = 0 if model.get_output_embeddings().weight is table else table.numel()
    weights = sum(weight.numel() for weight in model.parameters()) - looked_up
    return max(
        (weights * model.dtype.itemsize + kernels.memory() + row.batch * row.bytes) / moved, weights * row.batch / computed
    )


def prompts(length: int, rounds: int):
    """The same model reads a prompt, and one of four times the length."""
    model, kernels = model_and_kernels()

    def contenders(budget: int, **options):
        policy = half_and_half(budget)
        return {"bare": maker(model, policy, **options), "LESS": maker(model, policy, kernels, **options)}

    rows = prefill(model, contenders(length // 20), 1, length, rounds)
    longer = prefill(model, contenders(length // 5), 1, 4 * length, 1)
    took = seconds_of(rows)
    for name in ("bare", "LESS"):
        yield Bar(f"prefill, {name} H2O / DynamicCache", took[name] / took["DynamicCache"], most=1.25)
    others = []
    for policy in (Lambda(4, length // 20 - 4), Retention(32, 4).with_budget(length // 20)):
        learned = model_and_kernels(rho=32)[1].without_state() if policy.needs == "rho" else None
        others += prefill(model, {"bare": maker(model, policy, learned)}, 1, length, rounds)
        full, own = others[-2:]
        yield Bar(f"prefill, bare {type(policy).__name__} / DynamicCache", own.seconds / full.seconds, most=1.05)
    others += attention_prompt(length, half_and_half(length // 20), rounds)
    yield Bar("prefill, attention of a layer, H2O / SDPA", others[-1].seconds / others[-2].seconds, most=1.25)
    chunked = prefill(model, contenders(length // 20, chunk=max(2, length // 8)), 1, length, rounds)
    with busy():
        beside = prefill(model, contenders(length // 20), 1, length, rounds)
    took = seconds_of(beside)
    for name in ("bare", "LESS"):
        yield Bar(f"prefill beside another process, {name} H2O / DynamicCache", took[name] / took["DynamicCache"], most=1.6)
    for what, some in {"prefill in eight chunks": chunked, "prefill beside another process": beside}.items():
        others += [replace(one, what=what) for one in some]
    yield rows + longer + others


def attention_prompt(length: int, policy: H2O, rounds: int) -> list[Row]:
    """One attention layer of that model reads a prompt: causal attention alone, and under a policy."""
    qkv = torch.randn(3, 1, 8, length, 64)
    full = partial(scaled_dot_product_attention, *qkv, is_causal=True)

    def read() -> LayerState:
        state = LayerState.allocate(policy, 1, **layer_of(8))
        extend(state, *qkv)
        return state

    size = {"full": qkv[1:].nbytes, "bare": sum(read().memory().values())}
    spent = in_turns({"full": full, "bare": read}, rounds, qkv.device, burst=1)
    return [row("attention prompt", name, 1, length, seconds, size[name], length) for name, seconds in spent.items()]


@contextmanager
def busy() -> Iterator[None]:
    """Meanwhile another process multiplies matrices on all cores."""
    code = "import torch\nx = torch.randn(1000, 1000)\nprint(flush=True)\nwhile True: x @ x"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()  # it has begun
        yield
    finally:
        other.kill()
        other.wait()


def stream(tokens: int):
    """One layer takes tokens one by one: does it slow down, does it grow?"""
    policy, kernels = half_and_half(409), layer_of(8, 512)
    state = LayerState.allocate(policy, 1, **layer_of(8), kernels=kernels)
    fill(state, 410)
    token, parts = [torch.randn(1, 8, 1, 64) for _ in "qkv"], []
    step = compiled(state, token[0])
    held = sum(state.memory().values())
    for _ in range(10):
        spent = []
        for _token in range(tokens // 10):
            start = time.perf_counter()
            step(state, *token)
            spent.append(time.perf_counter() - start)
        parts.append(median(spent))
    assert state.n.item() == 410 + tokens // 10 * 10
    yield Bar(f"{tokens:,} tokens through a layer, time per token of the last tenth / the first", parts[-1] / parts[0], most=1.1)
    yield Bar("bytes held afterwards / before", sum(state.memory().values()) / held, least=1, most=1)
    yield [{"what": "stream", "tokens": tokens, "seconds": parts}]


def model_and_kernels(rho: int | None = None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL)).eval().requires_grad_(False)
    return model, LessKernels(**sizes(model), rho=rho).requires_grad_(False)


def parts(quick: bool) -> dict[str, Iterator]:
    """What is measured, by name: each gives bars, and in the end its raw figures."""
    return {
        "attention": attention_step(640 if quick else 8192, 2 if quick else 30, not quick),
        "unequal": unequal_budgets(640 if quick else 8192, 2 if quick else 15, not quick),
        "retention": retention_step(2 if quick else 30, not quick),
        "decoding": end_to_end(128 if quick else 4096, 1 if quick else 6, not quick),
        "by-head": by_head((256,) if quick else (1024, 4096), 1 if quick else 15, not quick),
        "prompts": prompts(128 if quick else 4096, 1 if quick else 7),
        "stream": stream(200 if quick else 1_000_000),
        "smollm2": real_model(4096, 1.6, 2),
        "smollm2-long": real_model(8192, 2.5, 2),
        "coder": coder((1, 4, 8), (1024, 4096, 16384), {(1, 1024), (8, 4096)}, 1),
        "coder-prompts": coder_prompts(4096, 32768, 3),
    }


def main():
    parser = script.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, little compiled, nothing written")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts(True)))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    every = parts(chosen.quick)
    if strange := set(chosen.parts) - set(every):
        parser.error(f"no part is called {', '.join(sorted(strange))}: choose of {', '.join(every)}")
    print("| | measured | bar |\n|---|---|---|")
    for name in chosen.parts or [*every][:-4]:
        *bars, raw = every[name]
        print(*bars, sep="\n", flush=True)
        if not chosen.quick:  # whoever stops it keeps what was measured
            write(name, bars, [row if isinstance(row, dict) else asdict(row) for row in raw])


def write(name: str, bars: list[Bar], rows: list[dict]) -> None:
    out = script.RESULTS / "performance.json"
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    about = {"hardware": script.hardware(), "threads": torch.get_num_threads(), "versions": versions()}
    record[name] = about | {"bars": [asdict(bar) | {"holds": bar.holds} for bar in bars], "rows": rows}
    write_text(out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
