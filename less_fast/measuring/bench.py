"""How fast, and how large: full caches, the bare policy and LESS in one run, taking turns.

Speed does not depend on values, so weights may be random and caches are filled with random tokens, not by a long prompt.
"""

import copy
import ctypes
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.table import Column, Table
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from ..hf import LessCache
from ..hf.architecture import layers_of, less_layers, sizes
from ..kernels import LessKernels
from ..layer.policies import Policy
from ..layer.state import LayerState
from ..layer.step import compiled, extend
from .caches import fill, held_bytes, lengthen, spell_bytes
from .compare import wait
from .pictures import picture

WARM_UP = 3  # turns before the clock runs, in which code is compiled
BURST = 8  # steps in one turn: a caller's next step finds the caches of the processor as its last one left them


@dataclass
class Row:
    """One line of a benchmark. seconds: median of one step or prompt, with the quartiles; bytes: held for each sequence;
    peak: bytes allocated above what was there before, None if that was not measured; limit: seconds that it cannot go below on
    this machine, see `Machine`, None if that was not asked."""

    what: str  # attention step, decode or prefill
    cache: str
    batch: int
    length: int
    seconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    bytes: int
    peak: int | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Machine:
    """What the machine can do at most: bytes moved and multiplications with additions, in a second."""

    moved: float
    computed: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, size: int = 4096, rounds: int = 5) -> "Machine":
        """By a copy and by a product of matrices (size x size), the best of so many rounds."""
        one, other, out = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))  # (size, size)
        steps = {"copy": partial(out.copy_, one), "product": partial(torch.mm, one, other, out=out)}
        best = {name: min(seconds) for name, seconds in in_turns(steps, rounds, device, burst=1).items()}
        return cls(2 * one.nbytes / best["copy"], size**3 / best["product"])

    def limit(self, row: Row, model: PreTrainedModel, kernels: LessKernels | None) -> float:
        """Seconds of a row at least: the weights and what is held move once, each weight is multiplied once for every token, and
        in a prompt each query with every key and value before it."""
        shape = sizes(model)
        if row.what == "attention step":
            weights, read, tokens = 0, 0 if kernels is None else kernels.layers[0].memory(), row.batch  # type: ignore[operator]
        else:
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
            weights = sum(weight.numel() for weight in model.parameters()) - looked_up
            read, tokens = kernels.memory() if kernels is not None else 0, row.batch
        computed = weights * tokens
        if row.what == "prefill":
            pairs = row.batch * row.length**2 // 2
            computed = weights * row.batch * row.length + 2 * pairs * shape["layers"] * shape["query_heads"] * shape["head_dim"]
        moved = weights * model.dtype.itemsize + read + row.batch * row.bytes
        return max(moved / self.moved, computed / self.computed)


def bench(
    model: PreTrainedModel,
    policy: Policy,
    kernels: LessKernels,
    batches: Sequence[int],
    length: int,
    rounds: int,
    compile: bool,
    progress: Callable[[str], object] = lambda stage: None,
    int8: bool = False,
) -> list[Row]:
    """Attention steps and decoding for each of the batches, then prefill: full caches, the bare policy and LESS, with uniform
    budgets and, if the kernels have a table for the policy, by head.

    length: tokens of each sequence before the measured ones, and of the prompt; rounds: turns of each cache; compile: measure
    compiled code as well; int8: slots of the bare policy and LESS in eight bits. Raises LessError if LESS cannot serve the model.
    """
    layer = {name: size for name, size in sizes(model).items() if name != "layers"}
    bare, first = kernels.without_state() if policy.needs == "rho" else None, less_layers(model)[0]
    alone = {"bare": (policy, bare and bare.layers[first]), "LESS": (policy, kernels.layers[first])}
    contenders, rows = {"bare": bare, "LESS": without_tables(kernels)}, []
    if kernels.budgets_for(policy) is not None:
        contenders["LESS by head"] = kernels
    for batch in batches:
        progress(f"attention steps and decoding, batch {batch} ...")
        rows += attention_steps(layer, alone, batch, length, rounds, model.dtype, model.device, compile, int8)
        rows += decode(model, policy, contenders, batch, length, rounds, compile, int8=int8)
    progress("prefill ...")
    rows += prefill(model, policy, contenders, 1, length, rounds, int8)
    machine = Machine.measure(model.device, model.dtype)
    return [replace(row, limit=machine.limit(row, model, contenders.get(row.cache.partition(",")[0]))) for row in rows]


def without_tables(kernels: LessKernels) -> LessKernels:
    """The same kernels, weights shared, for uniform budgets."""
    twin = copy.copy(kernels)
    twin.curves = {}
    return twin


def boundless(kernels: LessKernels) -> LessKernels:
    """The same kernels, weights shared, without a word on what texts they know: speed alone is measured, at any length."""
    twin = copy.copy(kernels)
    twin.about = {name: said for name, said in kernels.about.items() if name != "window"}
    return twin


def steps_of(rounds: int) -> int:
    """Decoding steps that so many rounds take, warm-up included."""
    return (WARM_UP + rounds) * BURST


