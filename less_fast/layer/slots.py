"""Slots: where the KV heads of a layer keep tokens. The one file that knows how unequal budgets and eight bits are stored.

A head has a slot for each token of its budget and one more, which the next token takes. All heads' slots lie in one row, one
head's behind the other's: T in all. So no head pays for another's budget. What works head by head sees them as (N, H, S), S
slots each, the most that a head has. A head with fewer shows empty ones there, which are stored nowhere.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from .checks import LessError

SCALE = 4  # bytes of the scale of a key or value in eight bits
LARGEST = 127  # its largest number is stored as this


class Tokens(NamedTuple):
    """m new tokens of each row. In pads and broken tokens q, k and v are 0."""

    q: torch.Tensor  # (N, H, G, m, D), of G query heads for each KV head
    k: torch.Tensor  # (N, H, m, D)
    v: torch.Tensor  # (N, H, m, D)
    position: torch.Tensor  # (N, m) int32, -1 for pads and broken tokens
    real: torch.Tensor | None  # (N, m) bool, False for those; None if it is known that there are none
    kinds: torch.Tensor | None = None  # (N, m) integers, for policies that need them


class Layout:
    """Which slots are whose: `sizes` of each head."""

    def __init__(self, sizes: Sequence[int], device: torch.device | str):
        self.H, self.S, self.T, self.even = len(sizes), max(sizes), sum(sizes), len(set(sizes)) == 1
        size = torch.tensor(sizes, device=device)  # (H,)
        self.first = size.cumsum(0) - size  # (H,) where a head's slots begin
        self.budget = size[:, None] - 1  # (H, 1)
        self.head = torch.arange(self.H, device=device).repeat_interleave(size, output_size=self.T)  # (T,)
        self.place = torch.arange(self.T, device=device) - self.first[self.head]  # (T,) counted from the head's first
        each = torch.arange(self.S, device=device)  # (S,)
        self.padded = self.head * self.S + self.place  # (T,) where each is among H S
        self.lacking = each >= size[:, None]  # (H, S) bool: slots that the head does not have
        self.slot = ((self.first[:, None] + each) % self.T).flatten()  # (H S,) which each is; what a head lacks is another head's

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, T, ...) -> (N, H, S, ...): itself if the heads are even, else a copy. What a head lacks holds anything."""
        if not self.even:
            x = x.index_select(1, self.slot)
        return x.view(len(x), self.H, self.S, *x.shape[2:])

    def in_a_row(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, H, S, ...) -> (N, T, ...)."""
        x = x.flatten(1, 2)
        return x if self.even else x.index_select(1, self.padded)


@lru_cache
def layout_of(sizes: tuple[int, ...], device: torch.device) -> Layout:
    """The same for all layers and caches with these sizes: it never changes."""
    return Layout(sizes, device)


class Slots:
    """What the heads of N rows keep. An empty slot has position -1.

    k, v (N, T, D), or (N, T, 4 + D) int8; position (N, T) int32; score (N, T, ...) as the policy says; free (N, H) int64: which
    of the T slots the next token takes.
    """

    NAMES = ("k", "v", "position", "score", "free")

    def __init__(self, layout: Layout, wide: torch.dtype, k, v, position, score, free):
        self.layout, self.k, self.v, self.position, self.score, self.free = layout, k, v, position, score, free
        self.wide, self.int8 = wide, k.dtype == torch.int8  # wide: what is computed in, float32 or float64
        self.row = torch.arange(len(k), device=k.device)[:, None]  # (N, 1)

    @classmethod
    def empty(
        cls, layout: Layout, rows: int, head_dim: int, dtype: torch.dtype, int8: bool, score_shape: tuple, score_dtype, device
    ) -> "Slots":
        """dtype: of keys and values that enter."""
        shape, wide = (rows, layout.T), torch.promote_types(dtype, torch.float32)
        stored, numbers = torch.int8 if int8 else dtype, width(head_dim) if int8 else head_dim
        k, v = (torch.zeros(*shape, numbers, dtype=stored, device=device) for _ in "kv")
        position = torch.full(shape, -1, dtype=torch.int32, device=device)
        score = torch.zeros(*shape, *score_shape, dtype=score_dtype or wide, device=device)
        return cls(layout, wide, k, v, position, score, layout.first.repeat(rows, 1))

    def positions(self) -> torch.Tensor:
        """(N, H, S), -1 for what a head lacks."""
        position = self.layout.by_head(self.position)
        return position if self.layout.even else position.masked_fill_(self.layout.lacking, -1)

    def scores(self) -> torch.Tensor:
        """(N, H, S, ...)."""
        return self.layout.by_head(self.score)

    def keep_scores(self, score: torch.Tensor) -> None:
        """score (N, H, S, ...)."""
        self.score.copy_(self.layout.in_a_row(score))

    # One token

    def put(self, tokens: Tokens, born: torch.Tensor | int) -> None:
        """One token of each row goes into the free slots. born: its scores (N, H, 1, ...), or one number for all."""
        at = self.free  # (N, H)
        k, v = (packed(tokens.k), packed(tokens.v)) if self.int8 else (tokens.k, tokens.v)
        self.k.index_put_((self.row, at), k[:, :, 0])  # compiled code does this in place, which it does not do with scatter_
        self.v.index_put_((self.row, at), v[:, :, 0])
        self.position.scatter_(1, at, tokens.position.expand(at.shape))
        if self.score.ndim > 2:
            at = at[..., None].expand(-1, -1, self.score.shape[2])  # (N, H, C)
        self.score.scatter_(1, at, born[:, :, 0].to(self.score.dtype) if torch.is_tensor(born) else born)

    def dot(self, q: torch.Tensor) -> torch.Tensor:
        """q (N, H, G, 1, D), wide -> q.k of each slot (N, H, G, 1, S)."""
        layout, (N, H, G, _, D), k = self.layout, q.shape, self.read(self.k)
        if layout.even:
            return torch.bmm(q.reshape(N * H, G, D), k.view(N * H, layout.S, D).mT).view(N, H, G, 1, layout.S)
        dots = torch.bmm(q.reshape(N, H * G, D), k.mT).view(N, H, G, 1, layout.T)
        return dots.gather(4, self._slots_of(N, G))

    def mix(self, p: torch.Tensor) -> torch.Tensor:
        """p (N, H, G, 1, S), 0 for empty slots -> the mean value (N, H, G, 1, D)."""
        layout, (N, H, G, _, S), v = self.layout, p.shape, self.read(self.v)
        if layout.even:
            return torch.bmm(p.reshape(N * H, G, S), v.view(N * H, S, -1)).view(N, H, G, 1, -1)
        p = p.new_zeros(N, H, G, 1, layout.T).scatter_(4, self._slots_of(N, G), p)  # of what a head lacks p is 0
        return torch.bmm(p.view(N, H * G, layout.T), v).view(N, H, G, 1, -1)

    def _slots_of(self, N, G):
        return self.layout.slot.view(1, self.layout.H, 1, 1, -1).expand(N, -1, G, -1, -1)  # (N, H, G, 1, S)

    def take(self, slot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """slot (N, H), of the T -> its key and value (N, H, 1, D)."""
        rows = slot[..., None].expand(-1, -1, self.k.shape[2])  # (N, H, D)
        return self.read(self.k.gather(1, rows))[:, :, None], self.read(self.v.gather(1, rows))[:, :, None]

    def free_at(self, slot: torch.Tensor) -> None:
        """Empties one slot of each head, (N, H) of the T: the next token goes there."""
        self.position.scatter_(1, slot, -1)
        self.free.copy_(slot)

    # Many tokens

    def held(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """k and v (N, H, S, D), position (N, H, S) and score (N, H, S, ...) of all slots."""
        k, v = (self.layout.by_head(self.read(x) if self.int8 else x) for x in (self.k, self.v))
        return k, v, self.positions(), self.scores()

    def fill(self, chosen: torch.Tensor, kept: torch.Tensor, k, v, position, score) -> None:
        """Other tokens take the place of all: of k and v (N, H, E, D), position and score (N, H, E, ...) those chosen.

        chosen (N, H, E'): which of the E go into a head's slots, in their order; kept (N, H, E') bool: whether they do.
        """
        layout, (N, H, E), most = self.layout, position.shape, chosen.shape[2]
        place = layout.place.clamp(max=most - 1)
        ordered = layout.head * most + place  # (T,)
        chosen = chosen.flatten(1).index_select(1, ordered) + layout.head * E  # (N, T), of H E
        stays = kept.flatten(1).index_select(1, ordered) & (layout.place < most)  # (N, T)
        rows = (torch.arange(0, N * H * E, H * E, device=chosen.device)[:, None] + chosen).flatten()  # (N T,)
        k, v, position, score = (
            x.reshape(N * H * E, *x.shape[3:]).index_select(0, rows).view(N, layout.T, *x.shape[3:])
            for x in (k, v, position, score)
        )
        self.write(self.k, k)
        self.write(self.v, v)
        self.score.copy_(score)
        self.position.copy_(position).masked_fill_(~stays, -1)
        self.free.copy_(layout.first + kept.sum(2))

    def of_head(self, row: int, head: int) -> dict[str, torch.Tensor]:
        """k and v (E, D), position (E,) and score (E, ...) of one head of a row, in the order of their positions: copies."""
        first, size = int(self.layout.first[head]), int(self.layout.budget[head]) + 1
        kept = {name: getattr(self, name)[row, first : first + size] for name in ("k", "v", "position", "score")}
        if self.int8:
            kept |= {name: unpacked(kept[name], torch.float64) for name in "kv"}  # which holds each product exactly
        order = kept["position"].argsort(stable=True)[(kept["position"] < 0).sum() :]
        return {name: x[order] for name, x in kept.items()}

    def write(self, held: torch.Tensor, new: torch.Tensor) -> None:
        """Keys or values (N, T, D) take the place of all that are held."""
        held.copy_(packed(new) if self.int8 else new)

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        """Keys or values (..., D), wide."""
        return unpacked(stored, self.wide) if self.int8 else stored.to(self.wide)


def width(head_dim: int) -> int:
    """Bytes of a key or value in eight bits. LessError for a head_dim of which rows would not lie where a float32 can."""
    if head_dim % SCALE:
        raise LessError(f"int8 needs a head_dim that is a multiple of {SCALE}, not {head_dim}: leave int8 out")
    return SCALE + head_dim


def packed(x: torch.Tensor) -> torch.Tensor:
    """x (..., D) -> (..., 4 + D) int8: a float32 scale, by which the largest number is 127, and the numbers, rounded to whole
    ones, halves to even. A departure from the paper.

    What is unpacked and packed again keeps its bits: a float32 that was divided by 127 stays itself, times 127 and divided again.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / LARGEST  # (..., 1)
    whole = (x / torch.where(scale > 0, scale, 1)).round().to(torch.int8)
    return torch.cat([scale.view(torch.int8), whole], -1)


def unpacked(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(..., 4 + D) int8 -> (..., D) in the dtype."""
    scale = stored[..., :SCALE].view(torch.float32).to(dtype)  # (..., 1)
    whole = stored.to(dtype)[..., SCALE:]  # rows are converted faster whole, scale and all
    if torch.compiler.is_compiling():
        return whole * scale
    return whole.mul_(scale)  # in the memory made just now, which compiled code does without
