"""The fast path equals the reference for every chunk, row and head: decisions exactly, numbers by `closeness.py`."""

import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import properties
import pytest
import torch
from both_paths import (
    allocate,
    assert_extends_alike,
    assert_identical,
    assert_rows_equal_the_reference_alone,
    assert_same_state,
    at,
    batch,
    empty,
    extend,
    extend_reference,
    kinds_of,
    positions,
    wide,
    widened,
    with_pads,
)
from closeness import FLOAT64, assert_close, error
from hypothesis import example, given
from hypothesis import strategies as st
from memory import numbers_held
from strategies import (
    ANY_ATTENTION,
    ANY_POLICY,
    ANY_SLOTS,
    APART,
    EVICTING,
    ONE_AT_A_TIME,
    Case,
    Layer,
    Policy,
    cases,
    fast_kernels,
    padded,
    policies,
    slices,
    some_kernels,
    streaming,
)

import less_fast
import less_ref
from less_fast.layer import parallel as parallel_module
from less_fast.layer import prompt as prompt_module
from less_fast.layer.parallel import eviction_times, merge, parallel

WINDOW, LAMBDA, H2O = Policy("Window", (4,)), Policy("Lambda", (1, 3)), Policy("H2O", (2, 2))


def batch_of(draw_case, rows=st.integers(1, 4)):
    return st.tuples(draw_case, rows)


def test_extend_equals_the_reference_after_every_chunk():
    properties.extend_equals_the_reference_after_every_chunk()


def test_each_row_of_a_padded_batch_equals_the_row_alone_and_pads_give_zero():
    properties.each_row_of_a_padded_batch_equals_the_row_alone_and_pads_give_zero()


@given(padded(cases(policy=ANY_POLICY, attention=ANY_ATTENTION, int8=ANY_SLOTS)), st.integers(1, 7), st.integers(1, 7))
def test_long_chunks_equal_the_reference_in_blocks_of_any_size(case_and_valid, queries, entries):
    case, valid = case_and_valid
    rows = len(valid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_module, "QUERIES_AT_ONCE", queries)
        patch.setattr(prompt_module, "TOKENS_AT_ONCE", entries)
        qkv = with_pads(batch(case, rows), valid)
        assert_rows_equal_the_reference_alone(case, allocate(case, rows), [empty(case)] * rows, qkv, valid)


def test_a_prompt_longer_than_every_block_equals_the_reference():
    case = Case(Layer(1, 2, 2, 2, 3), (1100, 1, 140), (Policy("H2O", (8, 8)),), 0.02, None, 3)
    assert case.length > prompt_module.TOKENS_AT_ONCE > prompt_module.QUERIES_AT_ONCE
    assert_extends_alike(case, allocate(case), empty(case), batch(case), slices(case.chunks))


SIDES = [times * prompt_module.QUERIES_AT_ONCE + more for times in (1, 4) for more in (-1, 0, 1)]  # of blocks of queries


@pytest.mark.parametrize("length", SIDES)
@pytest.mark.parametrize("attention", [(None, False), (1.5, True)], ids=["plain", "softcap and sinks"])
@pytest.mark.parametrize("policy", [H2O, Policy("TOVA", (6,)), Policy("SnapKV", (80, 70, 1)), LAMBDA], ids=lambda rule: rule.name)
def test_chunks_on_both_sides_of_every_block_of_queries_equal_the_reference(policy, attention, length):
    case = Case(Layer(2, 1, 2, 2, 3), (length, 1, length), (policy,) * 2, 0.02, None, 3, *attention)
    assert_extends_alike(case, allocate(case), empty(case), batch(case), slices(case.chunks))


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_as_many_entries_as_a_block_holds_are_folded_as_in_the_reference(more):
    case = Case(Layer(1, 1, 2, 2, 3), (prompt_module.TOKENS_AT_ONCE + 4 + more,), (WINDOW,), 1.0, None, 3)
    assert_extends_alike(case, allocate(case), empty(case), batch(case), slices(case.chunks))


