"""Which model this is, told by what it computes: the identity that kernels and saved caches carry.

A probe, one forward pass over a few tokens, goes through LESS's own seam and records the rotated queries, keys and values of each
layer that LESS serves. So it sees whatever decides what a cache holds (embeddings, MLPs, norms, biases, rotations, active
adapters), and it asks nothing of the weights, which may be quantised, offloaded or shared out among devices and processes.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.policies import Window
from ..layer.state import LayerState
from ..layer.step import extend
from .architecture import calls_sdpa, check_model, decoder_of, device_of, heads_mesh, less_layers, sizes
from .seam import CHANGING, TaggingLayer, layers_with, use_less_attention

NEAR, FAR = 12, 4  # tokens of the probe at positions below REACH, and up to the end of the model's context
NEAR_ALONE, NEAR_AND_FAR = [slice(NEAR)], [slice(NEAR), slice(NEAR, None)]
REACH = 64
DIRECTIONS = 2  # on which q, k and v of each token are projected: in units of their norm, 1 % of error shows as about 0.01

# What two identities may differ by, of the tokens near the beginning. Measured on the embedded model and on random Llamas and
# Qwen2s of 3 and 32 layers: the largest of all layers, and the first one.
#
#                                            directions      first layer     norms
#   float32 with 1 or 2 threads, or float64  0.000           0.000           0.000
#   bfloat16 and float16 for float32         0.001 to 0.019  0.000 to 0.005  0.002
#   int8 weights (torchao)                   0.006 to 0.028  0.004 to 0.006  0.005
#   int8 (torch, dynamic)                    0.014 to 0.086  0.010 to 0.015  0.023
#   5 % of noise on every weight             0.051 to 0.290  0.037 to 0.080  0.058
#   MLPs times 1.3                           0.091 to 0.357  0               0.085    from 0.016 on if random weights are so
#   rope_theta 500000 for 10000              0.432 to 0.916  0.299 to 0.523  0.051    small that MLPs hardly matter
#   the keys of one layer times 1.05         0.000 to 0.005  0               0.049
SAME_DTYPE = {torch.float64: 0.005, torch.float32: 0.005, torch.bfloat16: 0.03, torch.float16: 0.03}
"""For a saved cache, whose model must have the dtype that it had: directions and norms, far from the beginning also."""
ANY_DTYPE_NORMS = 0.035


OF_ANOTHER_MODEL = "these kernels are for another model of the same shape: {}; train kernels for this one with `less-kv train`"
WITHOUT_IDENTITY = "these kernels do not tell what their model computes: train them anew with `less-kv train`"


def _any_dtype(layer: int) -> float:
    """For kernels, whose model may have another dtype or be quantised: directions. What that does adds up from layer to layer.
    Tokens far from the beginning are left out, because `model.bfloat16()` rounds the frequencies of a RoPE."""
    return 0.027 if layer == 0 else 0.072 * (1 + layer / 16) ** 0.5


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What `check_kernels` and `check_saved` compare, as JSON holds it:

    "rope": config.rope_parameters, flat, or {}. "layers": for each layer that LESS serves a line of numbers, for each token of
    the probe and each of q, k and v the logarithm of the norm and the projections.
    It takes as long as one short forward pass. Every process of a model that is shared out must call it.
    Raises LessError for a model that LESS cannot serve or that does not run.
    """
    check_model(model)
    _, positions = probe(model.config.get_text_config(decoder=True))
    lines = [layer.numbers(heads_mesh(model)) for layer in observed(model, positions)]
    return {"rope": rope_of(model.config), "layers": lines}


def observed(model: PreTrainedModel, positions: torch.Tensor) -> list["Observed"]:
    """What the layers that LESS serves compute of the probe's tokens at these positions (NEAR + FAR,). Afterwards the model is as
    it was. LessError for a model that LESS cannot serve or that does not run."""
    check_model(model)
    layers = {index: Observed(calls_sdpa(model)) for index in less_layers(model)}
    with CHANGING, _left_as_it_was(model):
        use_less_attention(model)
        model.eval()
        try:
            with torch.no_grad():
                inputs = _tokens(model, positions)
                decoder_of(model)(**inputs, past_key_values=Cache(layers=layers_with(model, layers)), use_cache=True)
            return [layer for layer in layers.values() if layer.qkv]
        except LessError:
            raise
        except Exception as error:
            raise LessError(
                f"a forward pass over {NEAR + FAR} tokens fails, so {type(model).__name__} cannot be identified: make it run "
                f"before it is given kernels or saved caches ({type(error).__name__}: {error})"
            ) from error


