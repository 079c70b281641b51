"""How fast, and how large: full caches, the bare policy and LESS in one run, taking turns.

Speed does not depend on values, so weights may be random and caches are filled with random tokens, not by a long prompt.
"""

import copy
import ctypes
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicCache, StaticCache

from ..hf import LessCache
from ..hf.architecture import sizes
from ..layer.state import LayerState
from ..layer.step import compiled, extend
from .compare import held_bytes, wait

WARM_UP = 3  # turns before the clock runs, in which code is compiled
BURST = 8  # steps in one turn: a caller's next step finds the caches of the processor as its last one left them


@dataclass
class Row:
    """One line of a benchmark. seconds: median of one step or prompt, with the quartiles; bytes: held for each sequence;
    peak: bytes allocated above what was there before, None where that was not measured."""

    what: str  # attention step, decode or prefill
    cache: str
    batch: int
    length: int
    seconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    bytes: int
    peak: int | None = None


def in_turns(steps: dict[str, Callable], rounds: int, device: torch.device, burst: int = BURST) -> dict[str, list[float]]:
    """Seconds of every call of every step, warmed up, in turns of `burst` calls: what slows the machine slows all of them."""
    spent = {name: [] for name in steps}
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
    layer: dict, contenders: dict[str, tuple], batch: int, length: int, rounds: int, dtype, device, compile: bool
) -> list[Row]:
    """One token through one attention layer: full attention over `length` tokens beside each of the contenders.

    layer: query_heads, kv_heads and head_dim; contenders: by name a policy (one, or one for each KV head) and kernels or None.
    """
    device, widths = torch.device(device), (layer["query_heads"], layer["kv_heads"], layer["kv_heads"])
    token = [torch.randn(batch, heads, 1, layer["head_dim"], dtype=dtype, device=device) for heads in widths]
    held = [torch.randn(batch, layer["kv_heads"], length, layer["head_dim"], dtype=dtype, device=device) for _ in "kv"]
    steps = {"full": partial(scaled_dot_product_attention, token[0], *held, enable_gqa=True)}
    size = {"full": sum(x.nbytes for x in held)}
    for name, (policy, features) in contenders.items():
        state = LayerState.allocate(policy, batch, **layer, kernels=features, dtype=dtype, device=device)
        fill(state, length)
        size[name] = size[f"{name}, compiled"] = sum(state.memory().values())
        steps[name] = partial(extend, state, *token)
        if compile:
            steps[f"{name}, compiled"] = partial(compiled(state, token[0]), state, *token)
    spent = in_turns(steps, rounds, device)
    return [row("attention step", name, batch, length, seconds, size[name] // batch) for name, seconds in spent.items()]


@torch.inference_mode()
def decode(
    model, policy, contenders: dict, batch: int, length: int, rounds: int, compile: bool, only: str | None = None
) -> list[Row]:
    """Tokens generated greedily, one by one, by sequences of `length` tokens: the whole model, end to end.

    contenders: by name LessKernels or None, beside the full caches; only: the name of the one cache to measure, where several
    would not fit into the memory side by side.
    """
    new = (WARM_UP + rounds) * BURST + 1
    makers = dict(_full_caches(model, batch, length, new, compile))
    makers |= dict(_less_caches(model, policy, contenders, batch, length, compile))
    caches, steps = {}, {}
    for name, make in makers.items() if only is None else [(only, makers[only])]:
        network, caches[name] = make()
        steps[name] = partial(_next_token, network, caches[name], _tokens(model, batch, 1))
    size = {name: held_bytes(cache) // batch for name, cache in caches.items()}
    spent = in_turns(steps, rounds, model.device)
    return [row("decode", name, batch, length, seconds, size[name]) for name, seconds in spent.items()]


@torch.inference_mode()
def prefill(model, policy, contenders: dict, batch: int, length: int, rounds: int) -> list[Row]:
    """A prompt of `length` tokens into an empty cache, with the memory that takes beside the model. contenders: as in decode."""
    twin, ids = _twin(model, "sdpa"), _tokens(model, batch, length)
    makers = {"DynamicCache": (twin, lambda: DynamicCache(config=twin.config))}
    for name, learned in contenders.items():
        makers[name] = (model, partial(LessCache.for_model, model, policy, learned))
    spent, peaks, size = {name: [] for name in makers}, {}, {}

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


def row(what, cache, batch, length, seconds, size, tokens=1, peak=None) -> Row:
    """The line for measured seconds, `tokens` of each sequence a time."""
    middle = median(seconds)
    ordered = sorted(seconds)
    quartiles = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return Row(what, cache, batch, length, middle, quartiles, batch * tokens / middle, size, peak)


def fill(state: LayerState, length: int) -> None:
    """Brings an empty state to what it is after `length` tokens, as far as speed can tell: as many random ones as it holds."""
    group = state.groups[0]
    most = max(group.policy.budget for group in state.groups) + 1
    N, D = group.k.shape[0], group.k.shape[-1]
    heads = (state.query_heads, state.kv_heads, state.kv_heads)
    tokens = (torch.randn(N, H, min(length, most), D, device=group.k.device) for H in heads)
    extend(state, *(x.to(group.k.dtype) for x in tokens))
    age(state, length - min(length, most))


def age(state: LayerState, tokens: int) -> None:
    """Makes a state believe that so many more tokens came before those that it holds."""
    state.n += tokens
    for group in state.groups:
        group.position += tokens * (group.position >= 0)


def _full_caches(model, batch, length, new, compile) -> Iterator[tuple[str, Callable]]:
    shape, twin = sizes(model), _twin(model, "sdpa")

    def filled(cache, network):
        for index in range(shape["layers"]):
            k, v = (torch.randn(batch, shape["kv_heads"], length, shape["head_dim"], device=model.device) for _ in "kv")
            cache.update(k.to(model.dtype), v.to(model.dtype), index)
        return network, cache

    def static(network):
        return filled(StaticCache(config=twin.config, max_cache_len=length + new), network)

    yield "DynamicCache", lambda: filled(DynamicCache(config=twin.config), twin)
    yield "StaticCache", lambda: static(twin)
    if compile:
        yield "StaticCache, compiled", lambda: static(_compiled_model(twin))


def _less_caches(model, policy, contenders, batch, length, compile) -> Iterator[tuple[str, Callable]]:
    def filled(network, learned, step=False):
        cache = LessCache.for_model(model, policy, learned, compile=step)
        ids = _tokens(model, batch, min(length, policy.budget + 1))
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.layers:
            age(layer.state, length - ids.shape[1])
            layer.seen += length - ids.shape[1]
        return network, cache

    for name, learned in contenders.items():
        yield name, partial(filled, model, learned)
        if compile and policy.one_leaves:
            yield f"{name}, step compiled", partial(filled, model, learned, True)
            yield f"{name}, compiled", lambda learned=learned: filled(_compiled_model(model), learned)


def _next_token(network, cache, ids):
    logits = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    ids.copy_(logits[:, -1:].argmax(-1))


def _compiled_model(model):
    """As `generate` compiles a model, with CUDA graphs where there is CUDA."""
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    return torch.compile(model, fullgraph=True, dynamic=False, mode=mode)


def _twin(model, attention: str):
    """The same model, weights shared, with another attention."""
    shared = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    twin.set_attn_implementation(attention)
    return twin


def _tokens(model, batch, length):
    return torch.randint(model.config.get_text_config(decoder=True).vocab_size, (batch, length), device=model.device)


def plot(rows: list[Row], path, title: str) -> None:
    """Tokens per second of decoding against the batch, one line for each cache, as a picture file. ImportError without
    matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    decoding = [row for row in rows if row.what == "decode"]
    batches = sorted({row.batch for row in decoding})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    colours = {"DynamicCache": "gray", "StaticCache": "black", "bare": "tab:red", "LESS": "tab:blue"}
    dashes = {"": ":", "step compiled": "--", "compiled": "-"}
    for cache in dict.fromkeys(row.cache for row in decoding):
        line = sorted((row.batch, row.tokens_per_second) for row in decoding if row.cache == cache)
        name, _, how = cache.partition(", ")
        axes.plot(*zip(*line), marker="o", label=cache, color=colours[name], linestyle=dashes[how])
    axes.set(xlabel="sequences decoded together", ylabel="tokens per second", xscale="log", yscale="log")
    axes.set_title(title, size=9)
    axes.set_xticks(batches, batches)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