@pytest.mark.parametrize("length", [times * parallel_module.TOKENS_AT_ONCE + more for times in (1, 2) for more in (-1, 0, 1)])
def test_the_parallel_form_equals_the_references_streaming_on_both_sides_of_its_blocks(length):
    case = Case(Layer(2, 2, 4, 2, 3), (1,) * length, (H2O, LAMBDA), 1.0, None, 3)
    qkv = batch(case)
    out = parallel(*qkv, eviction_times(*qkv, case.fast), fast_kernels(case.kernels))
    assert_close(out[0].transpose(0, 1), case.run().out)


@pytest.mark.parametrize("policy", [Policy("TOVA", (6,)), Policy("Scissorhands", (6, 1, 4)), Policy("SnapKV", (6, 3, 1))])
def test_a_prompt_of_which_only_the_last_queries_are_scored_equals_the_reference(policy):
    case = Case(Layer(2, 2, 4, 2, 3), (20, 1, 1), (policy,) * 2, 1.0, None, 3)
    assert 0 < policy.fast.queries < 20
    assert_extends_alike(case, allocate(case), empty(case), batch(case), slices(case.chunks))


@given(
    cases(k3=st.sampled_from([0.0, 1e-4, 1.0, "exponential", "performer", "elu"])),
    st.sampled_from([1e-3, 1.0, 10.0]),
)
def test_the_fast_kernels_equal_the_reference_kernels(case, size):
    (q, k, _), reference, fast = case.qkv(), case.kernels, fast_kernels(case.kernels, case.layer)
    q, k = q * size, k * size
    phi, psi = fast.phi(torch.from_numpy(q)[None])[0], fast.psi(torch.from_numpy(k)[None])[0]
    for a in range(case.layer.query_heads):
        assert_close(phi[a], reference.phi(q[a], a))
    for g in range(case.layer.kv_heads):
        assert_close(psi[g], reference.psi(k[g], g))


@pytest.mark.parametrize("shift", [-600.0, 600.0])
def test_huge_logits_neither_overflow_nor_vanish(shift):
    properties.huge_logits_neither_overflow_nor_vanish(shift=shift)


def test_ties_keep_the_lower_position_whether_tokens_come_one_by_one_or_at_once():
    """All logits but token 0's underflow, so all scores tie at zero, the newest one's too."""
    q, k = torch.ones(1, 1, 9, 1), torch.full((1, 1, 9, 1), -1e4)
    k[0, 0, 0] = 1e4
    for chunks in ([9], [1] * 9, [4, 5], [1, 7, 1]):
        state = less_fast.LayerState.allocate(less_fast.H2O(heavy=3, recent=2), 1, 1, 1, 1)
        for now in slices(chunks):
            less_fast.extend(state, q[:, :, now], k[:, :, now], k[:, :, now])
        assert positions(state, 0)[0].tolist() == [0, 1, 2, 7, 8]


@given(cases(policy=ANY_POLICY, int8=ANY_SLOTS), st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(0, 39))
@example(APART, [3, 1, 1, 0], 2)
def test_after_reorder_every_row_goes_on_as_the_row_it_was(case, order, before):
    qkv, state, references, kinds = batch(case, 4), allocate(case, 4), [empty(case)] * 4, kinds_of(case, 4)
    read = [[]] * 4  # the kinds of the tokens that each row has read
    for index, now in enumerate(slices(case.chunks)):
        if index == min(before, len(case.chunks) - 1):
            state.reorder(torch.tensor(order))
            references, read = ([of_rows[row] for row in order] for of_rows in (references, read))
            *qkv, kinds = (x[order].flip(0) for x in (*qkv, kinds))  # from here on each row reads other tokens
        extend(case, state, qkv, now, kinds=kinds)
        for row, reference in enumerate(references):
            real = widened(x[row] for x in at(qkv, now))
            read[row] = read[row] + kinds[row, now].tolist()
            references[row] = extend_reference(case, reference, real, case.reference_of(read[row]))[1]
            assert_same_state(state, row, references[row])


