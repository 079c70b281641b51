"""What each policy is: its scores recomputed from the history, and a policy of one's own."""

from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from both_paths import allocate, batch, extend, heads_of
from closeness import assert_close
from histories import history
from hypothesis import assume, given
from hypothesis import strategies as st
from models import reference_policy
from strategies import cases, padded, policies, slices

import less_fast
import less_ref
from less_fast.layer import features, prompt
from less_fast.layer.policies import _later
from less_fast.setting import POLICIES


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


def evictions(case):
    """For every KV head, chunk by chunk: its policy, what each of the n queries so far gave each token, over the head's
    query heads (n, T), the positions held before the eviction and after it, and the scores of the latter."""
    trace = case.run()
    for g, policy in enumerate(case.reference):
        p, held = sum(attention(case, trace, a)[1] for a in readers(case, g)), []
        for now, heads in zip(slices(case.chunks), trace.heads):
            kept = heads[g].position.tolist()
            yield policy, p[: now.stop], [*held, *range(now.start, now.stop)], kept, heads[g].score
            held = kept


@given(cases(policy=policies("TOVA")))
def test_tova_scores_are_the_last_querys_attention_averaged_over_all_heads_of_the_layer(case):
    trace = case.run()
    mean = np.mean([attention(case, trace, a)[1] for a in range(case.layer.query_heads)], 0)
    for c, now in enumerate(slices(case.chunks)):
        for g in range(case.layer.kv_heads):
            assert np.array_equal(trace.kept[c][g], trace.kept[c][0])
            assert_close(trace.heads[c][g].score, mean[now.stop - 1, trace.kept[c][g]])


@given(cases(policy=policies("Scissorhands")))
def test_scissorhands_counts_how_often_of_the_last_queries_a_token_was_below_the_average(case):
    trace = case.run()
    for g, policy in enumerate(case.reference):
        seen, _ = attention(case, trace, readers(case, g)[0])
        mean = np.mean([attention(case, trace, a)[1] for a in readers(case, g)], 0)
        below = seen & (mean < (1 - 1e-6) / seen.sum(1, keepdims=True))
        for c, now in enumerate(slices(case.chunks)):
            last = below[max(0, now.stop - policy.history) : now.stop, trace.kept[c][g]].sum(0)
            rank = policy.rank(trace.kept[c][g], trace.heads[c][g].score, now.stop)
            recent = trace.kept[c][g] >= now.stop - policy.recent
            assert np.array_equal(rank, np.where(recent, np.inf, -last))


@given(cases(policy=policies("SnapKV")))
def test_snapkv_scores_are_what_each_of_the_last_queries_gave_the_token(case):
    for policy, p, _, kept, score in evictions(case):
        before_the_first = np.zeros((policy.window, p.shape[1]))
        assert_close(score, np.concatenate([before_the_first, p])[-policy.window :, kept].T)


@given(cases(policy=policies("SnapKV")))
def test_snapkv_keeps_its_window_and_of_the_others_those_with_the_best_neighbours(case):
    for policy, p, held, kept, _ in evictions(case):
        old = [j for j in held if j < len(p) - policy.window]
        votes = dict(zip(old, p[-policy.window :].sum(0)[old]))
        best = {j: max(votes.get(j + far, 0) for far in range(-policy.reach, policy.reach + 1)) for j in old}
        most = sorted(old, key=lambda j: (-best[j], j))[: policy.budget - policy.window]
        assert kept == [*sorted(most), *held[len(old) :]]


def five_sets(policy, kinds, attention, held, n):
    """What each of FastGen's choices would keep of what is held."""
    special = {j for j in held if kinds[j] == 2}
    marks = special | {j for j in held if kinds[j] == 1}
    local = {j for j in held if j >= n - policy.local}

    def and_frequent(some):
        return some | set(sorted(set(held) - some, key=lambda j: (-attention[j], j))[: policy.frequent])

    return special, marks, and_frequent(marks), and_frequent(marks | local), set(held)


def while_local(policy, p):
    """The part of the attention p (n, T) that came while the token was local: its own query, and the next local - 1."""
    n, T = p.shape
    return p * (np.arange(n)[:, None] < np.arange(T) + policy.local)


@given(cases(policy=policies("FastGen")))
def test_fastgen_scores_are_attention_its_local_part_and_queries_seen(case):
    for policy, p, _, kept, score in evictions(case):
        seen = len(p) - np.arange(p.shape[1])
        told = np.stack([p.sum(0), while_local(policy, p).sum(0), seen], 1)
        assert_close(score[:, :3], told[kept])


