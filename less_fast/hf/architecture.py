"""What a model must be for LESS, told by its properties, and the sizes that a cache and kernels need to know of it.

LESS takes the place of the layers with full attention. All others (sliding windows, chunks, recurrent and convolutional
layers) hold a constant amount already, exactly, and keep the cache that transformers has for them.
"""

from operator import attrgetter
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..layer.checks import LessError

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo")  # what attention modules call their output projection


OTHERWISE = "use transformers' own cache for it"


def check_model(model: PreTrainedModel) -> PreTrainedConfig:
    """The model's text config. LessError, with the reason, for a model that LESS cannot serve."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise LessError(f"{name} is no model of transformers: give LESS the one within, or use LayerState and extend")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise LessError(
            f"{name} has an encoder, whose tokens its decoder attends to, too: LESS serves decoders alone; {OTHERWISE}"
        )
    if getattr(config, "alibi", False):
        raise LessError(f"{name} adds a bias for the distance to its logits (alibi): LESS serves plain dot products; {OTHERWISE}")
    if any(getattr(module, "is_causal", True) is False for module in decoder_of(model).modules()):
        raise LessError(f"{name} attends to later tokens, too (is_causal is False): LESS serves causal attention; {OTHERWISE}")
    if not model._can_set_attn_implementation() and not calls_sdpa(model):
        way = ': load it with attn_implementation="sdpa"' if model._supports_sdpa else f", which cannot be replaced: {OTHERWISE}"
        raise LessError(f"{name} has attention code of its own{way}")
    unknown = {
        type(layer).__name__ for layer in layers_of(model) if type(layer) is not DynamicLayer and not _keeps_its_own(layer)
    }
    if unknown:
        raise LessError(
            f"{name} needs a {', '.join(sorted(unknown))} of transformers, in whose place LESS cannot step: {OTHERWISE}"
        )
    if not less_layers(model):
        raise LessError(
            f"no layer of {name} has full attention: with sliding windows or recurrence memory is constant already; {OTHERWISE}"
        )
    return config


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that is handed the cache."""
    decoder = model.get_decoder()
    return cast(PreTrainedModel, decoder if isinstance(decoder, PreTrainedModel) else model.base_model)


def layers_of(model: PreTrainedModel) -> list:
    """The layers that transformers' own cache has for the model."""
    return DynamicCache(config=model.config).layers


def less_layers(model: PreTrainedModel) -> list[int]:
    """The layers that LESS serves: those with full attention."""
    return [index for index, layer in enumerate(layers_of(model)) if type(layer) is DynamicLayer]


def _keeps_its_own(layer):
    """Whether a layer holds a constant amount, and holds nothing that would need another cache class around it."""
    return type(layer) is DynamicSlidingWindowLayer or not isinstance(layer, CacheLayerMixin)


def calls_sdpa(model: PreTrainedModel) -> bool:
    """Whether the model's attention, though not to be replaced, calls torch's scaled_dot_product_attention (Falcon)."""
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    return not model._can_set_attn_implementation() and model._supports_sdpa and implementation == "sdpa"


def device_of(*modules: torch.nn.Module | None) -> torch.device:
    """Where the first of these modules that has weights computes: where they are or, if accelerate has offloaded them, where its
    hooks bring them."""
    module, device = next((module, weight.device) for module in modules if module is not None for weight in module.parameters())
    hooks: list[Any] = [part._hf_hook for part in module.modules() if hasattr(part, "_hf_hook")] if device.type == "meta" else []
    devices = [hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None]
    return torch.device(devices[0]) if devices else device


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The model's attention modules by the index of their layer, in this order."""
    modules: Any = [module for module in model.modules() if hasattr(module, "layer_idx") and _output(module) is not None]
    return {module.layer_idx: module for module in sorted(modules, key=attrgetter("layer_idx"))}


def output_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight (hidden size, Hq D) of an attention module's output projection."""
    projection = _output(module)
    return projection.weight if isinstance(projection, torch.nn.Linear) else projection.weight.T  # GPT-2's lies the other way


def _output(module):
    return next((part for name in OUTPUTS if isinstance(part := getattr(module, name, None), torch.nn.Module)), None)


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """The sizes, ints, that kernels for this model must have. LessError if layers differ in them (Gemma 4's do)."""
    return sizes_of(model.config)


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The same from a model's config."""
    config = config.get_text_config(decoder=True)
    heads = {_heads(layer) for layer in getattr(config, "per_layer_config", [config])}
    if len(heads) > 1:
        raise LessError("the layers of this model differ in their heads: use the bare policy, without kernels or a budget table")
    query_heads, kv_heads, head_dim = heads.pop()
    return dict(layers=config.num_hidden_layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)


def _heads(config):
    """Query heads, KV heads as the cache is given them, head_dim."""
    query_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    if getattr(config, "multi_query", False):  # Falcon and GPTBigCode; a newer Falcon copies its KV heads before the cache
        kv_heads = query_heads if getattr(config, "new_decoder_architecture", False) else 1
    return query_heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // query_heads


def tensor_parallel(model: PreTrainedModel) -> tuple[int, int]:
    """(which part of the heads is in this process, how many parts there are)."""
    mesh = heads_mesh(model)
    return (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())


def heads_mesh(model: PreTrainedModel):
    """The device mesh among whose processes the heads are shared out, or None."""
    mesh = getattr(model, "_device_mesh", None)
    return mesh["tp"] if mesh is not None and "tp" in (mesh.mesh_dim_names or ()) else mesh