@given(cases(policy=ANY_POLICY, int8=ANY_SLOTS), st.integers(0, 40))
@example(APART, 3)
def test_a_saved_and_loaded_state_goes_on_identically(case, before):
    qkv, state = batch(case, 2), allocate(case, 2)
    for now in slices(case.chunks)[:before]:
        extend(case, state, qkv, now)
    with tempfile.TemporaryDirectory() as folder:
        less_fast.save_state(state, Path(folder) / "state.safetensors")
        loaded = allocate(case, 2)
        less_fast.load_state(loaded, Path(folder) / "state.safetensors")
        assert [path.name for path in Path(folder).iterdir()] == ["state.safetensors"]
    assert_identical(loaded, state)
    for now in slices(case.chunks)[before:]:
        one, other = (extend(case, some, qkv, now) for some in (state, loaded))
        assert torch.equal(one, other)
        assert_identical(loaded, state)


SAVED = Case(Layer(3, 2, 4, 2, 3), (6, 1), (WINDOW, H2O, WINDOW), 1.0, None, 5)


def fast_table(*table):
    return dict(policy=[policy.fast for policy in table])


@pytest.mark.parametrize(
    ("case", "instead"),
    [
        pytest.param(SAVED, fast_table(WINDOW, WINDOW, H2O), id="the same policies on other heads"),
        pytest.param(SAVED, fast_table(H2O, WINDOW, WINDOW), id="the groups in another order"),
        pytest.param(SAVED, fast_table(WINDOW, LAMBDA, WINDOW), id="another policy of the same budget"),
        pytest.param(SAVED, fast_table(WINDOW, Policy("H2O", (3, 1)), WINDOW), id="the same budget cut otherwise"),
        pytest.param(SAVED, fast_table(WINDOW, WINDOW, WINDOW), id="one group"),
        pytest.param(SAVED, dict(kernels=None), id="no kernels"),
        pytest.param(SAVED, dict(dtype=torch.float32), id="another dtype"),
        pytest.param(SAVED, dict(int8=True), id="slots in eight bits"),
        pytest.param(replace(SAVED, layer=Layer(3, 2, 4, 3, 3)), {}, id="another rank"),
        pytest.param(replace(SAVED, layer=Layer(3, 1, 4, 2, 3)), {}, id="other query heads"),
        pytest.param(replace(SAVED, layer=Layer(3, 2, 5, 2, 3)), {}, id="another head dimension"),
    ],
)
def test_a_state_of_another_configuration_is_refused_and_nothing_is_changed(case, instead, tmp_path):
    saved = allocate(SAVED)
    for now in slices(SAVED.chunks):
        less_fast.extend(saved, *at(batch(SAVED), now))
    less_fast.save_state(saved, tmp_path / "state")
    other = allocate(case, **instead)
    before = [(name, tensor, tensor.clone()) for name, tensor in other.tensors().items()]
    with pytest.raises(ValueError, match="holds a state of"):
        less_fast.load_state(other, tmp_path / "state")
    for (name, tensor, copy), (_, now) in zip(before, other.tensors().items(), strict=True):
        assert now is tensor, name
        assert torch.equal(tensor, copy), name


def test_a_state_in_eight_bits_knows_the_dtype_of_its_model(tmp_path):
    less_fast.save_state(allocate(SAVED, dtype=torch.bfloat16, int8=True), tmp_path / "state")
    with pytest.raises(ValueError, match=r"holds a state of torch\.int8, torch\.float16"):
        less_fast.load_state(allocate(SAVED, dtype=torch.float32, int8=True), tmp_path / "state")