@given(padded(cases(policy=policies("FastGen"))))
def test_in_the_fast_path_fastgen_scores_begin_with_the_kind_of_the_token_at_their_position(case_and_valid):
    case, valid = case_and_valid
    state, qkv = allocate(case, len(valid)), batch(case, len(valid))
    for now in slices(case.chunks):
        extend(case, state, qkv, now, valid)
        for row, tokens in enumerate(valid):
            for head in heads_of(state, row):
                assert head.score[:, 0].tolist() == case.kinds(row)[tokens][head.position.astype(int)].tolist()


@given(cases(policy=policies("FastGen")))
def test_fastgen_holds_all_until_over_budget_and_then_chooses_the_first_set_that_recovers_enough(case):
    for policy, p, held, kept, score in evictions(case):
        n, given = len(p), p.sum(0)
        if n <= policy.budget:
            choice = 0
            assert kept == held == list(range(n))
        elif held == list(range(n)):
            sets = five_sets(policy, case.kinds(), given, held, n)
            recovered = [given[list(some)].sum() for some in sets]
            recovered[3] += while_local(policy, p)[:, list(sets[4] - sets[3])].sum()
            choice = 1 + np.argmax(np.array(recovered) >= (policy.recovery - 1e-6) * given.sum())
        assert set(score[:, 3]) == {choice}


@given(cases(policy=policies("FastGen")))
def test_fastgen_keeps_its_set_and_of_that_first_the_local_then_special_then_most_attended(case):
    for policy, p, held, kept, score in evictions(case):
        choice, n, kinds, given = int(score[0, 3]), len(p), case.kinds(), p.sum(0)
        if choice:
            local = range(n - policy.local if choice >= 4 else n, n)
            last = sorted(five_sets(policy, kinds, given, held, n)[choice - 1], key=lambda j: (-given[j] * (kinds[j] < 2), j))
            last.sort(key=lambda j: (j not in local, kinds[j] < 2))
            assert kept == sorted(last[: policy.budget])


@given(cases(policy=policies("FastGen")))
def test_fastgen_that_must_recover_all_chooses_everything_where_all_is_attended(case):
    rules = [replace(policy, recovery=1.0) for policy in case.reference_of(0 * case.kinds())]
    trace = case.run(policy=rules, q=0 * case.qkv()[0])
    for now, heads in zip(slices(case.chunks), trace.heads):
        for policy, head in zip(rules, heads):
            assert len(head.position) == min(policy.budget, now.stop)
            assert (head.score[:, 3] == 5 * (now.stop > policy.budget)).all()


@pytest.mark.parametrize(
    ("kinds", "choices", "kept"),
    [  # in twelfths, of the first head's 48 it needs 38.4, of the second's 4 it needs 3.2:
        ([2, 2, 0, 2], (1, 3), ([0, 1, 3], [0, 1, 3])),  # special 25 + 13 + 3 | special 3, and 1 frequent
        ([2, 1, 0, 2], (2, 3), ([0, 1, 3], [0, 1, 3])),  # special 28, punctuation 13 | marks 3, and 1 frequent
        ([0, 1, 0, 2], (3, 4), ([0, 1, 3], [0, 1, 3])),  # marks 16, frequent 25 | set 3 has 3, while local 1 more
        ([0, 0, 1, 0], (4, 4), ([0, 2, 3], [0, 2, 3])),  # set 3 has 32, local 3, while local 6 | 2, local 1, while local 1
        ([0, 0, 0, 0], (5, 4), ([0, 1, 3], [0, 3])),  # set 4 has 28, while local 6 + 4 | 2, while local 2
    ],
)
def test_fastgen_chooses_as_worked_by_hand_each_head_and_row_for_itself(kinds, choices, kept):
    """The first KV head spreads its attention, so tokens get 25, 13, 7 and 3 twelfths; with the second all look at themselves."""
    q, k = torch.ones(1, 2, 4, 1), torch.tensor([[0.0] * 4, [0.0, 1e3, 2e3, 3e3]])[None, ..., None]
    rule, reference = less_fast.FastGen(3, 1, 1, 0.8), less_ref.FastGen(3, 1, 1, 0.8, tuple(kinds))
    trace = less_ref.run(q[0].numpy(), k[0].numpy(), k[0].numpy(), reference, chunks=[4], scale=1.0)
    assert tuple(head.score[0, 3] for head in trace.heads[0]) == choices
    assert tuple(held.tolist() for held in trace.kept[0]) == kept

    state = less_fast.LayerState.allocate(rule, 2, 2, 2, 1)
    q, k = q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1)
    less_fast.extend(state, q, k, k, logits=less_fast.Logits(1.0), kinds=torch.tensor([[2, 2, 2, 2], kinds]))
    (group,) = state.parts
    assert tuple(sorted(held[held >= 0].tolist()) for held in group.slots.positions()[1]) == kept
    for _ in range(2):
        assert group.slots.scores()[..., 4].amax(-1).tolist() == [[1, 1], list(choices)]
        token = [x[:, :, :1] for x in (q, k, k)]
        less_fast.extend(state, *token, logits=less_fast.Logits(1.0), kinds=torch.tensor([[1], [1]]))  # they choose once


