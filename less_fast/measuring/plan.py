"""What a cache will cost, before anything runs: bytes held and moved, and how many sequences fit.

Nothing is computed by formula: the model, the kernels and the caches are laid out on torch's "meta" device, which has
shapes and no memory, and their bytes are counted.
"""

import math
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ..hf.architecture import sizes_of
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..setting import Setting

SHAPES: dict[str, PretrainedConfig] = {
    "llama-2-7b": LlamaConfig(max_position_embeddings=4096),
    "llama-2-13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        max_position_embeddings=4096,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}
"""Well-known shapes by name: costs do not depend on the values of the weights."""


@dataclass(frozen=True)
class Plan:
    """Bytes. A decoding step of a batch reads the weights, the kernels, and what every sequence holds."""

    weights: int
    kernels: int  # shared by all sequences
    full: int  # held for one sequence by the full cache, at the length
    less: int  # held for one sequence by LESS, at any length
    full_moved: int  # by a decoding step of the batch
    less_moved: int
    break_even: int  # length from which a step with LESS moves fewer bytes than with the full cache
    full_batch: int | None  # sequences of the length that fit into the memory
    less_batch: int | None


def plan(
    config: PretrainedConfig,
    policy,
    rank: int = 8,
    hidden: int = 512,
    batch: int = 1,
    length: int = 4096,
    dtype: torch.dtype = torch.float16,
    memory: int | None = None,
    family: str = "paper",
) -> Plan:
    """The costs of a model with the full cache and with LESS; rank 0: with the bare policy.

    length: tokens of a sequence, prompt and generated; dtype: of the weights, keys and values; memory: bytes on the device;
    rank, hidden, family: of the kernels.
    Buffers of the computation itself are not counted. Raises LessError where no model or kernels can have these sizes.
    """
    shape = sizes_of(config)
    with torch.device("meta"):
        try:
            weights = sum(x.numel() for x in AutoModelForCausalLM.from_config(config).parameters()) * dtype.itemsize
        except Exception as error:  # whatever transformers says of numbers that cannot be
            raise LessError(f"there is no model of this config: {type(error).__name__} {error}") from error
        kernels = LessKernels(**shape, rank=rank, hidden=hidden, family=family) if rank else None
    shared = kernels.memory() if kernels else 0
    token = 2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * dtype.itemsize
    full, less = length * token, Setting.of(shape, range(shape["layers"]), policy, kernels, "uniform").memory(dtype)

    def largest(fixed, each):
        return None if memory is None else max(0, (memory - fixed) // each)

    return Plan(
        weights=weights,
        kernels=shared,
        full=full,
        less=less,
        full_moved=weights + batch * full,
        less_moved=weights + shared + batch * less,
        break_even=math.floor((shared + batch * less) / (batch * token)) + 1,
        full_batch=largest(weights, full),
        less_batch=largest(weights + shared, less),
    )


def config_of(model: str) -> PretrainedConfig:
    """The config of a named shape, a local folder, or a repository of the hub."""
    return SHAPES[model] if model in SHAPES else AutoConfig.from_pretrained(model)