@pytest.mark.parametrize(
    ("budgets", "parts"),
    [
        ([5] * 40, [40]),
        ([4, 16, 4] * 3, [6, 3]),
        ([500] + [30] * 31, [31, 1]),
        ([4, 5, 6, 7, 8] * 2, [8, 2]),
        ([4, 9] * 4 + [8], [5, 4]),
    ],
)
def test_of_many_heads_those_of_like_budgets_lie_together(budgets, parts):
    rules = [less_fast.H2O(1, 1).with_budget(budget) for budget in budgets]
    state = less_fast.LayerState.allocate(rules, 1, len(budgets), len(budgets), 4)
    assert [len(part.policies) for part in state.parts] == parts
    assert state.policies() == rules


def test_heads_that_differ_in_their_budgets_lie_together_if_they_are_few():
    budgets = [4, 16, 4]
    state = less_fast.LayerState.allocate([less_fast.H2O(1, 1).with_budget(budget) for budget in budgets], 2, 6, 3, 8)
    (part,) = state.parts
    assert part.slots.k.shape == (2, sum(budgets) + 3, 8)
    many = less_fast.LayerState.allocate([less_fast.H2O(1, 1).with_budget(budget) for budget in budgets * 3], 2, 9, 9, 8)
    assert [part.slots.k.shape for part in many.parts] == [(2, 6 * 5, 8), (2, 3 * 17, 8)]
    assert many.policies() == [less_fast.H2O(1, 1).with_budget(budget) for budget in budgets * 3]


BY_HEAD = Case(Layer(3, 2, 4, 2, 3), (6, 1, 1, 3, 1, 1, 1), (H2O, Policy("H2O", (4, 3)), H2O), 1.0, None, 5)


def test_single_tokens_and_chunks_in_turn_through_heads_that_lie_together_equal_the_reference():
    assert_extends_alike(BY_HEAD, allocate(BY_HEAD), empty(BY_HEAD), batch(BY_HEAD), slices(BY_HEAD.chunks))


@given(cases(policy=ANY_POLICY, int8=ANY_SLOTS))
def test_a_reset_state_is_as_allocated_and_goes_on_so(case):
    state = allocate(case)
    first, other = batch(case), tuple(x[1:] for x in batch(case, 2))
    for now in slices(case.chunks):
        extend(case, state, other, now)
    state.reset()
    assert_identical(state, allocate(case))
    assert_extends_alike(case, state, empty(case), first, slices(case.chunks))


def test_later_steps_never_change_earlier_outputs_nor_the_inputs():
    properties.later_steps_never_change_earlier_outputs_nor_the_inputs()