def fastgen_choices(rule, kinds, dtype):
    """What a head that attends to all tokens alike chooses at the end of a prompt of these kinds, in both paths."""
    n = len(kinds)
    q, k = np.zeros((1, n, 1)), np.arange(n, dtype=float)[None, :, None]
    trace = less_ref.run(q, k, k, less_ref.FastGen(**vars(rule), kinds=tuple(kinds)), chunks=[n])
    state = less_fast.LayerState.allocate(rule, 1, 1, 1, 1, dtype=dtype)
    less_fast.extend(state, *(torch.from_numpy(x)[None].to(dtype) for x in (q, k, k)), kinds=torch.tensor([kinds]))
    return trace.heads[0][0].score[0, 3], state.parts[0].slots.scores()[..., 4].amax().item()


@given(st.lists(st.integers(0, 2), min_size=2, max_size=12), st.integers(0, 4), st.sampled_from([torch.float64, torch.float32]))
def test_a_share_that_fastgen_recovers_exactly_is_enough_whatever_the_rounding(kinds, met, dtype):
    """With attention to all alike the shares are known as fractions: the first set that has as much as set `met` is chosen."""
    n, rule = len(kinds), less_fast.FastGen(len(kinds) - 1, 1, 0, 1.0)
    got = [sum(Fraction(1, i + 1) for i in range(j, n)) for j in range(n)]  # of each token, by all queries from its own on
    shares = [sum(got[j] for j in some) / n for some in five_sets(rule, kinds, got, range(n), n)]
    assume(shares[met] > 0)
    first = 1 + next(index for index, share in enumerate(shares) if share >= shares[met])
    assert fastgen_choices(replace(rule, recovery=float(shares[met])), kinds, dtype) == (first, first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kinds", "choice"), [([2, 0], 1), ([1, 0], 2)])
def test_what_fastgen_calls_enough_ends_at_the_same_number_in_both_paths(kinds, choice, dtype):
    """The first token has three quarters of the attention: enough where a millionth more is asked for, and no more than that."""
    recovery = 0.75 + 1e-6
    assert recovery - 1e-6 == 0.75
    assert fastgen_choices(less_fast.FastGen(1, 0, 0, recovery), kinds, dtype) == (choice, choice)
    assert fastgen_choices(less_fast.FastGen(1, 0, 0, recovery + 2e-7), kinds, dtype) == (5, 5)


def test_scissorhands_counts_the_ones_of_the_longest_history():
    numbers = [0, 1, 2**51, 2**52 - 1, *np.random.default_rng(0).integers(0, 2**52, 200).tolist()]
    position, last = torch.full((1, 1, len(numbers)), 0), less_fast.Scissorhands(4, 1, 52)
    ranks = last.rank(position, torch.tensor(numbers)[None, None], torch.tensor(9))
    assert (-ranks[0, 0]).tolist() == [bin(number).count("1") for number in numbers]


def test_only_real_queries_count_as_later():
    assert _later(torch.tensor([True, False, True, True, False])).tolist() == [2, 2, 1, 0, 0]


def test_a_policy_that_pools_over_the_layer_is_refused_beside_another():
    with pytest.raises(ValueError, match="pools over the layer"):
        less_ref.run(*np.zeros((3, 2, 4, 2)), [less_ref.TOVA(3), less_ref.TOVA(4)])
    with pytest.raises(ValueError, match="pools over the layer"):
        less_fast.LayerState.allocate([less_fast.TOVA(3), less_fast.TOVA(4)], 1, 2, 2, 2)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (None, "needs the kinds of the tokens: give extend kinds"),
        (torch.tensor([[0, 1, 2]]), r"kinds has shape \(1, 3\); this state wants \(1, 4\)"),
        (torch.tensor([[0, 1, 2, 0]] * 2), r"kinds has shape \(2, 4\); this state wants \(1, 4\)"),
    ],
)
def test_a_policy_that_asks_for_kinds_is_refused_without_one_for_each_token(kinds, message):
    x = np.zeros((2, 4, 2))
    state = less_fast.LayerState.allocate(less_fast.FastGen(3, 1, 1, 0.9), 1, 2, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        less_fast.extend(state, *[torch.from_numpy(x)[None]] * 3, kinds=kinds)
    assert state.n == 0


def test_the_references_fastgen_is_refused_without_a_kind_for_each_token():
    x = np.zeros((1, 4, 2))
    less_ref.run(x, x, x, less_ref.FastGen(3, 1, 1, 0.9, kinds=(0,) * 4))
    with pytest.raises(ValueError, match="has the kinds of 3 tokens, but there are 4: give it one for each"):
        less_ref.run(x, x, x, less_ref.FastGen(3, 1, 1, 0.9, kinds=(0,) * 3))


@pytest.mark.parametrize(
    ("policy", "fields", "message"),
    [
        (less_fast.TOVA, dict(budget=0), "budget of TOVA must be"),
        (less_fast.Scissorhands, dict(budget=4, recent=5, history=8), "recent within the budget"),
        (less_fast.Scissorhands, dict(budget=4, recent=2, history=53), "a history of at most 52"),
        (less_fast.Scissorhands, dict(budget=4, recent=2, history=0), "history of Scissorhands must be"),
        (less_fast.SnapKV, dict(budget=0, window=1, reach=1), "budget of SnapKV must be"),
        (less_fast.SnapKV, dict(budget=4, window=0, reach=1), "window of SnapKV must be"),
        (less_fast.SnapKV, dict(budget=4, window=5, reach=1), "its window within the budget"),
        (less_fast.SnapKV, dict(budget=4, window=2, reach=-1), "reach of SnapKV must be"),
        (less_fast.FastGen, dict(budget=0, frequent=0, local=0, recovery=0.9), "budget of FastGen must be"),
        (less_fast.FastGen, dict(budget=4, frequent=-1, local=2, recovery=0.9), "frequent of FastGen must be"),
        (less_fast.FastGen, dict(budget=4, frequent=2, local=-1, recovery=0.9), "local of FastGen must be"),
        (less_fast.FastGen, dict(budget=4, frequent=2, local=3, recovery=0.9), "frequent \\+ local within the budget"),
        (less_fast.FastGen, dict(budget=4, frequent=2, local=2, recovery=0.0), "recovery of FastGen must be a number above 0"),
        (less_fast.FastGen, dict(budget=4, frequent=2, local=2, recovery=1.1), "recovery of FastGen must be a number above 0"),
    ],
)
def test_impossible_fields_are_refused(policy, fields, message):
    with pytest.raises(ValueError, match=message):
        policy(**fields)


@pytest.mark.parametrize("name", POLICIES)
def test_both_paths_know_every_policy_by_the_same_name_and_fields(name):
    policy = POLICIES[name]
    twin = reference_policy(policy, kinds=())
    assert (twin.budget if np.isfinite(twin.budget) else None) == policy.budget


@given(policies("Scissorhands", "SnapKV", "FastGen"), st.integers(1, 30))
def test_with_another_budget_a_policy_keeps_its_shares_to_a_token_and_all_else(policy, budget):
    before, after = vars(policy.fast), vars(policy.fast.with_budget(budget))
    for name, value in after.items():
        if name in ("recent", "window", "frequent", "local"):
            assert -1 < value - budget * before[name] / before["budget"] <= 0 or (name == "window" and value == 1)
        else:
            assert value == (budget if name == "budget" else before[name])


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
    held = state.parts[0].slots.positions()
    assert sorted(held[held >= 0].tolist()) == [6, 6, 8, 8, 10, 10]


@dataclass(frozen=True)
class Forgets(less_fast.Policy):
    """Tokens of kind 1 go, all at once, when one of kind 2 comes. Beside the kind stands how many queries saw the token."""

    budget: int
    score_shape, needs, one_leaves = (2,), "kinds", False

    def born(self, tokens, kernels):
        return torch.stack([tokens.kinds, 0 * tokens.kinds], -1)[:, None]  # (N, 1, m, 2)

    def update(self, score, p, visible):
        return score + torch.nn.functional.pad(visible.sum(2)[..., None], (1, 0))

    def rank(self, position, score, n):
        end = position.masked_fill(score[..., 0] != 2, -1).amax(-1, keepdim=True)
        return score[..., 1].masked_fill((score[..., 0] == 1) & (position < end), -torch.inf)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6], [4, 8]])
