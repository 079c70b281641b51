"""LESS's pages among vLLM's caches: to vLLM a request's state is that of a recurrent (Mamba) layer. A request has one page for
its life or, where prefixes are cached, a new one for each piece of its text, so that the ones before may be cached."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from .pages import Part, laid_out

if TYPE_CHECKING:
    from .attention import LessAttention

ALIGNED = 64  # bytes: a page is a multiple of them
LEAST = 32  # tokens in a page of keys and values, if vLLM chooses the smallest


class LessMemory(nn.Module, MambaBase):
    """The pages of some layers: a page is one request's state of all of them, so their budgets may differ and nothing is padded.

    A model all of whose layers are LESS's has one LessMemory. Its pages have the memory to themselves, which is laid out anew:
    each tensor of each layer without gaps, over all requests, so that a step works on the pages themselves. Beside layers of
    vLLM's own each of LESS's has a LessMemory, because all pages must be as large as the largest.
    """

    def __init__(self, name: str, layers: Sequence["LessAttention"], alone: bool, config: VllmConfig):
        super().__init__()
        self.layer_name, self.alone = name, alone
        self.layers = (tuple(layers),)  # in a tuple: they are modules of the model already
        parts = [(layer, part) for layer in layers for part in layer.paged.parts]
        self.parts: list[tuple[LessAttention, Part]] = sorted(parts, key=lambda item: -item[1][2].itemsize)  # so all are aligned
        size = max(sum(layer.sizes[rank] for layer in layers) for rank in range(config.parallel_config.tensor_parallel_size))
        self.page_bytes = -(-size // ALIGNED) * ALIGNED  # every process has to ask vLLM for the same pages
        self.when_bound: Callable[[], None] = lambda: None
        config.compilation_config.static_forward_context[name] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        cache, layer = vllm_config.cache_config, self.layers[0][0]
        token = 2 * layer.kv_heads * layer.head_dim * layer.paged.dtype.itemsize  # bytes of its key and value
        theirs = token * (cache.block_size if self.page_bytes > token * cache.block_size else LEAST)
        return MambaSpec(
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            block_size=cache.mamba_block_size if cache.mamba_cache_mode == "align" else vllm_config.model_config.max_model_len,
            page_size_padded=None if self.alone else -(-self.page_bytes // theirs) * theirs,  # vLLM's own pages divide it
            mamba_type=self.mamba_type,
            mamba_cache_mode=cache.mamba_cache_mode,
        )

    @property
    def kv_cache(self) -> tuple[torch.Tensor, ...]:
        """vLLM sets it, to the pages (pages, page_bytes) uint8, and finds nothing in it: it would copy pages by their bytes, and
        these are laid out anew. So step.py copies them."""
        return ()

    @kv_cache.setter
    def kv_cache(self, tensors: Sequence[torch.Tensor]) -> None:
        if not tensors:  # vLLM has measured, and takes them back
            for layer in self.layers[0]:
                layer.paged.release()
            return
        (pages,) = tensors
        self.device = pages.device
        tensors = laid_out([part for _, part in self.parts], pages, self.alone and pages.is_contiguous())
        held: dict[LessAttention, dict[str, torch.Tensor]] = {}
        for (layer, (name, _, _)), tensor in zip(self.parts, tensors):
            held.setdefault(layer, {})[name] = tensor
        for layer, named in held.items():
            layer.paged.bind(named)
        self.when_bound()

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """The requests of these pages go on in others (int64)."""
        for layer in self.layers[0]:
            layer.paged.copy(sources, targets)

    def reset(self, rows: torch.Tensor) -> None:
        """Requests begin in these pages (int64)."""
        for layer in self.layers[0]:
            layer.paged.reset(rows)
