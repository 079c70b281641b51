"""How fast, and how large: full caches, the bare policy and LESS in one run, taking turns.

Speed does not depend on values, so weights may be random and caches are filled with random tokens, not by a long prompt.
"""

import copy
import ctypes
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Column, Table
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..hf import LessCache
from ..hf.architecture import layers_of, less_layers
from ..kernels import LessKernels
from ..layer.policies import Policy
from .caches import held_bytes, lengthen
from .compare import wait

Contenders = Mapping[str, Callable[..., LessCache]]  # by name, what makes an empty cache: see `maker`
WARM_UP = 3  # turns before the clock runs, in which code is compiled
BURST = 8  # steps in one turn: a caller's next step finds the caches of the processor as its last one left them


@dataclass
class Row:
    """One line of a benchmark. seconds: median of one step or prompt; bytes: held for each sequence; peak: bytes allocated above
    what was there before, None if that was not measured."""

    what: str  # decode, prefill, or what else was measured
    cache: str
    batch: int
    length: int
    seconds: float
    tokens_per_second: float
    bytes: int
    peak: int | None = None


def bench(
    model: PreTrainedModel,
    policy: Policy,
    kernels: LessKernels,
    batches: Sequence[int],
    length: int,
    rounds: int,
    compile: bool,
    progress: Callable[[str], object] = lambda stage: None,
) -> list[Row]:
    """Decoding for each of the batches, then prefill: full caches, the bare policy and LESS, with uniform budgets and, if the
    kernels have a table for the policy, by head.

    length: tokens of each sequence before the measured ones, and of the prompt; rounds: turns of each cache; compile: measure
    compiled code as well. Raises LessError if LESS cannot serve the model.
    """
    bare = kernels.without_state() if policy.needs == "rho" else None
    contenders = {"bare": maker(model, policy, bare, budgets="uniform"), "LESS": maker(model, policy, kernels, budgets="uniform")}
    if kernels.budgets_for(policy) is not None:
        contenders["LESS by head"] = maker(model, policy, kernels)
    rows = []
    for batch in batches:
        progress(f"decoding, batch {batch} ...")
        rows += decode(model, contenders, batch, length, rounds, compile)
    progress("prefill ...")
    return rows + prefill(model, contenders, 1, length, rounds)


