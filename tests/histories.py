"""What the kept positions of a run of the reference say of its history, and the same history once more."""

from dataclasses import dataclass

import numpy as np
from strategies import slices

import less_ref


def history(case, trace, g):
    """What KV head g's kept positions say of every query i and token j: whether i sees j exactly, and whether j was
    folded before i's chunk began. Both (T, T) bool."""
    visible, folded = (np.zeros((case.length, case.length), bool) for _ in range(2))
    held = np.array([], int)
    for now, kept in zip(slices(case.chunks), trace.kept):
        folded[now, : now.start] = True
        folded[now, held] = False
        visible[now, held] = True
        visible[now, now] = np.tri(now.stop - now.start, dtype=bool)
        held = kept[g]
    return visible, folded


def victims(trace, chunks):
    """For every chunk and KV head the positions that were evicted at its end."""
    held = [np.array([], int)] * len(trace.kept[0])
    for now, after in zip(slices(chunks), trace.kept):
        arrived = np.arange(now.start, now.stop)
        yield [np.setdiff1d(np.append(before, arrived), kept) for before, kept in zip(held, after)]
        held = after


@dataclass(frozen=True)
class Replay(less_ref.Policy):
    """Scores as `policy` does, and evicts `victims`, whatever that ranks highest."""

    policy: less_ref.Policy
    victims: tuple  # positions
    budget = np.inf
    score_shape = property(lambda self: self.policy.score_shape)
    pooled = property(lambda self: self.policy.pooled)

    def born(self, *tokens):
        return self.policy.born(*tokens)

    def update(self, score, p, visible):
        return self.policy.update(score, p, visible)

    def rank(self, position, score, n):
        self.policy.rank(position, score, n)  # which may note a choice in the score
        return np.where(np.isin(position, self.victims), -np.inf, 0)


def replaying(policies, victims):
    """Policies, one for each KV head, that evict what other ones chose."""
    return [Replay(policy, tuple(map(int, gone))) for policy, gone in zip(policies, victims, strict=True)]


def evicting_nothing(policies):
    return replaying(policies, [()] * len(policies))


def replayed(q, k, v, policies, kernels, chunks, scale, evicted):
    """`less_ref.run` with those victims for every chunk and KV head: (out, the state after every chunk)."""
    state = less_ref.empty_state(k.shape[0], k.shape[2], kernels)
    outs, states = [], []
    for now, gone in zip(slices(chunks), evicted):
        out, state = less_ref.extend(state, q[:, now], k[:, now], v[:, now], replaying(policies, gone), kernels, scale)
        outs.append(out)
        states.append(state)
    return np.concatenate(outs), states
