"""vLLM's decoders with LESS's attention: "LessLlamaForCausalLM" is vLLM's LlamaForCausalLM, and so on for every name there is."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from ..layer.checks import LessError
from . import PREFIX
from .asked import check, setting_of
from .attention import LessAttention
from .identity import check_identity, set_contexts
from .memory import LessMemory


class LessModel(nn.Module):
    """Before a decoder class of vLLM: when it is built, layers with full attention become LESS's. Those with a sliding window
    hold a constant amount already."""

    has_inner_state = True
    supports_mamba_prefix_caching = True

    @classmethod
    def get_mamba_state_copy_funcs(cls, kinds: Any) -> dict[Any, tuple]:
        """vLLM asks by which functions pages are copied, and finds no pages to copy: see LessMemory.kv_cache."""
        return {kind: (None,) for kind in kinds}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **others: Any):
        setting = setting_of(vllm_config)
        check(vllm_config, setting)
        with _positions_to(vllm_config.model_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **others)
        layers, alone = [], True
        for name, module in list(self.named_modules()):
            if not isinstance(module, AttentionLayerBase):
                continue
            if type(module) is not Attention:
                raise LessError(
                    f"{name} is a {type(module).__name__}, and LESS serves vLLM's own Attention: run this model without LESS"
                )
            if module.sliding_window is not None:
                alone = False
                continue
            where, _, attribute = name.rpartition(".")
            layers.append(LessAttention(module, setting, vllm_config))
            setattr(self.get_submodule(where), attribute, layers[-1])
        if tuple(layer.index for layer in layers) != setting.less_layers or not layers:
            served = [layer.index for layer in layers]
            raise LessError(f"vLLM has full attention in the layers {served}, and the model's config in {setting.less_layers}")
        parts = [layers] if alone else [[layer] for layer in layers]
        memories = [LessMemory(f"{part[0].layer_name}.less", part, alone, vllm_config) for part in parts]
        self.less_memories = nn.ModuleList(memories)
        for memory in memories:
            for layer in memory.layers[0]:
                layer.memory = (memory,)
                layer.first = layer is layers[0]
        self.less_asked = layers, setting, vllm_config
        layers[-1].memory[0].when_bound = self.less_when_bound

    def less_when_bound(self) -> None:
        """The model has its weights, and LESS its pages."""
        check_identity(self, *self.less_asked)
        set_contexts(self, *self.less_asked)


@contextmanager
def _positions_to(model_config: Any) -> Iterator[None]:
    """The model's tables of positions reach to the end of the longest text, which may lie beyond those it was trained for."""
    config, longest = model_config.hf_text_config, model_config.max_model_len
    known = getattr(config, "max_position_embeddings", None)
    try:
        if known is not None and known < longest:
            config.max_position_embeddings = longest
        yield
    finally:
        if known is not None:
            config.max_position_embeddings = known


@cache
def _model(name: str) -> type[nn.Module]:
    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    return type(name, (LessModel, base), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX) or name.removeprefix(PREFIX) not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model(name)
