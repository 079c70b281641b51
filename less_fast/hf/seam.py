"""The seam with transformers' attention: how the attention of a model reaches the layer of its cache.

transformers hands the attention function no cache. So `TaggingLayer.update` returns the new keys as a view that points back to
the layer, and the attention function finds the layer there; keys without that pointer (training, another cache) get plain
dense attention. A model that calls scaled_dot_product_attention by itself meets the pointer there.
"""

import sys
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..layer.attend import Logits
from ..layer.checks import LessError
from .architecture import calls_sdpa, check_model, device_of, layers_of, less_layers
from .clock import Clock

CHANGING = threading.RLock()
"""Held by whoever sets a model's attention, hooks or methods, or sets them back, or torch.compile's stance."""

OLDEST, NEWEST = "5.5.0", "5.23.0"  # of transformers, tested (.ci/versions); older ones keep recurrent states outside the cache


class TaggingLayer(CacheLayerMixin):
    """A cache layer whose `update` returns the new keys with a pointer to itself: the attention function calls `attend`.

    `unread`: keys were handed out, and the attention function has not come for them. `reached`: keys came in this forward pass.
    """

    is_sliding = False

    def __init__(self, by_sdpa: bool = False):
        super().__init__()
        self.by_sdpa = by_sdpa  # the model calls scaled_dot_product_attention itself
        self.unread = self.reached = False

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        tagged = key_states.as_subclass(_Keys) if self.by_sdpa else key_states.view(key_states.shape)  # never the model's own
        tagged.less_layer = self
        self.unread = self.reached = True
        return tagged, value_states

    def read(self, query, key, value, valid, logits: Logits) -> torch.Tensor:
        """What the attention function calls, once for the keys of one update."""
        if not self.unread:
            raise LessError(
                "this model attends twice to the keys that it gave its cache once, and a LessCache counts once: use "
                "transformers' own cache for it"
            )
        if value.shape != key.shape:
            raise LessError(
                f"this model's values, {tuple(value.shape)}, have another shape than its keys, {tuple(key.shape)} (multi-head "
                f"latent attention has): LESS serves keys and values of one head_dim; use transformers' own cache for it"
            )
        self.unread = False
        return self.attend(query, key, value, valid, logits)

    @abstractmethod
    def attend(self, query, key, value, valid, logits: Logits) -> torch.Tensor:
        """query (N, Hq, m, D), key, value (N, Hkv, m, D), valid (N, m) bool or None -> (N, Hq, m, D)."""

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.get_seq_length()


class FunctionLayer(TaggingLayer):
    """Attention over one whole text by a function of q (N, Hq, T, D), k, v (N, Hkv, T, D) and the scale."""

    def __init__(self, attention: Callable, by_sdpa: bool):
        super().__init__(by_sdpa)
        self.attention = attention

    def attend(self, query, key, value, valid, logits):
        if not logits.plain:
            raise LessError(
                "kernels and budget tables are made for plain softmax attention, not yet with a softcap or sinks: use this model "
                "with the bare policy"
            )
        return self.attention(query, key, value, logits.scale)

    def get_seq_length(self) -> int:
        return 0


def predictions(model: PreTrainedModel, ids: torch.Tensor, attention: Callable) -> torch.Tensor:
    """Log-probabilities (N, T, vocabulary) of texts ids (N, T) if every layer that LESS serves attends by a function.

    attention: (index of the layer, q (N, Hq, T, D), k, v (N, Hkv, T, D), scale) -> (N, Hq, T, D), q and k rotated. The layers
        that LESS does not serve attend as they always do.
    Raises LessError for a model that LESS cannot serve, or whose layers attend by more than a plain softmax.
    """
    logits = model(**_inputs(model, ids, attention)).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def read(model: PreTrainedModel, ids: torch.Tensor, attention: Callable) -> None:
    """The same without its predictions, for what the function sees: logits of many texts would take much memory."""
    model.base_model(**_inputs(model, ids, attention))


def _inputs(model, ids, attention):
    """What the model is called with, so that its layers attend by this function."""
    check_model(model)
    layers = {index: FunctionLayer(partial(attention, index), calls_sdpa(model)) for index in less_layers(model)}
    use_less_attention(model)
    cache = Cache(layers=layers_with(model, layers))
    return {"input_ids": ids.to(device_of(model)), "past_key_values": cache, "use_cache": True}


def layers_with(model: PreTrainedModel, layers: Mapping[int, TaggingLayer]) -> list:
    """The layers of a cache: these in their places, and those that transformers has for the model in all others."""
    return [layers.get(index, own) for index, own in enumerate(layers_of(model))]


def use_less_attention(model: PreTrainedModel) -> None:
    """Switches the model to the attention "less", unless it calls torch's attention itself."""
    if calls_sdpa(model):
        return
    with CHANGING:
        model.set_attn_implementation("less")
    if model.config.get_text_config(decoder=True)._attn_implementation != "less":
        raise LessError(
            f"{type(model).__name__} did not accept the attention implementation 'less': use transformers' own cache for it"
        )


