"""LESS beside its peers: the caches of transformers, and NVIDIA's kvpress, on the same weights, tokens and threads.

    python -m venv peers && peers/bin/pip install torch==TORCH kvpress==0.5.5 hqq==0.2.8.post1    # as here: .ci/constraints.txt
    python -m paper_checks.peers --environment peers --out paper_checks/results/peers.json
    python -m paper_checks.peers --quick        # a small size with nothing compiled, to see that it runs

kvpress asks for an older transformers than LESS, so it has an environment of its own, with the same Python and torch;
QuantizedCache, whose backend is not among our requirements, is measured there as well. Without one our side alone is measured.
Each side is a process; both read the same file of tokens, and their caches take turns, one pass of one side, one of the other.

A pass: the first 512 tokens of each window of held-out text are the prompt, --steps more are decoded, the true token fed each
time.
Quality: nats of the decoded tokens. Speed: tokens over the seconds that the model took for all of them, the median of the rounds.

Equal tokens: the largest number that a KV head holds between steps. DecodingPress compresses to `target_size` every
`compression_interval` steps, so that it grows to target + interval - 1: its target is chosen for that to be the budget. It does
not touch the prompt; PrefillDecodingPress compresses that to the same target, with the same press. At the default interval
nothing can be held so small: there the target is the budget, and the row is not one of equal tokens.

Refused rather than reported: sides that differ in tokens, weights, threads or torch, full caches that differ in perplexity, a
cache that held more than its budget, code compiled while the clock ran.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

AGREE = {"float32": 1e-3, "bfloat16": 0.05}  # by how much perplexities of full caches may differ
WARM_UP = 12  # steps before the clock runs, in which code is compiled
VARIANTS = 64  # compiled variants of one piece of code that torch may hold: one for each contender and batch
SPECIAL = 10  # the interval in the example of kvpress's documentation
OURS, THEIRS = "LESS", "kvpress"  # the two sides
FULL = "DynamicCache"


class Refused(Exception):
    """What would have been measured wrong; says why, and what to do."""


@dataclass(frozen=True)
class Setup:
    """What is measured: prompts of so many tokens and steps behind them, under a budget, in batches, so many times each. Of the
    caches all, or those with one of the words `only` in their name; DynamicCache always."""

    prompt: int
    steps: int
    budget: int
    batches: tuple[int, ...]
    rounds: int
    threads: int
    compile: bool
    only: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of a window: the last is only predicted."""
        return self.prompt + self.steps + 1

    def wants(self, cache: str) -> bool:
        return not self.only or cache == FULL or any(word in cache for word in self.only)


@dataclass
class Pass:
    """One use of an empty cache: `model` reads the prompt, `step` takes the tokens. within: holds while they do so; beside: what
    else holds tensors for the cache; positions: whether they are told, because the cache has lost count."""

    model: Callable
    step: Callable
    cache: Any
    within: Callable[[], AbstractContextManager] = nullcontext
    beside: Any = None
    positions: bool = False


@dataclass
class Contender:
    """A cache that is measured. budget: tokens that it may hold, None: all; equal: whether it must keep to that."""

    cache: str
    make: Callable[[], Pass] = field(repr=False)
    budget: int | None = None
    target: int | None = None
    interval: int | None = None
    equal: bool = True

    def about(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "make"}


