"""A state machine: whatever happens to a state, and in whatever order, it stays what its history says.

The third party beside both paths is a plain list of tokens for each row, with the positions that each KV head evicted.
At a near-tie either token may go: the reference follows the fast path's choice, and the test asks how the reference
ranked it.
"""

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from both_paths import allocate, assert_identical, empty, heads_of, room, rounded, wide, widened, with_pads
from closeness import BUDGETS, FLOAT64, SHIFTED_BY_300, error
from histories import evicting_nothing, replaying
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from strategies import ANY_SLOTS, NON_NEGATIVE, Case, fast_kernels, layers, policies, policy_tables

import less_fast
import less_ref

MOST_ROWS = 3
SOME_POLICY = st.one_of(*[policies(largest=3)] * 3, policies("Full"))
PADS = st.sampled_from(["none", "none", "none", "left", "right", "anywhere", "all"])
CHUNK = dict(m=st.integers(1, 6), seed=st.integers(0, 2**16), pads=st.lists(PADS, min_size=MOST_ROWS, max_size=MOST_ROWS))


@dataclass
class Row:
    """One row's history: a token's position is its index."""

    tokens: list  # (q (Hq, D), k (Hkv, D), v (Hkv, D), kind) of each
    evicted: list  # for each KV head a set of positions
    reference: less_ref.State

    def of_head(self, g, evicted):
        """Positions (E,), keys and values (E, D) of what a KV head has evicted, or of what it has not."""
        which = [j for j in range(len(self.tokens)) if (j in self.evicted[g]) == evicted]
        D = self.reference.heads[g].k.shape[1]
        return which, *(np.array([self.tokens[j][part][g] for j in which]).reshape(-1, D) for part in (1, 2))


def longer_than(tokens):
    return precondition(lambda self: any(len(row.tokens) > tokens for row in self.rows))


