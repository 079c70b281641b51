"""LESS's pages among vLLM's caches: to vLLM a request's state is that of a recurrent (Mamba) layer, one page for its life."""

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from .pages import Part, runs_of_parts

if TYPE_CHECKING:
    from .attention import LessAttention

ALIGNED = 64  # bytes: a page is a multiple of them


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
        own = sum(prod(shape) * dtype.itemsize for _, (_, shape, dtype) in self.parts)
        self.filling = -(-size // ALIGNED) * ALIGNED - own  # every process has to ask vLLM for pages of one size
        self._tensors: Any = ()
        self.when_bound: Callable[[], None] = lambda: None
        config.compilation_config.static_forward_context[name] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return (*(shape for _, (_, shape, _) in self.parts), (self.filling,))

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (*(dtype for _, (_, _, dtype) in self.parts), torch.uint8)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        cache, layer = vllm_config.cache_config, self.layers[0][0]
        own = sum(prod(shape) * dtype.itemsize for shape, dtype in zip(self.get_state_shape(), self.get_state_dtype()))
        theirs = 2 * layer.kv_heads * layer.head_dim * layer.paged.dtype.itemsize * cache.block_size  # a page of keys and values
        return MambaSpec(
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            block_size=vllm_config.model_config.max_model_len,
            page_size_padded=None if self.alone or own < theirs else -(-own // theirs) * theirs,  # else vLLM pads its own pages
            mamba_type=self.mamba_type,
            mamba_cache_mode=vllm_config.cache_config.mamba_cache_mode,
        )

    @property
    def kv_cache(self) -> tuple[torch.Tensor, ...]:
        """For each state of get_state_shape a tensor (pages, *shape); vLLM sets it."""
        return self._tensors

    @kv_cache.setter
    def kv_cache(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tuple(tensors)
        if not self._tensors:
            return
        pages, parts = self._tensors[0], [part for _, part in self.parts]
        page = pages.stride(0) * pages.element_size()
        if self.alone and page == sum(prod(shape) * dtype.itemsize for _, shape, dtype in parts) + self.filling:
            storage = torch.empty(0, dtype=torch.uint8, device=pages.device)
            storage.set_(pages.untyped_storage(), pages.storage_offset() * pages.element_size(), (len(pages) * page,), (1,))
            tensors = runs_of_parts(parts, storage, len(pages))
        held: dict[LessAttention, dict[str, torch.Tensor]] = {}
        for (layer, (name, _, _)), tensor in zip(self.parts, tensors):
            held.setdefault(layer, {})[name] = tensor
        for layer, named in held.items():
            layer.paged.bind(named)
        self.when_bound()

    def reset(self, rows: torch.Tensor) -> None:
        """Requests begin in these pages (int64)."""
        for layer in self.layers[0]:
            layer.paged.reset(rows)
