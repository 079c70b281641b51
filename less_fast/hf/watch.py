"""WatchedCache: a cache that is told of every forward pass of its model, and refuses what would go wrong in silence.

The hooks on the model's decoder are functions of this module, so that a model that has them can be sent to another process.
"""

import copy
import inspect
import warnings
import weakref
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..layer.checks import LessError
from ..setting import Setting
from .architecture import decoder_of
from .clock import OTHER_ROWS, Clock
from .layer import LessLayer
from .seam import CHANGING, check_mask

BROKEN_OFF = "the forward pass before was broken off, so layers have seen different tokens: reset() the cache first"
BEYOND = (
    "this text has {0} tokens, and the kernels were trained on windows of {1}: beyond these LESS can be far worse than the bare "
    "policy. Make the cache with context={1}, leave the kernels out, or train some on longer windows (less-kv train --length)"
)
ANOTHER_MODEL = "this model is not the one that the cache was made for: make one with LessCache.for_model"


class WatchedCache(Cache):
    """What a LessCache knows of itself and its model, and what it checks before and after each pass.

    setting: how it is compressed. world_size: processes among which the heads are shared out.
    open: a pass has begun and not ended. clock: what has been seen. token_kinds: (vocabulary,), for policies that ask.
    keepers: modules of the model that keep positions outside the cache, by name (see `keepers_of_positions`). positions: what
    they held for each row after the last pass, or None before the first one. trained: for how many tokens the kernels were, until
    it has been said that there are more; None if that is no matter.
    """

    model: weakref.ref[PreTrainedModel]
    config: PreTrainedConfig
    setting: Setting
    world_size: int
    clock: Clock
    keepers: dict[str, str]
    open = False
    positions: list[tuple[int, ...]] | None = None
    token_kinds: torch.Tensor | None = None
    trained: int | None = None

    @property
    def less_layers(self) -> list[LessLayer]:
        """The layers that are LESS's; all others are transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, LessLayer)]

    @property
    def batch_size(self) -> int:
        return self.less_layers[0].batch_size

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.open:
            raise LessError(ANOTHER_MODEL)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin(self, decoder, args, kwargs) -> None:
        """Before a pass: refuses what would run wrong, and hands the kinds of the tokens on if the cache asks."""
        if self.open:
            raise LessError(BROKEN_OFF)
        if kwargs.get("use_cache") is False:
            raise LessError("use_cache=False with a LessCache would feed every token twice: leave it out")
        if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
            raise LessError(
                "a LessCache does not support output_attentions: most of what it attends to is no longer there, so leave it out"
            )
        if decoder.training:
            raise LessError("a LessCache is for inference and carries no gradients: call model.eval() first")
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if ids is None else ids  # (N, m) or (N, m, hidden size)
        if tokens is not None and self.batch_size not in (-1, tokens.shape[0]):
            raise LessError(OTHER_ROWS.format(self.batch_size, tokens.shape[0]))
        if not torch.compiler.is_compiling():  # a prompt is not compiled, and what it shows stays so
            self._check_state_of_the_model(decoder, args, kwargs, tokens)
        self.clock.ids = ids if ids is not None and ids.ndim == 2 else None
        if self.token_kinds is not None:
            if ids is None:
                raise LessError("the cache's policy needs the kinds of the tokens: give the model input_ids, not embeddings")
            for layer in self.less_layers:
                layer.kinds = self.token_kinds[ids]
        self.open = True

    def _check_state_of_the_model(self, decoder, args, kwargs, tokens):
        model, seen = self.model(), self.less_layers[0].get_seq_length()
        if model is not None and decoder_of(model) is not decoder:
            raise LessError(ANOTHER_MODEL)
        new = None if tokens is None else tokens.shape[1]
        if new == 0:
            raise LessError(nothing_new(seen))
        if new and self.less_layers[0].by_sdpa:  # `less_mask` is not asked
            mask = _argument(decoder, args, kwargs, "attention_mask")
            if mask is None and new > 1:
                self.clock.check(None)
            elif mask is not None and mask.ndim == 2:
                check_mask(mask, seen, new, self.clock)
        if self.trained and new and seen + new > self.trained:
            warnings.warn(BEYOND.format(seen + new, self.trained), stacklevel=2)
            self.trained = None  # once
        limit = rotates_in_another_way_beyond(decoder.config)
        if limit and new and 0 < seen <= limit < seen + new:
            raise LessError(
                f"{type(decoder).__name__} rotates keys in another way beyond {limit} tokens, and what the cache holds cannot be "
                f"rotated again: stay below that length"
            )
        if self.keepers and model is not None:
            self._check_positions(model, _argument(decoder, args, kwargs, "position_ids"))

    def _check_positions(self, model, position_ids):
        """Refuses a pass of a model whose modules hold positions of another text."""
        if self.positions is not None:
            stale = self.positions != held_positions(model, self.keepers, self.batch_size) and not _of_an_image(position_ids)
        else:  # positions that this very text has brought come as position_ids
            deltas = [getattr(model.get_submodule(name), "rope_deltas", None) for name in self.keepers]
            stale = position_ids is None and any(delta is not None and delta.any() for delta in deltas)
        if stale:
            places = ", ".join(f"{name}.{attribute}" for name, attribute in self.keepers.items())
            raise LessError(
                f"the model holds positions of another text than this cache's ({places}): another went through it since, and "
                f"such a model serves one at a time. reset() the cache and feed its text again; before a text without images set "
                f"rope_deltas to None"
            )

    def end(self, decoder) -> None:
        """After a pass: refuses a model that left the cache out."""
        if any(layer.unread for layer in self.less_layers):
            raise LessError(
                "the model's attention did not take its keys from the LessCache: it changes them after the cache, and then this "
                'model is not supported, or its attention is no longer "less", and then make a new cache with LessCache.for_model'
            )
        if not all(layer.reached for layer in self.less_layers):
            raise LessError(
                f"{type(decoder).__name__} did not give its keys to the cache: it is not supported, use transformers' own cache"
            )
        for layer in self.less_layers:
            layer.reached = False
        self.clock.advance()
        if not torch.compiler.is_compiling():
            self._leave_inference_mode()
            if self.keepers and (model := self.model()) is not None:
                self.positions = held_positions(model, self.keepers, self.batch_size)
        self.open = False

    def _leave_inference_mode(self):
        """Recurrent layers of transformers change tensors in place, so these must not take over the caller's autograd mode."""
        if not torch.is_inference_mode_enabled():
            return
        with torch.inference_mode(False):
            for held in (vars(layer) for layer in self.layers if not isinstance(layer, CacheLayerMixin)):
                for part in (held, *(part for part in held.values() if isinstance(part, dict))):
                    part.update({key: x.clone() for key, x in part.items() if isinstance(x, torch.Tensor) and x.is_inference()})