class AnyHistory(RuleBasedStateMachine):
    dtype: torch.dtype

    @initialize(
        layer=layers(),
        k3=NON_NEGATIVE,
        seed=st.integers(0, 2**16),
        rows=st.integers(1, MOST_ROWS),
        int8=ANY_SLOTS,
        drawn=st.data(),
    )
    def an_empty_state(self, layer, k3, seed, rows, int8, drawn):
        table = drawn.draw(policy_tables(layer.kv_heads, SOME_POLICY))
        ranks = None if table[0].fast.pooled else layer.ranks
        head_dim = 4 + 4 * (layer.head_dim > 4) if int8 else layer.head_dim + 1
        layer = replace(layer, head_dim=head_dim, ranks=ranks)  # the last coordinate can shift all logits at once
        self.case, self.kernels = Case(layer, (), table, k3, None, seed, int8=int8), None
        if k3 is not None:
            self.kernels = rounded(self.case.kernels, wide(self.dtype))
            for name in {"q0", "q1", "k0", "k1"} & set(vars(self.kernels)):
                getattr(self.kernels, name)[:, -1] = 0  # and the learned kernels do not see it
        self.state = self.allocate(rows)
        self.bytes_of_a_row = [bytes_held(group) / rows for group in self.state.groups]
        self.earlier = []  # outputs and inputs, each with its copy
        self.forget()

    def allocate(self, rows):
        kernels = fast_kernels(self.kernels, self.case.layer, wide(self.dtype), self.case.rho)
        return allocate(self.case, rows, self.dtype, kernels=kernels)

    def forget(self):
        nothing = [set() for _ in range(self.case.layer.kv_heads)]
        self.rows = [Row([], copy.deepcopy(nothing), empty(self.case)) for _ in self.state.n]
        self.budgets = BUDGETS.get(self.dtype) or dict.fromkeys(("out", "first", "score", "H", "z", "rank"), FLOAT64)

    def random_tokens(self, m, seed):
        """q (N, Hq, m, D), k and v (N, Hkv, m, D), kinds (N, m); the last coordinate is 0 in queries and 1 in keys."""
        rng, layer = np.random.default_rng(seed), self.case.layer
        heads = layer.query_heads, layer.kv_heads, layer.kv_heads
        q, k, v = (torch.tensor(rng.normal(size=(len(self.rows), h, m, layer.head_dim))) for h in heads)
        q[..., -1], k[..., -1] = 0, 1
        return q, k, v, torch.tensor(rng.choice(3, (len(self.rows), m), p=[0.6, 0.25, 0.15]))

    @rule(**CHUNK)
    def extend_by_a_random_chunk(self, m, seed, pads):
        self.extend(*self.random_tokens(m, seed), pads)

    @longer_than(0)
    @rule(**CHUNK)
    def extend_by_queries_and_keys_that_the_row_has_seen(self, m, seed, pads):
        q, k, v, kinds = self.random_tokens(m, seed)
        for n, row in enumerate(self.rows):
            if row.tokens:
                old = np.random.default_rng([seed, 1]).integers(len(row.tokens), size=m)
                q[n], k[n] = (torch.tensor(np.stack([row.tokens[j][part] for j in old], 1)) for part in (0, 1))
                q[n, ..., -1] = 0
        self.extend(q, k, v, kinds, pads)

    @rule(**CHUNK, shift=st.sampled_from([-300.0, 300.0]))
    def extend_with_huge_logits(self, m, seed, pads, shift):
        q, k, v, kinds = self.random_tokens(m, seed)
        q[..., -1] = shift * q.shape[-1] ** 0.5
        self.budgets = self.budgets | SHIFTED_BY_300.get(self.dtype, {})  # until the scores are forgotten
        self.extend(q, k, v, kinds, pads)

    @rule(**CHUNK, size=st.sampled_from([1e-6, 0.0]))
    def extend_by_tiny_keys_or_zeros(self, m, seed, pads, size):
        q, k, v, kinds = self.random_tokens(m, seed)
        self.extend(q, k * size, v, kinds, pads)

    @rule(**CHUNK, value=st.sampled_from([np.nan, np.inf, -np.inf, 1e13]), part=st.sampled_from("qkv"))
    def extend_by_tokens_of_which_some_are_broken(self, m, seed, pads, value, part):
        q, k, v, kinds = self.random_tokens(m, seed)
        rng = np.random.default_rng([seed, 2])
        tokens = torch.tensor(rng.random((len(self.rows), m)) < 0.4)  # (N, m)
        broken = dict(q=q, k=k, v=v)[part]
        broken[:, rng.integers(broken.shape[1]), :, rng.integers(broken.shape[3])].masked_fill_(tokens, value)
        self.extend(q, k, v, kinds, pads)

    @longer_than(0)
    @rule(order=st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, max_size=MOST_ROWS))
    def reorder_repeat_and_drop_rows(self, order):
        order = [row % len(self.rows) for row in order]
        self.state.reorder(torch.tensor(order))
        self.rows = [copy.deepcopy(self.rows[row]) for row in order]

    @longer_than(0)
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.state.save(Path(folder) / "state")
            self.state = self.allocate(len(self.rows))
            self.state.load(Path(folder) / "state")

    @longer_than(15)  # or most histories would be short
    @rule()
    def reset(self):
        self.state.reset()
        assert_identical(self.state, self.allocate(len(self.rows)))
        self.forget()

    def extend(self, q, k, v, kinds, pads):
        valid = np.array([tokens_among(q.shape[2], kind) for kind in pads[: len(self.rows)]])  # (N, m)
        sound = np.all([x.abs().amax((1, 3)) < 1e12 for x in (q, k, v)], 0)  # (N, m)
        qkv = [x.to(self.dtype) for x in with_pads((q, k, v), valid)]
        out = less_fast.extend(self.state, *qkv, None if valid.all() else torch.tensor(valid), kinds=kinds)
        self.earlier += [(x, x.nan_to_num()) for x in (out, *qkv)]
        for n, row in enumerate(self.rows):
            assert not out[n][:, ~valid[n]].any()
            assert out[n][:, valid[n] & ~sound[n]].isnan().all()
            real = valid[n] & sound[n]
            if real.any():
                own, *kv = widened(x[n][:, real] for x in qkv)
                kv = map(less_ref.in_eight_bits, kv) if self.case.int8 else kv
                new = (own, *kv, kinds[n, real].numpy())
                self.follow(row, heads_of(self.state, n, with_kinds=False), out[n][:, real], new)

    def follow(self, row, held, out, new):
        """The history and the reference of one row take its new tokens and evict what the fast path evicted."""
        *qkv, kinds = new
        row.tokens += zip(*(x.swapaxes(0, 1) for x in qkv), kinds)
        gone = [set(range(len(row.tokens))) - set(head.position.tolist()) for head in held]
        policies = self.case.reference_of([kind for *_, kind in row.tokens])
        expected, before = less_ref.extend(row.reference, *qkv, evicting_nothing(policies), self.kernels)
        victims = [sorted(now - earlier) for now, earlier in zip(gone, row.evicted)]
        _, row.reference = less_ref.extend(row.reference, *qkv, replaying(policies, victims), self.kernels)
        first = [before.n == len(kinds) and not policy.fast.scored for policy in self.case.policies]
        budget = np.where(np.repeat(first, self.case.layer.group), self.budgets["first"], self.budgets["out"])[:, None]  # (Hq, 1)
        budget = budget * loss_of_digits(before, qkv[0], self.kernels)  # (Hq, m)
        for a, i in np.ndindex(budget.shape):
            self.within(budget[a, i], error(out[a, i], expected[i, a]))
        for g, (policy, head) in enumerate(zip(policies, held)):
            assert row.evicted[g] <= gone[g], "an evicted token has returned"
            row.evicted[g] = gone[g]
            assert len(head.position) == room(policy, before.heads[g], before.n)
            # A score of whole numbers counts what lies beyond a threshold: rounding in float32 moves it by a whole one.
            if self.dtype == torch.float64 or self.case.policies[g].fast.score_dtype is None:
                wanted = row.reference.heads[g]
                self.within("score", error(head.score, wanted.score[np.argsort(wanted.position)]))
                self.within("rank", excess_of_the_victims(policy, before.heads[g], victims[g], before.n))

    def within(self, budget, measured):
        budget = self.budgets.get(budget, budget)
        assert measured <= budget, f"error {measured:.2e} is beyond {budget:.2e}"

    @invariant()
    def the_state_is_what_the_history_says(self):
        assert self.state.n.tolist() == [len(row.tokens) for row in self.rows]
        for n, row in enumerate(self.rows):
            for g, head in enumerate(heads_of(self.state, n)):
                kept, k, v = row.of_head(g, evicted=False)
                assert head.position.tolist() == kept
                assert np.array_equal(head.k, k)
                assert np.array_equal(head.v, v)
                _, k, v = row.of_head(g, evicted=True)
                psi = self.kernels.psi(k, g) if self.kernels else np.zeros((len(k), 0))  # (evicted, R)
                self.within("H", error(head.H, psi.T @ v))
                self.within("z", error(head.z, psi.sum(0)))

    @invariant()
    def the_bytes_of_a_group_with_a_budget_are_constant(self):
        for group, bytes_of_a_row in zip(self.state.groups, self.bytes_of_a_row):
            if group.policy.budget is not None:
                assert bytes_held(group) == bytes_of_a_row * len(self.rows)

    @invariant()
    def earlier_outputs_and_inputs_are_unchanged(self):
        assert all(torch.equal(now.nan_to_num(), copied) for now, copied in self.earlier)


