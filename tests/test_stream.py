"""Tokens one at a time: a loop of `extend`, and on a GPU a graph of it."""

import pytest
import torch
from both_paths import allocate, assert_identical, at, batch, kinds_of, logits_of, with_pads
from hypothesis import given
from strategies import ANY_ATTENTION, ANY_POLICY, cases, padded

import less_fast
from less_fast.layer import stream as stream_module
from less_fast.layer.parallel import eviction_times
from less_fast.layer.stream import stream

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def inputs(case, valid):
    rows = len(valid)
    return with_pads(batch(case, rows), valid), torch.from_numpy(valid), logits_of(case), kinds_of(case, rows)


@given(padded(cases(policy=ANY_POLICY, attention=ANY_ATTENTION)))
def test_a_stream_is_extend_token_by_token(case_and_valid):
    case, _ = case_and_valid
    qkv, valid, logits, kinds = inputs(*case_and_valid)
    state, other = (allocate(case, len(valid)) for _ in range(2))
    out = stream(state, *qkv, valid, logits, kinds)
    steps = (slice(i, i + 1) for i in range(case.length))
    expected = [less_fast.extend(other, *at(qkv, now), valid[:, now], logits, kinds[:, now]) for now in steps]
    assert torch.equal(out, torch.cat(expected, 2))
    assert_identical(state, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NO_GPU
@pytest.mark.parametrize("policy", [less_fast.H2O(5, 4), less_fast.TOVA(9), less_fast.SnapKV(9, 3, 1), less_fast.Lambda(2, 7)])
def test_a_graph_of_the_step_is_the_step(policy, dtype, monkeypatch):
    """Outputs, states and eviction times of a captured graph are those of single steps."""
    device = "cuda"
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 40, 16, device=device, dtype=dtype) for heads in (6, 2, 2))
    valid = torch.rand(3, 40, device=device) < 0.8
    kernels = less_fast.LayerKernels(6, 2, 16, rank=4, hidden=8).to(device).requires_grad_(False)
    results = []
    for few in (10, 10**9):
        monkeypatch.setattr(stream_module, "FEW", few)
        state = less_fast.LayerState.allocate(policy, 3, 6, 2, 16, kernels, dtype, device)
        out = stream(state, q[:, :, :25], k[:, :, :25], v[:, :, :25], valid[:, :25])
        out = torch.cat([out, stream(state, q[:, :, 25:], k[:, :, 25:], v[:, :, 25:], valid[:, 25:])], 2)
        results.append((out, [tensor for _, tensor in state.tensors().items()], eviction_times(q, k, v, policy)))
    (out, tensors, e), (expected, others, expected_e) = results
    assert torch.equal(out, expected)
    assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))
    assert torch.equal(e, expected_e)
    assert out.isfinite().all()
