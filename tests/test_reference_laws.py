"""Laws that `less_ref.py` obeys by itself: each test recomputes something from the history, without the recurrence."""

import ast
import doctest
import inspect
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_close
from histories import evicting_nothing, history, replayed, victims
from hypothesis import given
from hypothesis import strategies as st
from memory import numbers_held
from strategies import (
    ANY_ATTENTION,
    ANY_POLICY,
    EVICTING_POLICIES,
    ONE_AT_A_TIME,
    Case,
    Layer,
    Policy,
    cases,
    in_one_chunk,
    policies,
    reference_kernels,
    slices,
    some_kernels,
    streaming,
)

import less_ref

UNSCORED = policies("Lambda", "Window")
SCORED = policies("H2O")


def dense(q, k, v, scale=None, softcap=None, sinks=None):
    """Causal attention with the full cache: (T, Hq, D)."""
    (Hq, T, D), G = q.shape, q.shape[0] // k.shape[0]
    k, v = np.repeat(k, G, 0), np.repeat(v, G, 0)
    logits = (D**-0.5 if scale is None else scale) * q @ k.transpose(0, 2, 1)
    logits = logits if softcap is None else np.tanh(logits / softcap) * softcap
    weight = np.exp(np.where(np.tri(T, dtype=bool), logits, -np.inf))
    nothing = np.exp(np.full(Hq, -np.inf) if sinks is None else sinks)[:, None, None]
    return (weight / (weight.sum(-1, keepdims=True) + nothing) @ v).transpose(1, 0, 2)