def in_turns(steps: Mapping[str, Callable], rounds: int, device: torch.device, burst: int = BURST) -> dict[str, list[float]]:
    """Seconds of every call of every step, warmed up, in turns of `burst` calls: what slows the machine slows all of them."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + rounds):
        for name, step in steps.items():
            for _ in range(burst):
                wait(device)
                start = time.perf_counter()
                step()
                wait(device)
                if turn >= WARM_UP:
                    spent[name].append(time.perf_counter() - start)
    return spent


@torch.inference_mode()
def attention_steps(
    layer: dict[str, int],
    contenders: dict[str, tuple],
    batch: int,
    length: int,
    rounds: int,
    dtype: torch.dtype,
    device: torch.device | str,
    compile: bool,
    int8: bool = False,
) -> list[Row]:
    """One token through one attention layer: full attention over `length` tokens beside each of the contenders.

    layer: query_heads, kv_heads and head_dim; contenders: by name a policy (one, or one for each KV head) and kernels or None.
    """
    place, D = torch.device(device), layer["head_dim"]
    # Those that may not fit come first, before anything is computed.
    keys, values = (torch.randn(batch, layer["kv_heads"], length, D, dtype=dtype, device=place) for _ in "kv")  # (N, Hkv, T, D)
    q, k, v = (
        torch.randn(batch, layer[heads], 1, D, dtype=dtype, device=place) for heads in ("query_heads", "kv_heads", "kv_heads")
    )  # (N, H, 1, D)
    steps = {"full": partial(scaled_dot_product_attention, q, keys, values, enable_gqa=True)}
    size = {"full": keys.nbytes + values.nbytes}
    for name, (policy, features) in contenders.items():
        state = LayerState.allocate(policy, batch, layer["query_heads"], layer["kv_heads"], D, features, dtype, place, int8=int8)
        fill(state, length)
        size[name] = size[f"{name}, compiled"] = sum(state.memory().values())
        steps[name] = partial(extend, state, q, k, v)
        if compile:
            steps[f"{name}, compiled"] = partial(compiled(state, q), state, q, k, v)
    spent = in_turns(steps, rounds, place)
    return [row("attention step", name, batch, length, seconds, size[name] // batch) for name, seconds in spent.items()]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    policy: Policy,
    contenders: dict[str, LessKernels | None],
    batch: int,
    length: int,
    rounds: int,
    compile: bool,
    only: str | None = None,
    int8: bool = False,
) -> list[Row]:
    """Tokens generated greedily, one by one, by sequences of `length` tokens: the whole model, end to end.

    contenders: by name LessKernels or None, beside the full caches; only: the name of the one cache to measure, if several
    would not fit into the memory side by side.
    """
    if compile:  # torch holds few variants of a model's code, and those of earlier measurements count
        torch._dynamo.reset()
    contenders = {name: kernels and boundless(kernels) for name, kernels in contenders.items()}
    makers = dict(_full_caches(model, batch, length, steps_of(rounds) + 1, compile))
    makers |= dict(_less_caches(model, policy, contenders, batch, length, compile, int8))
    caches, steps = {}, {}
    for name in makers if only is None else [only]:
        network, caches[name] = makers[name]()
        steps[name] = partial(_next_token, network, caches[name], _tokens(model, batch, 1))
    size = {name: held_bytes(cache) // batch for name, cache in caches.items()}
    spent = in_turns(steps, rounds, model.device)
    return [row("decode", name, batch, length, seconds, size[name]) for name, seconds in spent.items()]


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    policy: Policy,
    contenders: dict[str, LessKernels | None],
    batch: int,
    length: int,
    rounds: int,
    int8: bool = False,
    chunk: int | None = None,
) -> list[Row]:
    """A prompt of `length` tokens into an empty cache, with the memory that takes beside the model. contenders: as in decode;
    chunk: how many tokens of it enter LESS's caches together, None for all."""
    twin, ids = _twin(model), _tokens(model, batch, length)
    makers: dict[str, tuple] = {"DynamicCache": (twin, lambda: DynamicCache(config=twin.config))}
    for name, kernels in contenders.items():
        own = kernels and boundless(kernels)
        makers[name] = model, partial(LessCache.for_model, model, policy, own, chunk=chunk, int8=int8)
    spent: dict[str, list[float]] = {name: [] for name in makers}
    peaks, size = {}, {}

    def run(network, cache):
        start = time.perf_counter()
        network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        wait(model.device)
        return time.perf_counter() - start

    for name, (network, make) in makers.items():
        cache = make()
        with Peak(model.device) as peak:
            run(network, cache)
        size[name], peaks[name] = held_bytes(cache) // batch, peak.bytes
        del cache
    for _ in range(rounds):
        for name, (network, make) in makers.items():
            spent[name].append(run(network, make()))
    return [row("prefill", name, batch, length, seconds, size[name], length, peaks[name]) for name, seconds in spent.items()]


def row(
    what: str, cache: str, batch: int, length: int, seconds: Sequence[float], size: int, tokens: int = 1, peak: int | None = None
) -> Row:
    """The line for measured seconds, `tokens` of each sequence a time."""
    middle = median(seconds)
    ordered = sorted(seconds)
    quartiles = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return Row(what, cache, batch, length, middle, quartiles, batch * tokens / middle, size, peak)


