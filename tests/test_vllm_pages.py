"""Requests that come and go in pages, as vLLM has them, compute what each computes alone. This needs torch, not vLLM."""

from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ANY_SLOTS,
    ONE_AT_A_TIME,
    Layer,
    fast_kernels,
    layers,
    policies,
    policy_tables,
    reference_kernels,
    reference_rho,
)

from less_fast import H2O, Lambda, LayerState, SnapKV, extend
from less_fast.vllm.pages import PagedLayer, laid_out, span_of

FIXED = policies(*ONE_AT_A_TIME)
PAGES = 7


def pages_of(paged, gap):
    """The pages of a layer without gaps, or with other bytes between them, as beside layers of vLLM's own."""
    parts = sorted(paged.parts, key=lambda part: -part[2].itemsize)
    size = -(-paged.page_bytes // 8) * 8 + 8
    tensors = laid_out(parts, torch.randint(0, 255, (PAGES, size), dtype=torch.uint8), not gap)
    return {name: tensor for (name, _, _), tensor in zip(parts, tensors)}


@st.composite
def paged_layers(draw):
    layer, int8 = draw(layers()), draw(ANY_SLOTS)
    layer = replace(layer, head_dim=4) if int8 else layer
    table = [policy.fast for policy in draw(policy_tables(layer.kv_heads, FIXED))]
    layer = replace(layer, ranks=None) if table[0].pooled else layer  # heads that are pooled have one rank
    with_kernels, seed = draw(st.booleans()), draw(st.integers(0, 2**32 - 1))
    rho = reference_rho(layer, seed) if any(policy.learned for policy in table) else None
    kernels = fast_kernels(reference_kernels(layer, seed) if with_kernels else None, layer, rho=rho)
    return layer, table, kernels, seed, int8


@pytest.mark.parametrize("gap", [False, True], ids=["side by side", "with gaps"])
@given(case=paged_layers(), chunk=st.sampled_from([None, 1, 3]), data=st.data())
def test_requests_in_pages_compute_what_each_computes_alone(gap, case, chunk, data):
    layer, rule, kernels, seed, int8 = case
    heads = layer.query_heads, layer.kv_heads, layer.head_dim
    paged = PagedLayer(rule, kernels, heads, torch.float64, chunk, int8=int8)
    paged.bind(pages_of(paged, gap))
    generator = torch.Generator().manual_seed(seed % 2**31)
    alone: dict[int, LayerState] = {}

    def draw_tokens(*shape):
        return [
            torch.randn(*shape[:1], h, *shape[1:], layer.head_dim, generator=generator).double() for h in heads[:2] + heads[1:2]
        ]

    for _ in range(data.draw(st.integers(1, 8))):
        free = [row for row in range(PAGES) if row not in alone]
        if free and data.draw(st.booleans()):
            n = data.draw(st.integers(1, len(free)))
            rows = data.draw(st.permutations(free))[:n]
            lengths = [data.draw(st.integers(1, 9)) for _ in rows]
            m = max(lengths)
            q, k, v = draw_tokens(n, m)
            valid = torch.arange(m) < torch.tensor(lengths)[:, None]
            out = paged.prompts(q, k, v, torch.tensor(rows), None if valid.all() else valid)
            for i, (row, length) in enumerate(zip(rows, lengths)):
                alone[row] = LayerState.allocate(rule, 1, *heads, kernels, torch.float64, int8=int8)
                wanted = []
                for start in range(0, length, chunk or length):
                    now = slice(start, min(length, start + (chunk or length)))
                    wanted.append(extend(alone[row], *(x[i : i + 1, :, now] for x in (q, k, v))))
                assert_close(out[i : i + 1, :, :length], torch.cat(wanted, 2))
        if alone:
            rows = data.draw(st.lists(st.sampled_from(sorted(alone)), min_size=1, unique=True).map(sorted))
            q, k, v = draw_tokens(len(rows))
            out = paged.decode(q, k, v, torch.tensor(rows), None, data.draw(st.sampled_from([None, span_of(rows)])))
            for i, row in enumerate(rows):
                wanted = extend(alone[row], *(x[i : i + 1, :, None] for x in (q, k, v)))
                assert_close(out[i], wanted[0, :, 0])
            for row in data.draw(st.lists(st.sampled_from(rows), unique=True)):
                del alone[row]
    for row, state in alone.items():
        own = paged._state({name: page[row : row + 1] for name, page in paged.pages.items()})
        for (_, kept), (_, wanted) in zip(own.positions(), state.positions(), strict=True):
            assert torch.equal(kept.sort(-1).values, wanted.sort(-1).values)  # slots may lie in another order


def test_pads_of_a_graph_change_nothing():
    paged = PagedLayer(H2O(3, 2), None, (2, 1, 4), torch.float64)
    paged.bind(pages_of(paged, False))
    rows = torch.arange(PAGES)
    paged.reset(rows)
    before = {name: page.clone() for name, page in paged.pages.items()}
    q, k, v = (torch.full((3, h, 4), torch.nan, dtype=torch.float64) for h in (2, 1, 1))
    paged.decode(q, k, v, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool))
    for name, page in paged.pages.items():
        assert torch.equal(page, before[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("policy", [H2O(5, 4), Lambda(2, 7), SnapKV(9, 4, 1)], ids=repr)
def test_a_decoding_step_in_a_cuda_graph_computes_what_it_computes_outside(policy):
    torch.use_deterministic_algorithms(False)  # its checks wait for the GPU, which a graph does not
    layer = Layer(2, 2, 8, 3, 4)
    kernels = fast_kernels(reference_kernels(layer, 0), layer, torch.float32)
    layers = [PagedLayer(policy, kernels, (4, 2, 8), torch.float32) for _ in range(2)]
    rows, real = torch.tensor([3, 1, 6, 0, 0], device="cuda"), torch.tensor([1, 1, 1, 0, 0], device="cuda").bool()
    for paged in layers:
        paged.bind({name: page.cuda() for name, page in pages_of(paged, False).items()})
        paged.reset(torch.arange(PAGES, device="cuda"))
    tokens = [torch.randn(5, heads, 8, device="cuda") for heads in (4, 2, 2)]
    captured, outside = layers
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        captured.decode(*tokens, rows, real)
    torch.cuda.synchronize()
    captured.reset(torch.arange(PAGES, device="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.decode(*tokens, rows, real)
    for _ in range(40):
        for x in tokens:
            x.normal_()
        graph.replay()
        assert_close(out[:3].cpu(), outside.decode(*tokens, rows, real)[:3].cpu(), 1e-5)


def test_rows_lie_side_by_side_with_few_between_them():
    assert span_of([3, 4, 5, 6]) == (3, 7)
    assert span_of([3, 4, 6, 7]) == (3, 8)
    assert span_of([3, 9]) is None