def test_a_policy_of_ones_own_may_ask_for_kinds_and_let_several_tokens_go_at_once(chunks):
    kinds = torch.tensor([[0, 1, 1, 2, 1, 0, 1, 1, 2, 0, 1, 0], [1] * 11 + [2]])
    kept = [[0, 3, 5, 8, 9, 10, 11], [11]]
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 12, 4), torch.randn(2, 1, 12, 4), torch.randn(2, 1, 12, 4)
    kernels = features.Elu(2, 1, 4)
    state = less_fast.LayerState.allocate(Forgets(12), 2, 2, 1, 4, kernels)
    for now in slices(chunks):
        less_fast.extend(state, q[:, :, now], k[:, :, now], v[:, :, now], kinds=kinds[:, now])
    (group,) = state.parts
    for row in range(2):
        held = group.slots.positions()[row, 0] >= 0
        position, score = group.slots.positions()[row, 0, held], group.slots.scores()[row, 0, held]
        assert sorted(position.tolist()) == kept[row]
        assert score.tolist() == [[kinds[row, j], 12 - j] for j in position.tolist()]
        gone = [j for j in range(12) if j not in kept[row]]
        assert_close(group.z[row, 0], kernels.psi(k[row, :, gone])[0].sum(0), 1e-6)  # float32