def _full_caches(model, batch, length, new, compile):
    """By name, functions that make a network and a full cache of `length` tokens, with room for new ones, for it."""
    twin = _twin(model)

    def static(network):
        return network, _filled(StaticCache(config=twin.config, max_cache_len=length + new), twin, batch, 1, length)

    yield "DynamicCache", lambda: (twin, _filled(DynamicCache(config=twin.config), twin, batch, 1, length))
    yield "StaticCache", lambda: static(twin)
    if compile and twin._can_compile_fullgraph:
        yield "StaticCache, compiled", lambda: static(_compiled_model(twin))


def _less_caches(model, policy, contenders, batch, length, compile, int8=False):
    """The same of the bare policy and of LESS. A model that has layers of transformers' own is not compiled: they grow."""

    def less(network, kernels, step=False):
        cache = LessCache.for_model(model, policy, kernels, compile=step, int8=int8)
        return network, _filled(cache, model, batch, min(length, policy.budget + 1), length)

    for name, kernels in contenders.items():
        yield name, partial(less, model, kernels)
        if compile and policy.one_leaves:
            yield f"{name}, step compiled", partial(less, model, kernels, True)
            if _all_less(model):
                yield f"{name}, compiled", lambda kernels=kernels: less(_compiled_model(model), kernels)


def _filled(cache, network, batch, prompt, length):
    """The cache after `length` tokens of which the network read the first ones, its prompt."""
    network(input_ids=_tokens(network, batch, prompt), past_key_values=cache, use_cache=True, logits_to_keep=1)
    lengthen(cache, length - prompt)
    return cache


def _next_token(network, cache, ids):
    logits = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    ids.copy_(logits[:, -1:].argmax(-1))


def _compiled_model(model):
    """As `generate` compiles a model, with CUDA graphs if there is CUDA. Sliding windows count their tokens in an int: for them
    code must be dynamic, or it is compiled anew for every token."""
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    return torch.compile(model, fullgraph=True, dynamic=False if _all_less(model) else None, mode=mode)


def _all_less(model):
    return len(less_layers(model)) == len(layers_of(model))


def _twin(model):
    """The same model, weights shared, with transformers' own attention: torch's, or eager if it has only that."""
    shared = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    twin.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return twin


def _tokens(model, batch, length):
    return torch.randint(model.config.get_text_config(decoder=True).vocab_size, (batch, length), device=model.device)


class Peak:
    """Bytes allocated at most inside the block, above those at its start: on CUDA by torch's count, on Linux as resident
    memory. None elsewhere."""

    def __init__(self, device: torch.device):
        self.device, self.bytes, self._status = device, None, Path("/proc/self/status")

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self._status.exists():
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._before = self._resident("VmRSS")
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._status.exists():
            self.bytes = self._resident("VmHWM") - self._before

    def _resident(self, name):
        return int(re.search(rf"{name}:\s+(\d+) kB", self._status.read_text())[1]) * 1024


def table(rows: list[Row], title: str) -> Table:
    """The rows to print, each part's speeds relative to its first line."""
    right = ("batch", "ms", "quartiles", "tokens/s", "speed", "of the limit", "bytes/sequence", "peak")
    lines = Table("", "cache", *(Column(heading, justify="right") for heading in right), title=title)
    first = None
    for row in rows:
        if first is None or (row.what, row.batch) != (first.what, first.batch):
            first = row
            lines.add_section()
        lines.add_row(
            row.what if row is first else "",
            row.cache,
            str(row.batch),
            f"{row.seconds * 1e3:,.2f}",
            " to ".join(f"{seconds * 1e3:,.2f}" for seconds in row.quartiles),
            f"{row.tokens_per_second:,.0f}",
            f"{first.seconds / row.seconds:.2f}x",
            "" if row.limit is None else f"{row.limit / row.seconds:.0%}",
            f"{row.bytes:,}",
            "" if row.peak is None else spell_bytes(row.peak),
        )
    return lines


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Tokens per second of decoding against the batch, one line for each cache, as a picture file."""
    from matplotlib.ticker import LogLocator

    decoding = [row for row in rows if row.what == "decode"]
    batches = sorted({row.batch for row in decoding})
    colours = {"DynamicCache": "gray", "StaticCache": "black", "bare": "tab:red", "LESS": "tab:blue", "LESS by head": "tab:green"}
    dashes = {"": ":", "step compiled": "--", "compiled": "-"}
    with picture(path, (8, 4.2)) as (figure, axes):
        for cache in dict.fromkeys(row.cache for row in decoding):
            line = sorted((row.batch, row.tokens_per_second) for row in decoding if row.cache == cache)
            name, _, mode = cache.partition(", ")
            axes.plot(*zip(*line), marker="o", label=cache, color=colours[name], linestyle=dashes[mode])
        axes.set(xlabel="sequences decoded together", ylabel="tokens per second", xscale="log", yscale="log")
        axes.set_title(title, size=9)
        axes.set_xticks(batches, batches)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
