"""Eviction policies: one small frozen class each, with the names and fields of `less_ref.py`.

A policy has a `budget`, the number of entries that a KV head holds between steps, and two functions on tensors of fixed
shape (N rows, H KV heads, G query heads for each, S slots):

    update(score (N, H, S), p (N, H, G, m, S)) -> score    p: attention of m new queries, softmax over the visible tokens
    rank(position (N, H, S), score (N, H, S), n (N, 1, 1)) -> (N, H, S)    the lowest is evicted; ties evict the newer

`scored = False` says that update does nothing, so that p need not be computed. n counts the tokens seen, these included.
Slots without an entry have position -1; their rank is ignored. `with_budget(b)` is the same policy for b entries.
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


@dataclass(frozen=True)
class Full:
    """Keeps everything: the one policy whose tensors grow with the text."""

    budget: ClassVar[None] = None
    scored: ClassVar[bool] = False

    def update(self, score, p):
        return score

    def rank(self, position, score, n):
        return position

    def with_budget(self, budget: int) -> "Full":
        raise ValueError("the policy full has no budget: it keeps everything")


@dataclass(frozen=True)
class Window:
    """Keeps the last `recent` tokens (local attention: Child et al. 2019, Parmar et al. 2018)."""

    recent: int
    scored: ClassVar[bool] = False

    def __post_init__(self):
        _need(self, recent=1)

    @property
    def budget(self) -> int:
        return self.recent

    def update(self, score, p):
        return score

    def rank(self, position, score, n):
        return position

    def with_budget(self, budget: int) -> "Window":
        return Window(recent=budget)


@dataclass(frozen=True)
class Lambda:
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

    def update(self, score, p):
        return score

    def rank(self, position, score, n):
        return position.masked_fill(position < self.sinks, torch.iinfo(position.dtype).max)

    def with_budget(self, budget: int) -> "Lambda":
        """The same number of sinks; the window takes the rest."""
        if budget <= self.sinks:
            raise ValueError(f"a budget of {budget} leaves no recent tokens beside {self.sinks} sinks: give it more")
        return replace(self, recent=budget - self.sinks)


@dataclass(frozen=True)
class H2O:
    """Keeps the last `recent` tokens and the `heavy` ones with the most accumulated attention (Zhang et al. 2023)."""

    heavy: int
    recent: int
    scored: ClassVar[bool] = True

    def __post_init__(self):
        _need(self, heavy=0, recent=0)
        _need(self, budget=1)

    @property
    def budget(self) -> int:
        return self.heavy + self.recent

    def update(self, score, p):
        return score + p.sum((2, 3))

    def rank(self, position, score, n):
        return score.masked_fill(position >= n - self.recent, torch.inf)

    def with_budget(self, budget: int) -> "H2O":
        """Heavy and recent in the same proportion; what does not divide goes to the heavy ones."""
        if budget < 1:
            raise ValueError(f"a budget must be at least 1 token, not {budget}")
        recent = budget * self.recent // self.budget
        return H2O(heavy=budget - recent, recent=recent)


POLICIES = {"full": Full(), "window": Window(32), "lambda": Lambda(4, 28), "h2o": H2O(16, 16)}
"""Every policy by the name that the command line uses; `with_budget` turns the example into the one wanted."""