def tokens_among(m, pads):
    """(m,) bool: where the tokens are among the pads."""
    place = np.arange(m)
    return {
        "none": place >= 0,
        "left": place >= m // 2,
        "right": place < m // 2,
        "anywhere": place % 2 == 1,
        "all": place < 0,
    }[pads]


def bytes_held(group):
    return sum(getattr(group, name).untyped_storage().nbytes() for name in group.TENSORS)


def loss_of_digits(before, q, kernels):
    """By how much a shift far below zero magnifies errors, (Hq, m), at least 1: every evicted token brings an error
    into the low-rank part, and where that is alone the sum that divides it may be as small as the error."""
    factor = np.ones(q.shape[:2])
    for a, i in np.ndindex(factor.shape):
        head = before.heads[a * len(before.heads) // len(q)]
        if q[a, i, -1] < 0 and head.z.any():
            seen = head.position < before.n - q.shape[1] + i + 1
            mass = kernels.phi(q[a, i], a) @ head.z + np.exp(head.k[seen] @ q[a, i] * q.shape[2] ** -0.5).sum()
            factor[a, i] = max(1.0, (before.n - len(seen)) / mass) if mass else np.inf
    return factor


def excess_of_the_victims(policy, head, victims, n):
    """By how much the highest victim outranks the lowest of what was kept, in the reference's ranks; relative."""
    rank, gone = policy.rank(head.position, head.score, n).astype(float), np.isin(head.position, victims)
    if not gone.any() or rank[gone].max() <= rank[~gone].min():
        return 0.0
    return (rank[gone].max() - rank[~gone].min()) / max(1.0, abs(rank[~gone].min()))


class Float64(AnyHistory):
    dtype = torch.float64


class Float32(AnyHistory):
    dtype = torch.float32


class BFloat16(AnyHistory):
    dtype = torch.bfloat16


def steps(histories):
    """Settings for that many histories of 30 steps: data of that size is neither too large nor too slow."""
    return settings(max_examples=histories, stateful_step_count=30, suppress_health_check=list(HealthCheck))