@given(cases(policy=st.integers(40, 50).map(lambda budget: Policy("H2O", (budget // 2, budget - budget // 2)))))
def test_a_budget_of_at_least_the_length_is_full_attention_in_every_chunking(case):
    q, k, v = case.qkv()
    assert_close(case.run().out, dense(q, k, v, case.scale))


@given(cases(policy=st.just(Policy("Window", (99,)))))
def test_the_full_policy_is_full_attention_in_every_chunking(case):
    q, k, v = case.qkv()
    assert_close(case.run().out, dense(q, k, v, case.scale))


@given(cases(chunks=in_one_chunk))
def test_a_first_chunk_attends_densely_whatever_the_policy(case):
    q, k, v = case.qkv()
    assert_close(case.run().out, dense(q, k, v, case.scale))


@given(cases(policy=st.just(Policy("Window", (99,))), attention=ANY_ATTENTION))
def test_a_softcap_bounds_the_logits_and_a_sink_takes_its_share(case):
    assert_close(case.run().out, dense(*case.qkv(), case.scale, case.softcap, case.sinks))


@given(cases(attention=ANY_ATTENTION))
def test_a_softcap_beyond_all_logits_and_sinks_far_below_them_change_nothing(case):
    plain = replace(case, softcap=None, sinking=False)
    far = less_ref.Logits(softcap=1e9, sinks=np.full(case.layer.query_heads, -1e3))
    plain, same = plain.run(), plain.run(step=lambda *rest, attention: less_ref.extend(*rest, far))
    assert_close(same.out, plain.out)
    assert all(np.array_equal(a, b) for one, other in zip(same.kept, plain.kept) for a, b in zip(one, other))


@given(cases(policy=SCORED, attention=st.just((None, True))))
def test_the_scores_of_h2o_leave_out_what_the_sink_takes(case):
    """A query gives away 1, to what is kept and to its sink."""
    everything = [replace(rule, heavy=case.length) for rule in case.reference]
    given_away = sum(head.score.sum() for head in case.run(policy=everything).heads[-1])
    assert 0 < given_away < case.length * case.layer.query_heads
    without = sum(head.score.sum() for head in replace(case, sinking=False).run(policy=everything).heads[-1])
    assert_close(without, case.length * case.layer.query_heads)


@given(cases(k3=st.just(0.0)))
def test_with_zero_kernels_less_is_the_bare_policy(case):
    less, bare = case.run(), case.run(kernels=None)
    assert not any(head.H.any() or head.z.any() for heads in less.heads for head in heads)
    assert_close(less.out, bare.out)


@given(cases())
def test_every_output_is_the_formula_over_the_history(case):
    (q, k, v), trace, kernels = case.qkv(), case.run(), case.kernels
    scale = case.layer.head_dim**-0.5 if case.scale is None else case.scale
    for a in range(case.layer.query_heads):
        g = a // case.layer.group
        visible, folded = history(case, trace, g)
        weight = visible * np.exp(scale * q[a] @ k[g].T)
        if kernels:
            low_rank = folded * (kernels.phi(q[a], a) @ kernels.psi(k[g], g).T)
            weight = weight + low_rank * (low_rank.sum(1, keepdims=True) > 0)
        assert_close(trace.out[:, a], weight @ v[g] / weight.sum(1, keepdims=True))


@given(cases(k3=some_kernels))
def test_the_low_rank_state_is_the_sum_over_the_evicted_tokens(case):
    (_, k, v), trace = case.qkv(), case.run()
    for c, now in enumerate(slices(case.chunks)):
        for g, kept in enumerate(trace.kept[c]):
            evicted = np.setdiff1d(np.arange(now.stop), kept)
            psi = case.kernels.psi(k[g, evicted], g)
            assert_close(trace.heads[c][g].H, psi.T @ v[g, evicted])
            assert_close(trace.heads[c][g].z, psi.sum(0))


@given(cases(policy=ANY_POLICY))
def test_the_budget_is_never_exceeded_and_filled_by_all_policies_that_do_not_select(case):
    for now, kept in zip(slices(case.chunks), case.run().kept):
        for policy, positions in zip(case.reference, kept):
            most = min(policy.budget, now.stop)
            assert len(np.unique(positions)) == len(positions) <= most
            assert all(0 <= p < now.stop for p in positions)
            assert isinstance(policy, less_ref.FastGen) or len(positions) == most


@given(cases())
def test_an_evicted_token_never_returns(case):
    trace = case.run()
    for g in range(case.layer.kv_heads):
        held = set()
        for now, kept in zip(slices(case.chunks), trace.kept):
            assert set(kept[g]) <= held | set(range(now.start, now.stop))
            held = set(kept[g])


@given(cases())
def test_what_is_kept_carries_the_key_and_value_of_its_position(case):
    q, k, v = case.qkv()
    state = less_ref.empty_state(case.layer.kv_heads, case.layer.head_dim, case.kernels)
    for now in slices(case.chunks):
        rest = case.reference, case.kernels, case.scale
        _, state = less_ref.extend(state, q[:, now], k[:, now], v[:, now], *rest)
        assert state.n == now.stop
        for g, head in enumerate(state.heads):
            assert np.array_equal(head.k, k[g, head.position])
            assert np.array_equal(head.v, v[g, head.position])


@given(cases(policy=SCORED))
def test_h2o_scores_sum_the_attention_to_visible_tokens_over_queries_and_query_heads(case):
    (q, k, _), trace = case.qkv(), case.run()
    scale = case.layer.head_dim**-0.5 if case.scale is None else case.scale
    for g in range(case.layer.kv_heads):
        visible, _ = history(case, trace, g)
        total = np.zeros((case.length, case.length))
        for a in range(g * case.layer.group, (g + 1) * case.layer.group):
            weight = visible * np.exp(scale * q[a] @ k[g].T)
            total += (weight / weight.sum(1, keepdims=True)).cumsum(0)
        for c, now in enumerate(slices(case.chunks)):
            assert_close(trace.heads[c][g].score, total[now.stop - 1, trace.kept[c][g]])


@given(cases(policy=SCORED))
def test_h2o_keeps_the_recent_tokens_and_the_best_scored_of_the_others(case):
    q, k, v = case.qkv()
    state = less_ref.empty_state(case.layer.kv_heads, case.layer.head_dim)
    for now in slices(case.chunks):
        chunk = q[:, now], k[:, now], v[:, now]
        _, all_held = less_ref.extend(state, *chunk, evicting_nothing(case.reference), scale=case.scale)
        _, state = less_ref.extend(state, *chunk, case.reference, scale=case.scale)
        for policy, before, after in zip(case.reference, all_held.heads, state.heads):
            score = dict(zip(before.position.tolist(), before.score))
            old = [p for p in score if p < now.stop - policy.recent]
            recent = [p for p in score if p >= now.stop - policy.recent]
            room = policy.budget - len(recent)
            assert set(after.position) == {*recent, *sorted(old, key=lambda p: -score[p])[:room]}


@given(cases())
def test_kernels_never_change_what_is_kept(case):
    less, bare = case.run(), case.run(kernels=None)
    for g in range(case.layer.kv_heads):
        assert all(np.array_equal(a[g].position, b[g].position) for a, b in zip(less.heads, bare.heads))
        assert all(np.array_equal(a[g].score, b[g].score) for a, b in zip(less.heads, bare.heads))


@given(st.integers(1, 12), st.integers(1, 40), st.sampled_from(["Window", "Lambda", "H2O"]), st.integers(0, 2**16))
def test_recent_counts_the_current_token(recent, length, name, seed):
    policy = Policy(name, (recent,) if name == "Window" else (0, recent))
    kept = Case(Layer(1, 2, 3, 2, 3), (1,) * length, (policy,), None, None, seed).run().kept
    for step in range(length):
        assert kept[step][0].tolist() == list(range(max(0, step + 1 - recent), step + 1))


@given(cases(policy=policies("Lambda")))
def test_lambda_keeps_the_first_sinks_and_the_last_of_the_others(case):
    for now, kept in zip(slices(case.chunks), case.run().kept):
        for policy, positions in zip(case.reference, kept):
            sinks = range(min(policy.sinks, now.stop))
            recent = range(max(len(sinks), now.stop - policy.recent), now.stop)
            assert positions.tolist() == [*sinks, *recent]


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)), min_size=1, max_size=12),
    st.integers(0, 5),
    st.integers(1, 5),
)
def test_ties_keep_the_lower_position_in_whatever_slots_the_entries_lie(scores, recent, heavy):
    """A float beside each score shuffles the slots."""
    order = sorted(range(len(scores)), key=lambda i: scores[i][1])
    position, score = np.array(order), np.array([scores[i][0] for i in order])
    kept = less_ref.choose(position, score, less_ref.H2O(heavy, recent), len(order))
    rank = {i: (np.inf if i >= len(order) - recent else scores[i][0]) for i in order}
    assert set(position[kept]) == set(sorted(order, key=lambda i: (-rank[i], i))[: heavy + recent])


@given(st.integers(0, 4), st.integers(1, 4), st.integers(1, 20), st.booleans())
def test_where_nothing_is_attended_the_oldest_tokens_are_kept(recent, heavy, length, at_once):
    """Only token 0 is ever attended: every other logit underflows, so all scores tie at zero, the newest one's too."""
    q, k = np.ones((1, length, 1)), np.full((1, length, 1), -1e4)
    k[0, 0] = 1e4
    chunks = [length] if at_once else [1] * length
    kept = less_ref.run(q, k, k, less_ref.H2O(heavy, recent), chunks=chunks).kept[-1][0]
    lowest = min(heavy, length)
    assert kept.tolist() == [*range(lowest), *range(max(lowest, length - recent), length)]


@given(cases(policy=SCORED))
def test_where_all_keys_are_equal_h2o_keeps_the_oldest_and_the_recent(case):
    _, _, v = case.qkv()
    same = np.ones_like(v)
    trace = case.run(q=np.ones((case.layer.query_heads, *v.shape[1:])), k=same)
    for now, kept in zip(slices(case.chunks), trace.kept):
        for policy, positions in zip(case.reference, kept):
            heavy = range(min(policy.heavy, now.stop))
            assert positions.tolist() == [*heavy, *range(max(len(heavy), now.stop - policy.recent), now.stop)]


@given(cases(), st.floats(-2, 2), st.floats(-2, 2))
def test_for_the_same_victims_the_output_is_linear_in_the_values(case, a, b):
    (q, k, v), (_, _, w) = case.qkv(), case.qkv(1)
    evicted = list(victims(case.run(), case.chunks))
    rest = (case.reference, case.kernels, case.chunks, case.scale, evicted)
    both, of_v, of_w = (replayed(q, k, x, *rest)[0] for x in (a * v + b * w, v, w))
    assert_close(both, a * of_v + b * of_w)


@given(cases(policy=policies(*(name for name in EVICTING_POLICIES if name != "Retention"))))
def test_the_values_never_change_what_is_kept_unless_rho_reads_them(case):
    one, other = case.run(), case.run(v=case.qkv(1)[2])
    assert all(np.array_equal(a, b) for c, d in zip(one.kept, other.kept) for a, b in zip(c, d))


@given(cases(), st.data())
def test_later_tokens_never_change_earlier_outputs_not_even_within_a_chunk(case, data):
    first = data.draw(st.integers(0, case.length - 1), "first token that differs")
    one, other = case.qkv(), case.qkv(1)
    q, k, v = (np.concatenate([a[:, :first], b[:, first:]], 1) for a, b in zip(one, other))
    assert np.array_equal(case.run().out[:first], case.run(q=q, k=k, v=v).out[:first])


@given(cases())
def test_the_order_of_the_slots_is_irrelevant(case):
    q, k, v = case.qkv()
    plain = mixed = less_ref.empty_state(case.layer.kv_heads, case.layer.head_dim, case.kernels)
    for now in slices(case.chunks):
        heads = []
        for head in mixed.heads:
            held = len(head.position)  # a policy that pools over the layer needs the same order in all heads
            order = np.random.default_rng([case.seed, held]).permutation(held)
            slots = {name: getattr(head, name)[order] for name in ("position", "k", "v", "score")}
            heads.append(replace(head, **slots))
        rest = q[:, now], k[:, now], v[:, now], case.reference, case.kernels, case.scale
        out, plain = less_ref.extend(plain, *rest)
        out_mixed, mixed = less_ref.extend(replace(mixed, heads=tuple(heads)), *rest)
        assert_close(out_mixed, out)
        for a, b in zip(plain.heads, mixed.heads):
            assert set(a.position) == set(b.position)
            assert_close(b.H, a.H)


@given(cases(policy=policies(*(name for name in EVICTING_POLICIES if name != "TOVA"))))
def test_kv_heads_do_not_know_of_each_other(case):
    (q, k, v), G, trace = case.qkv(), case.layer.group, case.run()
    for g, policy in enumerate(case.reference):
        readers = slice(g * G, (g + 1) * G)
        kernels = case.kernels
        if isinstance(policy, less_ref.Retention):
            policy = replace(policy, rho=less_ref.Rho(*(w[g : g + 1] for w in vars(policy.rho).values())))
        if isinstance(kernels, less_ref.Kernels):
            of_head = {name: readers if name.startswith("q") else slice(g, g + 1) for name in vars(kernels)}
            kernels = replace(kernels, **{name: w[of_head[name]] for name, w in vars(kernels).items()})
        alone = case.run(q=q[readers], k=k[g : g + 1], v=v[g : g + 1], policy=policy, kernels=kernels)
        assert np.array_equal(alone.out, trace.out[:, readers])
        assert all(np.array_equal(a[0], b[g]) for a, b in zip(alone.kept, trace.kept))


def repeated(case):
    """The same layer with a KV head for each query head."""
    _, k, v = case.qkv()
    G, kernels = case.layer.group, case.kernels
    if isinstance(kernels, less_ref.Kernels):
        of_keys = {name: np.repeat(w, G, 0) for name, w in vars(kernels).items() if name.startswith("k")}
        kernels = replace(kernels, **of_keys)
    return dict(k=np.repeat(k, G, 0), v=np.repeat(v, G, 0), kernels=kernels)


@given(cases(policy=UNSCORED))
def test_grouped_queries_equal_one_kv_head_for_each_query_head_where_nothing_is_scored(case):
    policy = [rule for rule in case.reference for _ in range(case.layer.group)]
    assert_close(case.run(**repeated(case), policy=policy).out, case.run().out)


@given(cases(policy=policies("H2O", "Lambda", "Window")))
def test_grouped_queries_equal_single_ones_that_evict_the_same_and_their_scores_add_up(case):
    G, trace = case.layer.group, case.run()
    policy = [rule for rule in case.reference for _ in range(G)]
    evicted = [[gone for gone in step for _ in range(G)] for step in victims(trace, case.chunks)]
    single = repeated(case)
    rest = policy, single["kernels"], case.chunks, case.scale, evicted
    out, states = replayed(case.qkv()[0], single["k"], single["v"], *rest)
    assert_close(out, trace.out)
    for c, state in enumerate(states):
        for g in range(case.layer.kv_heads):
            readers = state.heads[g * G : (g + 1) * G]
            assert all(np.array_equal(head.position, trace.kept[c][g]) for head in readers)
            assert_close(sum(head.score for head in readers), trace.heads[c][g].score)


@given(cases())
def test_replaying_the_victims_of_a_run_gives_the_same_run(case):
    trace = case.run()
    evicted = victims(trace, case.chunks)
    out, states = replayed(*case.qkv(), case.reference, case.kernels, case.chunks, case.scale, evicted)
    assert np.array_equal(out, trace.out)
    for c, state in enumerate(states):
        for g, head in enumerate(state.heads):
            assert set(head.position) == set(trace.kept[c][g])
            assert np.array_equal(head.H, trace.heads[c][g].H)


def test_given_victims_go_instead_of_the_policys_choice():
    case = Case(Layer(2, 1, 3, 2, 3), (5,), (Policy("Window", (2,)),) * 2, 1.0, None, 0)
    _, (state,) = replayed(*case.qkv(), case.reference, case.kernels, case.chunks, None, [[(3, 4), (0,)]])
    assert [head.position.tolist() for head in state.heads] == [[0, 1, 2], [1, 2, 3, 4]]
    assert_close(state.heads[0].z, case.kernels.psi(case.qkv()[1][0, 3:], 0).sum(0))


@given(cases(chunks=streaming))
def test_streaming_equals_the_parallel_form(case):
    trace = case.run()
    parallel = less_ref.parallel(*case.qkv(), less_ref.eviction_times(trace), case.kernels, case.scale)
    assert_close(parallel, trace.out)


@given(cases(chunks=streaming, policy=ANY_POLICY))
def test_the_eviction_time_is_the_step_after_which_a_token_is_gone(case):
    trace = case.run()
    e = less_ref.eviction_times(trace)
    for step, kept in enumerate(trace.kept):
        for g in range(case.layer.kv_heads):
            assert kept[g].tolist() == [j for j in range(step + 1) if e[g, j] > step]
    assert (e >= np.arange(case.length)).all()


@given(cases(length=st.just(1)), st.integers(1, 10), st.sampled_from([0.0, 1e-6, 1.0, 100.0]))
def test_the_stable_attention_equals_the_literal_one(case, E, size):
    rng, D, R = np.random.default_rng(case.seed), case.layer.head_dim, case.layer.rank
    logits, v, H = rng.normal(size=E) * 5, rng.normal(size=(E, D)), rng.normal(size=(R, D)) * size
    phi, z = np.abs(rng.normal(size=R)), np.abs(rng.normal(size=R)) * size
    stable, literal = less_ref.attend(logits, v, phi, H, z), less_ref.attend_literal(logits, v, phi, H, z)
    assert_close(stable, literal)


@given(st.sampled_from([-900.0, -20.0, 20.0, 900.0]), st.integers(0, 2**16))
def test_adding_to_every_logit_is_dividing_the_low_rank_state(shift, seed):
    """Also where e^logit itself overflows or vanishes."""
    rng = np.random.default_rng(seed)
    logits, v, H, z = rng.normal(size=4), rng.normal(size=(4, 3)), rng.normal(size=(2, 3)), rng.random(2)
    phi = rng.random(2)
    shifted = less_ref.attend(logits + shift, v, phi, H, z)
    if abs(shift) < 700:
        assert_close(shifted, less_ref.attend_literal(logits, v, phi * math.exp(-shift), H, z))
    else:
        assert_close(shifted, less_ref.softmax(logits) @ v if shift > 0 else phi @ H / (phi @ z))


@given(st.floats(-6, 6))
def test_the_kernels_activation_is_x_times_the_normal_distribution_function(x):
    assert_close(less_ref.gelu(np.array([x])), [x * math.erfc(-x / math.sqrt(2)) / 2])


def test_the_kernels_are_what_they_say_for_one_number():
    one = np.ones((1, 1, 1))
    kernels, x = less_ref.Kernels(q1=one * 2, q2=one * -3, k1=one, k2=one * 2, k3=one * -5), np.array([0.7])
    gelu = less_ref.gelu
    assert_close(kernels.phi(x, 0), -gelu(-3 * gelu(2 * x)))  # gelu is negative below 0, the kernel is not
    assert_close(kernels.psi(x, 0), 5 * gelu(2 * gelu(x)))
    kernels = less_ref.Exponential(**vars(kernels) | dict(k3=-5 * one[0]), q0=one * 4, k0=one * 6)
    assert_close(kernels.phi(x, 0), np.exp(4 * x - 3 * gelu(2 * x)))
    assert_close(kernels.psi(x, 0), np.exp(6 * x + 2 * gelu(x) - 5))
    assert_close(np.log(kernels.psi(x * 20, 0)), [40])


@given(cases(chunks=streaming, policy=policies(largest=3), length=st.integers(8, 24)))
def test_the_training_loss_counts_only_queries_behind_the_first_eviction(case):
    (q, k, v), trace, e = case.qkv(), case.run(), less_ref.eviction_times(case.run())
    full, projection = (
        dense(q, k, v, case.scale),
        np.random.default_rng(case.seed).normal(size=(q.shape[0] * q.shape[2], 5)),
    )
    first = int(e.min()) + 1
    error = ((trace.out - full).reshape(case.length, -1) @ projection)[first:] ** 2
    assert_close(less_ref.training_loss(trace.out, full, projection, e), error.mean())
    assert less_ref.training_loss(full, full, projection, e) == 0
    assert_close(trace.out[:first], full[:first])


def test_a_training_loss_without_any_eviction_is_refused():
    out = np.zeros((4, 1, 2))
    for e in ([np.inf] * 4, [3, np.inf, np.inf, np.inf]):
        with pytest.raises(ValueError, match="nothing is evicted within 4 tokens"):
            less_ref.training_loss(out, out, np.eye(2), np.array([e]))


@given(cases(length=st.integers(20, 40), policy=policies(*ONE_AT_A_TIME, largest=5)))
def test_a_full_state_holds_budgets_ranks_and_scores_and_nothing_else(case):
    """`numbers_held`, which counts one slot more for each KV head, is what the fast path is held to."""
    q, k, v = case.qkv()
    state = less_ref.empty_state(case.layer.kv_heads, case.layer.head_dim, case.kernels)
    _, state = less_ref.extend(state, q, k, v, case.reference, case.kernels)
    ranks = [case.kernels.rank if case.kernels else 0] * case.layer.kv_heads
    score_sizes = [math.prod(policy.score_shape) for policy in case.reference]
    without_the_free_one = [policy.budget - 1 for policy in case.reference]
    numbers = numbers_held(without_the_free_one, ranks, score_sizes, case.layer.head_dim)
    assert numbers["entries"] == sum(head.k.size + head.v.size for head in state.heads)
    assert numbers["low_rank"] == sum(head.H.size + head.z.size for head in state.heads)
    assert numbers["bookkeeping"] == sum(head.position.size + head.score.size for head in state.heads)


def test_a_bare_policy_holds_no_low_rank_state():
    x = np.ones((2, 9, 4))
    _, state = less_ref.extend(less_ref.empty_state(2, 4), x, x, x, [less_ref.Window(3), less_ref.H2O(3, 2)])
    assert [(head.k.size, head.H.size, head.z.size) for head in state.heads] == [(12, 0, 0), (20, 0, 0)]


def test_the_papers_low_rank_state_weighs_about_four_tokens():
    (head,) = less_ref.empty_state(1, 128, reference_kernels(Layer(1, 1, 128, 8, 3), seed=0)).heads
    assert round((head.H.size + head.z.size) / (2 * 128), 2) == 4.03


@pytest.mark.parametrize(
    ("q", "k", "v", "policies"),
    [
        ((3, 2, 4), (2, 2, 4), (2, 2, 4), 1),
        ((2, 2, 4), (2, 2, 4), (2, 2, 4), 3),
        ((2, 2, 4), (2, 3, 4), (2, 3, 4), 1),
        ((2, 2, 4), (2, 2, 5), (2, 2, 5), 1),
        ((2, 2, 4), (2, 2, 4), (2, 2, 5), 1),
    ],
    ids=["heads do not divide", "too many policies", "lengths differ", "head dimensions differ", "values differ"],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v, policies):
    rule = less_ref.Window(2)
    with pytest.raises(ValueError, match="shapes do not fit"):
        less_ref.extend(
            less_ref.empty_state(2, 4), np.ones(q), np.ones(k), np.ones(v), [rule] * policies if policies > 1 else rule
        )


@pytest.mark.parametrize(("chunks", "broken"), [([2, 2], False), ([4], False), (None, True)])
def test_only_a_streaming_run_without_broken_tokens_has_eviction_times(chunks, broken):
    x = np.ones((1, 4, 2))
    x[0, 1, 0] = np.nan if broken else 1
    trace = less_ref.run(x, x, x, less_ref.Window(2), chunks=chunks, step=less_ref.extend_past_broken_tokens)
    with pytest.raises(ValueError, match="run it without chunks, on finite tokens"):
        less_ref.eviction_times(trace)


@pytest.mark.parametrize("chunks", [[2, 1], [2, 3], [4, 0], [5, -1]])
def test_chunks_that_do_not_sum_to_the_sequence_are_refused(chunks):
    x = np.ones((1, 4, 2))
    with pytest.raises(ValueError, match="sum to 4 tokens"):
        less_ref.run(x, x, x, less_ref.Window(2), chunks=chunks)


def test_the_example_worked_by_hand_is_what_the_code_computes():
    """Its snippet runs; every sum in its table is right, and what the run gives, step by step."""
    assert doctest.testmod(less_ref) == (0, 3)
    q, k, v = np.array([[1, 1, 1], [math.log(3), 0, 0], [4, 8, 2]]).reshape(3, 1, 3, 1)
    rest = less_ref.H2O(heavy=1, recent=0), less_ref.Elu(1)
    trace = less_ref.run(q, k, v, *rest, scale=1)
    rows = [re.split(r"\s{2,}", line.strip()) for line in less_ref.__doc__.splitlines() if re.match("    [012]  ", line)]
    assert [len(row) for row in rows] == [3, 7, 7]
    for step, (token, output, score, *others) in enumerate(rows):
        assert int(token) == step
        assert_close(trace.out[step, 0], [value_of(output)])
        head, before = trace.heads[step][0], trace.heads[step - 1][0]
        assert_close(head.score, [value_of(score)])
        assert trace.kept[step][0] == [0]
        if others:
            new, gone, H, z = others
            assert_close(1 - (value_of(score) - before.score), [value_of(new)])
            assert gone == f"token {step}"
            assert_close(head.H, [[value_of(H.removeprefix("H = "))]])
            assert_close(head.z, [value_of(z.removeprefix("z = "))])
    full, bare = less_ref.run(q, k, v, less_ref.Full(), scale=1), less_ref.run(q, k, v, rest[0], scale=1)
    assert [full.out[2, 0, 0].round(9), bare.out[2, 0, 0].round(9)] == [4.4, 3.5]
    assert "The full cache would give 4.4, the bare policy 3.5." in less_ref.__doc__


def value_of(text):
    """The number that a text like "1 + 3/4 = 1.75" comes to, both sides being equal."""
    value, *others = [eval(side) for side in text.split(" = ")]
    assert others in ([], [value])
    return value


def test_a_reader_has_seen_all_of_less_after_250_lines_and_nothing_else():
    core = [less_ref.Kernels, less_ref.H2O, less_ref.Head, less_ref.State, less_ref.attend, less_ref.extend, less_ref.choose]
    core += [less_ref.fold, less_ref.run, less_ref.eviction_times, less_ref.parallel, less_ref.training_loss]
    starts = [inspect.getsourcelines(part)[1] for part in core]
    assert starts == sorted(starts)
    lines = Path(less_ref.__file__).read_text().splitlines()
    end = lines.index("# The policies of other papers.")
    assert starts[-1] < len("\n".join(lines[:end]).rstrip().splitlines()) <= 250
    assert len(lines) <= 600
    text = "\n".join(lines[:end]).lower()
    assert not [
        word for word in ("sink", "softcap", "context", "moved", "broken", "eight bits", "int8", "rotary") if word in text
    ]


def test_the_reference_imports_numpy_and_the_standard_library_only():
    imports = set()
    for node in ast.walk(ast.parse(Path(less_ref.__file__).read_text())):
        if isinstance(node, ast.Import):
            imports |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports.add("." if node.level else node.module.split(".")[0])
    assert imports <= {"numpy", *sys.stdlib_module_names}
