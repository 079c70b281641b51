"""One row of the state machine in any_history.py: the history of its tokens, and the reference, to which the same is said."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from both_paths import empty
from closeness import error

import less_ref


@dataclass
class Row:
    """A token's position is its index."""

    tokens: list  # [q (Hq, D), k (Hkv, D), v (Hkv, D), kind] of each, its key as it stands now, or stood when it was evicted
    evicted: list  # for each KV head a set of positions
    forgotten: list  # and of these the ones that were folded before the row last moved back
    reference: less_ref.Stream

    @classmethod
    def before_its_first_token(cls, case):
        nothing = [set() for _ in range(case.layer.kv_heads)]
        return cls([], nothing, copy.deepcopy(nothing), empty(case))

    def receive(self, moved, qkv, kinds, int8):
        """If the row has moved back, its held keys are now `moved`, for each KV head (E, D). Then new tokens enter."""
        for g, keys in enumerate(moved):
            for j, key in zip(self.held(g)[0], keys, strict=True):
                self.tokens[j][1][g] = key
        if moved:
            self.forgotten = copy.deepcopy(self.evicted)
        q, k, v = qkv
        stored = (x.swapaxes(0, 1) for x in (q, self.as_stored(k, int8), self.as_stored(v, int8)))
        self.tokens += map(list, zip(*stored, kinds))

    @staticmethod
    def as_stored(x, int8):
        return less_ref.in_eight_bits(x) if int8 else x

    def held(self, g):
        """Positions (E,), keys and values (E, D) of what a KV head holds."""
        which = [j for j in range(len(self.tokens)) if j not in self.evicted[g]]
        return which, *self._keys_and_values(which, g)

    def folded(self, g):
        """Keys and values (E, D) of what is in the low-rank state of a KV head."""
        return self._keys_and_values(sorted(self.evicted[g] - self.forgotten[g]), g)

    def _keys_and_values(self, which, g):
        D = self.reference.heads[g].k.shape[1]
        return [np.array([self.tokens[j][part][g] for j in which]).reshape(-1, D) for part in (1, 2)]


@dataclass(frozen=True, kw_only=True)
class AsTurned(less_ref.Rotary):
    """Gives the bits that the fast path turned to, after it has compared them with its own."""

    turned: Iterator  # for each call the bits, and how large their error may be

    def turn(self, x, by):
        bits, budget = next(self.turned)
        sound = (abs(x) < 1e12).all(-1)  # (..., E)
        measured = error(bits[sound], super().turn(x, by)[sound])
        assert measured <= budget, f"turned: error {measured:.2e} is beyond {budget:.2e}"
        return bits


def loss_of_digits(before, q, kernels, softcap):
    """By how much a shift far below zero magnifies errors, (Hq, m), at least 1: every evicted token brings an error
    into the low-rank part, and where that is alone the sum that divides it may be as small as the error."""
    factor = np.ones(q.shape[:2])
    for a, i in np.ndindex(factor.shape):
        head = before.heads[a * len(before.heads) // len(q)]
        if q[a, i, -1] < 0 and head.z.any():
            seen = head.position < before.n - q.shape[1] + i + 1
            exact = head.k[seen] @ q[a, i] * q.shape[2] ** -0.5
            exact = exact if softcap is None else softcap * np.tanh(exact / softcap)
            mass = kernels.phi(q[a, i], a) @ head.z + np.exp(exact).sum()
            factor[a, i] = max(1.0, (before.n - len(seen)) / mass) if mass else np.inf
    return factor


def excess_of_the_victims(policy, head, victims, n):
    """By how much the highest victim outranks the lowest of what was kept, in the reference's ranks; relative."""
    rank, gone = policy.rank(head.position, head.score, n).astype(float), np.isin(head.position, victims)
    if not gone.any() or rank[gone].max() <= rank[~gone].min():
        return 0.0
    return (rank[gone].max() - rank[~gone].min()) / max(1.0, abs(rank[~gone].min()))
