"""The tests can fail: each of these bugs, planted into the fast path at run time, turns the tests red that are named with it."""

import properties
import pytest
import torch
from any_history import BFloat16, Float64, steps
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import less_fast
from less_fast.layer import decode, prompt
from less_fast.layer.context import Context
from less_fast.layer.slots import Slots, unpacked
from less_fast.layer.state import Part


def a_fold_is_skipped(patch):
    fold = Part.fold
    patch.setattr(Part, "fold", lambda part, *tokens: fold(part, *(x[:, :, 1:] for x in tokens)))


def tokens_are_folded_twice(patch):
    fold = Part.fold
    patch.setattr(Part, "fold", lambda *args: (fold(*args), fold(*args)))


def z_is_dropped(patch):
    fold = Part.fold

    def fold_into_H_alone(part, *tokens):
        z = part.z.clone()
        fold(part, *tokens)
        part.z.copy_(z)

    patch.setattr(Part, "fold", fold_into_H_alone)


def the_maximum_is_evicted(patch):
    def rank(self, position, score, n):
        return (-score).masked_fill(position >= n - self.recent, torch.inf)

    patch.setattr(less_fast.H2O, "rank", rank)


def the_virtual_token_is_not_weighed_against_the_largest_logit(patch):
    """share = sigmoid(log mass - log total), without the largest logit, which both sums must be relative to."""
    weigh = decode.weigh

    def without_the_largest(dots, hidden, *rest):
        largest = dots.masked_fill(hidden[:, :, None], -torch.inf).amax(-1, keepdim=True)
        p, logits, every = weigh(dots, hidden, *rest)
        return p, logits - largest, every

    for module in (decode, prompt):
        patch.setattr(module, "weigh", without_the_largest)


def the_recent_window_is_one_too_short(patch):
    rank = less_fast.H2O.rank
    patch.setattr(less_fast.H2O, "rank", lambda self, position, score, n: rank(self, position, score, n + 1))


def scores_come_after_the_eviction(patch):
    before = []

    def remembering(update):
        def remember(self, score, p, visible):
            before.append(score.clone())
            return update(self, score, p, visible)

        return remember

    def too_early(rank):
        def rank_by_what_was(self, position, score, n):
            old = before[0] if before and before[0].shape == score.shape else score
            before.clear()
            return rank(self, position, old, n)

        return rank_by_what_was

    for policy in (less_fast.H2O, less_fast.TOVA, less_fast.Retention, less_fast.Scissorhands):
        patch.setattr(policy, "update", remembering(policy.update))
        patch.setattr(policy, "rank", too_early(policy.rank))


def outputs_share_their_memory(patch):
    extend, memory = less_fast.extend, {}

    def into_the_same_memory(*args, **named):
        out = extend(*args, **named)
        return memory.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)

    patch.setattr(less_fast, "extend", into_the_same_memory)


def rows_are_joined_as_if_none_had_moved(patch):
    join = less_fast.LayerState.join

    def join_and_forget(states):
        joined = join(states)
        joined.moved = None if joined.moved is None else torch.zeros_like(joined.moved)
        return joined

    patch.setattr(less_fast.LayerState, "join", join_and_forget)


def selected_rows_have_moved_as_the_first_ones_did(patch):
    reorder = less_fast.LayerState.reorder

    def reorder_all_else(state, rows):
        moved = state.moved
        reorder(state, rows)
        state.moved = None if moved is None else moved[torch.arange(len(rows)) % len(moved)]

    patch.setattr(less_fast.LayerState, "reorder", reorder_all_else)


def every_row_begins_anew_when_one_moves(patch):
    make_room = Context.make_room

    def make_room_and_forget(context, state, new):
        before = state.moved.clone()
        room = make_room(context, state, new)
        if (state.moved != before).any():
            for part in state.parts:
                part.mean.zero_()
        return room

    patch.setattr(Context, "make_room", make_room_and_forget)


def eight_bits_are_unpacked_to_bfloat16(patch):
    read = Slots.read
    patch.setattr(
        Slots, "read", lambda slots, x: (unpacked(x, torch.bfloat16) if x.dtype == torch.int8 else read(slots, x)).float()
    )


STOP_AT_ONCE = dict(derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)


def run(test, patch, **arguments):
    """A property as it stands, with the examples of the quick profile, and without shrinking."""
    quick = settings(test._hypothesis_internal_use_settings, max_examples=100, **STOP_AT_ONCE)
    patch.setattr(test, "_hypothesis_internal_use_settings", quick)  # calling settings(...) would change it for good
    test(**arguments)


def every_chunk(patch):
    run(properties.extend_equals_the_reference_after_every_chunk, patch)


def padded_rows(patch):
    run(properties.each_row_of_a_padded_batch_equals_the_row_alone_and_pads_give_zero, patch)


def huge_logits(patch):
    run(properties.huge_logits_neither_overflow_nor_vanish, patch, shift=600.0)


def lower_precision(patch):
    run(properties.lower_precision_stays_within_the_measured_budgets, patch, dtype=torch.float32)


def earlier_outputs(patch):
    run(properties.later_steps_never_change_earlier_outputs_nor_the_inputs, patch)


def any_history(patch, machine=Float64):
    run_state_machine_as_test(machine, settings=settings(steps(60), **STOP_AT_ONCE))


def any_history_in_bfloat16(patch):
    any_history(patch, BFloat16)


TESTS = {
    a_fold_is_skipped: padded_rows,
    tokens_are_folded_twice: every_chunk,
    z_is_dropped: lower_precision,
    the_maximum_is_evicted: lower_precision,
    the_virtual_token_is_not_weighed_against_the_largest_logit: huge_logits,
    the_recent_window_is_one_too_short: every_chunk,
    scores_come_after_the_eviction: padded_rows,
    outputs_share_their_memory: earlier_outputs,
}

OF_HISTORIES_ALONE = {
    rows_are_joined_as_if_none_had_moved: any_history,
    selected_rows_have_moved_as_the_first_ones_did: any_history,
    every_row_begins_anew_when_one_moves: any_history,
    eight_bits_are_unpacked_to_bfloat16: any_history_in_bfloat16,
}
OF_BOTH = [*TESTS.items(), *((bug, any_history) for bug in TESTS), *OF_HISTORIES_ALONE.items()]


def name(function):
    return function.__name__


@pytest.mark.parametrize(("bug", "test"), OF_BOTH, ids=name)
def test_a_planted_bug_turns_a_named_test_red(bug, test, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test(monkeypatch)


@pytest.mark.parametrize("test", dict.fromkeys(TESTS.values()), ids=name)  # the machines are in test_state_machine.py
def test_the_named_tests_are_green_without_a_bug(test, monkeypatch):
    test(monkeypatch)
