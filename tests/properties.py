"""Properties of the fast path that `test_equivalence.py` tests and `test_teeth.py` plants bugs against."""

import numpy as np
import torch
from both_paths import (
    allocate,
    assert_extends_alike,
    assert_rows_equal_the_reference_alone,
    batch,
    empty,
    extend,
    kinds_of,
    lower_precision_errors,
    with_pads,
)
from closeness import BUDGETS, assert_close
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    ANY_ATTENTION,
    ANY_POLICY,
    ANY_SLOTS,
    APART,
    EVICTING,
    YOUNG,
    cases,
    fast_kernels,
    padded,
    slices,
    some_kernels,
)

from less_fast.layer.parallel import eviction_times, parallel


@given(cases(policy=ANY_POLICY, attention=ANY_ATTENTION, int8=ANY_SLOTS))
@example(APART)
@example(YOUNG)
def extend_equals_the_reference_after_every_chunk(case):
    assert_extends_alike(case, allocate(case), empty(case), batch(case), slices(case.chunks))


@given(padded(cases(policy=ANY_POLICY, attention=ANY_ATTENTION, int8=ANY_SLOTS)), st.sampled_from([torch.nan, 1.0]))
@example((APART, np.tri(4, APART.length, 8, dtype=bool)), torch.nan)
def each_row_of_a_padded_batch_equals_the_row_alone_and_pads_give_zero(case_and_valid, fill):
    case, valid = case_and_valid
    rows = len(valid)
    qkv = with_pads(batch(case, rows), valid, fill)
    state = allocate(case, rows)
    assert_rows_equal_the_reference_alone(case, state, [empty(case)] * rows, qkv, valid)
    assert state.n.tolist() == valid.sum(1).tolist()


@given(case=cases(**EVICTING, k3=some_kernels))
def huge_logits_neither_overflow_nor_vanish(shift, case):
    """A constant in every query and key adds `shift` to every logit; far below zero the low-rank part is alone."""
    q, k, v = case.qkv()
    scale = case.layer.head_dim**-0.5 if case.scale is None else case.scale
    q[..., -1], k[..., -1] = shift / scale, 1.0
    qkv = tuple(torch.from_numpy(x)[None] for x in (q, k, v))
    assert_extends_alike(case, allocate(case), empty(case), qkv, slices(case.chunks))
    if any(not policy.fast.one_leaves for policy in case.policies):
        return
    kernels = fast_kernels(case.kernels, case.layer, rho=case.rho)
    e = eviction_times(*qkv, case.fast, case.scale, kinds_of(case), kernels)
    streamed = case.run(q=q, k=k, v=v, chunks=None).out
    assert_close(parallel(*qkv, e, kernels, case.scale)[0].transpose(0, 1), streamed)


@given(cases(policy=ANY_POLICY, int8=ANY_SLOTS))
def later_steps_never_change_earlier_outputs_nor_the_inputs(case):
    qkv, state = batch(case), allocate(case)
    before = [x.clone() for x in qkv]
    outs, copies = [], []
    for now in slices(case.chunks):
        outs.append(extend(case, state, qkv, now))
        copies.append(outs[-1].clone())
    assert all(torch.equal(out, copy) for out, copy in zip(outs, copies))
    assert all(torch.equal(x, copy) for x, copy in zip(qkv, before))


@given(case=cases(**EVICTING))
def lower_precision_stays_within_the_measured_budgets(dtype, case):
    """The reference reads the same rounded bits, and evicts what the fast path evicted: at a near-tie either may go."""
    for what, measured in lower_precision_errors(case, dtype).items():
        assert measured <= BUDGETS[dtype][what], what