def maker(model: PreTrainedModel, policy: Policy, kernels: LessKernels | None = None, **options: Any) -> Callable[..., LessCache]:
    """A contender: what makes an empty cache. options: as in LessCache.for_model.

    Any length will do, since the kernels do not say what texts they know: speed alone is measured.
    """
    if kernels:
        kernels = copy.copy(kernels)  # weights are shared
        kernels.about = {name: said for name, said in kernels.about.items() if name != "window"}
    return partial(LessCache.for_model, model, policy, kernels, **options)


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
def decode(model: PreTrainedModel, contenders: Contenders, batch: int, length: int, rounds: int, compile: bool) -> list[Row]:
    """Tokens generated greedily, one by one, by sequences of `length` tokens: the whole model, end to end.

    contenders: beside the full caches; compile: measure compiled code as well.
    """
    if compile:  # torch holds few variants of a model's code, and those of earlier measurements count
        torch._dynamo.reset()
    width = model.config.get_text_config(decoder=True).hidden_size
    torch.empty(batch, length, width, device=model.device)  # what no memory holds is refused before anything is computed
    makers = _makers(model, contenders, batch, length, steps_of(rounds) + 1, compile)
    caches, steps = {}, {}
    for name, make in makers.items():
        network, caches[name] = make()
        steps[name] = partial(_next_token, network, caches[name], _tokens(model, batch, 1))
    size = {name: held_bytes(cache) // batch for name, cache in caches.items()}
    spent = in_turns(steps, rounds, model.device)
    return [row("decode", name, batch, length, seconds, size[name]) for name, seconds in spent.items()]


@torch.inference_mode()
def prefill(model: PreTrainedModel, contenders: Contenders, batch: int, length: int, rounds: int) -> list[Row]:
    """A prompt of `length` tokens into an empty cache, with the memory that takes beside the model."""
    twin, ids = _twin(model), _tokens(model, batch, length)
    makers: dict[str, tuple] = {"DynamicCache": (twin, lambda: DynamicCache(config=twin.config))}
    makers |= {name: (model, make) for name, make in contenders.items()}

    def read(network: PreTrainedModel, cache: Cache) -> float:
        start = time.perf_counter()
        network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        wait(model.device)
        return time.perf_counter() - start

    size, peaks = {}, {}
    for name, (network, make) in makers.items():
        cache = make()
        peaks[name] = peak_of(partial(read, network, cache), model.device)
        size[name] = held_bytes(cache) // batch
        del cache
    turns = [{name: read(network, make()) for name, (network, make) in makers.items()} for _ in range(rounds)]
    return [
        row("prefill", name, batch, length, [turn[name] for turn in turns], size[name], length, peaks[name]) for name in makers
    ]


def row(
    what: str, cache: str, batch: int, length: int, seconds: Sequence[float], size: int, tokens: int = 1, peak: int | None = None
) -> Row:
    """The line for measured seconds, `tokens` of each sequence a time."""
    middle = median(seconds)
    return Row(what, cache, batch, length, middle, batch * tokens / middle, size, peak)


def _makers(model, contenders, batch, length, new, compile):
    """By name, functions that make a network and, for it, a cache of `length` tokens: full ones, static with room for new
    tokens, then those of the contenders. A model that has layers of transformers' own is not compiled: with LESS they grow."""
    twin = _twin(model)
    whole = compile and len(less_layers(model)) == len(layers_of(model))

    def dynamic():
        return twin, _filled(DynamicCache(config=twin.config), twin, batch, 1, length)

    def static(network):
        return network, _filled(StaticCache(config=twin.config, max_cache_len=length + new), twin, batch, 1, length)

    def less(network, make, step=False):
        cache = make(compile=step)
        return network, _filled(cache, model, batch, min(length, cache.setting.policy.budget + 1), length)

    makers = {"DynamicCache": dynamic, "StaticCache": partial(static, twin)}
    if whole and twin._can_compile_fullgraph:
        makers["StaticCache, compiled"] = lambda: static(_compiled_model(twin))
    for name, make in contenders.items():
        makers[name] = partial(less, model, make)
        if compile and make().setting.policy.one_leaves:
            makers[f"{name}, step compiled"] = partial(less, model, make, step=True)
            if whole:
                makers[f"{name}, compiled"] = lambda make=make: less(_compiled_model(model), make)
    return makers


def _filled(cache, network, batch, prompt, length):
    """The cache after `length` tokens of which the network read the first ones, its prompt."""
    network(input_ids=_tokens(network, batch, prompt), past_key_values=cache, use_cache=True, logits_to_keep=1)
    lengthen(cache, length - prompt)
    return cache


def _next_token(network, cache, ids):
    logits = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    ids.copy_(logits[:, -1:].argmax(-1))


def _compiled_model(model):
    """As `generate` compiles a model, with CUDA graphs if there is CUDA."""
    return torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead" if model.device.type == "cuda" else None)


def _twin(model):
    """The same model, weights shared, with transformers' own attention: torch's, or eager if it has only that."""
    shared = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    twin.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return twin


def _tokens(model, batch, length):
    return torch.randint(model.config.get_text_config(decoder=True).vocab_size, (batch, length), device=model.device)


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes allocated at most while it runs, above those before: on CUDA by torch's count, on Linux as resident memory. None
    elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not (status := Path("/proc/self/status")).exists():
        run()
        return None

    def resident(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def table(rows: list[Row], title: str) -> Table:
    """The rows to print, each part's speeds relative to its first line."""
    right = ("batch", "ms", "tokens/s", "speed", "bytes/sequence", "peak")
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
            f"{row.tokens_per_second:,.0f}",
            f"{first.seconds / row.seconds:.2f}x",
            f"{row.bytes:,}",
            "" if row.peak is None else decimal(row.peak, precision=2),
        )
    return lines