def tensors_of(thing):
    """Every tensor that an object holds in its attributes and lists, less its kernels and the tables of its heads."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, list | tuple):
        return [tensor for part in thing for tensor in tensors_of(part)]
    if hasattr(thing, "__dict__") and not isinstance(thing, torch.nn.Module):
        apart = ("kv_heads", "query_heads", "policy", "layout", "row")
        return [tensor for name, part in vars(thing).items() if name not in apart for tensor in tensors_of(part)]
    return []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(case=cases(length=st.integers(12, 30), int8=ANY_SLOTS), rows=st.integers(1, 3))
def test_the_bytes_held_are_those_of_the_specification_and_stay_where_they_are(dtype, case, rows):
    state, qkv = allocate(case, rows, dtype), batch(case, rows, dtype)
    ranks = [case.kernels.rank if case.kernels else 0] * case.layer.kv_heads
    score_sizes = [math.prod(rule.score_shape) + isinstance(rule, less_ref.FastGen) for rule in case.reference]  # and its kind
    numbers = numbers_held([policy.budget for policy in case.reference], ranks, score_sizes, case.layer.head_dim)
    slots = sum(policy.budget + 1 for policy in case.reference)
    own = sum((policy.budget + 1) * (8 - wide(dtype).itemsize) for policy in case.fast if policy.score_dtype)
    own += 8 * case.layer.kv_heads  # which slot the next token takes
    told = {
        # in eight bits a key or value has a byte for each number, and a float32
        "entries": rows * (2 * slots * (case.layer.head_dim + 4) if case.int8 else numbers["entries"] * dtype.itemsize),
        # of the low-rank state z is wide, and the mean as narrow as the entries
        "low_rank": rows * (numbers["low_rank"] * dtype.itemsize + sum(ranks) * (wide(dtype).itemsize - dtype.itemsize)),
        # positions are int32, scores wide, save those of one policy, which are int64; and 8 for the tokens seen
        "bookkeeping": rows * (slots * 4 + (numbers["bookkeeping"] - slots) * wide(dtype).itemsize + own + 8),
    }
    where = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
    for now in [slice(0, 0), *slices(case.chunks)]:
        if now.stop:
            extend(case, state, qkv, now)
        assert state.memory() == told
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(state)) == sum(told.values())
        assert {name: tensor.data_ptr() for name, tensor in state.tensors().items()} == where


GROWING = Case(Layer(2, 1, 4, 2, 3), (5, 1, 2), (Policy("Window", (99,)),) * 2, 1.0, None, 0)
"""Heads that keep what they are given."""


@given(cases(policy=ANY_POLICY))
@example(GROWING)
@example(replace(GROWING, layer=Layer(1, 1, 1, 1, 1), policies=GROWING.policies[:1]))
def test_no_two_tensors_of_a_state_share_memory(case):
    state, qkv = allocate(case), batch(case)
    for now in slices(case.chunks):
        extend(case, state, qkv, now)
        storages = [x.untyped_storage() for x in (*qkv, *(tensor for _, tensor in state.tensors().items())) if x.numel()]
        assert len({storage.data_ptr() for storage in storages}) == len(storages)


def as_integers(e, T):
    """The reference's eviction times as the fast path writes them: the length stands for never."""
    return np.where(np.isinf(e), T, e).astype(int)


@given(batch_of(cases(chunks=streaming, policy=ANY_POLICY)))
@example((replace(APART, chunks=(1,) * 13), 2))
def test_eviction_times_equal_the_references(case_and_rows):
    case, rows = case_and_rows
    kernels = fast_kernels(case.kernels, case.layer, rho=case.rho)
    e = eviction_times(*batch(case, rows), case.fast, case.scale, kinds_of(case, rows), kernels)
    for row in range(rows):
        q, k, v = case.qkv(row)
        expected = less_ref.eviction_times(case.run(q=q, k=k, v=v, policy=case.reference_of(case.kinds(row))))
        assert e[row].tolist() == as_integers(expected, case.length).tolist()


@given(batch_of(cases(chunks=streaming, policy=policies(*ONE_AT_A_TIME)), st.integers(1, 2)), st.integers(1, 9))
def test_the_parallel_form_equals_the_references_streaming(case_and_rows, block):
    case, rows = case_and_rows
    qkv = batch(case, rows)
    kernels = fast_kernels(case.kernels, case.layer, rho=case.rho)
    e = eviction_times(*qkv, case.fast, case.scale, kinds_of(case, rows), kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_module, "TOKENS_AT_ONCE", block)
        out = parallel(*qkv, e, kernels, case.scale)
    for row in range(rows):
        q, k, v = case.qkv(row)
        assert_close(out[row].transpose(0, 1), case.run(q=q, k=k, v=v, policy=case.reference_of(case.kinds(row))).out)


@pytest.mark.parametrize("lse", [-1e4, -90.0, 90.0, 1e4])
def test_merging_stays_finite_in_float32_and_gives_all_to_the_larger_part(lse):
    exact, low_rank, mass = torch.tensor([[2.0]]), torch.tensor([[3e4]]), torch.tensor([1e4])
    assert_close(merge(exact, torch.tensor([lse]), low_rank, mass), [[3.0 if lse < 0 else 2.0]], 1e-6)