@torch.inference_mode()
def decode(run: Pass, windows: torch.Tensor, prompt: int, steps: int) -> dict[str, Any]:
    """Reads the prompts of windows (N, T), then feeds `steps` tokens one by one.

    nats: mean of each window's predicted tokens; seconds: of all steps; held: tokens that a KV head holds between steps, at most;
    bytes: at most, for each sequence.
    """
    nats, held, size, seconds = [], 0.0, 0, 0.0

    def told(start, end):
        return {"position_ids": torch.arange(start, end)[None]} if run.positions else {}

    with run.within():
        run.model(input_ids=windows[:, :prompt], past_key_values=run.cache, use_cache=True, logits_to_keep=1, **told(0, prompt))
        for index in range(prompt, prompt + steps):
            token, where = windows[:, index : index + 1], told(index, index + 1)
            start = time.perf_counter()
            logits = run.step(input_ids=token, past_key_values=run.cache, use_cache=True, **where).logits
            seconds += time.perf_counter() - start
            nats.append(cross_entropy(logits[:, -1].float(), windows[:, index + 1], reduction="none").double())
            held = max(held, held_tokens(run.cache))
            size = max(size, held_bytes(run.cache) + held_bytes(run.beside))
    per_window = torch.stack(nats).mean(0)  # (N,)
    if not per_window.isfinite().all():
        raise Refused("the predictions are not finite")
    return {"nats": per_window.tolist(), "seconds": seconds, "held": held, "bytes": size // len(windows)}


def held_tokens(cache: Any) -> float:
    """Tokens that a KV head holds: the largest number over the layers; of a LessCache the mean over all its heads."""
    if hasattr(cache, "less_layers"):
        states = [layer.state for layer in cache.less_layers]
        entries = sum((group.slots.positions() >= 0).sum().item() for state in states for group in state.parts)
        return entries / sum(state.kv_heads * len(state.n) for state in states)
    return max(int(layer.get_seq_length()) for layer in cache.layers)


def held_bytes(holder: Any) -> int:
    """Bytes of all tensors that a cache, or what stands beside it, holds."""
    if hasattr(holder, "less_layers"):
        return sum(holder.memory().values())
    parts = [vars(layer) for layer in holder.layers] if hasattr(holder, "layers") else getattr(holder, "__dict__", {})
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(parts)}.values())


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Every tensor in these dicts, lists and tuples."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def load(folder: str, dtype: torch.dtype) -> Any:
    """The model of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(tensors: Iterable[torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def our_contenders(model: Any, folder: str, setup: Setup) -> Iterator[Contender]:
    """The caches of transformers, then bare policies and LESS."""
    from transformers import DynamicCache, StaticCache

    from less_fast import LessCache
    from less_fast.hf.shipped import kernels_for
    from less_fast.setting import POLICIES

    def static():
        return Pass(model, whole, StaticCache(config=model.config, max_cache_len=setup.length))

    def less(policy, learned=None, table=None, step=False, network=None):
        cache = LessCache.for_model(ours, policy, learned, table or "uniform", compile=step)
        return Pass(ours, ours if network is None else network, cache)

    whole = torch.compile(model, fullgraph=True, dynamic=False)
    yield Contender(FULL, lambda: Pass(model, model, DynamicCache(config=model.config)))
    if setup.compile:
        yield Contender("StaticCache, compiled", static)
    ours = load(folder, model.dtype)
    kernels = kernels_for(ours)
    if kernels is None:
        raise Refused("there are no kernels in the package for this model: choose one that has some")
    ours_whole = torch.compile(ours, fullgraph=True, dynamic=False)
    policies = {name: POLICIES[name].with_budget(setup.budget) for name in ("h2o", "retention", "tova", "lambda")}
    tables = {name: kernels.budgets_for(policies[name]) for name in ("h2o", "retention")}
    kinds: dict[str, tuple] = {
        "TOVA": (policies["tova"],),
        "Lambda": (policies["lambda"],),
        "H2O": (policies["h2o"],),
        "H2O with LESS": (policies["h2o"], kernels),
        "H2O with LESS, by head": (policies["h2o"], kernels, tables["h2o"]),
        "Retention with LESS": (policies["retention"], kernels),
        "Retention with LESS, by head": (policies["retention"], kernels, tables["retention"]),
    }
    for name, kind in kinds.items():
        if name.endswith("by head") and kind[-1] is None:  # Qwen's kernels have a table for Retention alone
            continue
        make = partial(less, *kind)
        yield Contender(name, make, setup.budget)
        if name in ("H2O with LESS", "Retention with LESS, by head") and setup.compile:
            yield Contender(f"{name}, step compiled", partial(make, step=True), setup.budget)
            yield Contender(f"{name}, compiled", partial(make, network=ours_whole), setup.budget)


def their_contenders(model: Any, folder: str, setup: Setup) -> Iterator[Contender]:
    """In kvpress's environment: the full cache once more, the quantized one, and the presses."""
    import kvpress
    from transformers import DynamicCache, QuantizedCache

    def quantized():
        cache = QuantizedCache("hqq", model.config, nbits=4, axis_key=1, axis_value=1)  # the axes that transformers advises
        return Pass(model, model, cache)

    def press(base, target, interval):
        before = base()
        before.compression_ratio = 1 - (target + 0.5) / setup.prompt  # it keeps the whole part of what this leaves
        after = kvpress.DecodingPress(base(), compression_interval=interval, target_size=target)
        pressing = kvpress.PrefillDecodingPress(before, after)
        cache = DynamicCache(config=model.config)
        return Pass(model, model, cache, lambda: pressing(model), pressing.decoding_press, positions=True)

    def snapkv():
        return kvpress.SnapKVPress(window_size=SPECIAL - 2)  # it wants more states than that in its buffer

    yield Contender(FULL, lambda: Pass(model, model, DynamicCache(config=model.config)))
    yield Contender("QuantizedCache, hqq, 4 bits", quantized)
    default = kvpress.DecodingPress(kvpress.KnormPress()).compression_interval
    bases = {one.__name__: one for one in (kvpress.KnormPress, kvpress.TOVAPress, kvpress.StreamingLLMPress)}
    wanted = [(name, base, interval) for interval in (1, SPECIAL) for name, base in bases.items()]
    wanted += [(f"SnapKVPress, window {SPECIAL - 2}", snapkv, SPECIAL), ("TOVAPress", kvpress.TOVAPress, default)]
    for name, base, interval in wanted:
        equal = interval != default
        target = setup.budget - interval + 1 if equal else setup.budget
        yield Contender(name, partial(press, base, target, interval), setup.budget, target, interval, equal)


