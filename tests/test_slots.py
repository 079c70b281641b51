"""Slots in eight bits: what they store, and the caches that have them."""

import numpy as np
import pytest
import torch
from both_paths import allocate, batch
from both_paths import extend as extend_case
from caches import feed
from closeness import BUDGETS, error_before_rounding
from hypothesis import given
from hypothesis import strategies as st
from models import make_kernels, make_model, tokens
from strategies import ANY_ATTENTION, ANY_POLICY, ANY_SLOTS, cases, slices

import less_ref
from less_fast import H2O, Lambda, LayerState, LessCache, LessError, Window, extend
from less_fast.layer.slots import packed, unpacked
from less_fast.layer.state import _rounded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(st.integers(0, 2**16), st.integers(1, 5).map(lambda quarter: 4 * quarter), st.sampled_from(DTYPES), st.floats(1e-20, 1e4))
def test_each_number_is_rounded_to_a_127th_of_the_largest_of_its_row_as_the_specification_says(seed, head_dim, dtype, size):
    x = (torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, head_dim))) * size).to(dtype)
    got, largest = unpacked(packed(x), torch.float64), x.double().abs().amax(-1, keepdim=True)
    assert np.array_equal(got.numpy(), less_ref.in_eight_bits(x.double().numpy()))
    assert packed(x).shape == (2, 3, 4 + head_dim)
    assert ((got - x).abs() <= largest / 254 * (1 + 1e-5) + 1e-40).all()
    assert torch.allclose(got.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=1e-40)  # the largest stays what it is


def test_what_was_rounded_before_is_rounded_no_further():
    """For each of the mantissas that a float32 may have, and where halves were rounded to even."""
    mantissas = (
        torch.arange(2**23, dtype=torch.int32)[:, None].bitwise_or(127 << 23).view(torch.float32)
    )  # (2^23, 1), from 1 to 2
    once = packed(mantissas * torch.tensor([1.0, -0.3, 0.5, 0.01]))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(packed(unpacked(once, dtype)), once)


def test_zeros_stay_zeros_and_numbers_at_the_limit_stay_finite():
    x = torch.tensor([[0.0, 0, 0, 0], [1e12, -1e12, 1, 0]])
    assert unpacked(packed(x), torch.float32).tolist() == [[0, 0, 0, 0], [pytest.approx(1e12), pytest.approx(-1e12), 0, 0]]


def test_a_head_dim_without_room_for_a_scale_is_refused_and_so_is_another_dtype():
    with pytest.raises(LessError, match="multiple of 4, not 6: leave int8 out"):
        LayerState.allocate(H2O(2, 2), 1, 2, 1, 6, int8=True)
    state = LayerState.allocate(H2O(2, 2), 1, 2, 1, 8, dtype=torch.bfloat16, int8=True)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(LessError, match="bring them to one dtype"):
            extend_by_ones(state, dtype)
    assert not state.n.any()
    extend_by_ones(state, torch.bfloat16)
    with pytest.raises(LessError, match="int8 is True or False, not 8"):
        LessCache.for_model(make_model(), H2O(2, 2), int8=8)


def extend_by_ones(state, dtype):
    extend(state, *(torch.ones(1, heads, 1, 8, dtype=dtype) for heads in (2, 1, 1)))


@given(cases(policy=ANY_POLICY, attention=ANY_ATTENTION, int8=ANY_SLOTS), st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_half_precision_layer_computes_in_float32_from_the_bits_that_its_slots_hold(case, dtype):
    """As the same layer in float32 does, fed with the same bits: all is the same to the last bit, but the output is rounded once,
    and so is the state's mean after each chunk. A first chunk that nobody scores is attended in the dtype itself."""
    half, single = allocate(case, 1, dtype), allocate(case, 1, torch.float32)
    qkv = batch(case, 1, dtype)
    for now in slices(case.chunks):
        out = extend_case(case, half, qkv, now)
        wanted = extend_case(case, single, [x.float() for x in qkv], now)
        if now.start or now.stop == 1 or all(policy.fast.queries != 0 for policy in case.policies):
            assert torch.equal(out, wanted.to(dtype))
        for part in single.parts:
            part.mean.copy_(_rounded(part.mean.clone(), part.z))
        for (name, a), (_, b) in zip(half.tensors().items(), single.tensors().items(), strict=True):
            assert torch.equal(a.to(b.dtype), b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_with_such_slots_says_nearly_the_same_and_holds_fewer_bytes(dtype):
    model, ids = make_model().to(dtype), tokens(2, 40)
    kernels = make_kernels(model).float()
    caches = [LessCache.for_model(model, H2O(12, 12), kernels, int8=int8) for int8 in (False, True)]
    exact, rounded = (feed(model, ids, cache, prompt=20).float() for cache in caches)
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    entries = [cache.memory()["entries"] for cache in caches]
    D = model.config.head_dim
    assert entries[1] * D * dtype.itemsize == entries[0] * (D + 4)
    assert caches[1].memory()["low_rank"] == caches[0].memory()["low_rank"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", [Lambda(1, 3), Window(4), Window(999)])
def test_a_prompt_that_nobody_scores_reads_keys_and_values_as_they_are_stored(policy, dtype):
    """Not rounded to the dtype once more."""
    q, k, v = (torch.randn(1, heads, 12, 8, generator=torch.Generator().manual_seed(heads)).to(dtype) for heads in (4, 2, 2))
    out = extend(LayerState.allocate(policy, 1, 4, 2, 8, dtype=dtype, int8=True), q, k, v)[0]  # (4, 12, 8)
    q, k, v = (x[0].double().numpy() for x in (q, k, v))
    stored = less_ref.in_eight_bits(k), less_ref.in_eight_bits(v)
    expected, _ = less_ref.extend(less_ref.empty_state(2, 8), q, *stored, less_ref.Full())
    assert error_before_rounding(out.transpose(0, 1), expected) <= BUDGETS[dtype]["out"]