@given(st.floats(-58, 85), st.floats(-85, 85))
def test_merging_in_float32_weighs_both_parts_by_their_size(lse, log_mass):
    """Features may reach e^80 in all; either part may be the larger one by far."""
    mass = torch.tensor([log_mass], dtype=torch.float64).exp().float()
    merged = merge(torch.tensor([[2.0]]), torch.tensor([lse], dtype=torch.float32), 3 * mass[:, None], mass)
    share = 1 / (1 + np.exp(lse - np.log(mass.item())))
    assert merged.item() == pytest.approx(2 + share, abs=1e-4)


@given(cases(length=EVICTING["length"], policy=policies(*ONE_AT_A_TIME, largest=4), chunks=streaming, k3=some_kernels))
def test_gradients_of_the_parallel_form_equal_differences_of_the_reference(case):
    """In the direction of a random change of all kernels; both sides of |x| = 0 are left to hypothesis to find."""
    q, k, v = case.qkv()
    rng, reference = np.random.default_rng(case.seed), case.kernels
    weight, e = rng.normal(size=(case.length, *q.shape[::2])), less_ref.eviction_times(case.run())
    direction = {name: rng.normal(size=getattr(reference, name).shape) for name in ("q1", "q2", "k1", "k2", "k3")}

    def loss(step):
        moved = replace(reference, **{name: getattr(reference, name) + step * way for name, way in direction.items()})
        return (less_ref.parallel(q, k, v, e, moved, case.scale) * weight).sum()

    kernels = fast_kernels(reference).requires_grad_()
    out = parallel(*batch(case), torch.from_numpy(as_integers(e, case.length))[None], kernels, case.scale)
    (out[0].transpose(0, 1) * torch.from_numpy(weight)).sum().backward()
    slope = sum((parameter.grad.numpy() * direction[name]).sum() for name, parameter in kernels.named_parameters())
    h = 1e-6
    assert_close(slope, (loss(h) - loss(-h)) / (2 * h), 1e-4)  # the difference itself is good to about h^2 + 1e-16 / h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_within_the_measured_budgets(dtype):
    properties.lower_precision_stays_within_the_measured_budgets(dtype=dtype)


def test_uninitialised_memory_reads_as_nan_in_these_tests():
    like = torch.zeros(3)
    for some in (torch.empty(3), torch.empty_like(like), like.new_empty(3)):
        assert some.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert error(like / like, like) > FLOAT64


REFUSED = Case(Layer(2, 2, 4, 2, 3), (3,), (WINDOW,) * 2, 1.0, None, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(1, 3, 3, 4)), "q has shape (1, 3, 3, 4); this state wants (1, 4, 3, 4)"),
        (dict(q=torch.zeros(4, 3, 4)), "q has shape (4, 3, 4)"),
        (dict(q=torch.zeros(1, 4, 0, 4), k=torch.zeros(1, 2, 0, 4), v=torch.zeros(1, 2, 0, 4)), "with m >= 1 tokens"),
        (dict(q=torch.zeros(2, 4, 3, 4), k=torch.zeros(2, 2, 3, 4), v=torch.zeros(2, 2, 3, 4)), "wants (1, 4, 3, 4)"),
        (dict(k=torch.zeros(1, 4, 3, 4)), "k has shape (1, 4, 3, 4); this state wants (1, 2, 3, 4)"),
        (dict(v=torch.zeros(1, 2, 2, 4)), "v has shape (1, 2, 2, 4); this state wants (1, 2, 3, 4)"),
        (dict(v=torch.zeros(1, 2, 3, 5)), "v has shape (1, 2, 3, 5)"),
        (dict(k=torch.zeros(1, 2, 3, 4, dtype=torch.float16)), "q, k, v are torch.float32, torch.float16"),
        (dict(valid=torch.ones(1, 4, dtype=torch.bool)), "valid has shape (1, 4); this state wants (1, 3)"),
        (dict(valid=torch.ones(1, 3)), "valid must be bool"),
        (dict(logits=less_fast.Logits(sinks=torch.ones(2))), "sinks has shape (2,); this state wants (4,)"),
    ],
)
def test_extend_refuses_what_does_not_fit_and_changes_nothing(change, message):
    state = allocate(REFUSED, dtype=torch.float32)
    less_fast.extend(state, *batch(REFUSED, dtype=torch.float32))
    before = [tensor.clone() for _, tensor in state.tensors().items()]
    with pytest.raises(ValueError, match=re.escape(message)):
        less_fast.extend(state, **dict(zip("qkv", batch(REFUSED, dtype=torch.float32))) | change)
    assert all(torch.equal(tensor, copy) for (_, tensor), copy in zip(state.tensors().items(), before))