def watch(model: PreTrainedModel) -> None:
    """Lets the model's decoder tell of every forward pass, once."""
    decoder = decoder_of(model)
    with CHANGING:
        if not any(hook is before_pass for hook in decoder._forward_pre_hooks.values()):
            decoder.register_forward_pre_hook(before_pass, with_kwargs=True)
            decoder.register_forward_hook(after_pass, with_kwargs=True)
        own, here = getattr(type(model), GuardedPrepare.NAME, None), vars(model).get(GuardedPrepare.NAME)
        if own and (here is None or getattr(here, "__func__", None) is own):
            vars(model)[GuardedPrepare.NAME] = GuardedPrepare(model)


class GuardedPrepare:
    """A model's prepare_inputs_for_generation, which `generate` calls before each pass. With a WatchedCache it refuses a prompt
    that is not longer than what the cache has seen, of which transformers would feed something again, or does not begin with
    that; and a model that would drop the cache (Phi-3 does, where its rotation changes). It holds the model weakly, so that the
    model is gone when its owner is."""

    NAME = "prepare_inputs_for_generation"

    def __init__(self, model: PreTrainedModel):
        self.model = weakref.ref(model)
        self.__signature__ = inspect.signature(getattr(type(model), self.NAME).__get__(model))

    def __call__(self, *args, past_key_values=None, **kwargs):
        model, new = self.model(), kwargs.get("next_sequence_length")
        watched = isinstance(past_key_values, WatchedCache)
        if watched and new is not None and new < 1:
            raise LessError(nothing_new(past_key_values.get_seq_length()))
        if watched and new is not None and kwargs.get("is_first_iteration"):  # the whole text is at hand
            self._check_past(past_key_values.clock, new, *args, **kwargs)
        inputs = getattr(type(model), self.NAME)(model, *args, past_key_values=past_key_values, **kwargs)
        if watched and inputs.get("past_key_values") is not past_key_values:
            raise LessError(
                f"{type(model).__name__} rotates keys in another way beyond {model.config.original_max_position_embeddings} "
                f"tokens and drops its cache there, and folded keys cannot be rotated again: stay below that length"
            )
        return inputs

    @staticmethod
    def _check_past(clock, new, input_ids=None, *_, attention_mask=None, inputs_embeds=None, **__):
        """LessError if the text before the `new` last tokens is not what the cache was fed."""
        if inputs_embeds is None and input_ids is not None and input_ids.ndim == 2:
            mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            seen = input_ids.shape[1] - new
            clock.check(None if mask is None else mask[:, :seen], input_ids[:, :seen])

    def __reduce__(self):  # to another process the model goes as it was; LessCache.for_model guards it there
        return getattr, (self.model(), self.NAME)

    def __deepcopy__(self, memo):
        return type(self)(copy.deepcopy(self.model(), memo))