def rope_of(config: PreTrainedConfig) -> dict[str, str]:
    """config.rope_parameters as an identity holds them."""
    return dict(_flat(getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}))


class Observed(TaggingLayer):
    """Dense attention that keeps its q (1, Hq, T, D), k, v (1, Hkv, T, D)."""

    qkv: tuple[torch.Tensor, ...]

    def attend(self, query, key, value, valid, logits):
        self.qkv = query, key, value
        (N, query_heads, T, D), kv_heads = query.shape, key.shape[1]
        state = LayerState.allocate(Window(T), N, query_heads, kv_heads, D, None, key.dtype, key.device)
        return extend(state, query, key, value, None, logits)

    def get_seq_length(self) -> int:
        return 0

    def numbers(self, mesh) -> str:
        first = 0 if mesh is None else mesh.get_local_rank()

        def add(sums):
            sums = sums.to(self.qkv[0].device)
            torch.distributed.all_reduce(sums, group=mesh.get_group())
            return sums

        q, k, v = (x[0].transpose(0, 1) for x in self.qkv)  # (T, H, D)
        return line(q, k, v, first, None if mesh is None else add)


def line(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rank: int = 0, add: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> str:
    """What one layer computed of the probe, in numbers: for each token log |x| and the projections of x / |x|, for x = q, k and v
    over all heads.

    q (T, Hq, D), k, v (T, Hkv, D): the heads of process `rank`; `add` adds a tensor (float64) over all processes that share them.
    """
    parts = []
    for x in (q, k, v):
        heads = x.cpu().double()  # (T, H, D), on the CPU first: some devices have no float64
        directions = _directions(rank * heads.shape[1], *heads.shape[1:])  # (DIRECTIONS, H, D)
        sums = torch.cat([heads.square().sum((1, 2))[:, None], torch.einsum("thd,rhd->tr", heads, directions)], 1)
        sums = sums if add is None else add(sums).cpu()  # (T, 1 + DIRECTIONS)
        norm = sums[:, :1].sqrt().clamp(min=1e-30)  # (T, 1)
        parts.append(torch.cat([norm.log(), sums[:, 1:] / norm], 1))
    return " ".join(f"{number:.4f}" for number in torch.cat(parts, 1).flatten().tolist())


def _directions(first: int, heads: int, head_dim: int) -> torch.Tensor:
    """Numbers (DIRECTIONS, heads, head_dim) that look random, of mean 0 and variance 1, for the heads from `first` on."""
    sizes = (0, DIRECTIONS), (first, first + heads), (0, head_dim)
    r, h, d = torch.meshgrid(*(torch.arange(*size, dtype=torch.float64, device="cpu") for size in sizes), indexing="ij")
    wave = (37.719 * r + 78.233 * h + 12.9898 * d + 1).sin() * 43758.5453
    return (wave - wave.floor() - 0.5) * math.sqrt(12)


def probe(config: PreTrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe's tokens (NEAR + FAR,), some of the first of the vocabulary, and their positions. config: the text config."""
    i, near, far = (torch.arange(count, device="cpu") for count in (NEAR + FAR, NEAR, FAR))
    last = (getattr(config, "max_position_embeddings", None) or 2048) - 2  # where a dynamic RoPE is not yet stretched
    reach = min(REACH, last)
    positions = torch.cat([near * (reach - 1) // (NEAR - 1), reach + far * (last - reach) // (FAR - 1)])  # (NEAR + FAR,)
    return (7919 * i * i + 131 * i + 17) % min(config.vocab_size, 1000), positions


def _tokens(model, positions) -> dict[str, torch.Tensor]:
    """The probe as the decoder takes it, at these positions: (1, NEAR + FAR) each."""
    decoder = decoder_of(model)
    ids, _ = probe(model.config.get_text_config(decoder=True))
    takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
    inputs = {"input_ids": ids} | ({"position_ids": positions} if takes_positions else {})
    return {name: row[None].to(device_of(model)) for name, row in inputs.items()}


@contextmanager
def _left_as_it_was(model) -> Iterator[None]:
    """Afterwards the model has the attention, the mode and whatever else its modules keep between passes that it had before."""
    kept = [(vars(module), vars(module).copy(), module._buffers.copy()) for module in model.modules()]
    configs = {id(config): config for _, before, _ in kept if isinstance(config := before.get("config"), PreTrainedConfig)}
    attention = [(config, config._attn_implementation) for config in configs.values()]
    frequencies = [(x, x.clone()) for name, x in model.named_buffers() if name.endswith("inv_freq") and x.device.type != "meta"]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for config, implementation in attention:
            config._attn_implementation_internal = implementation
        for now, before, buffers in kept:
            now["_buffers"].update(buffers)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update((name, value) for name, value in before.items() if now.get(name) is not value)
        for buffer, before in frequencies:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def _flat(parameters: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in parameters.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, default=str)


def check_kernels(model: PreTrainedModel, kernels: LessKernels) -> None:
    """LessError, with the reason, if LessKernels were made for another model."""
    for name, wanted in sizes(model).items():
        if kernels.sizes[name] != wanted:
            raise LessError(
                f"these kernels are for another model: {name} is {kernels.sizes[name]} in the kernels and {wanted} in the model; "
                f"train kernels for this one with `less-kv train`"
            )
    if "fingerprint" in kernels.about:
        raise LessError(WITHOUT_IDENTITY)
    if "identity" not in kernels.about:  # controls belong to every model
        return
    if difference := difference_from(kernels, identity(model), less_layers(model)):
        raise LessError(OF_ANOTHER_MODEL.format(difference))


def difference_from(kernels: LessKernels, identity: dict[str, Any], layers: Sequence[int]) -> str | None:
    """What tells the model of this identity, which LESS serves in these layers, from the one in the kernels' own, or None."""
    tolerances = [(_any_dtype(layer), ANY_DTYPE_NORMS) for layer in layers]
    return _difference(kernels.about["identity"], identity, NEAR_ALONE, tolerances)


def check_saved(path, about: dict[str, Any], model: PreTrainedModel) -> None:
    """LessError, with the reason, if a file says that its cache was saved with another model than this one of equal dtype."""
    tolerances = [(SAME_DTYPE.get(model.dtype, 0.03),) * 2] * len(less_layers(model))
    if difference := _difference(about["identity"], identity(model), NEAR_AND_FAR, tolerances):
        raise LessError(
            f"{path} was saved with another model: {difference}; load it with the model that it was saved with, with the same "
            f"adapters and quantisation"
        )


def _difference(one: dict, other: dict, parts: list[slice], tolerances: list[tuple[float, float]]) -> str | None:
    """What tells two identities apart in any of these parts of the probe's tokens, or None. tolerances: for each layer that of
    directions and that of norms."""
    try:
        ropes = one["rope"], other["rope"]
        layers = [[_parsed(line) for line in lines] for lines in (one["layers"], other["layers"])]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return "what is known of that one is broken"
    for name in ropes[0].keys() & ropes[1].keys():  # another version of transformers may know more of them
        if ropes[0][name] != ropes[1][name]:
            return f"its {name} is {ropes[0][name]}, and this model's is {ropes[1][name]}"
    if len(layers[0]) != len(layers[1]):
        return f"it has {len(layers[0])} layers with full attention, and this model {len(layers[1])}"
    for (index, (a, b, tolerance)), tokens in product(enumerate(zip(*layers, tolerances)), parts):
        difference = (a - b)[tokens].abs()  # (T, 3, 1 + DIRECTIONS)
        directions = difference[:, :, 1:].square().mean((1, 2)).sqrt().median().item()  # of most tokens: some change experts
        norms = difference[:, :, 0].median(0).values.max().item()
        if not (directions <= tolerance[0] and norms <= tolerance[1]):  # NaN is another model
            return f"queries, keys and values of its layer {index} differ from this model's by {max(directions, norms):.1%}"
    return None


def _parsed(line: str) -> torch.Tensor:
    """(tokens, 3, 1 + DIRECTIONS)"""
    return torch.tensor([*map(float, line.split())], dtype=torch.float64, device="cpu").view(NEAR + FAR, 3, 1 + DIRECTIONS)
