"""Requests that come and go in pages, as vLLM has them, compute what each computes alone in the reference. This needs no vLLM."""

import gc
import weakref

import numpy as np
import pytest
import torch
from both_paths import assert_same_state, empty, extend_reference, heads_of, logits_of, widened
from closeness import assert_close
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import ANY_ATTENTION, ANY_SLOTS, ONE_AT_A_TIME, Layer, cases, fast_kernels, policies, reference_kernels

import less_ref
from less_fast import H2O, Lambda, SnapKV
from less_fast.layer.context import Context, Rotary
from less_fast.vllm.pages import PagedLayer, laid_out, span_of

FIXED = policies(*ONE_AT_A_TIME)
PAGES, PIECE = 7, 7
CONTEXTS = st.sampled_from([None, 2 * PIECE, 2 * PIECE + 3])


def pages_of(paged, gap):
    """The pages of a layer without gaps, or with other bytes between them, as beside layers of vLLM's own."""
    parts = sorted(paged.parts, key=lambda part: -part[2].itemsize)
    size = -(-paged.page_bytes // 8) * 8 + 8
    tensors = laid_out(parts, torch.randint(0, 255, (PAGES, size), dtype=torch.uint8), not gap)
    return {name: tensor for (name, _, _), tensor in zip(parts, tensors)}


def paged_layer(case, context, gap):
    layer, rule = case.layer, case.fast[0] if len(set(case.fast)) == 1 else case.fast
    kernels = fast_kernels(case.kernels, layer, rho=case.rho)
    heads = layer.query_heads, layer.kv_heads, layer.head_dim
    paged = PagedLayer(rule, kernels, heads, torch.float64, logits_of(case), case.int8, context is not None)
    paged.bind(pages_of(paged, gap))
    frequencies = tuple(100.0 ** (-pair) for pair in range(layer.head_dim // 2))
    paged.context = context and Context(context, Rotary(frequencies))
    return paged


class Alone:
    """A request by itself, in the reference."""

    def __init__(self, case, context, state=None):
        self.case, self.state, self.step = case, state or empty(case), None
        if context is not None:
            rotary = less_ref.Rotary(np.array(context.rotary.frequencies))
            self.step = less_ref.Context(context.length, rotary, case.int8).extend

    def enter(self, q, k, v):
        """q (Hq, m, D), k, v (Hkv, m, D) -> (Hq, m, D)."""
        case, row, policies = self.case, widened((q, k, v)), self.case.reference_of(())
        if self.step is None:
            out, self.state = extend_reference(case, self.state, row, policies)
        else:
            out, self.state = self.step(self.state, *row, policies, case.kernels, case.scale, case.attention)
        return torch.from_numpy(out).transpose(0, 1)

    def assert_same(self, state):
        """The state of one row is this one."""
        if self.step is None:
            return assert_same_state(state, 0, self.state)
        assert (state.n[0], state.moved[0]) == (self.state.n, self.state.moved)
        for got, wanted in zip(heads_of(state, 0, with_kinds=False), self.state.heads, strict=True):
            order = np.argsort(wanted.position)
            assert np.array_equal(got.position, wanted.position[order])
            for name in ("k", "v", "score"):
                assert_close(getattr(got, name), getattr(wanted, name)[order].reshape(getattr(got, name).shape))
            assert_close(got.H, wanted.H)


@pytest.mark.parametrize("gap", [False, True], ids=["side by side", "with gaps"])
@given(cases(policy=FIXED, attention=ANY_ATTENTION, int8=ANY_SLOTS), CONTEXTS, st.data())
@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
def test_requests_in_pages_compute_what_each_computes_alone_in_the_reference(gap, case, length, data):
    """Prompts come in pieces, tokens of several requests at once, requests leave, go on in another row or in two; rows are
    anywhere, and others hold anything."""
    layer, paged = case.layer, paged_layer(case, length, gap)
    alone: dict[int, Alone] = {}
    generator = torch.Generator().manual_seed(case.seed)

    def draw_tokens(*shape):
        heads = layer.query_heads, layer.kv_heads, layer.kv_heads
        return [torch.randn(shape[0], h, *shape[1:], layer.head_dim, generator=generator).double() for h in heads]

    for _ in range(data.draw(st.integers(1, 6))):
        free = [row for row in range(PAGES) if row not in alone]
        if free and data.draw(st.booleans()):
            rows = data.draw(st.permutations(free))[: data.draw(st.integers(1, len(free)))]
            alone |= {row: Alone(case, paged.context) for row in rows}
            computed = 0
            for _ in range(data.draw(st.integers(1, 3))):  # the last piece of some may be shorter, and then it was their last
                lengths = data.draw(st.lists(st.integers(1, PIECE), min_size=len(rows), max_size=len(rows)))
                m = max(lengths)
                q, k, v = draw_tokens(len(rows), m)
                valid = torch.arange(m) < torch.tensor(lengths)[:, None]  # (N, m)
                out = paged.prompts(q, k, v, torch.tensor(rows), None if valid.all() else valid, computed)
                for i, (row, length) in enumerate(zip(rows, lengths)):
                    assert_close(out[i, :, :length], alone[row].enter(*(x[i, :, :length] for x in (q, k, v))))
                rows, computed = [row for row, length in zip(rows, lengths) if length == m], computed + m
        if alone and len(alone) < PAGES and data.draw(st.booleans()):
            source, target = data.draw(st.sampled_from(sorted(alone))), data.draw(st.sampled_from([*{*range(PAGES)} - {*alone}]))
            paged.copy(torch.tensor([source]), torch.tensor([target]))
            alone[target] = Alone(case, paged.context, alone[source].state)
            if data.draw(st.booleans()):
                del alone[source]
        if alone:
            rows = data.draw(st.lists(st.sampled_from(sorted(alone)), min_size=1, unique=True))
            span = span_of(sorted(rows)) if data.draw(st.booleans()) else None
            rows = rows if span is None else sorted(rows)
            nobody = [row for row in range(PAGES) if row not in alone]  # pads are in a row of nobody's
            pads = data.draw(st.integers(0, 2)) if nobody and span is None else 0
            paged.reset(torch.tensor(nobody[:pads], dtype=torch.int64))
            for _ in range(data.draw(st.sampled_from([1, 1, 9]))):  # some decode beyond the context
                q, k, v = draw_tokens(len(rows) + pads)
                real = torch.arange(len(rows) + pads) < len(rows) if pads else None
                if paged.context is not None:
                    full = torch.tensor(rows)[paged.full(torch.tensor(rows))]
                    if len(full):
                        paged.make_room(full)
                out = paged.decode(q, k, v, torch.tensor(rows + nobody[:1] * pads), real, span)
                for i, row in enumerate(rows):
                    assert_close(out[i], alone[row].enter(*(x[i, :, None] for x in (q, k, v)))[:, 0])
            for row in data.draw(st.lists(st.sampled_from(rows), unique=True)):
                del alone[row]
    for row, request in alone.items():
        request.assert_same(paged._state({name: page[row : row + 1] for name, page in paged.pages.items()}))


@pytest.mark.parametrize("fill", [torch.nan, 1.0])  # what is broken leaves no trace anyway
def test_pads_of_a_graph_change_nothing(fill):
    paged = PagedLayer(H2O(3, 2), None, (2, 1, 4), torch.float64)
    paged.bind(pages_of(paged, False))
    rows = torch.arange(PAGES)
    paged.reset(rows)
    before = {name: page.clone() for name, page in paged.pages.items()}
    q, k, v = (torch.full((3, h, 4), fill, dtype=torch.float64) for h in (2, 1, 1))
    paged.decode(q, k, v, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool))
    for name, page in paged.pages.items():
        assert torch.equal(page, before[name]), name


def test_a_step_changes_the_pages_that_were_bound_last():
    paged = PagedLayer(H2O(3, 2), None, (2, 1, 4), torch.float64)
    for _ in range(2):
        pages = pages_of(paged, False)
        paged.bind(pages)
        paged.reset(torch.arange(PAGES))
        paged.decode(*(torch.ones(1, h, 4, dtype=torch.float64) for h in (2, 1, 1)), torch.tensor([1]), span=(1, 2))
        assert pages["n"].tolist() == [0, 1] + [0] * (PAGES - 2)


def test_pages_that_are_taken_back_are_free():
    """The keys lie in memory of numpy's, which tells when nobody holds it."""
    paged = PagedLayer(H2O(3, 2), None, (2, 1, 4), torch.float64)
    pages = pages_of(paged, False)
    keys = pages["0.k"].numpy().copy()
    paged.bind(pages | {"0.k": torch.from_numpy(keys)})
    paged.reset(torch.arange(PAGES))
    paged.decode(*(torch.ones(1, h, 4, dtype=torch.float64) for h in (2, 1, 1)), torch.tensor([1]), span=(1, 2))
    held = weakref.ref(keys)
    del keys
    assert held() is not None
    paged.release()
    gc.collect()
    assert held() is None


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