SIDES: dict[str, tuple[Callable[..., Iterator[Contender]], tuple[str, ...]]] = {
    OURS: (our_contenders, ()),
    THEIRS: (their_contenders, ("kvpress", "hqq")),
}
"""The contenders of each side, and the libraries whose version it tells."""


def serve(name: str, options: dict[str, Any]) -> None:
    """The process of one side: it says what it is, then reads requests from standard input and answers, a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer

    def answer(said: dict[str, Any]) -> None:
        print(json.dumps(said), file=answers, flush=True)

    try:
        _serve(name, options, answer)
    except Refused as error:
        answer({"stopped": str(error)})


def _serve(name: str, options: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    import transformers

    transformers.logging.disable_progress_bar()
    make, libraries = SIDES[name]
    setup = Setup(**options["setup"])
    torch.set_num_threads(setup.threads)
    torch._dynamo.config.recompile_limit = VARIANTS  # a compiled model beyond it is an error, because fullgraph is asked for
    ids, model = torch.from_numpy(np.load(options["tokens"])), load(options["model"], getattr(torch, options["dtype"]))
    contenders = [one for one in make(model, options["model"], setup) if setup.wants(one.cache)]
    releases = {library: version(library) for library in ("torch", "transformers", *libraries)}
    answer(
        {
            "versions": releases | {"python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "dtype": options["dtype"],
            "tokens": digest([ids]),
            "weights": digest(weight for _, weight in sorted(model.state_dict().items())),
            "contenders": [contender.about() for contender in contenders],
        }
    )
    warm: set[tuple[int, int]] = set()
    graphs = torch._dynamo.utils.counters["stats"]
    for line in sys.stdin:
        number, batch, first = json.loads(line)
        contender, windows = contenders[number], ids[first : first + batch]
        if (number, batch) not in warm:
            short = min(setup.prompt, 2 * setup.budget)  # behind a shorter prompt the same code runs
            decode(contender.make(), windows[:, setup.prompt - short :], short, min(WARM_UP, setup.steps))
            warm.add((number, batch))
        before = graphs["unique_graphs"]
        measured = decode(contender.make(), windows, setup.prompt, setup.steps)
        if graphs["unique_graphs"] != before:
            raise Refused(f"{contender.cache}: code was compiled while the clock ran")
        answer(measured)


class Side:
    """A side as the others see it."""

    def __init__(self, name: str, python: str, options: dict[str, Any]):
        program = [__file__] if name == THEIRS else ["-m", "paper_checks.peers"]
        command = [python, *program, "--side", name, "--options", json.dumps(options)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options["setup"]["threads"])}
        if name == THEIRS:  # nothing of this project is theirs
            environment.pop("PYTHONPATH", None)
            environment["PYTHONSAFEPATH"] = "1"
        self.name = name
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self.process = subprocess.Popen(command, **pipes, env=environment, cwd=Path(__file__).parent.parent)
        self.about = self._answer()
        self.contenders = self.about.pop("contenders")

    def measure(self, number: int, batch: int, first: int) -> dict[str, Any]:
        """A pass of one contender over windows first, first + 1, ..."""
        print(json.dumps([number, batch, first]), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise Refused(f"the side of {self.name} has ended: what it said last stands above")
        said = json.loads(line)
        if "stopped" in said:
            raise Refused(f"{self.name}: {said['stopped']}")
        return said

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def check_sides(sides: list[Side]) -> None:
    """Refused if they do not measure the same thing."""
    for what, of in {
        "tokens": lambda about: about["tokens"],
        "weights": lambda about: about["weights"],
        "numbers of threads": lambda about: about["threads"],
        "releases of torch": lambda about: about["versions"]["torch"],
        "releases of Python": lambda about: about["versions"]["python"],
    }.items():
        found = {side.name: of(side.about) for side in sides}
        if len(set(found.values())) > 1:
            raise Refused(f"the sides have different {what}: {found}")


def measure(sides: list[Side], setup: Setup, progress: Callable[[str], object] = print) -> list[dict[str, Any]]:
    """All passes, in turns: for each contender its description, its side, and its answers by batch.

    In round r the windows from r * (largest batch) on are decoded, so a smaller batch decodes some of the same.
    """
    numbered = [[(side, number) for number in range(len(side.contenders))] for side in sides]
    turns = [turn for turn in chain(*zip_longest(*numbered)) if turn is not None]
    results = [
        {"side": side.name, **side.contenders[number], "passes": {batch: [] for batch in setup.batches}} for side, number in turns
    ]
    for turn in range(setup.rounds):
        for batch in setup.batches:
            progress(f"round {turn + 1} of {setup.rounds}, batch {batch}")
            for (side, number), result in zip(turns, results):
                result["passes"][batch].append(side.measure(number, batch, turn * max(setup.batches)))
    return results


def rows_of(results: list[dict[str, Any]], setup: Setup, dtype: str) -> list[dict[str, Any]]:
    """A row for each contender. Refused if full caches differ, or a cache held more tokens than it may.

    nats: mean over the windows of the largest batch; worse: the nats above those of our DynamicCache on the same windows. Both
    with standard errors over windows.
    """
    from paper_checks.script import mean

    def nats_of(result):
        """Of each window, as it was decoded in the largest batch: (W,) float64."""
        return torch.tensor([measured["nats"] for measured in result["passes"][largest]], dtype=torch.float64).flatten()

    largest, rows = max(setup.batches), []
    full = nats_of(next(result for result in results if result["cache"] == FULL))
    for result in results:
        row = {name: value for name, value in result.items() if name != "passes"}
        rows.append(row)
        passes = result["passes"]
        row["held"] = max(measured["held"] for batch in setup.batches for measured in passes[batch])
        if row["budget"] is not None and row["equal"] and row["held"] > row["budget"]:
            raise Refused(f"{row['cache']} held {row['held']} tokens, and its budget is {row['budget']}")
        nats = nats_of(result)
        row["windows"] = len(nats)
        row["nats"], row["stderr"] = mean(nats)
        row["worse"], row["worse_stderr"] = mean(nats - full)
        row["perplexity"] = math.exp(row["nats"])
        if row["budget"] is None and "Quantized" not in row["cache"]:
            apart = abs(row["perplexity"] - math.exp(full.mean()))
            if not apart <= AGREE[dtype]:
                raise Refused(f"{row['cache']} of {row['side']} is a full cache, and its perplexity is {apart:.4g} off another's")
        row["bytes"] = max(measured["bytes"] for measured in passes[largest])
        row["speed"] = {
            str(batch): batch * setup.steps / median(measured["seconds"] for measured in passes[batch]) for batch in setup.batches
        }
    return rows


def markdown(rows: list[dict[str, Any]], setup: Setup) -> str:
    """The rows as a table: caches that hold everything, then by budget."""
    from paper_checks.script import markdown as table

    speeds = [f"tokens/s, batch {batch}" for batch in setup.batches]
    headings = ["cache", "tokens held, at most", "perplexity", "nats above the full cache", *speeds, "bytes/sequence"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["budget"] or 0, row["side"] == THEIRS)):
        name = f"{row['side']}: {row['cache']}" if row["side"] == THEIRS else row["cache"]
        if row["interval"] is not None:
            every = "every step" if row["interval"] == 1 else f"every {row['interval']} steps"
            name += f", to {row['target']} {every}"
        line = [name, f"{row['held']:g}" + ("" if row["equal"] else f" (budget {row['budget']})"), f"{row['perplexity']:.2f}"]
        line.append(f"{round(row['worse'], 3) + 0.0:.3f} ± {row['worse_stderr']:.3f}")  # no -0.000
        lines.append([*line, *(f"{speed:,.0f}" for speed in row["speed"].values()), f"{row['bytes']:,}"])
    return table(headings, lines)


def compare(name: str, setup: Setup, environment: Path | None) -> dict[str, Any]:
    """What is written: about both sides, and the rows. name: of the model; environment: kvpress's, None without it."""
    from less_fast.demo import MODEL, corpus
    from less_fast.gguf import unpacked
    from less_fast.loading import AUTO, dtype_named, load_tokenizer
    from less_fast.text import windows

    texts = [text for _, text in corpus.documents("test")]
    ids = windows(load_tokenizer(name), texts, setup.length, setup.rounds * max(setup.batches))  # (W, T)
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, ids.numpy())
        dtype = str(dtype_named(AUTO, name)).removeprefix("torch.")
        options = {"setup": asdict(setup), "tokens": str(tokens), "model": unpacked(name) or str(MODEL), "dtype": dtype}
        try:
            sides.append(Side(OURS, sys.executable, options))
            if environment is not None:
                sides.append(Side(THEIRS, str(python_of(environment)), options))
            check_sides(sides)
            results = measure(sides, setup, lambda stage: print(stage, file=sys.stderr, flush=True))
        finally:
            for side in sides:
                side.close()
    about = {"model": name or "embedded", "text": f"standard library, test ({corpus.digest('test')})", "setup": asdict(setup)}
    rows = rows_of(results, setup, sides[0].about["dtype"])
    return about | {"sides": {side.name: side.about for side in sides}, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="one with kernels in the package; the embedded model by default")
    parser.add_argument("--steps", type=int, default=511, help="tokens that are decoded behind a prompt")
    parser.add_argument(
        "--only", action="append", default=[], help="a word in the names of the caches that are measured; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="file for the raw figures; none are written without it")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each cache, on other windows each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each side")
    parser.add_argument("--environment", type=Path, help="folder of kvpress's environment; without it kvpress is left out")
    parser.add_argument("--quick", action="store_true", help="small, nothing compiled")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if min(chosen.rounds, chosen.threads, chosen.steps) < 1:
        parser.error("--rounds, --steps and --threads are at least 1")
    if chosen.side:
        serve(chosen.side, chosen.options)
        return 0
    from less_fast import LessError
    from less_fast.files import write_text
    from paper_checks.script import hardware

    setup = Setup(512, chosen.steps, 51, (1, 8), chosen.rounds, chosen.threads, True, tuple(chosen.only))
    if chosen.quick:
        setup = replace(setup, prompt=64, steps=63, budget=13, batches=(1, 2), rounds=1, compile=False)
    try:
        if chosen.environment and not python_of(chosen.environment).is_file():
            raise Refused(f"{chosen.environment} is no environment of Python: make one as --help says")
        if chosen.out is not None:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"hardware": hardware()} | compare(chosen.model, setup, chosen.environment)
    except (Refused, LessError, OSError) as error:
        print(f"peers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(markdown(record["rows"], setup))
    for name, about in record["sides"].items():
        print(f"\n{name}: {', '.join(' '.join(release) for release in about['versions'].items())}, {about['threads']} threads")
    if chosen.out is not None:
        write_text(chosen.out, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
