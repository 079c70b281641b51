"""How fast LESS is against what it has to beat, on a CPU: `python -m paper_checks.performance [PART ...]`.

Prints each ratio of medians beside its bar, and writes the raw figures to paper_checks/results/performance.json; the contenders
of a part take turns in one run, and parts that are not asked for stay there as they were. SPEED.md says what the figures
mean, and what was not worth it. Those of the embedded model are measured if none is named: real models come from packages of
their own, and take longer. `--quick` runs them at a small size, nothing compiled, to see that they run.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import torch

from less_fast import H2O, LessKernels, Retention
from less_fast.files import write_text
from less_fast.hf.shipped import kernels_for
from less_fast.loading import AUTO, load_model
from less_fast.measuring import versions
from less_fast.measuring.bench import Row, decode, in_turns, maker, peak_of, prefill
from less_fast.measuring.caches import held_bytes

from . import script

MODES = ("", ", step compiled", ", compiled")


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


def subject(name: str):
    """A model as it is used, in bfloat16 if its weights are, with its kernels."""
    model, _ = load_model(name, dtype=AUTO)
    return model, kernels_for(model)


def seconds_of(rows: list[Row]) -> dict[str, float]:
    return {row.cache: row.seconds for row in rows}


def half_and_half(budget: int) -> H2O:
    return H2O(1, 1).with_budget(budget)


def decoding(name: str, batches: tuple[int, ...], lengths: tuple[int, ...], also_compiled: set, asked: dict, rounds: int):
    """A model decodes with its kernels and a budget of 5 %: by head, exact and in eight bits; with uniform budgets, and H2O's.

    also_compiled: the batches and lengths at which compiled code is measured, too; asked: how many times as long DynamicCache and
    the quickest StaticCache are to take there, at least.
    """
    model, kernels = subject(name)
    raw, speeds = [], machine(model.dtype)
    for batch, length in product(batches, lengths):
        less = partial(maker, model, Retention(32, 4).with_budget(length // 20), kernels)
        contenders = {
            "by head": less(),
            "int8 by head": less(int8=True),
            "uniform": less(budgets="uniform"),
            "H2O uniform": maker(model, half_and_half(length // 20), kernels, budgets="uniform"),
        }
        rows = decode(model, contenders, batch, length, rounds, compile=(batch, length) in also_compiled)
        took, held, what = seconds_of(rows), {row.cache: row.bytes for row in rows}, f"{name or 'embedded'}, {batch} x {length}"
        own = min((row for row in rows if row.cache.startswith("by head")), key=lambda row: row.seconds)
        for rival, least in zip(("DynamicCache", "StaticCache"), asked.get((batch, length), ())):
            quickest = min(seconds for cache, seconds in took.items() if cache.startswith(rival))
            yield Bar(f"{what}, the quickest {rival} / the quickest by head", quickest / own.seconds, least=least)
        for mode in [mode for mode in MODES if f"by head{mode}" in took]:
            yield Bar(f"{what}, by head / uniform{mode}", took[f"by head{mode}"] / took[f"uniform{mode}"], most=1.1)
            yield Bar(f"{what}, Retention / H2O{mode}", took[f"uniform{mode}"] / took[f"H2O uniform{mode}"], most=1.15)
        least_seconds = limit(own, model, kernels, *speeds)
        if batch > 1:
            yield Bar(f"{what}, the quickest by head / its limit", own.seconds / least_seconds, most=1.5)
        if length == max(lengths):
            yield Bar(f"{what}, bytes of DynamicCache / by head", held["DynamicCache"] / held["by head"], least=15)
        raw += [*rows, {"what": "decode", "cache": "limit", "batch": batch, "length": length, "seconds": least_seconds}]
    yield raw


def prompts(name: str, length: int, longest: int, most: float, gigabytes: float, rounds: int):
    """A model reads a prompt with its kernels and a budget of 5 %, and one so long that its memory tells. most: how many times as
    long as DynamicCache it may take; gigabytes: what the long one may take beside the weights."""
    model, kernels = subject(name)
    policies = (half_and_half(length // 20), Retention(32, 4).with_budget(length // 20))
    contenders = {type(policy).__name__: maker(model, policy, kernels) for policy in policies}
    rows, what = prefill(model, contenders, 1, length, rounds), f"prompt, {name or 'embedded'}"
    took = seconds_of(rows)
    for policy in contenders:
        yield Bar(f"{what}, {length} tokens, {policy} / DynamicCache", took[policy] / took["DynamicCache"], most=most)
    cache, ids = maker(model, policies[1].with_budget(longest // 20), kernels)(), torch.randint(1000, (1, longest))
    with torch.inference_mode():
        peak = peak_of(lambda: model(input_ids=ids, past_key_values=cache, logits_to_keep=1), model.device)
    if peak is not None:
        yield Bar(f"{what}, {longest} tokens, peak beside the weights, GB", peak / 1e9, most=gigabytes)
    yield [*rows, {"what": "peak", "length": longest, "bytes": held_bytes(cache), "peak": peak}]


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


def parts(quick: bool) -> dict[str, Iterator]:
    """What is measured, by name: each gives bars, and in the end its raw figures."""
    if quick:
        return {
            "embedded": decoding("", (1,), (256,), set(), {(1, 256): (1.3, 1)}, 1),
            "embedded-prompts": prompts("", 128, 256, 1.25, 1, 1),
        }
    small = (1, 8), (1024, 4096)
    return {
        "embedded": decoding("", *small, {*product(*small)}, {(8, 1024): (3, 1.3), (8, 4096): (12, 3)}, 10),
        "embedded-prompts": prompts("", 4096, 16384, 1.25, 1, 5),
        "smollm2": decoding("smollm2", (4,), (4096, 8192), {(4, 4096)}, {(4, 4096): (1.6, 1.6), (4, 8192): (2.5, 2.5)}, 2),
        "coder": decoding(
            "qwen2.5-coder-1.5b", (1, 4, 8), (1024, 4096, 16384), {(1, 1024), (8, 4096)},
            {(1, 1024): (0.95,), (8, 4096): (1.5, 1.2), (8, 16384): (3, 2)}, 2,
        ),
        "coder-prompts": prompts("qwen2.5-coder-1.5b", 4096, 32768, 1.1, 4, 2),
    }  # fmt: skip


def main():
    parser = script.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts(False)))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    every = parts(chosen.quick)
    if strange := set(chosen.parts) - set(every):
        parser.error(f"no part is called {', '.join(sorted(strange))}: choose of {', '.join(every)}")
    for name in chosen.parts or [name for name in every if name.startswith("embedded")]:
        *bars, raw = every[name]
        print("| | measured | bar |", "|---|---|---|", *bars, sep="\n")
        rows = [row if isinstance(row, dict) else asdict(row) for row in raw]
        print(f"\n{table(rows)}\n", flush=True)
        if not chosen.quick:  # whoever stops it keeps what was measured
            write(name, bars, rows)


def table(rows: list[dict]) -> str:
    """Milliseconds: a line for each cache, a column for each batch and length."""
    found = {(row["cache"], f"{row['batch']} x {row['length']:,}"): row["seconds"] for row in rows if "seconds" in row}
    caches, columns = (list(dict.fromkeys(names)) for names in zip(*found))
    lines = [[cache, *(f"{found[cache, at] * 1e3:,.2f}" if (cache, at) in found else "" for at in columns)] for cache in caches]
    return script.markdown(["ms", *columns], lines)


def write(name: str, bars: list[Bar], rows: list[dict]) -> None:
    out = script.RESULTS / "performance.json"
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    about = {"hardware": script.hardware(), "threads": torch.get_num_threads(), "versions": versions()}
    record[name] = about | {"bars": [asdict(bar) | {"holds": bar.holds} for bar in bars], "rows": rows}
    write_text(out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