def before_pass(decoder, args, kwargs):
    if (cache := _cache_among(args, kwargs)) is not None:
        cache.begin(decoder, args, kwargs)


def after_pass(decoder, args, kwargs, output):
    if (cache := _cache_among(args, kwargs)) is not None:
        cache.end(decoder)


def _cache_among(args, kwargs):
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, WatchedCache)), None)


def _argument(decoder, args, kwargs, name):
    """The argument of that name of the decoder's forward pass, or None."""
    if name in kwargs or not args:
        return kwargs.get(name)
    return inspect.signature(decoder.forward).bind_partial(*args).arguments.get(name)


def nothing_new(seen: int) -> str:
    return (
        f"no new tokens came after the {seen} that this cache has seen: give `generate` the whole text so far with new tokens "
        f"behind it, or reset() the cache before another text"
    )


def keepers_of_positions(model: PreTrainedModel) -> dict[str, str]:
    """The modules that keep from one pass to the next what decides where tokens stand, and in which attribute: M-RoPE's shift
    of the tokens behind an image (Qwen2-VL and its relatives), and how far a dynamic RoPE has been stretched."""
    keepers = {}
    for name, module in model.named_modules():
        if hasattr(module, "rope_deltas"):
            keepers[name] = "rope_deltas"
        elif "dynamic" in str(getattr(module, "rope_type", "")) and hasattr(module, "max_seq_len_cached"):
            keepers[name] = "max_seq_len_cached"
    return keepers


def held_positions(model: PreTrainedModel, keepers: dict[str, str], rows: int) -> list[tuple[int, ...]]:
    """For each row one number of each keeper; 0 is what a text has that brought nothing unusual."""
    columns = []
    for name, attribute in keepers.items():
        module: Any = model.get_submodule(name)
        if attribute == "rope_deltas":
            deltas = [0] if module.rope_deltas is None else module.rope_deltas.flatten().tolist()
            columns.append([deltas[row * len(deltas) // rows] for row in range(rows)])  # fewer deltas are of several rows each
        else:
            reached = [value for name, value in vars(module).items() if name.endswith(attribute)]  # one for each kind of layer
            columns.append([int(max(reached)) - module.original_max_seq_len] * rows)
    return list(zip(*columns))


def _of_an_image(position_ids):
    """Whether these are positions (3 or more axes, N, m) of a chunk with an image: height and width differ there."""
    if position_ids is None or position_ids.ndim != 3 or len(position_ids) < 3:
        return False
    return not torch.equal(position_ids[-1], position_ids[-2])


def rotates_in_another_way_beyond(config) -> int | None:
    """The length at which LongRoPE goes over to other frequencies, if the model has it."""
    kinds = getattr(config, "rope_parameters", None) or {}
    for parameters in (kinds, *(kind for kind in kinds.values() if isinstance(kind, dict))):
        if parameters.get("rope_type") == "longrope":
            return parameters.get("original_max_position_embeddings")
    return None
