"""What the model that vLLM has loaded computes of a few tokens: whether kernels are its own, as hf/identity.py tells, and how it
turns queries and keys by their positions, as hf/positions.py does."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from ..hf.identity import FAR, NEAR, OF_ANOTHER_MODEL, WITHOUT_IDENTITY, difference_from, line, probe, rope_of
from ..hf.positions import fitting
from ..layer.attend import Logits
from ..layer.checks import LessError
from ..layer.context import Context
from ..setting import Setting
from .attention import LessAttention, dense, logits_of


def check_identity(model: nn.Module, layers: Sequence[LessAttention], setting: Setting, vllm_config: VllmConfig) -> None:
    """One pass over a few tokens, in all processes at once. LessError, with the reason, if the kernels are another model's."""
    kernels, config = setting.kernels, vllm_config.model_config.hf_text_config
    if kernels is not None and "fingerprint" in kernels.about:
        raise LessError(WITHOUT_IDENTITY)
    if kernels is None or "identity" not in kernels.about:
        return  # controls belong to every model
    rank, add = get_tensor_model_parallel_rank(), _add(layers[0].memory[0].device, vllm_config)
    lines = [line(*qkv, rank=rank, add=add) for qkv in observed(model, layers, vllm_config, probe(config)[1])]
    here: dict[str, Any] = {"rope": rope_of(vllm_config.model_config.hf_config), "layers": lines}
    if difference := difference_from(kernels, here, setting.less_layers):
        raise LessError(OF_ANOTHER_MODEL.format(difference) + ', or say "kernels": "none", for the bare policy')


def set_contexts(model: nn.Module, layers: Sequence[LessAttention], setting: Setting, vllm_config: VllmConfig) -> None:
    """Each layer learns how the model turns queries and keys by their positions, so that texts can stay within the setting's
    context. Two passes over a few tokens. LessError for positions that cannot be moved."""
    if setting.context is None:
        return
    known = [one for module in model.modules() if hasattr(module, "_compute_inv_freq") for one in _frequencies(module)]
    last = getattr(vllm_config.model_config.hf_text_config, "max_position_embeddings", None) or 2048
    positions, later = torch.arange(NEAR + FAR, device="cpu") * max(1, last // 64), last // 2
    both = [observed(model, layers, vllm_config, where) for where in (positions, positions + later)]
    here, there = ([[x.transpose(0, 1)[None] for x in qkv] for qkv in seen] for seen in both)  # (1, H, T, D) each
    rotaries = fitting(known, here, there, later, vllm_config.model_config.architecture)
    for layer, rotary in zip(layers, rotaries):
        layer.paged.context = Context(setting.context, rotary)


@torch.inference_mode()
def observed(
    model: nn.Module, layers: Sequence[LessAttention], vllm_config: VllmConfig, positions: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q (T, Hq, D), k, v (T, Hkv, D) of the probe's tokens at these positions (T,), of each layer.

    Layers with a sliding window see all of these few tokens. LessError if theirs is smaller.
    """
    own: list[Any] = [module for module in model.modules() if type(module) is Attention]
    if narrow := [module.layer_name for module in own if module.sliding_window < len(positions)]:
        raise LessError(f"{narrow[0]} looks back by fewer than {len(positions)} tokens, so its model cannot be told from others")
    device = layers[0].memory[0].device
    ids, positions = probe(vllm_config.model_config.hf_text_config)[0].to(device), positions.to(device)
    for layer in layers:
        layer.probed = ()
    for module in own:  # vLLM's own compute nothing outside of a step
        module.impl.forward = partial(_attend, logits_of(module.impl))
    try:
        with set_forward_context(None, vllm_config, num_tokens=len(ids)):
            model(ids.int(), positions)  # of vLLM's own dtypes: compiled code does not look
        return [cast(Any, layer.probed) for layer in layers]
    finally:
        for layer in layers:
            layer.probed = None
        for module in own:
            del module.impl.forward


def _frequencies(module: Any) -> Iterator[torch.Tensor]:
    """Those (F,) that a module which rotates may have: its classes differ in what they take, and in what they scale later."""
    for argument in (module.base, getattr(module, "scaling_factor", None)):
        with suppress(TypeError):
            found = module._compute_inv_freq(argument)
            yield from (found, found / getattr(module, "scaling_factor", 1.0))


def _attend(logits: Logits, layer: Any, q: Any, k: Any, v: Any, *others: Any, output: torch.Tensor, **more: Any) -> None:
    q, k, v = (x.view(len(x), -1, layer.head_size) for x in (q, k, v))  # (T, H, D)
    output.copy_(dense(q, k, v, logits).reshape(output.shape))


def _add(device: torch.device, vllm_config: VllmConfig) -> Any:
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return None
    return lambda sums: tensor_model_parallel_all_reduce(sums.float().to(device)).double()
