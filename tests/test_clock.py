"""What a cache knows of its past, by hashes alone: every column tells masks and texts apart, in whatever pieces they came, and
whatever became of the rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from less_fast import LessError
from less_fast.hf.clock import Clock

BITS = st.lists(st.booleans(), min_size=8, max_size=8)
IDS = st.lists(st.integers(0, 3), min_size=8, max_size=8)
ROWS = st.lists(st.tuples(BITS, IDS), min_size=2, max_size=2)


def told(rows):
    """The mask and the ids of drawn rows: (N, T) each."""
    return tuple(torch.tensor(part) for part in zip(*rows))


def fed(mask, ids, at_once):
    """A clock that was told of these columns, so many at once."""
    clock = Clock()
    clock.begin(len(ids), ids.device)
    for valid, some in zip(mask.split(at_once, 1), ids.split(at_once, 1)):
        clock.ids, clock.valid, clock.m = some, None if valid.all() else valid, some.shape[1]
        clock.advance()
    return clock


def refused(clock, mask, ids):
    """The rows of another mask, or else of another text, by the sentence that refuses them; none if nothing does."""
    try:
        clock.check(None if mask.all() else mask, ids)
    except LessError as error:
        return str(error).partition("rows [")[2].partition("]")[0]
    return ""


def differing(mask, ids, other_mask, other_ids):
    """The same by comparing column by column."""
    masks = (mask != other_mask).any(1)  # (N,)
    texts = ((ids != other_ids) & mask).any(1)  # (N,)
    return ", ".join(map(str, (masks if masks.any() else texts).nonzero().flatten().tolist()))


@given(ROWS, st.integers(1, 8), st.sampled_from(["swap", "change", "mask", "same"]), st.permutations(range(8)))
def test_a_clock_tells_apart_whatever_differs_in_any_column_and_nothing_else(rows, at_once, what, columns):
    mask, ids = told(rows)
    one, two, *_ = columns
    other_mask, other_ids = mask.clone(), ids.clone()
    if what == "swap":  # the same tokens, and as many pads, in another order
        other_mask[0, [one, two]], other_ids[0, [one, two]] = mask[0, [two, one]], ids[0, [two, one]]
    elif what == "change":
        other_ids[1, one] += 1
    elif what == "mask":
        other_mask[1, one] ^= True
    assert refused(fed(mask, ids, at_once), other_mask, other_ids) == differing(mask, ids, other_mask, other_ids)


@given(ROWS, ROWS, st.integers(0, 7), st.lists(st.integers(0, 3), min_size=1, max_size=5), st.booleans())
def test_joined_and_selected_rows_keep_what_each_was(rows, more, shorter, order, in_front):
    """Rows that have seen less stand behind pads then."""
    (mask, ids), (late_mask, late_ids) = told(rows), told(more)
    late_mask, late_ids = late_mask[:, shorter:], late_ids[:, shorter:]
    pads = torch.nn.functional.pad
    both = [
        (mask, ids, fed(mask, ids, 3)),
        (pads(late_mask, (shorter, 0)), pads(late_ids, (shorter, 0)), fed(late_mask, late_ids, 2)),
    ]
    masks, texts, clocks = zip(*both[:: -1 if in_front else 1])
    clock, mask, ids = Clock.join(clocks), torch.cat(masks), torch.cat(texts)
    assert clock.length() == 8
    clock.reorder(torch.tensor(order))
    mask, ids = mask[order], ids[order]
    assert refused(clock, mask, ids) == ""
    for row in range(len(order)):
        other = ids.clone()
        other[row] += mask[row]
        assert refused(clock, mask, other) == (str(row) if mask[row].any() else "")
        other_mask = mask.clone()
        other_mask[row, row] ^= True
        assert refused(clock, other_mask, ids) == str(row)


@pytest.mark.parametrize("unknown", ["ids", "nothing"])
def test_a_clock_that_begins_anew_knows_what_comes_then_whatever_it_knew(unknown):
    mask, ids = torch.ones(2, 6, dtype=torch.bool), torch.arange(12).view(2, 6)
    clock = fed(mask, ids, 4)
    before = clock.tensors()
    if unknown == "ids":
        clock.ids, clock.valid, clock.m = None, None, 1
        clock.advance()
        assert clock.tokens is None
    clock.begin(2, ids.device)
    assert clock.length() == 0
    clock.ids, clock.m = ids, 6
    clock.advance()
    assert clock.length() == 6
    assert refused(clock, mask, ids) == ""
    assert refused(clock, mask, ids.flip(0)) == "0, 1"
    kept = zip(before, clock.tensors())  # graphs know them by their place
    assert [one is other for one, other in kept] == [True, True, unknown != "ids"]
