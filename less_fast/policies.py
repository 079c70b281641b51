"""Eviction policies: one small frozen class each, with the names and fields of `less_ref.py`.

A policy has a `budget`, the number of entries that a KV head holds between steps, and two functions on tensors of fixed
shape (N rows, H KV heads, G query heads for each, S slots):

    update(score (N, H, S), p (N, H, G, m, S), visible (N, H, m, S)) -> score
        p: what m new queries gave each slot, softmax over the visible ones; zero where not visible. A query that is a pad sees
        nothing. A long chunk comes in several calls, in its order.
    rank(position (N, H, S), score (N, H, S), n (N, 1, 1)) -> (N, H, S)
        The lowest is evicted; ties evict the newer. n counts the tokens seen, these included. Slots without an entry have
        position -1; their rank is ignored.

Beside them, for a policy that needs more, with what they are in Policy, the base class:

    scored = True         False: update does nothing and is not called
    pooled = False        True: scores are pooled over the layer; all its KV heads must follow the policy, and H is all of them
    score_dtype = None    None: float32 or wider
    score_shape = ()      the shape of one slot's score; (C,) makes the scores (N, H, S, C). They start at 0
    kinds = False         True: tokens come with a kind, an integer that becomes the first number of their score
    selective = False     True: what ranks -inf goes even where there is room, so several may go at once
    settle(position, score, n) -> score    called once at the end of a chunk, before rank
    with_budget(b)        the same policy for b entries
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch


def _need(policy, **least):
    """Refuses fields below their least value, or beyond int32, which positions are, in one sentence."""
    for name, smallest in least.items():
        value = getattr(policy, name)
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < 2**31 - 1:
            raise ValueError(
                f"{type(policy).__name__} needs {name} to be an integer of at least {smallest} and below 2^31 - 1, not {value!r}"
            )


def _need_share(policy, name):
    """Refuses a field that is no number above 0 and at most 1."""
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{type(policy).__name__} needs a {name} above 0, at most 1, not {value!r}")


def _need_budget(budget):
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"a budget must be a whole number of tokens, at least 1, not {budget!r}")


class Policy:
    """What policies have in common; a policy of your own inherits from it and says `budget` and `rank`.

    It should be a frozen dataclass: equal policies share tensors.
    """

    scored: ClassVar[bool] = True
    pooled: ClassVar[bool] = False
    score_dtype: ClassVar[torch.dtype | None] = None
    score_shape: ClassVar[tuple[int, ...]] = ()
    kinds: ClassVar[bool] = False
    selective: ClassVar[bool] = False

    def update(self, score, p, visible):
        return score

    def settle(self, position, score, n):
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
        _need_budget(budget)
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
        return score + _sum(p.flatten(2, 3))

    def rank(self, position, score, n):
        return score.masked_fill(position >= n - self.recent, torch.inf)

    def with_budget(self, budget: int) -> "H2O":
        """Heavy and recent in the same proportion; what does not divide goes to the heavy ones."""
        _need_budget(budget)
        recent = budget * self.recent // self.budget
        return replace(self, heavy=budget - recent, recent=recent)


@dataclass(frozen=True)
class DecayedH2O(H2O):
    """H2O whose scores fade by `decay` with every query, so that old attention counts less (A2SF, Jo and Shin 2024)."""

    decay: float

    def __post_init__(self):
        super().__post_init__()
        _need_share(self, "decay")

    def update(self, score, p, visible):
        real = visible.any(-1)  # (N, H, m)
        fading = self.decay ** _later(real).to(score.dtype)  # (N, H, m)
        faded = self.decay ** real.sum(-1, keepdim=True).to(score.dtype)  # (N, H, 1)
        return score * faded + _sum(_sum(p) * fading[..., None])


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
        mean = _sum(p.flatten(1, 2)[:, None])[:, 0] / (p.shape[1] * p.shape[2])  # (N, m, S)
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
        _need_budget(budget)
        return replace(self, budget=budget, recent=budget * self.recent // self.budget)

    def rank(self, position, score, n):
        return (-_ones(score)).masked_fill(position >= n - self.recent, torch.iinfo(score.dtype).max)


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

    def __post_init__(self):
        _need(self, budget=1, window=1, reach=0)
        if self.window > self.budget:
            raise ValueError(f"SnapKV needs its window within the budget, not {self}")

    @property
    def score_shape(self) -> tuple[int, ...]:
        return (self.window,)

    def update(self, score, p, visible):
        real = visible.any(-1)[:, 0]  # (N, m)
        votes = torch.cat([score, _sum(p).mT.to(score.dtype)], -1)  # (N, H, S, window + m)
        real = torch.cat([real.new_ones(len(real), self.window), real], 1)  # (N, window + m)
        last = real.long().argsort(stable=True)[:, -self.window :]  # (N, window), pads come first
        return votes.gather(3, last[:, None, None].expand(score.shape))

    def rank(self, position, score, n):
        recent = position >= n - self.window
        place = position.argsort(-1)  # (N, H, S)
        where = position.gather(2, place)
        votes = score.sum(-1).masked_fill(recent | (position < 0), 0).gather(2, place)
        best = votes
        for apart in range(1, min(self.reach, position.shape[2] - 1) + 1):
            near = where[..., apart:] - where[..., :-apart] <= self.reach
            after = torch.nn.functional.pad(votes[..., apart:] * near, (0, apart))
            before = torch.nn.functional.pad(votes[..., :-apart] * near, (apart, 0))
            best = best.maximum(after).maximum(before)
        return torch.zeros_like(best).scatter(2, place, best).masked_fill(recent, torch.inf)

    def with_budget(self, budget: int) -> "SnapKV":
        """The same share of the window, rounded down, and at least one token."""
        _need_budget(budget)
        return replace(self, budget=budget, window=max(1, budget * self.window // self.budget))


@dataclass(frozen=True)
class FastGen(Policy):
    """Each head keeps the least that recovers its attention (Ge et al. 2023): 1 special tokens, 2 and punctuation, 3 and the
    `frequent` others with the most accumulated attention, 4 and the last `local`, or 5 everything.

    A head chooses when the budget is first exceeded, with a prompt at its end: the first of these sets that got at least
    `recovery` of all attention so far. (A token that was local counts with what it got while it was.) Until then nothing is
    evicted; from then on all else goes, and what does not fit the budget: the least attended, then the newest special tokens,
    never the local ones. So heads hold different numbers of tokens in tensors of the same shape, `budget` at most.

    Tokens come with a kind: 0, 1 for punctuation or 2 for special, which `token_kinds(tokenizer)` tells of each token id. A
    cache is given that table, `LessCache.for_model(..., token_kinds=table)`, and reads the input ids of every forward pass;
    `extend` takes the kinds themselves, `kinds=...`. Each slot holds five numbers as its score: the kind, the attention it
    got, the part of that which it got while local, how many queries it has seen, and its head's choice, 0 before.
    """

    budget: int
    frequent: int
    local: int
    recovery: float
    score_shape: ClassVar[tuple[int, ...]] = (5,)
    kinds: ClassVar[bool] = True
    selective: ClassVar[bool] = True

    def __post_init__(self):
        _need(self, budget=1, frequent=0, local=0)
        _need_share(self, "recovery")
        if self.frequent + self.local > self.budget:
            raise ValueError(f"FastGen needs frequent + local within the budget, not {self}")

    def update(self, score, p, visible):
        kind, attention, near, age, choice = score.unbind(-1)
        ages = age[:, :, None] + visible.cumsum(2)  # (N, H, m, S)
        p = _sum(p)  # (N, H, m, S)
        attention = attention + _sum(p)
        near = near + _sum(p * (ages <= self.local))
        return torch.stack([kind, attention, near, ages[:, :, -1], choice], -1)

    def settle(self, position, score, n):
        held = (position >= 0).to(score.dtype)
        _, attention, near, _, choice = (score * held[..., None]).unbind(-1)
        choice = choice.amax(-1, keepdim=True)  # (N, H, 1), tokens that came since have 0
        chooses = (choice == 0) & (n > self.budget)
        if chooses.any():
            first = torch.full_like(choice, 5)
            for candidate in (4, 3, 2, 1):
                member = self._members(position, score, n, torch.full_like(choice, candidate))
                recovered = torch.where(member, attention, near if candidate == 4 else 0).sum(-1, keepdim=True)
                enough = recovered >= (self.recovery - 1e-6) * attention.sum(-1, keepdim=True)
                first = first.masked_fill(enough, candidate)
            choice = torch.where(chooses, first, choice)
        return torch.cat([score[..., :4], choice[..., None].expand(*position.shape, 1)], -1)

    def _members(self, position, score, n, choice):
        """What a head with that choice (N, H, 1) keeps: (N, H, S) bool."""
        kind, attention = score[..., 0], score[..., 1]
        local = position >= n - self.local
        member = (kind == 2) | (choice >= 2) & (kind == 1) | (choice >= 4) & local
        others = (position >= 0) & ~member
        order = best_first(attention.masked_fill(~others, -torch.inf), position)
        most = torch.zeros_like(member).scatter(2, order[..., : self.frequent], True)
        return member | (choice >= 3) & others & most | (choice == 5)

    def rank(self, position, score, n):
        kind, attention, choice = score[..., 0], score[..., 1], score[..., :1, 4]  # choice: the same in all slots
        rank = attention.masked_fill(kind == 2, torch.finfo(score.dtype).max)
        rank = rank.masked_fill((choice >= 4) & (position >= n - self.local), torch.inf)
        return rank.masked_fill(~self._members(position, score, n, choice) & (choice > 0), -torch.inf)

    def with_budget(self, budget: int) -> "FastGen":
        """The same shares of frequent and local tokens, rounded down."""
        _need_budget(budget)
        share = {name: budget * getattr(self, name) // self.budget for name in ("frequent", "local")}
        return replace(self, budget=budget, **share)


def best_first(rank, position):
    """Slots by rank, the highest first; of equals the lower position first, and slots without an entry (position -1) last.

    rank, position (N, H, S) -> (N, H, S)
    """
    order = position.masked_fill(position < 0, torch.iinfo(position.dtype).max).argsort(-1)
    return order.gather(2, rank.gather(2, order).sort(dim=-1, descending=True, stable=True).indices)


def _sum(x):
    """The sum over dimension 2, added in the same order in every slot: torch's own order differs between the last slots and the
    others, and would decide ties by where entries lie."""
    while x.shape[2] > 1:
        half = x.shape[2] // 2
        rest = x[:, :, 2 * half :]
        x = x[:, :, :half] + x[:, :, half : 2 * half]
        x = torch.cat([x, rest], 2) if rest.shape[2] else x
    return x.squeeze(2)


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
    "snapkv": SnapKV(32, 8, 3),
    "fastgen": FastGen(32, 8, 8, 0.95),
}
"""Every policy by the name that the command line uses; `with_budget` turns the example into the one wanted."""
