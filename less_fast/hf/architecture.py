"""What a model must be for LESS, told by its properties, and the sizes that a cache and kernels need to know of it.

LESS takes the place of the layers with full attention. All others (sliding windows, chunks, recurrent and convolutional
layers) hold a constant amount already, exactly, and keep the cache that transformers has for them.
"""

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..layer.checks import LessError

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo")  # what attention modules call their output projection


def check_model(model):
    """The model's text config. LessError, with the reason, for a model that LESS cannot serve."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise LessError(f"{name} is no model of transformers: give LESS the one within, or use LayerState and extend")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise LessError(f"{name} has an encoder, whose tokens its decoder attends to, too: LESS serves decoders alone")
    if getattr(config, "alibi", False):
        raise LessError(f"{name} adds a bias for the distance to its logits (alibi): LESS serves plain dot products")
    if any(getattr(module, "is_causal", True) is False for module in decoder_of(model).modules()):
        raise LessError(f"{name} attends to later tokens, too (is_causal is False): LESS serves causal attention")
    if not model._can_set_attn_implementation() and not calls_sdpa(model):
        way = ': load it with attn_implementation="sdpa"' if model._supports_sdpa else ", which cannot be replaced"
        raise LessError(f"{name} has attention code of its own{way}")
    layers = layers_of(model)
    strange = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer and not _keeps_its_own(layer)}
    if strange:
        raise LessError(f"{name} needs a {', '.join(sorted(strange))} of transformers, in whose place LESS cannot step")
    if not less_layers(model):
        raise LessError(f"no layer of {name} has full attention: with sliding windows or recurrence memory is constant already")
    return config


def decoder_of(model) -> PreTrainedModel:
    """The part of the model that is handed the cache."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def layers_of(model) -> list:
    """The layers that transformers' own cache has for the model."""
    return DynamicCache(config=model.config).layers


def less_layers(model) -> list[int]:
    """The layers that LESS serves: those with full attention."""
    return [index for index, layer in enumerate(layers_of(model)) if type(layer) is DynamicLayer]


def _keeps_its_own(layer):
    """Whether a layer holds a constant amount, and holds nothing that would need another cache class around it."""
    return type(layer) is DynamicSlidingWindowLayer or not isinstance(layer, CacheLayerMixin)


def calls_sdpa(model) -> bool:
    """Whether the model's attention, though not to be replaced, calls torch's scaled_dot_product_attention (Falcon)."""
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    return not model._can_set_attn_implementation() and model._supports_sdpa and implementation == "sdpa"


def attention_modules(model) -> list[torch.nn.Module]:
    """The model's attention modules in the order of their layers."""
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and _output(module) is not None]
    return sorted(found, key=lambda module: module.layer_idx)


def output_weight(module) -> torch.Tensor:
    """The weight (hidden size, Hq D) of an attention module's output projection."""
    projection = _output(module)
    return projection.weight if isinstance(projection, torch.nn.Linear) else projection.weight.T  # GPT-2's lies the other way


def _output(module):
    return next((part for name in OUTPUTS if isinstance(part := getattr(module, name, None), torch.nn.Module)), None)


def fingerprint(model) -> list[float]:
    """What tells this model from another of the same shape: for each layer, the norm of its key projection, or of all weights of
    its attention where keys have none of their own."""

    def norm(module):
        weights = [module.k_proj.weight] if hasattr(module, "k_proj") else [w for w in module.parameters() if w.ndim > 1]
        return torch.stack([weight.detach().float().norm() for weight in weights]).norm().item()

    return [round(norm(module), 4) for module in attention_modules(model)]


def signature(model) -> list[float]:
    """Like `fingerprint`, but it sees directions, too: for each layer the logarithm of its attention's norm, and where its
    weights point, in units of theirs. In another dtype a model differs by less than 0.01 from itself, a fine-tune by more."""

    def points(weight):
        left, right = (torch.arange(size, device=weight.device).add(1).mul(12.9898).sin() for size in weight.shape)
        return left @ weight @ right / weight.norm()

    found = []
    for module in attention_modules(model):
        weights = [weight.detach().float().flatten(1) for weight in module.parameters() if weight.ndim > 1]
        found += [torch.stack([w.norm() for w in weights]).norm().log().item(), sum(map(points, weights)).item()]
    return [round(number, 4) for number in found]


def same(one: list[float], other: list[float]) -> bool:
    """Whether two fingerprints are of one model, in whatever dtype it was."""
    return len(one) == len(other) and all(abs(a - b) <= 0.01 * b for a, b in zip(one, other))


def sizes(model) -> dict[str, int]:
    """The sizes that kernels for this model must have. LessError where layers differ in them (Gemma 4's do)."""
    return sizes_of(model.config)


def sizes_of(config) -> dict[str, int]:
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


def check_kernels(model, kernels) -> None:
    """LessError, with the reason, where LessKernels were made for another model."""
    for name, wanted in sizes(model).items():
        if kernels.sizes[name] != wanted:
            raise LessError(
                f"these kernels are for another model: {name} is {kernels.sizes[name]} in the kernels and {wanted} in the model"
            )
    known = kernels.about.get("fingerprint")
    if known and not same(known, fingerprint(model)):
        raise LessError(
            "these kernels are for another model of the same shape (its key projections differ): train kernels for this one "
            "with `less-kv train`"
        )
