"""Eviction policies: one small frozen class each, with the names and fields of `less_ref.py`.

A policy has a `budget`, the number of entries that a KV head holds between steps, and two functions on tensors of fixed
shape (N rows, H KV heads, G query heads for each, S slots):

    update(score (N, H, S), p (N, H, G, m, S), visible (N, H, m, S)) -> score
        p: what m new queries gave each slot, softmax over the visible ones; zero where not visible. A query that is a pad sees
        nothing. A long chunk comes in several calls, in its order.
    rank(position (N, H, S), score (N, H, S), n (N, 1, 1)) -> (N, H, S)
        The lowest is evicted; ties evict the newer. n counts the tokens seen, these included. Slots without an entry have
        position -1; their rank is ignored.

Beside them: `scored` (False: update does nothing and is not called), `pooled` (True: scores are pooled over the layer, so
all its KV heads must follow the policy, and H is all of them), `score_dtype` (None: float32 or wider), and
`with_budget(b)`, the same policy for b entries. Policy, below, has them all for a policy of your own.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch


def _need(policy, **least):
    """Refuses fields below their least value, in one sentence."""
    for name, smallest in least.items():
        value = getattr(policy, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"{type(policy).__name__} needs {name} to be an integer of at least {smallest}, not {value!r}")


class Policy:
    """What policies have in common; a policy of your own inherits from it and says `budget` and `rank`.

    It should be a frozen dataclass: equal policies share tensors.
    """

    scored: ClassVar[bool] = True
    pooled: ClassVar[bool] = False
    score_dtype: ClassVar[torch.dtype | None] = None

    def update(self, score, p, visible):
        return score

    def with_budget(self, budget: int) -> "Policy":
        return replace(self, budget=budget)


@dataclass(frozen=True)
class Full(Policy):
    """Keeps everything: the one policy whose tensors grow with the text."""

    budget: ClassVar[None] = None
    scored: ClassVar[bool] = False

    def rank(self, position, score, n):
        return position

    def with_budget(self, budget: int) -> "Full":
        raise ValueError("the policy full has no budget: it keeps everything")


@dataclass(frozen=True)
class Window(Policy):
    """Keeps the last `recent` tokens (local attention: Child et al. 2019, Parmar et al. 2018)."""

    recent: int
    scored: ClassVar[bool] = False

    def __post_init__(self):
        _need(self, recent=1)

    @property
    def budget(self) -> int:
        return self.recent

    def rank(self, position, score, n):
        return position

    def with_budget(self, budget: int) -> "Window":
        return Window(recent=budget)


@dataclass(frozen=True)
class Lambda(Policy):
    """Keeps the first `sinks` and the last `recent` tokens (LM-Infinite, Han et al. 2023; StreamingLLM, Xiao et al. 2023)."""

    sinks: int
    recent: int
    scored: ClassVar[bool] = False

    def __post_init__(self):
        _need(self, sinks=0, recent=0)
        _need(self, budget=1)

    @property
    def budget(self) -> int:
        return self.sinks + self.recent

    def rank(self, position, score, n):
        return position.masked_fill(position < self.sinks, torch.iinfo(position.dtype).max)

    def with_budget(self, budget: int) -> "Lambda":
        """The same number of sinks; the window takes the rest."""
        if budget <= self.sinks:
            raise ValueError(f"a budget of {budget} leaves no recent tokens beside {self.sinks} sinks: give it more")
        return replace(self, recent=budget - self.sinks)


@dataclass(frozen=True)
class H2O(Policy):
    """Keeps the last `recent` tokens and the `heavy` ones with the most accumulated attention (Zhang et al. 2023)."""

    heavy: int
    recent: int

    def __post_init__(self):
        _need(self, heavy=0, recent=0)
        _need(self, budget=1)

    @property
    def budget(self) -> int:
        return self.heavy + self.recent

    def update(self, score, p, visible):
        return score + p.sum((2, 3))

    def rank(self, position, score, n):
        return score.masked_fill(position >= n - self.recent, torch.inf)

    def with_budget(self, budget: int) -> "H2O":
        """Heavy and recent in the same proportion; what does not divide goes to the heavy ones."""
        if budget < 1:
            raise ValueError(f"a budget must be at least 1 token, not {budget}")
        recent = budget * self.recent // self.budget
        return replace(self, heavy=budget - recent, recent=recent)


@dataclass(frozen=True)
class DecayedH2O(H2O):
    """H2O whose scores fade by `decay` with every query, so that old attention counts less (A2SF, Jo and Shin 2024)."""

    decay: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ValueError(f"DecayedH2O needs a decay above 0 and at most 1, not {self.decay!r}")

    def update(self, score, p, visible):
        real = visible.any(-1)  # (N, H, m)
        fading = self.decay ** _later(real).to(score.dtype)  # (N, H, m)
        faded = self.decay ** real.sum(-1, keepdim=True).to(score.dtype)  # (N, H, 1)
        return score * faded + (p.sum(2) * fading[..., None]).sum(2)


@dataclass(frozen=True)
class TOVA(Policy):
    """Keeps what the last query attends to most, by the mean over all query heads of the layer (Oren et al. 2024)."""

    budget: int
    pooled: ClassVar[bool] = True

    def __post_init__(self):
        _need(self, budget=1)

    def update(self, score, p, visible):
        real = visible.any(-1)[:, 0]  # (N, m)
        newest = real & (_later(real) == 0)  # (N, m), at most one query in each row
        pooled = (p.mean((1, 2)) * newest[..., None]).sum(1)  # (N, S)
        return torch.where(real.any(-1)[:, None, None], pooled[:, None].to(score.dtype), score)

    def rank(self, position, score, n):
        return score


@dataclass(frozen=True)
class Scissorhands(Policy):
    """Keeps the last `recent` tokens and those that were seldom unimportant (Liu et al. 2023): of the last `history` queries,
    how many gave the token less than the average, 1 / (visible tokens)? Attention is the mean over the query heads.

    The score is a row of `history` bits, at most 52, the newest the lowest: was the token below the average?
    """

    budget: int
    recent: int
    history: int
    score_dtype: ClassVar[torch.dtype] = torch.int64

    def __post_init__(self):
        _need(self, budget=1, recent=0, history=1)
        if self.recent > self.budget or self.history > 52:
            raise ValueError(f"Scissorhands needs recent within the budget and a history of at most 52, not {self}")

    def update(self, score, p, visible):
        below = visible & (p.mean(2) * visible.sum(-1, keepdim=True) < 1 - 1e-6)  # (N, H, m, S)
        real = visible.any(-1)  # (N, H, m)
        later = _later(real)  # (N, H, m)
        bit = torch.where(later < self.history, 1 << later, 0)  # (N, H, m)
        shift = real.sum(-1, keepdim=True).clamp(max=self.history)  # (N, H, 1)
        return ((score << shift) + (below * bit[..., None]).sum(2)) & (2**self.history - 1)

    def with_budget(self, budget: int) -> "Scissorhands":
        """The same share of recent tokens, rounded down."""
        return replace(self, budget=budget, recent=budget * self.recent // self.budget)

    def rank(self, position, score, n):
        return (-_ones(score)).masked_fill(position >= n - self.recent, torch.iinfo(score.dtype).max)


def _later(real):
    """For each query, how many real ones come after it: real (..., m) bool -> (..., m)."""
    return real.sum(-1, keepdim=True) - real.cumsum(-1)


def _ones(bits):
    """How many bits are set in each int64, by adding neighbours: bits, pairs, fours, then all bytes at once."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (bits * 0x0101010101010101) >> 56


POLICIES = {
    "full": Full(),
    "window": Window(32),
    "lambda": Lambda(4, 28),
    "h2o": H2O(16, 16),
    "decayed-h2o": DecayedH2O(16, 16, 0.99),
    "tova": TOVA(32),
    "scissorhands": Scissorhands(32, 16, 32),
}
"""Every policy by the name that the command line uses; `with_budget` turns the example into the one wanted."""
