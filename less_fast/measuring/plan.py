"""What a cache will cost, before anything runs: bytes held and moved, and how many sequences fit.

Nothing is computed by formula: the model, the kernels and the caches are laid out on torch's "meta" device, which has
shapes and no memory, and their bytes are counted.
"""

from dataclasses import dataclass

import torch
from rich.filesize import decimal
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from ..hf.architecture import check_model, layers_of, less_layers, sizes
from ..hf.cache import bytes_of
from ..kernels import LessKernels
from ..layer.checks import LessError, integer
from ..layer.features import RHO_HIDDEN
from ..layer.policies import Policy
from ..setting import Setting
from .caches import grow


@dataclass(frozen=True)
class Plan:
    """Bytes. A decoding step of a batch reads the weights, the kernels of LESS's layers, and what every sequence holds."""

    weights: int
    kernels: int  # shared by all sequences
    full: int  # held for one sequence by the full cache, at the length
    less: int  # held for one sequence with LESS, at the length: what LESS's layers hold does not grow
    full_moved: int  # by a decoding step of the batch
    less_moved: int
    break_even: int  # length from which a step with LESS moves fewer bytes than with the full cache
    full_batch: int | None  # sequences of the length that fit into the memory
    less_batch: int | None


def plan(
    config: PretrainedConfig,
    policy: Policy,
    rank: int = 8,
    hidden: int = 512,
    batch: int = 1,
    length: int = 4096,
    dtype: torch.dtype = torch.float16,
    memory: int | None = None,
    family: str = "paper",
) -> Plan:
    """The costs of a model with the full cache and with LESS.

    length: tokens of a sequence, prompt and generated; dtype: of the weights, keys and values; memory: bytes on the device;
    rank, hidden, family: of the kernels.
    Buffers of the computation itself are not counted. Raises LessError if no model or kernels can have these sizes, LESS cannot
    serve the model, or a layer of it holds what is known only once it runs (recurrent layers).
    """
    batch, length = integer("the batch", batch), integer("the length", length)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # whatever transformers says of numbers that cannot be
            raise LessError(f"there is no model of this config: {type(error).__name__} {error}") from error
        check_model(model)
        served = less_layers(model)
        try:
            shape = sizes(model)
        except LessError as error:
            raise LessError("the layers of this model differ in their heads, and plans are for those that do not") from error
        rho = RHO_HIDDEN if policy.needs == "rho" else None
        kernels = LessKernels(**shape, rank=rank, hidden=hidden, family=family, rho=rho)
        held = [_held(layer, shape, length, dtype) for layer in layers_of(model)]
    weights = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    shared, read = kernels.memory(), sum(kernels.layers[index].memory() for index in served)  # type: ignore[operator]
    growing = sum(held[index] for index in served)  # of the full cache, in the layers that LESS serves
    constant = Setting.of(shape, served, policy, kernels, "uniform").memory(dtype)  # of LESS, in the same
    full, less = sum(held), sum(held) - growing + constant

    def largest(fixed, each):
        return None if memory is None else max(0, (memory - fixed) // each)

    return Plan(
        weights=weights,
        kernels=shared,
        full=full,
        less=less,
        full_moved=weights + batch * full,
        less_moved=weights + read + batch * less,
        break_even=(read + batch * constant) * length // (batch * growing) + 1,
        full_batch=largest(weights, full),
        less_batch=largest(weights + shared, less),
    )


def _held(layer: object, shape: dict[str, int], length: int, dtype: torch.dtype) -> int:
    """Bytes that a layer of transformers' own holds for one sequence of the length, laid out on the device "meta"."""
    if hasattr(layer, "conv_states"):
        raise LessError("what a recurrent layer holds is known only once the model runs: measure this model with `less-kv bench`")
    if not isinstance(layer, DynamicLayer):
        return 0  # it reads the keys of another layer
    kv = torch.empty(1, shape["kv_heads"], 0, shape["head_dim"], dtype=dtype, device="meta")  # (1, Hkv, 0, D)
    try:
        grow(layer, kv, kv, length)
    except RuntimeError as error:
        raise LessError(f"no full cache can hold {length:,} tokens of this model: take fewer ({error})") from error
    return bytes_of([layer])


def table(costs: Plan, title: str, memory: float) -> Table:
    """The plan to print. memory: gigabytes of the device, 0 if not asked."""
    lines = Table("", Column("full cache", justify="right"), Column("LESS", justify="right"), title=title)
    for what, full, less in (
        ("weights of the model", costs.weights, costs.weights),
        ("weights of the kernels", 0, costs.kernels),
        ("held for each sequence", costs.full, costs.less),
        ("moved by a decoding step of the batch", costs.full_moved, costs.less_moved),
    ):
        lines.add_row(what, decimal(full, precision=2), decimal(less, precision=2))
    if memory:
        lines.add_row(f"largest batch in {memory:g} GB", f"{costs.full_batch:,}", f"{costs.less_batch:,}")
    return lines
