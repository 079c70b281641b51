"""A state machine: whatever happens to a state, and in whatever order, it stays what its history says.

The third party beside both paths is a plain list of tokens for each row, with the positions that each KV head evicted
(row_history.py). At a near-tie either token may go: the reference follows the fast path's choice, and the test asks how the
reference ranked it. Where a token is turned, the reference follows the fast path's rounding in the same way.
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from both_paths import allocate, assert_identical, heads_of, room, rounded, wide, widened, with_pads
from closeness import BUDGETS, FLOAT64, SHIFTED_BY_300, TURNED, TURNED_IN_EIGHT_BITS, error, error_before_rounding
from histories import evicting_nothing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from row_history import AsTurned, Row, excess_of_the_victims, loss_of_digits
from strategies import (
    ANY_ATTENTION,
    ANY_SLOTS,
    KERNELS,
    ONE_AT_A_TIME,
    PLAIN,
    Case,
    fast_kernels,
    layers,
    policies,
    policy_tables,
)

import less_fast
import less_ref
from less_fast.layer.context import Context, Rotary

MOST_ROWS = 3
MOST_TOKENS = 6  # at once
SOME_POLICY = policies(largest=3)
PADS = st.sampled_from(["none", "none", "none", "left", "right", "anywhere", "all"])
OF_ROWS = st.just(["none"] * MOST_ROWS) | st.lists(PADS, min_size=MOST_ROWS, max_size=MOST_ROWS)
CHUNK = dict(m=st.integers(1, MOST_TOKENS), seed=st.integers(0, 2**16), pads=OF_ROWS)


@st.composite
def contexts(draw, head_dim):
    """None, or a context with room for every chunk. The last coordinate is not turned."""
    length = draw(st.sampled_from([None, None, 2 * MOST_TOKENS, 2 * MOST_TOKENS + 1, 3 * MOST_TOKENS]))
    pairs = draw(st.integers(0, (head_dim - 1) // 2))
    rotary = Rotary(tuple(100.0 ** (-pair / pairs) for pair in range(pairs)), draw(st.booleans()))
    return length and Context(length, rotary)


def longer_than(tokens):
    return precondition(lambda self: any(len(row.tokens) > tokens for row in self.rows))


class AnyHistory(RuleBasedStateMachine):
    dtype: torch.dtype

    @initialize(
        layer=layers(),
        k3=KERNELS,
        seed=st.integers(0, 2**16),
        rows=st.integers(1, MOST_ROWS - 1),
        attention=PLAIN | ANY_ATTENTION,
        int8=ANY_SLOTS,
        drawn=st.data(),
    )
    def an_empty_state(self, layer, k3, seed, rows, attention, int8, drawn):
        policy = drawn.draw(st.sampled_from([SOME_POLICY, *(policies(name, largest=3) for name in ONE_AT_A_TIME)]))
        table = drawn.draw(policy_tables(layer.kv_heads, policy))  # heads of one policy and several budgets lie in one row
        head_dim = 4 + 4 * (layer.head_dim > 4) if int8 else layer.head_dim + 1
        layer = replace(layer, head_dim=head_dim)  # the last coordinate can shift all logits at once
        self.case, self.kernels = Case(layer, (), table, k3, None, seed, *attention, int8), None
        if k3 is not None:
            self.kernels = rounded(self.case.kernels, wide(self.dtype))
            for name in {"q0", "q1", "k0", "k1"} & set(vars(self.kernels)):
                getattr(self.kernels, name)[:, -1] = 0  # and the learned kernels do not see it
        self.fast_kernels = fast_kernels(self.kernels, layer, wide(self.dtype), self.case.rho)
        self.sinks = None if self.case.sinks is None else torch.tensor(self.case.sinks).float()  # (Hq,)
        sinks = None if self.sinks is None else self.sinks.double().numpy()  # (Hq,)
        self.attention = less_ref.Logits(self.case.softcap, sinks)
        self.context = drawn.draw(contexts(head_dim))
        self.state = self.allocate(rows)
        self.bytes_of_a_row = [bytes_held(part) / rows for part in self.state.parts]
        self.earlier = []  # outputs and inputs, each with its copy
        self.forget()

    def allocate(self, rows):
        return allocate(self.case, rows, self.dtype, kernels=self.fast_kernels, movable=self.context is not None)

    def forget(self):
        self.rows = [Row.before_its_first_token(self.case) for _ in self.state.n]
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
        if self.sinks is not None:
            shift = abs(shift)  # far below a sink there is no attention that float32 can hold, and FastGen compares shares of it
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
    @precondition(lambda self: len(self.rows) < MOST_ROWS)
    @rule(**CHUNK, in_front=st.booleans())
    def join_a_row_that_has_seen_a_chunk_of_its_own(self, m, seed, pads, in_front):
        old = self.state, self.rows
        self.state, self.rows = self.allocate(1), [Row.before_its_first_token(self.case)]
        self.extend(*self.random_tokens(m, seed), pads)
        both = [old, (self.state, self.rows)][:: -1 if in_front else 1]
        self.state = less_fast.LayerState.join([state for state, _ in both])
        self.rows = [row for _, rows in both for row in rows]

    @longer_than(0)
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            less_fast.save_state(self.state, Path(folder) / "state")
            self.state = self.allocate(len(self.rows))
            less_fast.load_state(self.state, Path(folder) / "state")

    @longer_than(15)  # or most histories would be short
    @rule()
    def reset(self):
        self.state.reset()
        assert_identical(self.state, self.allocate(len(self.rows)))
        self.forget()

    def extend(self, q, k, v, kinds, pads):
        valid = np.array([tokens_among(q.shape[2], kind) for kind in pads[: len(self.rows)]])  # (N, m)
        sound = np.all([x.abs().amax((1, 3)) < 1e12 for x in (q, k, v)], 0)  # (N, m)
        given = [x.to(self.dtype) for x in with_pads((q, k, v), valid)]
        mask = None if valid.all() else torch.tensor(valid)
        entered = (*self.context.enter(self.state, *given[:2], mask), given[2]) if self.context else given
        moved = [self.keys_if_moved(n, row) for n, row in enumerate(self.rows)]
        out = less_fast.extend(self.state, *entered, mask, less_fast.Logits(None, self.case.softcap, self.sinks), kinds)
        self.earlier += [(x, x.nan_to_num()) for x in (out, *given)]
        for n, row in enumerate(self.rows):
            assert not out[n][:, ~valid[n]].any()
            assert out[n][:, valid[n] & ~sound[n]].isnan().all()
            if valid[n].any():
                real = valid[n] & sound[n]
                row.receive(moved[n], widened(x[n][:, real] for x in entered), kinds[n, real].numpy(), self.case.int8)
                both = (widened(x[n][:, valid[n]] for x in qkv) for qkv in (given, entered))
                with np.errstate(invalid="ignore"):  # broken tokens are turned and rounded, too
                    expected, row.reference = self.say_to_the_reference(row, moved[n], *both)
                if real.any():
                    self.compare_outputs(row, out[n][:, real], expected[sound[n][valid[n]]], entered[0][n][:, real])
                    self.follow(row, heads_of(self.state, n, with_kinds=False))

    def keys_if_moved(self, n, row):
        """The keys that each KV head of the row holds, if it has moved back just now; else none."""
        moves = self.context and self.state.moved[n] != row.reference.moved
        return [head.k for head in heads_of(self.state, n)] if moves else []

    def say_to_the_reference(self, row, moved, given, entered):
        """The same tokens enter, the broken ones among them: what it puts out, and its state before anything is evicted."""
        rest = evicting_nothing(self.policies(row)), self.kernels, None, self.attention
        if self.context is None:
            q, *kv = given
            kv = (row.as_stored(x, self.case.int8) for x in kv)
            return less_ref.extend_past_broken_tokens(row.reference, q, *kv, *rest)
        budget, rotary = TURNED[self.dtype], self.context.rotary
        bits = [(k, TURNED_IN_EIGHT_BITS if self.case.int8 else budget) for k in moved] + [(x, budget) for x in entered[:2]]
        follower = AsTurned(np.array(rotary.frequencies), rotary.interleaved, turned=iter(bits))
        return less_ref.Context(self.context.length, follower, self.case.int8).extend(row.reference, *given, *rest)

    def policies(self, row):
        return self.case.reference_of([kind for *_, kind in row.tokens])

    def compare_outputs(self, row, out, expected, q):
        """out (Hq, m, D), expected (m, Hq, D), q (Hq, m, D)."""
        first = row.reference.n == q.shape[1] and not self.case.int8  # of a first chunk that nobody scores
        first = np.repeat([first and policy.fast.queries == 0 for policy in self.case.policies], self.case.layer.group)  # (Hq,)
        factor = loss_of_digits(row.reference, q.double().numpy(), self.kernels, self.case.softcap)  # (Hq, m)
        for a, i in np.ndindex(factor.shape):
            name, measure = ("first", error) if first[a] else ("out", error_before_rounding)
            self.within(name, measure(out[a, i], expected[i, a]), factor[a, i])

    def follow(self, row, held):
        """The history and the reference of a row evict what the fast path evicted, of which `held` is left."""
        heads, n = [], len(row.tokens)
        for g, (policy, head, before) in enumerate(zip(self.policies(row), held, row.reference.heads)):
            gone = set(range(n)) - set(head.position.tolist())
            assert row.evicted[g] <= gone, "an evicted token has returned"
            victims, row.evicted[g] = sorted(gone - row.evicted[g]), gone
            assert len(head.position) == room(policy, before, n)
            rest = less_ref.fold(before, ~np.isin(before.position, victims), self.kernels, g)
            # A score of whole numbers counts what lies beyond a threshold: rounding in float32 moves it by a whole one.
            if self.dtype == torch.float64 or self.case.policies[g].fast.score_dtype is None:
                self.within("rank", excess_of_the_victims(policy, before, victims, n))
            elif len(head.position) == len(rest.position):
                rest = replace(rest, score=head.score)
            heads.append(rest)
        row.reference = replace(row.reference, heads=tuple(heads))

    def within(self, name, measured, factor=1.0):
        budget = self.budgets[name] * factor
        assert measured <= budget, f"{name}: error {measured:.2e} is beyond {budget:.2e}"

    @invariant()
    def the_state_is_what_the_history_says(self):
        assert self.state.n.tolist() == [len(row.tokens) for row in self.rows] == [row.reference.n for row in self.rows]
        assert (self.state.moved is None) == (self.context is None)
        assert self.context is None or self.state.moved.tolist() == [row.reference.moved for row in self.rows]
        for n, row in enumerate(self.rows):
            for g, head in enumerate(heads_of(self.state, n)):
                kept, k, v = row.held(g)
                assert head.position.tolist() == kept
                assert np.array_equal(head.k, k)
                assert np.array_equal(head.v, v)
                score = head.score
                if self.case.policies[g].fast.needs == "kinds":
                    kinds, score = score[:, 0], score[:, 1:]
                    assert kinds.tolist() == [row.tokens[j][3] for j in kept]
                self.within("score", error(score, row.reference.heads[g].score.reshape(score.shape)))
                k, v = row.folded(g)
                psi = self.kernels.psi(k, g) if self.kernels else np.zeros((len(k), 0))  # (folded, R)
                self.within("H", error(head.H, psi.T @ v))
                self.within("z", error(head.z, psi.sum(0)))

    @invariant()
    def the_next_token_has_an_empty_slot(self):
        for part in self.state.parts:
            slots = part.slots
            assert (slots.position.gather(1, slots.free) == -1).all()
            assert (slots.layout.head[slots.free] == torch.arange(slots.layout.H)).all()

    @invariant()
    def the_bytes_are_constant(self):
        for part, bytes_of_a_row in zip(self.state.parts, self.bytes_of_a_row):
            assert bytes_held(part) == bytes_of_a_row * len(self.rows)

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


def bytes_held(part):
    return sum(tensor.untyped_storage().nbytes() for tensor in part.tensors().values())


class Float64(AnyHistory):
    dtype = torch.float64


class Float32(AnyHistory):
    dtype = torch.float32


class BFloat16(AnyHistory):
    dtype = torch.bfloat16


def steps(histories):
    """Settings for that many histories of 30 steps: data of that size is neither too large nor too slow."""
    return settings(max_examples=histories, stateful_step_count=30, suppress_health_check=list(HealthCheck))
