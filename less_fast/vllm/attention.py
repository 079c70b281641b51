"""LESS's attention in the place of vLLM's: the tokens of all requests of a step enter their states."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionType

from ..layer.attend import Logits
from ..layer.checks import LessError
from ..layer.policies import Window
from ..layer.state import LayerState
from ..layer.step import extend
from ..setting import Setting
from .pages import PagedLayer
from .step import Prompts, Step


class LessAttention(nn.Module):
    """Takes the place of one Attention of vLLM's. LessError if that one computes what `extend` does not."""

    memory: tuple[Any]  # the LessMemory that has its pages; in a tuple, because it is a module of the model already
    first: bool  # of LESS's layers: it measures memory for all

    def __init__(self, attention: Attention, setting: Setting, config: VllmConfig):
        super().__init__()
        impl, self.layer_name, self.index = attention.impl, attention.layer_name, extract_layer_index(attention.layer_name)
        _check(attention, impl)
        self.most = config.scheduler_config.max_num_seqs  # requests at once
        self.query_heads, self.kv_heads, self.head_dim = attention.num_heads, attention.num_kv_heads, attention.head_size
        heads, dtype = (self.query_heads, self.kv_heads, self.head_dim), config.model_config.dtype
        logits = logits_of(impl)
        world_size = config.parallel_config.tensor_parallel_size
        shards = [setting.shard(self.index, rank, world_size) for rank in range(world_size)]
        layers = [PagedLayer(*shard, heads, dtype, logits, setting.int8, setting.context is not None) for shard in shards]
        self.sizes = [layer.page_bytes for layer in layers]  # for each process
        self.paged = layers[get_tensor_model_parallel_rank()]
        self.probed: tuple[torch.Tensor, ...] | None = None
        config.compilation_config.static_forward_context[self.layer_name] = self  # where the operator finds it

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output_shape: Any = None) -> torch.Tensor:
        """query (T, Hq D), key, value (T, Hkv D), rotated, of all tokens of the step -> (T, Hq D)."""
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        torch.ops.vllm.less_attention(query, key, value, out, self.layer_name)
        return out

    def compute(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        """The same into `out`, within a pass of the model."""
        q = query.view(-1, self.query_heads, self.head_dim)  # (T, Hq, D)
        k, v = (x.view(-1, self.kv_heads, self.head_dim) for x in (key, value))  # (T, Hkv, D)
        steps, heads = get_forward_context().attn_metadata, out.view(-1, self.query_heads, self.head_dim)  # (T, Hq, D)
        if steps is not None:
            self._enter(steps[self.memory[0].layer_name], (q, k, v), heads)
        elif self.probed is not None:
            self._probe(q, k, v, heads)
        else:
            self._measure(q, k, v, heads)

    def _enter(self, step: Step, qkv, out):
        """The tokens of a step; q (T, Hq, D), k, v (T, Hkv, D) -> out (T, Hq, D)."""
        if step.decodes:
            first = [x[: step.decodes] for x in qkv]
            ordered = first if step.order is None else [x.index_select(0, step.order) for x in first]
            y = self.paged.decode(*ordered, step.rows, step.real, step.span)  # (d, Hq, D)
            if step.order is None:
                out[: step.decodes] = y
            else:
                out.index_copy_(0, step.order, y)
        for prompts in step.prompts:
            self._enter_prompts(prompts, qkv, out)

    def _enter_prompts(self, prompts: Prompts, qkv, out):
        n, m = prompts.tokens.shape
        tokens = prompts.tokens.flatten()  # (n m,)
        q, k, v = (x.index_select(0, tokens).unflatten(0, (n, m)).transpose(1, 2) for x in qkv)  # (n, H, m, D)
        y = self.paged.prompts(q, k, v, prompts.rows, prompts.valid, prompts.computed)  # (n, Hq, m, D)
        y = y.transpose(1, 2).flatten(0, 1)  # (n m, Hq, D)
        if prompts.valid is not None:
            real = prompts.valid.flatten()
            tokens, y = tokens[real], y[real]
        out.index_copy_(0, tokens, y)

    def _probe(self, q, k, v, out):
        """Dense attention over all tokens, which are remembered: see identity.py."""
        self.probed = q.clone(), k.clone(), v.clone()
        out.copy_(dense(q, k, v, self.paged.logits))

    def _measure(self, q, k, v, out):
        """vLLM measures memory by a pass over as many tokens as there can be, which belong to nobody. What takes most is a piece
        of them all, and a copy of all requests' states; one layer stands for all, because each frees it before the next."""
        out.copy_(q)
        if not self.first or self.paged.pages:  # where there are pages, memory has been measured
            return
        states = self.paged.allocate(self.most, q.device)
        prompt = [x.transpose(0, 1)[None] for x in (q, k, v)]  # (1, H, T, D)
        out.copy_(extend(self.paged.allocate(1, q.device), *prompt, None, self.paged.logits)[0].transpose(0, 1))
        del states


def logits_of(impl: Any) -> Logits:
    """How an implementation of vLLM's attention makes logits."""
    return Logits(impl.scale, getattr(impl, "logits_soft_cap", None) or None, getattr(impl, "sinks", None))


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logits: Logits) -> torch.Tensor:
    """What the tokens of one text attend to if nothing is evicted: q (T, Hq, D), k, v (T, Hkv, D) -> (T, Hq, D)."""
    state = LayerState.allocate(Window(len(q)), 1, q.shape[1], k.shape[1], q.shape[2], None, q.dtype, q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, D)
    return extend(state, q, k, v, None, logits)[0].transpose(0, 1)


def _check(attention: Attention, impl: Any) -> None:
    """LessError for attention that is not softmax(scale q.k) v over all earlier tokens."""
    refused = {
        "adds a bias for the distance (alibi)": getattr(impl, "alibi_slopes", None) is not None,
        "shares the keys and values of another layer": getattr(attention, "kv_sharing_target_layer_name", None) is not None,
        "is no decoder's": getattr(attention, "attn_type", AttentionType.DECODER) != AttentionType.DECODER,
        "has values of another width than its keys": getattr(attention, "head_size_v", attention.head_size)
        != attention.head_size,
        "sees later tokens of images": getattr(attention, "use_mm_prefix", False),
        "holds quantised keys and values": attention.kv_cache_torch_dtype != torch.get_default_dtype(),
        "has sinks that are not where LESS looks for them": getattr(attention, "has_sink", False) and impl.sinks is None,
        "does not tell its scale": not hasattr(impl, "scale"),
        "looks back by chunks": getattr(impl, "chunk_lookback", -1) > -1,
    }
    for what, wrong in refused.items():
        if wrong:
            raise LessError(f"{attention.layer_name} {what}, which LESS does not serve: run this model without LESS")


def _less_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].compute(query, key, value, out)


def _traced(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op("less_attention", _less_attention, mutates_args=["out"], fake_impl=_traced)
