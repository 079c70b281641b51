"""Eviction policies: one small frozen class each, with the names and fields of `less_ref.py`.

A policy has a `budget`, the number of tokens that a KV head keeps between steps, and three functions on tensors of fixed
shape (N rows, H KV heads, G query heads for each, S slots):

    born(tokens: Tokens (slots.py), kernels) -> (N, H, m, *score_shape), or one number for all
        The scores of m new tokens.
    update(score (N, H, S), p (N, H, G, m, S), visible (N, H, m, S)) -> score, in place or not
        p: what m new queries gave each slot, softmax over the visible ones; zero if not visible. A query that is a pad sees
        nothing. A long chunk comes in several calls, in its order; a first one head by head, perhaps, and of its queries only
        the last `queries`.
    rank(position (N, H, S), score (N, H, S), n (N, 1, 1)) -> (N, H, S)
        The lowest is evicted; ties evict the newer. n counts the tokens seen, these included. Empty slots have position -1; their
        rank is ignored. Called once at the end of a chunk; it may note something in the score, in place.

What a policy may say of itself stands in Policy, the base class.
"""

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from .checks import LessError, integer
from .slots import Tokens


class Policy:
    """What policies have in common; a policy of your own inherits from it and says `budget` and `rank`.

    It should be a frozen dataclass: equal policies share tensors.
    """

    queries: ClassVar[int | None] = None
    """Which queries of a chunk the scores look at: None for all, k for the last k; 0 for none, then update is not called."""
    needs: ClassVar[str | None] = None
    """What born needs: the "kinds" of the tokens, integers that `extend` is given; or "rho", which some kernels have."""
    by_head: ClassVar[tuple[str, ...]] = ()
    """Fields that may differ from head to head: then rank finds a tensor (H, 1) there. Heads that differ in others go apart."""
    shares: ClassVar[tuple[str, ...]] = ()
    """Fields that keep their share of the budget when it changes."""
    pooled: ClassVar[bool] = False
    """True: scores are pooled over the layer; all its KV heads must follow the policy, and H is all of them."""
    score_dtype: ClassVar[torch.dtype | None] = None
    """None: float32 or wider."""
    score_shape: ClassVar[tuple[int, ...]] = ()
    """The shape of one slot's score; (C,) makes the scores (N, H, S, C)."""
    one_leaves: ClassVar[bool] = True
    """A token that comes alone makes at most one token leave, so that shapes are fixed and steps can be compiled. False: what
    ranks -inf goes even if there is room, so several may go at once."""
    if TYPE_CHECKING:  # a field or a property of each policy

        @property
        def budget(self) -> int: ...

    def born(self, tokens: Tokens, kernels) -> torch.Tensor | int:
        return 0

    def update(self, score: torch.Tensor, p: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return score

    def rank(self, position: torch.Tensor, score: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def with_budget(self, budget: int) -> "Policy":
        """The same policy for another budget; its shares are rounded down."""
        budget = integer("a budget", budget)
        shares = {name: budget * getattr(self, name) // self.budget for name in self.shares}
        return replace(self, budget=budget, **shares)  # type: ignore[type-var]

    def is_scaled(self, other: "Policy") -> bool:
        """Whether they are one policy at two budgets, but for rounding."""
        return type(self) is type(other) and (self._scales_to(other) or other._scales_to(self))

    def _scales_to(self, other: "Policy") -> bool:
        """Whether each field is the other's, or its budget takes it to within a token of that."""
        try:
            scaled = self.with_budget(other.budget)
        except LessError:  # a budget that leaves no room for its sinks
            return False
        names = [part.name for part in fields(self)]  # type: ignore[arg-type]
        triples = ((getattr(self, name), getattr(scaled, name), getattr(other, name)) for name in names)
        return all(new == wanted or (new != old and abs(new - wanted) <= 1) for old, new, wanted in triples)

    def _check(self, **least: int) -> None:
        """Makes these fields ints. LessError for one that is no integer, or below its least value."""
        for name, smallest in least.items():
            value = integer(f"{name} of {type(self).__name__}", getattr(self, name), smallest)
            if name in {field.name for field in fields(self)}:  # type: ignore[arg-type]
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Window(Policy):
    """Keeps the last `recent` tokens (local attention: Child et al. 2019, Parmar et al. 2018)."""

    recent: int
    queries: ClassVar[int] = 0
    by_head: ClassVar[tuple[str, ...]] = ("recent",)

    def __post_init__(self):
        self._check(recent=1)

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
    queries: ClassVar[int] = 0
    by_head: ClassVar[tuple[str, ...]] = ("recent",)

    def __post_init__(self):
        self._check(sinks=0, recent=0)
        self._check(budget=1)

    @property
    def budget(self) -> int:
        return self.sinks + self.recent

    def rank(self, position, score, n):
        return position.masked_fill(position < self.sinks, torch.iinfo(position.dtype).max)

    def with_budget(self, budget: int) -> "Lambda":
        """The same number of sinks; the window takes the rest."""
        budget = integer("a budget", budget)
        if budget <= self.sinks:
            raise LessError(f"a budget of {budget} leaves no recent tokens beside {self.sinks} sinks: give it more")
        return replace(self, recent=budget - self.sinks)


@dataclass(frozen=True)
class H2O(Policy):
    """Keeps the last `recent` tokens and the `heavy` ones with the most accumulated attention (Zhang et al. 2023)."""

    heavy: int
    recent: int
    by_head: ClassVar[tuple[str, ...]] = ("heavy", "recent")

    def __post_init__(self):
        self._check(heavy=0, recent=0)
        self._check(budget=1)

    @property
    def budget(self) -> int:
        return self.heavy + self.recent

    def update(self, score, p, visible):
        return score.add_(ordered_sum(p.flatten(2, 3)))

    def rank(self, position, score, n):
        return score.masked_fill(position >= n - self.recent, torch.inf)

    def with_budget(self, budget: int) -> "H2O":
        """Heavy and recent in the same proportion; what does not divide goes to the heavy ones."""
        budget = integer("a budget", budget)
        recent = budget * self.recent // self.budget
        return replace(self, heavy=budget - recent, recent=recent)


@dataclass(frozen=True)
class TOVA(Policy):
    """Keeps what the last query attends to most, by the mean over all query heads of the layer (Oren et al. 2024)."""

    budget: int
    pooled: ClassVar[bool] = True
    queries: ClassVar[int] = 1

    def __post_init__(self):
        self._check(budget=1)

    def update(self, score, p, visible):
        real = visible.any(-1)[:, 0]  # (N, m)
        newest = real & (_later(real) == 0)  # (N, m), at most one query in each row
        mean = ordered_sum(p.flatten(1, 2)[:, None])[:, 0] / (p.shape[1] * p.shape[2])  # (N, m, S)
        pooled = (mean * newest[..., None]).sum(1)  # (N, S)
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
    by_head: ClassVar[tuple[str, ...]] = ("budget", "recent")
    shares: ClassVar[tuple[str, ...]] = ("recent",)

    def __post_init__(self):
        self._check(budget=1, recent=0, history=1)
        if self.recent > self.budget or self.history > 52:
            raise LessError(f"Scissorhands needs recent within the budget and a history of at most 52, not {self}")

    @property
    def queries(self) -> int:  # type: ignore[override]
        return self.history

    def update(self, score, p, visible):
        below = visible & (p.mean(2) * visible.sum(-1, keepdim=True) < 1 - 1e-6)  # (N, H, m, S)
        real = visible.any(-1)  # (N, H, m)
        later = _later(real)  # (N, H, m)
        bit = torch.where(later < self.history, 1 << later, 0)  # (N, H, m)
        shift = real.sum(-1, keepdim=True).clamp(max=self.history)  # (N, H, 1)
        return ((score << shift) + (below * bit[..., None]).sum(2)) & (2**self.history - 1)

    def rank(self, position, score, n):
        return (-_bits_set(score)).masked_fill(position >= n - self.recent, torch.iinfo(score.dtype).max)


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keeps the last `window` tokens and those to which the last `window` queries attend most, all together; a token counts as
    much as the best of its neighbours within `reach` positions (Li et al. 2024: max pooling with a kernel of 2 reach + 1).

    The paper chooses once, at the end of the prompt, and keeps all that is generated; here the window moves on. Each slot
    holds `window` numbers as its score: what each of the last queries gave it.
    """

    budget: int
    window: int
    reach: int
    by_head: ClassVar[tuple[str, ...]] = ("budget",)

    def __post_init__(self):
        self._check(budget=1, window=1, reach=0)
        if self.window > self.budget:
            raise LessError(f"SnapKV needs its window within the budget, not {self}")

    @property
    def score_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.window,)

    @property
    def queries(self) -> int:  # type: ignore[override]
        return self.window

    def update(self, score, p, visible):
        real = visible.any(-1)[:, 0]  # (N, m)
        votes = torch.cat([score, ordered_sum(p).mT.to(score.dtype)], -1)  # (N, H, S, window + m)
        real = torch.cat([real.new_ones(len(real), self.window), real], 1)  # (N, window + m)
        last = real.long().argsort(stable=True)[:, -self.window :]  # (N, window), pads come first
        return votes.gather(3, last[:, None, None].expand(score.shape))

    def rank(self, position, score, n):
        recent = position >= n - self.window
        place = position.argsort(-1)  # (N, H, S)
        ordered = position.gather(2, place)
        votes = score.sum(-1).masked_fill(recent | (position < 0), 0).gather(2, place)
        best = votes
        for apart in range(1, min(self.reach, position.shape[2] - 1) + 1):
            near = ordered[..., apart:] - ordered[..., :-apart] <= self.reach
            after = torch.nn.functional.pad(votes[..., apart:] * near, (0, apart))
            before = torch.nn.functional.pad(votes[..., :-apart] * near, (apart, 0))
            best = best.maximum(after).maximum(before)
        return torch.zeros_like(best).scatter(2, place, best).masked_fill(recent, torch.inf)

    def with_budget(self, budget: int) -> "SnapKV":
        """The same share of the window, rounded down, and at least one token."""
        budget = integer("a budget", budget)
        return replace(self, budget=budget, window=max(1, budget * self.window // self.budget))


@dataclass(frozen=True)
class Retention(Policy):
    """Keeps the last `recent` tokens and those that are worth most by a - b log(1 + age) + c log(s + 1e-4) + d log(l + 1e-4): a
    departure from the paper.

    a, b, c and d are what rho of the kernels said of the token's q, k and v when it entered (features.py); age counts the tokens
    that came since; s and l are the attention that it got, fading by each of FADING with every query. The score is these six.
    """

    budget: int
    recent: int
    needs: ClassVar[str] = "rho"
    score_shape: ClassVar[tuple[int, ...]] = (6,)
    by_head: ClassVar[tuple[str, ...]] = ("budget", "recent")
    shares: ClassVar[tuple[str, ...]] = ("recent",)

    FADING = (0.9, 0.99)
    LEAST = 1e-4
    queries: ClassVar[int] = 3200  # what earlier ones gave has faded to less than 1e-11

    def __post_init__(self):
        self._check(budget=1, recent=0)
        if self.recent > self.budget:
            raise LessError(f"Retention needs recent within the budget, not {self}")

    def born(self, tokens, kernels):
        return torch.nn.functional.pad(kernels.rho(tokens.q, tokens.k, tokens.v), (0, 2))  # (N, H, m, 6)

    def update(self, score, p, visible):
        real, got = visible.any(-1), ordered_sum(p)  # (N, H, m), (N, H, m, S)
        if got.shape[2] == 1:  # as below, where powers for each slot would take a step longer than all else
            one = real.to(score.dtype)  # (N, H, 1)
            for seen, fading in zip(score[..., 4:].unbind(-1), self.FADING):  # (N, H, S) each
                seen.addcmul_(seen, one, value=fading - 1).add_(got[:, :, 0])
            return score
        fading = score.new_tensor(self.FADING)
        queries = real.sum(-1)[..., None, None]  # (N, H, 1, 1)
        got = got.mT.to(score.dtype) @ fading ** _later(real)[..., None]  # (N, H, S, 2)
        score[..., 4:].mul_(fading**queries).add_(got)
        return score

    def rank(self, position, score, n):
        a, b, c, d, *_ = score.unbind(-1)  # (N, H, S) each
        age = (n - position).to(score.dtype)  # (N, H, S), one more than the age
        short, long = (score[..., 4:] + self.LEAST).log_().unbind(-1)
        worth = torch.addcmul(a, b, age.log_(), value=-1).addcmul_(c, short).addcmul_(d, long)
        return worth.masked_fill_(position >= n - self.recent, torch.inf)


def kind_of(policy: Policy) -> Hashable:
    """Equal for policies that heads can follow together: of one class, and equal but for the fields that may differ by head."""
    if not policy.by_head:
        return policy
    own = [getattr(policy, part.name) for part in fields(policy) if part.name not in policy.by_head]  # type: ignore[arg-type]
    return type(policy), *own


def together(policies: Sequence[Policy], device: torch.device | str) -> Policy:
    """One policy for heads that follow these, all of one kind: a number that differs becomes a tensor (H, 1)."""
    one = copy.copy(policies[0])
    for name in one.by_head:
        numbers = [getattr(policy, name) for policy in policies]
        if len(set(numbers)) > 1:
            object.__setattr__(one, name, torch.tensor(numbers, device=device)[:, None])
    return one


def best_first(rank, position):
    """Slots by rank, the highest first; of equals the lower position first, and empty ones (position -1) last.

    rank, position (N, H, S) -> (N, H, S)
    """
    order = position.masked_fill(position < 0, torch.iinfo(position.dtype).max).argsort(-1)
    return order.gather(2, rank.gather(2, order).sort(dim=-1, descending=True, stable=True).indices)


def ordered_sum(x):
    """The sum over dimension 2, added in the same order in every slot: torch's own order differs between the last slots and the
    others, and would decide ties by the slots of the tokens."""
    own = False  # whether x lies in memory of this function
    while x.shape[2] > 1:
        half = x.shape[2] // 2
        first, second, rest = x[:, :, :half], x[:, :, half : 2 * half], x[:, :, 2 * half :]
        x = first.add_(second) if own else first + second
        x, own = torch.cat([x, rest], 2) if rest.shape[2] else x, True
    return x.squeeze(2)


def _later(real):
    """For each query, how many real ones come after it: real (..., m) bool -> (..., m)."""
    return real.sum(-1, keepdim=True) - real.cumsum(-1)


def _bits_set(bits):
    """How many bits are set in each int64, by adding neighbours: bits, pairs, fours, then all bytes at once."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (bits * 0x0101010101010101) >> 56
