"""What each policy is: its scores recomputed from the history, and a policy of one's own."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from closeness import assert_close
from hypothesis import given
from strategies import cases, policies, slices
from test_reference_laws import history

import less_fast
import less_ref
from less_fast.policies import POLICIES, _later, _ones


def attention(case, trace, a):
    """What query head a gave every token at every step: visible (T, T) bool and p (T, T), zero where not visible."""
    q, k, _ = case.qkv()
    g = a // case.layer.group
    scale = case.layer.head_dim**-0.5 if case.scale is None else case.scale
    visible, _ = history(case, trace, g)
    weight = visible * np.exp(scale * q[a] @ k[g].T)
    return visible, weight / weight.sum(1, keepdims=True)


def readers(case, g):
    return range(g * case.layer.group, (g + 1) * case.layer.group)


@given(cases(policy=policies("TOVA")))
def test_tova_scores_are_the_last_querys_attention_averaged_over_all_heads_of_the_layer(case):
    trace = case.run()
    mean = np.mean([attention(case, trace, a)[1] for a in range(case.layer.query_heads)], 0)
    for c, now in enumerate(slices(case.chunks)):
        for g in range(case.layer.kv_heads):
            assert np.array_equal(trace.kept[c][g], trace.kept[c][0])
            assert_close(trace.score[c][g], mean[now.stop - 1, trace.kept[c][g]])


@given(cases(policy=policies("Scissorhands")))
def test_scissorhands_counts_how_often_of_the_last_queries_a_token_was_below_the_average(case):
    trace = case.run()
    for g, policy in enumerate(case.reference):
        seen, _ = attention(case, trace, readers(case, g)[0])
        mean = np.mean([attention(case, trace, a)[1] for a in readers(case, g)], 0)
        below = seen & (mean < (1 - 1e-6) / seen.sum(1, keepdims=True))
        for c, now in enumerate(slices(case.chunks)):
            last = below[max(0, now.stop - policy.history) : now.stop, trace.kept[c][g]].sum(0)
            rank = policy.rank(trace.kept[c][g], trace.score[c][g], now.stop)
            recent = trace.kept[c][g] >= now.stop - policy.recent
            assert np.array_equal(rank, np.where(recent, np.inf, -last))


@given(cases(policy=policies("DecayedH2O")))
def test_decayed_h2o_weighs_each_querys_attention_by_the_decay_to_its_age(case):
    trace = case.run()
    for g, policy in enumerate(case.reference):
        total = sum(attention(case, trace, a)[1] for a in readers(case, g))
        for c, now in enumerate(slices(case.chunks)):
            age = now.stop - 1 - np.arange(now.stop)
            score = (policy.decay**age)[:, None] * total[: now.stop]
            assert_close(trace.score[c][g], score.sum(0)[trace.kept[c][g]])


@given(cases(policy=policies("H2O")))
def test_h2o_that_does_not_decay_is_h2o(case):
    undecayed = [less_ref.DecayedH2O(policy.heavy, policy.recent, 1.0) for policy in case.reference]
    one, other = case.run(), case.run(policy=undecayed)
    assert all(np.array_equal(a, b) for c, d in zip(one.kept, other.kept) for a, b in zip(c, d))


def test_ones_are_counted_in_every_int64_that_a_history_can_be():
    numbers = [0, 1, 2**51, 2**52 - 1, *np.random.default_rng(0).integers(0, 2**52, 200).tolist()]
    assert _ones(torch.tensor(numbers)).tolist() == [bin(number).count("1") for number in numbers]


def test_only_real_queries_count_as_later():
    assert _later(torch.tensor([True, False, True, True, False])).tolist() == [2, 2, 1, 0, 0]


def test_a_policy_that_pools_over_the_layer_is_refused_beside_another():
    with pytest.raises(ValueError, match="pools over the layer"):
        less_ref.run(*np.zeros((3, 2, 4, 2)), [less_ref.TOVA(3), less_ref.TOVA(4)])
    with pytest.raises(ValueError, match="pools over the layer"):
        less_fast.LayerState.allocate([less_fast.TOVA(3), less_fast.TOVA(4)], 1, 2, 2, 2)


@pytest.mark.parametrize(
    ("policy", "fields", "message"),
    [
        (less_fast.TOVA, dict(budget=0), "TOVA needs budget"),
        (less_fast.DecayedH2O, dict(heavy=0, recent=0, decay=0.5), "DecayedH2O needs budget"),
        (less_fast.DecayedH2O, dict(heavy=2, recent=2, decay=0.0), "needs a decay above 0"),
        (less_fast.DecayedH2O, dict(heavy=2, recent=2, decay=1.5), "needs a decay above 0"),
        (less_fast.Scissorhands, dict(budget=4, recent=5, history=8), "recent within the budget"),
        (less_fast.Scissorhands, dict(budget=4, recent=2, history=53), "a history of at most 52"),
        (less_fast.Scissorhands, dict(budget=4, recent=2, history=0), "Scissorhands needs history"),
    ],
)
def test_impossible_fields_are_refused(policy, fields, message):
    with pytest.raises(ValueError, match=message):
        policy(**fields)


@pytest.mark.parametrize("name", POLICIES)
def test_both_paths_know_every_policy_by_the_same_name_and_fields(name):
    policy = POLICIES[name]
    twin = getattr(less_ref, type(policy).__name__)(**vars(policy))
    assert (twin.budget if np.isfinite(twin.budget) else None) == policy.budget


@dataclass(frozen=True)
class EveryOther(less_fast.Policy):
    """Keeps the last of the even positions."""

    budget: int

    def rank(self, position, score, n):
        return position - 1000 * (position % 2)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6]])
def test_a_policy_of_ones_own_works_in_every_chunking(chunks):
    state = less_fast.LayerState.allocate(EveryOther(3), 2, 2, 1, 4)
    torch.manual_seed(0)
    for m in chunks:
        less_fast.extend(state, torch.randn(2, 2, m, 4), torch.randn(2, 1, m, 4), torch.randn(2, 1, m, 4))
    held = state.groups[0].position
    assert sorted(held[held >= 0].tolist()) == [6, 6, 8, 8, 10, 10]
