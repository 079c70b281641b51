"""FastGen (Ge et al. 2023), the one policy that asks what tokens are and lets several go at once.

A layer never sees token ids, so the kinds of the new tokens travel with them through `extend`.
"""

import string
from dataclasses import dataclass
from typing import ClassVar

import torch

from .checks import LessError
from .policies import Policy, best_first, ordered_sum


@dataclass(frozen=True)
class FastGen(Policy):
    """Each head keeps the least that recovers its attention: 1 special tokens, 2 and punctuation, 3 and the `frequent` others
    with the most accumulated attention, 4 and the last `local`, or 5 everything.

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
    needs: ClassVar[str] = "kinds"
    one_leaves: ClassVar[bool] = False
    shares: ClassVar[tuple[str, ...]] = ("frequent", "local")

    def __post_init__(self):
        self._check(budget=1, frequent=0, local=0)
        if isinstance(self.recovery, bool) or not isinstance(self.recovery, int | float) or not 0 < self.recovery <= 1:
            raise LessError(f"recovery of FastGen must be a number above 0 and at most 1, not {self.recovery!r}")
        if self.frequent + self.local > self.budget:
            raise LessError(f"FastGen needs frequent + local within the budget, not {self}")

    def born(self, tokens, kernels):
        kind = tokens.kinds[:, None, :, None].expand(*tokens.k.shape[:3], 1)  # (N, H, m, 1)
        return torch.nn.functional.pad(kind, (0, 4))  # (N, H, m, 5)

    def update(self, score, p, visible):
        kind, attention, near, age, choice = score.unbind(-1)
        ages = age[:, :, None] + visible.cumsum(2)  # (N, H, m, S)
        p = ordered_sum(p)  # (N, H, m, S)
        attention = attention + ordered_sum(p)
        near = near + ordered_sum(p * (ages <= self.local))
        return torch.stack([kind, attention, near, ages[:, :, -1], choice], -1)

    def rank(self, position, score, n):
        choice = self._choose(position, score, n)  # (N, H, 1)
        score[..., 4] = choice
        kind, attention = score[..., 0], score[..., 1]
        rank = attention.masked_fill(kind == 2, torch.finfo(score.dtype).max)
        rank = rank.masked_fill((choice >= 4) & (position >= n - self.local), torch.inf)
        return rank.masked_fill(~self._members(position, score, n, choice) & (choice > 0), -torch.inf)

    def _choose(self, position, score, n):
        """Each head's choice (N, H, 1), 0 as long as the budget has not been exceeded."""
        held = (position >= 0).to(score.dtype)
        _, attention, near, _, choice = (score * held[..., None]).unbind(-1)
        choice = choice.amax(-1, keepdim=True)  # tokens that came since have 0
        chooses = (choice == 0) & (n > self.budget)
        if not chooses.any():
            return choice
        first = torch.full_like(choice, 5)
        for candidate in (4, 3, 2, 1):
            member = self._members(position, score, n, torch.full_like(choice, candidate))
            recovered = torch.where(member, attention, near if candidate == 4 else 0).sum(-1, keepdim=True)
            enough = recovered >= (self.recovery - 1e-6) * attention.sum(-1, keepdim=True)
            first = first.masked_fill(enough, candidate)
        return torch.where(chooses, first, choice)

    def _members(self, position, score, n, choice):
        """What a head with that choice (N, H, 1) keeps: (N, H, S) bool."""
        kind, attention = score[..., 0], score[..., 1]
        local = position >= n - self.local
        member = (kind == 2) | (choice >= 2) & (kind == 1) | (choice >= 4) & local
        others = (position >= 0) & ~member
        order = best_first(attention.masked_fill(~others, -torch.inf), position)
        most = torch.zeros_like(member).scatter(2, order[..., : self.frequent], True)
        return member | (choice >= 3) & others & most | (choice == 5)


def token_kinds(tokenizer) -> torch.Tensor:
    """The kind of each token id: 2 special, 1 nothing but ASCII punctuation (and spaces), 0 all others.

    Returns int64, as long as the largest id needs.
    """
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = {*tokenizer.all_special_ids, *added}
    count = max(*tokenizer.get_vocab().values(), *special) + 1
    kinds = torch.zeros(count, dtype=torch.int64, device="cpu")
    for index, text in enumerate(tokenizer.batch_decode([[index] for index in range(count)], clean_up_tokenization_spaces=False)):
        kinds[index] = bool(text.strip()) and set(text.strip()) <= set(string.punctuation)
    kinds[list(special)] = 2
    return kinds
