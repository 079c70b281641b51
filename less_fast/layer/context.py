"""Streams without end: what a state holds moves back, so that no token stands beyond the positions that a model was trained for.

A departure from the paper, whose streams are no longer than the context of the model. less_ref.py has the same in numpy.
"""

from dataclasses import dataclass
from functools import cache

import torch

from .checks import LessError, integer
from .state import LayerState
from .step import known_true


@dataclass(frozen=True)
class Rotary:
    """How a layer turns queries and keys by their positions (Su et al. 2021): one position later, pair f of the numbers is turned
    by frequencies[f]. The pairs are (f, f + F), or, interleaved, (2f, 2f + 1); numbers beyond 2F are not turned."""

    frequencies: tuple[float, ...]
    interleaved: bool = False

    def turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """x (..., D) as if it stood `by` positions later, integers that broadcast to (...)."""
        F, wide = len(self.frequencies), torch.promote_types(x.dtype, torch.float32)
        exact = torch.device("cpu") if x.device.type == "mps" else x.device  # Apple's GPUs have no float64
        angle = by.to(exact)[..., None] * _on(exact, self.frequencies)  # (..., F)
        cos, sin = (wave.to(x.device, wide) for wave in (angle.cos(), angle.sin()))
        one, other = (slice(0, 2 * F, 2), slice(1, 2 * F, 2)) if self.interleaved else (slice(F), slice(F, 2 * F))
        turned, x, y = x.clone(), x[..., one].to(wide), x[..., other].to(wide)  # x and y (..., F)
        turned[..., one] = (x * cos - y * sin).to(turned.dtype)
        turned[..., other] = (y * cos + x * sin).to(turned.dtype)
        return turned


@cache
@torch.inference_mode(False)
def _on(device: torch.device, frequencies: tuple[float, ...]) -> torch.Tensor:
    """(F,) float64, made once: a CUDA graph may not copy them from the host."""
    return torch.tensor(frequencies, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Context:
    """A stream looks as if it never left the first `length` positions of a text. A token stands `moved` positions before its true
    one, but not below 0. Where new tokens find no room, all that a row holds moves back by half the length, and its low-rank
    state begins anew: what was folded cannot be moved. Policies know true positions, and scores stay what they are.

        q, k = context.enter(state, q, k)     and then `extend` with them, as without

    Raises LessError for a length below 2.
    """

    length: int
    rotary: Rotary

    def __post_init__(self):
        integer("the length of a context", self.length, 2)

    @torch.no_grad()
    def make_room(self, state: LayerState, new: torch.Tensor) -> int:
        """Moves the rows back that have no room for so many new tokens (N,). Returns how many more every row has room for.

        LessError, and nothing changed, for a row that cannot have room.
        """
        if state.moved is None:
            raise LessError("this state cannot move what it holds: allocate it with movable=True")
        by, before = self.length // 2, state.moved.clone()
        full = state.n - before + new > self.length  # (N,)
        if full.any():
            if (new[full] > by).any():
                raise LessError(
                    f"{new.max()} tokens at once find no room in a context of {self.length}: give at most {by} at a time"
                )
            state.moved += by * full
            for part in state.parts:
                slots = part.slots
                was, now = ((slots.position - moved[:, None]).clamp(min=0) for moved in (before, state.moved))  # (N, T)
                slots.write(slots.k, self.rotary.turn(slots.read(slots.k), now - was))
                part.mean.masked_fill_(full[:, None, None, None], 0)
                part.z.masked_fill_(full[:, None, None], 0)
        return int((self.length - (state.n - state.moved)).min())

    def enter(
        self, state: LayerState, q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (N, Hq, m, D) and k (N, Hkv, m, D), turned by their true positions, as they enter the state, which has room then.

        valid (N, m) bool: False for pads. LessError for more tokens than there can be room for.
        """
        new = torch.full_like(state.n, q.shape[2]) if valid is None else valid.sum(1)  # (N,)
        self.make_room(state, new)
        return self.place(state, q, k)

    def place(self, state: LayerState, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q (N, Hq, m, D) and k (N, Hkv, m, D), turned by true positions, as they stand within the context."""
        if known_true(state.moved == 0):
            return q, k
        both = self.rotary.turn(torch.cat([q, k], 1), -state.moved[:, None, None])
        return both[:, : q.shape[1]], both[:, q.shape[1] :]
