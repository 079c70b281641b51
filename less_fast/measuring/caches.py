"""Caches as measurements need them: what they hold, and filled to a length without reading a prompt."""

import torch
from transformers.cache_utils import Cache

from ..hf.cache import LessCache, LessLayer, bytes_of
from ..layer.state import LayerState


def held_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds. Kernels are shared by all caches, and counted by `LessKernels.memory`."""
    if isinstance(cache, LessCache):
        return sum(cache.memory().values())
    return bytes_of(cache.layers)


def full_bytes(cache: LessCache) -> int:
    """Bytes that a full cache would hold after the same tokens."""
    seen, held = int(cache.get_seq_length()), cache.memory()["others"]
    for layer in cache.less_layers:
        state = layer.state
        held += 2 * len(state.n) * state.kv_heads * seen * state.head_dim * layer.dtype.itemsize
    return held


def describe(cache: LessCache) -> str:
    """What each KV head of the cache keeps, what becomes of the others, and the bytes held, in words."""
    seen, kernels = int(cache.get_seq_length()), cache.setting.kernels
    at_most = "at most " if cache.setting.policy.needs == "kinds" else ""
    kept = _ends(min(policy.budget, seen) for layer in cache.less_layers for policy in layer.state.policies())
    ranks = [kernels.layers[index].rank for index in cache.setting.less_layers] if kernels else []
    folded = f"folded into {_ends(ranks)} features" if any(ranks) else "forgotten"
    if any(ranks) and cache.setting.context and seen > cache.setting.context:
        folded += f" (anew every {cache.setting.context // 2} tokens)"
    return f"{seen} through the cache: each KV head keeps {at_most}{kept}, the others are {folded}; {_held(cache)}"


def describe_briefly(cache: LessCache) -> str:
    """The tokens that the cache has seen, and the bytes held."""
    return f"{int(cache.get_seq_length()):,} tokens seen, {_held(cache)}"


def _held(cache):
    return f"{held_bytes(cache):,} bytes held, a full cache would hold {full_bytes(cache):,}"


def _ends(numbers):
    """The smallest and the largest: 4 to 9, or 4 if they are the same."""
    ordered = sorted(numbers)
    return " to ".join(map(str, dict.fromkeys([ordered[0], ordered[-1]])))


def lengthen(cache: Cache, tokens: int) -> None:
    """Brings a cache that has seen a few tokens to what it is after so many more, as far as speed and memory can tell.

    Layers that are LESS's age. Those of transformers that attend are given random keys and values. All others, which are
    recurrent or read the keys of another layer, hold already what they ever will.
    """
    if isinstance(cache, LessCache):
        cache.clock.seen += tokens
        cache.clock.counted = None
    for layer in cache.layers:
        if isinstance(layer, LessLayer):
            age(layer.state, tokens)
        elif getattr(layer, "keys", None) is not None:
            kv = layer.keys, layer.values  # (N, H, *, D)
            for many in (tokens - 1, min(tokens, 1)):  # the last alone, so that a sliding window holds no more than it does
                if many > 0:
                    layer.update(*(torch.randn(*x.shape[:2], many, x.shape[3], dtype=x.dtype, device=x.device) for x in kv))


def age(state: LayerState, tokens: int) -> None:
    """Makes a state believe that so many more tokens came before those that it holds."""
    state.n += tokens
    for part in state.parts:
        part.slots.position += tokens * (part.slots.position >= 0)