@pytest.mark.parametrize(
    ("sizes", "kernels"),
    [
        (dict(query_heads=3, kv_heads=2), None),
        (dict(query_heads=4, kv_heads=2, policy=[less_fast.Window(2)] * 3), None),
        (dict(query_heads=4, kv_heads=2), (2, 2, 4)),
        (dict(query_heads=4, kv_heads=2), (4, 4, 4)),
        (dict(query_heads=4, kv_heads=2), (4, 2, 5)),
    ],
    ids=[
        "heads do not divide",
        "too many policies",
        "query heads of kernels",
        "KV heads of kernels",
        "their dimension",
    ],
)
def test_allocate_refuses_heads_policies_and_kernels_that_do_not_fit(sizes, kernels):
    given = dict(policy=less_fast.Window(2), batch=1, head_dim=4) | sizes
    with pytest.raises(ValueError, match="fit"):
        less_fast.LayerState.allocate(**given, kernels=kernels and less_fast.LayerKernels(*kernels, rank=2, hidden=3))


@pytest.mark.parametrize("sizes", [(3, 2, 4, 2, 3), (0, 1, 4, 2, 3), (2, 2, 4, 0, 3), (2, 2, 4, 2, 0)])
def test_kernels_of_impossible_sizes_are_refused(sizes):
    with pytest.raises(
        ValueError, match=r"must be an integer from 1 to 65,536, not 0|3 query heads are no multiple of 2 KV heads"
    ):
        less_fast.LayerKernels(*sizes)


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        (less_fast.Window, dict(recent=0)),
        (less_fast.Window, dict(recent=2.0)),
        (less_fast.Window, dict(recent=True)),
        (less_fast.Lambda, dict(sinks=-1, recent=3)),
        (less_fast.Lambda, dict(sinks=0, recent=0)),
        (less_fast.H2O, dict(heavy=3, recent=-1)),
        (less_fast.H2O, dict(heavy=0, recent=0)),
        (less_fast.H2O, dict(heavy="3", recent=0)),
    ],
)
def test_policies_refuse_impossible_budgets(policy, fields):
    with pytest.raises(ValueError, match=f"of {policy.__name__} must be an integer from [01] to 2,147,483,646, not "):
        policy(**fields)


@given(policies(), st.integers(1, 30))
def test_a_policy_with_another_budget_has_that_budget_or_says_why_not(policy, budget):
    if policy.name == "Lambda" and budget <= policy.fast.sinks:
        with pytest.raises(ValueError, match=f"a budget of {budget} leaves no recent tokens"):
            policy.fast.with_budget(budget)
    else:
        other = policy.fast.with_budget(budget)
        assert (type(other), other.budget) == (type(policy.fast), budget)


def test_a_policy_with_its_own_budget_is_itself():
    for policy in (less_fast.Window(5), less_fast.Lambda(2, 5), less_fast.H2O(4, 3), less_fast.H2O(0, 2)):
        assert policy.with_budget(policy.budget) == policy


def test_h2o_needs_at_least_one_token():
    with pytest.raises(ValueError, match=r"must be an integer from 1 to .*, not 0"):
        less_fast.H2O(2, 2).with_budget(0)
