"""Saved caches: all that a LessCache holds in one file, and back."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from ..files import digest, read, write
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.names import policy_of, written
from .architecture import attention_modules, check_model, device_of
from .identity import check_saved, identity
from .layer import LessLayer
from .shipped import kernels_for
from .watch import BROKEN_OFF, WatchedCache

Kept = TypeVar("Kept", bound=WatchedCache)


def save(cache: WatchedCache, path: str | os.PathLike) -> None:
    """See `LessCache.save`."""
    model = cache.model()
    unsaved = {type(layer).__name__ for layer in cache.layers} - {"LessLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    if cache.world_size > 1:
        unsaved.add("its heads on several processes")
    if any(any(row) for row in cache.positions or ()):
        unsaved.add(f"positions that the model keeps outside the cache ({', '.join(cache.keepers)})")
    if model is None:
        raise LessError("this cache cannot be saved: its model is gone, and nobody could tell whose it was; save it before")
    if unsaved:
        raise LessError(f"this cache cannot be saved: it has {', '.join(sorted(unsaved))}; keep the text and feed it again")
    if cache.open:
        raise LessError(BROKEN_OFF)
    rule = written(cache.setting.policy)
    tensors: dict[str, torch.Tensor] = {}
    lengths: list[int] = []
    for index, layer in enumerate(cache.layers):
        held = _tensors_of(layer)
        tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
        lengths.append(cache.get_seq_length(index) if held else 0)
    about = {
        "model": _kind(model) | {"identity": identity(model)},
        "policy": rule,
        "budgets": cache.setting.budgets or "uniform",
        "chunk": cache.setting.chunk,
        "context": cache.setting.context,
        "int8": cache.setting.int8,
        "kernels": cache.setting.kernels and digest(cache.setting.kernels.state_dict()),
        "heads": [layer.state and (layer.state.query_heads, layer.state.kv_heads) for layer in cache.less_layers],
        "lengths": lengths,
    }
    more = {"token_kinds": cache.token_kinds, "masks": cache.clock.masks, "tokens": cache.clock.tokens}
    tensors |= {name: tensor for name, tensor in more.items() if tensor is not None}
    write(path, tensors, about)


def load(
    for_model: Callable[..., Kept], path: str | os.PathLike, model: PreTrainedModel, kernels: LessKernels | None, compile: bool
) -> Kept:
    """See `LessCache.load`."""
    tensors, about = read(path)
    if "model" not in about:
        raise LessError(f"{path} holds one layer's state, not a cache: load it with less_fast.load_state")
    check_model(model)
    for what, value in _kind(model).items():
        if about["model"].get(what) != value:
            raise LessError(
                f"{path} was saved with another model, of {what} {about['model'].get(what)}, and this one is of {value}: load it "
                f"with the model that it was saved with"
            )
    check_saved(path, about["model"], model)
    if kernels is None and about["kernels"]:
        kernels = kernels_for(model)
    if about["kernels"] != (kernels and digest(kernels.state_dict())):
        raise LessError(f"{path} was saved {'with other' if about['kernels'] else 'without'} kernels: load it with the same")
    policy = policy_of(*about["policy"])
    if policy is None:
        raise LessError(f"{path} was saved under the policy {about['policy'][0]}, which is not there: import it first")
    asked = about["budgets"], about["chunk"], tensors.get("token_kinds"), compile, about["context"], about["int8"]
    cache = for_model(model, policy, kernels, *asked)
    modules = attention_modules(model)
    heads = iter(about["heads"])
    for index, (layer, length) in enumerate(zip(cache.layers, about["lengths"])):
        held = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith(f"{index}.")}
        device = device_of(modules.get(index), model)
        with torch.inference_mode(False):
            if isinstance(layer, LessLayer) and (layer_heads := next(heads)):
                rows, dtype = len(held["n"]), model.dtype if layer.int8 else held["0.k"].dtype  # eight bits do not tell it
                layer.allocate(rows, layer_heads[0], layer_heads[1], held["0.mean"].shape[3], dtype, device)
                layer.state.take_over(held)
                layer.pin_addresses()
            elif held:
                _fill_window(path, layer, held, length, device)
    if (clock := cache.clock).begun:
        clock.counted = max(about["lengths"])
        clock.seen.fill_(clock.counted)
        known = tensors.get("masks"), tensors.get("tokens")
        clock.masks, clock.tokens = (None if x is None else x.to(clock.seen.device) for x in known)
        cache.less_layers[0].pin_addresses()
    if any(about["lengths"]):
        cache.positions = [(0,) * len(cache.keepers)] * cache.batch_size if cache.keepers else None
    return cache


def _kind(model):
    config = model.config.get_text_config(decoder=True)
    return {"type": config.model_type, "layers": config.num_hidden_layers, "dtype": str(model.dtype)}


def _tensors_of(layer) -> dict[str, torch.Tensor]:
    if not isinstance(layer, LessLayer):
        return {name: x for name in ("keys", "values") if (x := getattr(layer, name)) is not None}
    if layer.state is None:
        return {}
    return layer.state.tensors()


def _fill_window(path, layer, held, length, device):
    entries = min(length, layer.sliding_window - 1)
    if held["keys"].shape[2] != entries:
        raise LessError(
            f"{path} holds {held['keys'].shape[2]} tokens of a sliding window, and this model's window of {layer.sliding_window} "
            f"would hold {entries}: load it with the model that it was saved with"
        )
    keys, values = held["keys"].to(device), held["values"].to(device)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, length
