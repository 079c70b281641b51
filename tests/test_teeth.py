"""The tests can fail: each of these bugs, planted into the fast path at run time, turns two named tests red."""

import pytest
import test_equivalence as equivalence
import test_state_machine as histories
import torch
from hypothesis import Phase, settings

import less_fast
from less_fast.layer import step


def a_fold_is_skipped(patch):
    fold = step._fold
    patch.setattr(step, "_fold", lambda group, entries, *which: fold(group, entries, *(x[:, :, 1:] for x in which)))


def entries_are_folded_twice(patch):
    fold = step._fold
    patch.setattr(step, "_fold", lambda *args: (fold(*args), fold(*args)))


def z_is_dropped(patch):
    fold = step._fold

    def fold_into_H_alone(group, *args):
        z = group.z.clone()
        fold(group, *args)
        group.z.copy_(z)

    patch.setattr(step, "_fold", fold_into_H_alone)


def the_maximum_is_evicted(patch):
    def rank(self, position, score, n):
        return (-score).masked_fill(position >= n - self.recent, torch.inf)

    patch.setattr(less_fast.H2O, "rank", rank)


def the_virtual_token_is_not_weighed_against_the_largest_logit(patch):
    """share = sigmoid(log mass - log total), without the largest logit, which both sums must be relative to."""
    attend = step.attend

    def without_the_largest(q, k, v, visible, clear, real, scale, low_rank=None, *unusual):
        if low_rank is not None:
            logits = torch.einsum("nhgmd,nhsd->nhgms", q * scale, k).masked_fill(~visible[:, :, None], -torch.inf)
            phi, *state = low_rank
            low_rank = phi * logits.amax(-1, keepdim=True).exp(), *state
        return attend(q, k, v, visible, clear, real, scale, low_rank, *unusual)

    patch.setattr(step, "attend", without_the_largest)


def the_recent_window_is_one_too_short(patch):
    rank = less_fast.H2O.rank
    patch.setattr(less_fast.H2O, "rank", lambda self, position, score, n: rank(self, position, score, n + 1))


def scores_come_after_the_eviction(patch):
    attend_and_score, evict, late = step._attend_and_score, step._evict, {}

    def put_the_scores_off(group, entries, *args):
        before = entries.score.clone()
        out = attend_and_score(group, entries, *args)
        late.update(position=entries.position.clone(), score=entries.score.clone())
        entries.score.copy_(before)
        return out

    def evict_and_then_score(group, *args):
        evict(group, *args)
        same = (group.position[..., None] == late["position"][:, :, None]) & (group.position >= 0)[..., None]
        score = late["score"].view(*late["score"].shape[:3], -1)
        group.score.copy_((same.to(score.dtype) @ score).view_as(group.score))

    patch.setattr(step, "_attend_and_score", put_the_scores_off)
    patch.setattr(step, "_evict", evict_and_then_score)


def outputs_share_their_memory(patch):
    extend, memory = less_fast.extend, {}

    def into_the_same_memory(*args, **named):
        out = extend(*args, **named)
        return memory.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)

    patch.setattr(less_fast, "extend", into_the_same_memory)


STOP_AT_ONCE = dict(derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)


def run(test, patch, **given):
    """A test of hypothesis as it stands, with the examples of the quick profile, and without shrinking."""
    quick = settings(test._hypothesis_internal_use_settings, max_examples=100, **STOP_AT_ONCE)
    patch.setattr(test, "_hypothesis_internal_use_settings", quick)  # calling settings(...) would change it for good
    test(**given)


def every_chunk(patch):
    run(equivalence.test_extend_equals_the_reference_after_every_chunk, patch)


def padded_rows(patch):
    run(equivalence.test_each_row_of_a_padded_batch_equals_the_row_alone_and_pads_give_zero, patch)


def huge_logits(patch):
    run(equivalence.test_huge_logits_neither_overflow_nor_vanish, patch, shift=600.0)


def lower_precision(patch):
    run(equivalence.test_lower_precision_stays_within_the_measured_budgets, patch, dtype=torch.float32)


def earlier_outputs(patch):
    run(equivalence.test_later_steps_never_change_earlier_outputs_nor_the_inputs, patch)


def any_history(patch):
    steps = histories.steps
    patch.setattr(histories, "steps", lambda _: settings(steps(30), **STOP_AT_ONCE))
    histories.test_a_state_is_what_its_history_says(histories.Float64)


TESTS = {
    a_fold_is_skipped: padded_rows,
    entries_are_folded_twice: every_chunk,
    z_is_dropped: lower_precision,
    the_maximum_is_evicted: lower_precision,
    the_virtual_token_is_not_weighed_against_the_largest_logit: huge_logits,
    the_recent_window_is_one_too_short: every_chunk,
    scores_come_after_the_eviction: padded_rows,
    outputs_share_their_memory: earlier_outputs,
}


def name(function):
    return function.__name__


@pytest.mark.parametrize(("bug", "test"), [*TESTS.items(), *((bug, any_history) for bug in TESTS)], ids=name)
def test_a_planted_bug_turns_a_named_test_red(bug, test, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test(monkeypatch)


@pytest.mark.parametrize("test", [*dict.fromkeys(TESTS.values()), any_history], ids=name)
def test_the_named_tests_are_green_without_a_bug(test, monkeypatch):
    test(monkeypatch)