@dataclass(frozen=True)
class OfKinds(less_fast.Policy):
    """Keeps the tokens of the highest kinds, which come as integers."""

    budget: int
    needs = "kinds"

    def born(self, tokens, kernels):
        return tokens.kinds[:, None]  # (N, 1, m)

    def rank(self, position, score, n):
        return score


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 1, 4]])
def test_scores_of_another_dtype_are_born_in_every_chunking(chunks):
    state, kinds = less_fast.LayerState.allocate(OfKinds(3), 1, 1, 1, 2), torch.tensor([[0, 2, 1, 0, 2, 1, 2, 0]])
    for now in slices(chunks):
        less_fast.extend(state, *torch.ones(3, 1, 1, now.stop - now.start, 2), kinds=kinds[:, now])
    assert state.head(0, 0)["position"].tolist() == [1, 4, 6]


@dataclass(frozen=True)
class CountsItsRanks(less_ref.Policy):
    """Keeps the newest, and notes in the score how often it ranked a token."""

    budget: int

    def update(self, score, p, visible):
        return score

    def rank(self, position, score, n):
        score += 1
        return position


def test_the_reference_ranks_once_at_the_end_of_a_chunk_and_keeps_what_is_noted_in_the_score():
    trace = less_ref.run(*np.zeros((3, 1, 8, 2)), CountsItsRanks(4), chunks=[5, 1, 2])
    assert [heads[0].score.tolist() for heads in trace.heads] == [[1, 1, 1, 1], [2, 2, 2, 1], [3, 2, 1, 1]]


@dataclass(frozen=True)
class Notes(less_fast.Policy):
    """Keeps the newest; notes what is called, and counts in the score at how many ends of chunks a token was there."""

    budget: int
    called: list = field(default_factory=list, compare=False)

    def update(self, score, p, visible):
        self.called.append("update")
        return score

    def rank(self, position, score, n):
        self.called.append(f"rank {n.item()}")
        score += 1
        return position


def test_entries_are_ranked_once_at_the_end_of_a_chunk_and_the_rank_may_note_something_in_the_score(monkeypatch):
    monkeypatch.setattr(prompt, "QUERIES_AT_ONCE", 2)
    rule = Notes(4)
    state = less_fast.LayerState.allocate(rule, 1, 1, 1, 2)
    for m in (17, 1, 2):  # of one head four times as many queries are attended at once
        less_fast.extend(state, *torch.zeros(3, 1, 1, m, 2))
    three, one = ["update"] * 3, ["update"]
    assert rule.called == [*three, "rank 17", *one, "rank 18", *one, "rank 20"]
    (group,) = state.parts
    counted = dict(zip(group.slots.positions().flatten().tolist(), group.slots.scores().flatten().tolist()))
    assert [counted[j] for j in (16, 17, 18, 19)] == [3, 2, 1, 1]
