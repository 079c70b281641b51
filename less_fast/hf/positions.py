"""How a model turns queries and keys by their positions, asked of the model itself: for streams beyond its context."""

import inspect
from collections.abc import Iterable, Sequence
from itertools import product

import torch
from transformers import PreTrainedModel

from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.context import Rotary
from .architecture import decoder_of
from .identity import FAR, NEAR, observed
from .watch import keepers_of_positions, rotates_in_another_way_beyond

SPARED = 2  # tokens, in 16 bits
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""By how much queries, keys and values that were turned may differ from the model's own, by their norms. What the layers before
round adds up: in bfloat16 to 5 % in the layers of SmolLM2 and of Qwen2.5-Coder-1.5B. It may change a token altogether, one of
sixteen in Qwen's, so that the worst ones are SPARED. What is turned in another way differs by as much as it is."""


def rotaries(model: PreTrainedModel) -> list[Rotary]:
    """The rotary positions of each layer that LESS serves, such that a text that stands later has the same queries and keys,
    turned. They are found by two short forward passes; a layer without positions has no frequencies.

    Raises LessError, with the reason, for a model whose positions are of another kind.
    """
    decoder, name = decoder_of(model), type(model).__name__
    if keepers_of_positions(model) or rotates_in_another_way_beyond(decoder.config):
        raise LessError(f"{name} changes what its positions mean as a text grows (or after images): leave context out")
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise LessError(f"{name} takes no position_ids, so nobody can tell what its positions mean: leave context out")
    last = trained_length(model) or 2048
    positions, later = torch.arange(NEAR + FAR, device="cpu") * max(1, last // 64), last // 2
    here, there = observed(model, positions), observed(model, positions + later)
    buffers = [buffer for place, buffer in decoder.named_buffers() if place.endswith("inv_freq") and buffer.ndim == 1]
    return fitting(buffers, [one.qkv for one in here], [one.qkv for one in there], later, name)


def fitting(known: Iterable[torch.Tensor], here: Sequence, there: Sequence, later: int, name: str) -> list[Rotary]:
    """For each layer the rotary positions by which its q (1, Hq, T, D), k, v (1, Hkv, T, D) of a text here become those of the
    text `later` positions away. known: frequencies (F,) that may be the model's. LessError, with its name, if there are none."""
    frequencies = dict.fromkeys(tuple(one.double().tolist()) for one in known)
    candidates = [Rotary(()), *(Rotary(*both) for both in product(frequencies, (False, True)))]
    by = torch.tensor([[later]], device="cpu")
    found = []
    for one, other in zip(here, there):
        wide = [rotary for rotary in candidates if 2 * len(rotary.frequencies) <= one[0].shape[-1]]
        errors = [_error(rotary, one, other, by) for rotary in wide]
        if not min(errors) <= TOLERANCE.get(one[0].dtype, 0.2):
            raise LessError(f"the positions of {name} are not rotary ones, which can be moved: leave context out")
        found.append(wide[errors.index(min(errors))])
    return found


def trained_length(model: PreTrainedModel, kernels: LessKernels | None = None) -> int | None:
    """For how many positions the model was trained, as its config says, and the kernels for it; None if nobody knows."""
    own = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    lengths = own, None if kernels is None else kernels.window
    return min((length for length in lengths if length is not None), default=None)


def can_move(model: PreTrainedModel) -> bool:
    """Whether `rotaries` finds them, so that a cache can stay within a context (`LessCache.for_model(context=...)`)."""
    try:
        rotaries(model)
    except LessError:
        return False
    return True


def _error(rotary, here, there, later):
    """By how much q, k and v of a text that stands `later` differ from those of the text here, q and k turned: the largest, by
    their norms."""
    later = later.to(here[0].device)
    turned = *(rotary.turn(x, later[:, None]) for x in here[:2]), here[2]
    return max(_apart(x, wanted) for x, wanted in zip(turned, there))


def _apart(x, wanted):
    """The norm of x - wanted, (1, H, T, D) each, by that of wanted; in 16 bits without the tokens that differ most."""
    difference, size = (y.float().square().sum((0, 1, 3)) for y in (x - wanted, wanted))  # (T,)
    spared = SPARED if x.dtype.itemsize < 4 else 0
    rest = (difference / size.clamp(min=1e-30)).argsort()[: len(size) - spared]
    return (difference[rest].sum() / size[rest].sum().clamp(min=1e-30)).sqrt().item()