def check_version() -> None:
    """ImportError for a transformers that is too old; a warning for one that is newer than all that were tested."""
    installed = Version(transformers.__version__)
    if installed < Version(OLDEST):
        raise ImportError(f"LessCache needs transformers {OLDEST} or newer, and this is {installed}: pip install -U transformers")
    if installed.release[:2] > Version(NEWEST).release[:2]:
        warnings.warn(f"LessCache was tested with transformers up to {NEWEST}, and {installed} is newer", stacklevel=3)


def less_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function, attention_mask=None, **kwargs
):
    """The padding alone (N, 1, q_length, 1) where the mask is causal over just the new tokens, else transformers' own 4D mask.

    A LessLayer asks for a mask over the new tokens only: what it holds has no pads. What the mask says about the past must be
    what was fed; `generate` leaves masks without pads away, so no mask says that there were none, unless a single token comes.
    Masks with four dimensions pass through a model unchanged, so one that was made before a compiled forward pass arrives.
    No mask at all means that the last query sees every slot. Of a prompt into an empty static cache it does not.
    """
    if mask_function is not causal_mask_function or kv_length != q_length:
        if q_length not in (1, kv_length):
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    clock = getattr(kv_offset, "less_clock", None)
    if attention_mask is None and q_length == 1:  # compiled decoding steps shall see a mask with and without padding
        return torch.ones(batch_size, 1, 1, 1, dtype=torch.bool, device=kwargs["device"])
    if attention_mask is None:
        if clock is not None:
            clock.check(None)
        return None
    seen = int(kv_offset if clock is None else clock.length())
    check_mask(attention_mask, seen, kv_length, clock)
    return attention_mask[:, None, seen : seen + kv_length, None].bool().contiguous()


def check_mask(attention_mask: torch.Tensor, seen: int, new: int, clock: Clock | None) -> None:
    """LessError for a mask (N, columns) that does not cover the tokens seen and the new ones, or that contradicts an earlier one
    about the past."""
    if attention_mask.shape[-1] < seen + new:
        raise LessError(
            f"the attention mask covers {attention_mask.shape[-1]} tokens, but {seen} were seen before these {new}: pass a mask "
            f"over all of them, or reset() the cache before another text"
        )
    if clock is not None:
        clock.check(attention_mask[:, :seen].bool())


def less_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function: LESS for keys that come from a LessLayer, the model's own dense attention for all others."""
    layer = getattr(key, "less_layer", None)
    if layer is None:
        return _dense(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    refused = [name for name in ("position_bias", "sliding_window") if kwargs.get(name) is not None]
    if refused or kwargs.get("is_causal") is False:
        raise LessError(
            f"a LessCache does not support {', '.join(refused) or _NOT_CAUSAL}: use transformers' own cache for such a model"
        )
    valid = _valid(attention_mask, query)
    out = layer.read(query, key, value, valid, Logits(scaling, kwargs.get("softcap"), kwargs.get("s_aux")))
    return out.transpose(1, 2).contiguous(), None


def _dense(module, query, key, value, mask, scaling, dropout, **kwargs):
    """As without LESS: by scaled_dot_product_attention or, with a softcap or sinks, by the model's own eager function."""
    if _of_padding(mask, query):
        sizes = query.shape[0], query.shape[2], key.shape[2]
        mask = sdpa_mask(*sizes, attention_mask=mask[:, 0, :, 0], device=query.device)
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    if mask is None:
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _valid(mask, query):
    """(N, m) bool or None: which of the new tokens are no pads, from the mask that `less_mask` or transformers' own made."""
    if mask is None:
        return None
    if _of_padding(mask, query):
        return mask[:, 0, :, 0]
    raise LessError(_WRONG_MASK)


_NOT_CAUSAL = "attention that is not causal"
_WRONG_MASK = (
    "a LessCache takes a 2D attention mask (1 for tokens, 0 for pads), and this call made another: leave out masks of your own, "
    "token_type_ids and whatever else lets tokens see later ones"
)


def _of_padding(mask, query):
    """Whether it is a mask of `less_mask`'s own, (N, 1, m, 1)."""
    return mask is not None and mask.dtype == torch.bool and mask.shape == (query.shape[0], 1, query.shape[2], 1)


class _Keys(torch.Tensor):
    """Keys that point to their LessLayer, for a model that calls scaled_dot_product_attention by itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _sdpa(*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """In the place of scaled_dot_product_attention; of a causal mask (N, 1, m, m) the diagonal tells tokens from pads."""
    m, valid = query.shape[2], None
    if attn_mask is None and m > 1 and not is_causal:
        raise LessError(f"a LessCache does not support {_NOT_CAUSAL}: use transformers' own cache for such a model")
    if attn_mask is not None:
        fits = attn_mask.dtype == torch.bool and attn_mask.shape == (query.shape[0], 1, m, m)
        valid = attn_mask[:, 0].diagonal(dim1=1, dim2=2) if fits else None  # (N, m)
        causal = fits and valid[:, None] & torch.ones(m, m, dtype=torch.bool, device=query.device).tril()  # (N, m, m)
        if not fits or not torch.equal(attn_mask[:, 0][valid], causal[valid]):
            raise LessError(_WRONG_MASK)
    return key.less_layer.read(query, key.as_subclass(torch.Tensor), value, valid, Logits(scale))


AttentionInterface.register("less", less_attention)  # at import: a model that uses it may be sent to another process
AttentionMaskInterface.register("less", less_mask)
