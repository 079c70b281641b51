"""Whether kernels are those of the model that vLLM has loaded, told by what it computes, as hf/identity.py does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.forward_context import set_forward_context

from ..hf.identity import OF_ANOTHER_MODEL, WITHOUT_IDENTITY, difference_from, line, probe, rope_of
from ..layer.checks import LessError
from ..setting import Setting
from .attention import LessAttention


def check_identity(model: nn.Module, layers: Sequence[LessAttention], setting: Setting, vllm_config: VllmConfig) -> None:
    """One pass over a few tokens, in all processes at once. LessError, with the reason, if the kernels are another model's."""
    kernels, config = setting.kernels, vllm_config.model_config.hf_text_config
    if kernels is not None and "fingerprint" in kernels.about:
        raise LessError(WITHOUT_IDENTITY)
    if kernels is None or "identity" not in kernels.about:
        return  # controls belong to every model
    device = layers[0].memory[0].kv_cache[0].device
    ids, positions = (x.to(device) for x in probe(config))  # (T,)
    for layer in layers:
        layer.probed = ()
    try:
        with torch.inference_mode(), set_forward_context(None, vllm_config, num_tokens=len(ids)):
            model(ids.int(), positions)  # of vLLM's own dtypes: compiled code does not look
        rank, add = get_tensor_model_parallel_rank(), _add(device, vllm_config)
        lines = [line(q, k, v, rank, add) for q, k, v in (layer.probed for layer in layers)]
    finally:
        for layer in layers:
            layer.probed = None
    here: dict[str, Any] = {"rope": rope_of(vllm_config.model_config.hf_config), "layers": lines}
    if difference := difference_from(kernels, here, setting.less_layers):
        raise LessError(OF_ANOTHER_MODEL.format(difference) + ', or say "kernels": "none", for the bare policy')


def _add(device: torch.device, vllm_config: VllmConfig) -> Any:
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return None
    return lambda sums: tensor_model_parallel_all_reduce(sums.float().to(device)).double()
