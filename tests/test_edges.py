"""Numbers at the edge of both paths: broken tokens, ties, huge logits, zeros, 16 bits, and a hundred thousand tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from both_paths import (
    allocate,
    assert_extends_alike,
    assert_identical,
    at,
    batch,
    empty,
    extend,
    heads_of,
    lower_precision_errors,
    rounded,
    wide,
    widened,
)
from closeness import BUDGETS, DRIFT, LOGITS_OF_1E4, error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import ANY_POLICY, ANY_SLOTS, Case, Layer, Policy, cases, fast_kernels, padded, policies, slices, some_kernels

import less_fast
import less_ref
from less_fast import LayerState, Window
from less_fast.layer.features import Features

SHORT = dict(length=st.integers(8, 24), policy=policies(largest=3))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
ON_EVERY_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])


@dataclass(frozen=True)
class Edge(Case):
    """A case some of whose tokens are at an edge: `change` gets a random generator, which tokens, and q, k, v to change."""

    change: Callable | None = None
    blind: bool = False  # the learned kernels do not see the last coordinate

    def chosen(self, *more):
        """(T,) bool: which tokens of a sequence are at the edge; of some sequences all are."""
        rng = np.random.default_rng([self.seed, 4, *more])
        return rng.random(self.length) < rng.choice([0.2, 0.5, 1.0])

    def qkv(self, *more):
        q, k, v = super().qkv(*more)
        self.change(np.random.default_rng([self.seed, 5, *more]), self.chosen(*more), q, k, v)
        return q, k, v

    @property
    def kernels(self):
        kernels = super().kernels
        if self.blind and isinstance(kernels, less_ref.Kernels):
            kernels.q1[:, -1], kernels.k1[:, -1] = 0, 0
        return kernels


def at_the_edge(case, change, **more):
    return Edge(**vars(case), change=change, **more)


# Broken tokens.


def break_tokens(rng, chosen, *qkv):
    """One number of each, in any part of any head."""
    for token in np.flatnonzero(chosen):
        x = qkv[rng.integers(3)]
        x[rng.integers(x.shape[0]), token, rng.integers(x.shape[2])] = rng.choice([np.nan, np.inf, -np.inf, 1e13, -1e13])


@given(cases(policy=ANY_POLICY))
def test_the_reference_goes_on_as_if_broken_tokens_had_not_been_there(case):
    case = at_the_edge(case, break_tokens)
    sound = ~case.chosen()
    policy = case.reference_of(case.kinds()[sound])  # broken tokens have no position
    trace = case.run(policy=policy, step=less_ref.extend_past_broken_tokens)
    parts = np.array([sound[now].sum() for now in slices(case.chunks)])
    qkv = {name: x[:, sound] for name, x in zip("qkv", case.qkv())}
    alone = case.run(**qkv, chunks=parts[parts > 0], policy=policy)
    assert np.isnan(trace.out[~sound]).all()
    assert np.array_equal(trace.out[sound], alone.out)
    for heads, over in zip(trace.heads, (parts > 0).cumsum()):
        for head, same in (
            zip(heads, alone.heads[over - 1], strict=True) if over else []
        ):  # so many chunks of the run without them
            assert all(np.array_equal(getattr(head, name), getattr(same, name)) for name in vars(head))


@given(padded(cases(policy=ANY_POLICY, int8=ANY_SLOTS)), st.sampled_from(DTYPES))
def test_a_broken_token_is_a_pad_whose_output_is_nan_and_a_pad_may_hold_anything(case_and_valid, dtype):
    """Bit for bit. What pads do is held to the reference by test_equivalence."""
    case, valid = case_and_valid
    rows, edge = len(valid), at_the_edge(case, break_tokens)
    broken = np.stack([edge.chosen(row) for row in range(rows)])
    state, qkv = allocate(case, rows, dtype), batch(edge, rows, dtype)
    other, plain = allocate(case, rows, dtype), batch(case, rows, dtype)
    for now in slices(case.chunks):
        out, expected = extend(case, state, qkv, now, valid), extend(case, other, plain, now, valid & ~broken)
        nan = torch.from_numpy(valid & broken)[:, None, now, None]
        torch.testing.assert_close(out, expected.masked_fill(nan, torch.nan), rtol=0, atol=0, equal_nan=True)
        assert_identical(state, other)


@given(cases(policy=ANY_POLICY, int8=ANY_SLOTS), st.integers(1, 3), st.sampled_from(DTYPES))
def test_a_chunk_of_broken_tokens_changes_no_bit_of_what_is_held(case, rows, dtype):
    state, qkv = allocate(case, rows, dtype), batch(case, rows, dtype)
    for now in slices(case.chunks):
        extend(case, state, qkv, now)
    before, n = [heads_of(state, row) for row in range(rows)], state.n.clone()
    broken = case.qkv()
    break_tokens(np.random.default_rng(case.seed), np.ones(case.length, bool), *broken)
    broken = tuple(torch.from_numpy(x).to(dtype).expand(rows, *x.shape) for x in broken)
    assert extend(case, state, broken, slice(0, case.chunks[-1])).isnan().all()
    assert torch.equal(state.n, n)
    for row, heads in enumerate(before):
        for now, was in zip(heads_of(state, row), heads, strict=True):
            assert all(np.array_equal(getattr(now, name), x) for name, x in vars(was).items())


def numbers(dtype):
    """All numbers of 16 bits, or those around the largest that a token may hold."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    edge = torch.tensor([1e12, -1e12, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max, 0], dtype=dtype)
    return torch.cat([edge, *(edge[:2].nextafter(edge[:2] * far) for far in (0, 2))])


@pytest.mark.parametrize("part", "qkv")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_sound_exactly_if_its_number_is_at_most_1e12_whatever_the_dtype(dtype, part):
    """Each in a row of its own; 1e12 is no number of float16, whose largest is sound."""
    x = numbers(dtype)
    one = torch.ones(len(x), 1, 1, 1, dtype=dtype)
    state = less_fast.LayerState.allocate(less_fast.Window(1), len(x), 1, 1, 1, dtype=dtype)
    out = less_fast.extend(state, **{name: x.view_as(one) if name == part else one for name in "qkv"}).flatten()
    sound = x.double().abs() <= 1e12
    assert torch.equal(state.n, sound.long())
    assert torch.equal(out[sound], x[sound] if part == "v" else one.flatten()[sound])
    assert out[~sound].isnan().all()


def as_large_as_can_be(rng, chosen, *qkv):
    for x in qkv:
        x[:, chosen] = np.sign(x[:, chosen]) * 9.9e11  # also a sound number when rounded to bfloat16


@given(cases(**SHORT, k3=some_kernels), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_largest_sound_numbers_leave_a_finite_state_and_those_of_float16_finite_outputs_too(case, dtype):
    state, largest = allocate(case, dtype=dtype), torch.finfo(dtype).max
    qkv = tuple(x.clamp(-largest, largest).to(dtype) for x in batch(at_the_edge(case, as_large_as_can_be)))
    for now in slices(case.chunks):
        out = extend(case, state, qkv, now)
        assert state.n == now.stop
        assert all(tensor.isfinite().all() for _, tensor in state.tensors().items())
        assert dtype != torch.float16 or out.isfinite().all()


# Ties. The numbers are such that equal logits are equal bits, in whatever order a product is summed.


def all_alike(rng, chosen, q, k, v):
    q[:], k[:] = 0, 1
    q[..., 0] = 2


def first_the_first_and_then_all_alike(rng, chosen, q, k, v):
    """Whatever came in the first half ties at zero, where all logits but the first token's underflow, and then at more."""
    q[:], k[:] = 0, -(2**13)
    q[:, : q.shape[1] // 2, 0], k[:, 0] = 1, 2**13


def first_ordinary_and_then_all_alike(rng, chosen, q, k, v):
    """The order of the slots and that of the positions come apart before the ties."""
    q[:, q.shape[1] // 2 :] = 0


def held_by(state):
    """For each KV head the positions that each row holds."""
    return [[state.head(row, g)["position"].tolist() for row in range(len(state.n))] for g in range(state.kv_heads)]


def with_eight_heads(name, *fields, chunks):
    """torch adds so many numbers in another order in the last slots than in the others."""
    case = Case(Layer(1, 2, 2, 2, 2), chunks, (Policy(name, fields),), 1.0, None, 9)
    return example(case=case, rows=1, many=4, dtype=torch.float32)


ONE_BY_ONE, IN_TENS = (1,) * 20, (50,) + (10,) * 5


@ON_EVERY_DEVICE
@pytest.mark.parametrize("change", [all_alike, first_the_first_and_then_all_alike, first_ordinary_and_then_all_alike])
@given(
    case=cases(policy=ANY_POLICY),
    rows=st.integers(1, 4),
    many=st.sampled_from([1, 4]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@with_eight_heads("TOVA", 5, chunks=ONE_BY_ONE)
@with_eight_heads("H2O", 4, 1, chunks=ONE_BY_ONE)
@with_eight_heads("H2O", 39, 1, chunks=IN_TENS)
@with_eight_heads("SnapKV", 5, 2, 1, chunks=ONE_BY_ONE)
@with_eight_heads("SnapKV", 6, 2, 1, chunks=(1,) * 10 + (5, 5))
@with_eight_heads("FastGen", 5, 1, 1, 1.0, chunks=ONE_BY_ONE)
@with_eight_heads("FastGen", 40, 0, 1, 1.0, chunks=IN_TENS)
def test_ties_are_decided_as_in_the_reference_and_in_all_rows_alike(device, change, case, rows, many, dtype):
    case = at_the_edge(replace(case, layer=replace(case.layer, group=case.layer.group * many)), change)
    if change is first_ordinary_and_then_all_alike:
        dtype = torch.float64  # there may be near-ties
    kernels = fast_kernels(case.kernels, case.layer, wide(dtype), case.rho)
    state = allocate(case, rows, dtype, device=device, kernels=kernels and kernels.to(device))
    kinds = torch.from_numpy(case.kinds()).expand(rows, -1).to(device)
    qkv = tuple(x.expand(rows, *x.shape[1:]).to(device) for x in batch(case, dtype=dtype))
    for now, kept in zip(slices(case.chunks), case.run().kept):
        extend(case, state, qkv, now, kinds=kinds)
        assert held_by(state) == [[head.tolist()] * rows for head in kept]


# Logits of 1e4, and zeros.


def loud(rng, chosen, q, k, v, exact=False, alone=True):
    """A chosen query shifts the logits of chosen keys by 1e4, up and down, or not at all.

    exact: those keys hold nothing else; alone: the logits of all that a query sees may be shifted down.
    """
    of_queries = chosen * rng.choice([-1, 0, 1], len(chosen))
    of_keys = chosen * rng.choice([-1, 1], len(chosen)) if alone else of_queries  # then it is 1e4 or 0 of a query and its key
    if exact:
        k[:, of_keys != 0] = 0
    q[..., -1], k[..., -1] = of_queries, of_keys * 1e4 * k.shape[2] ** 0.5


def zeros(rng, chosen, *qkv):
    for x in qkv:
        x[:, chosen] *= rng.integers(2)


@pytest.mark.parametrize("change", [loud, zeros])
@given(case=cases(policy=ANY_POLICY))
def test_logits_of_1e4_among_ordinary_ones_and_zeros_anywhere_equal_the_reference(change, case):
    case = at_the_edge(replace(case, scale=None), change)
    assert_extends_alike(case, allocate(case), empty(case), batch(case), slices(case.chunks))


@given(cases(**SHORT))
def test_logits_of_1e4_stay_within_the_measured_budgets_in_float32(case):
    """What lies beyond a threshold may not depend on the last digits: policies that have one get equal logits of 1e4. And of
    features that cancel from 1e4, float32 keeps too few digits."""
    exact = any(policy.name in ("Scissorhands", "FastGen") for policy in case.policies)
    case = at_the_edge(replace(case, scale=None), partial(loud, exact=exact, alone=False), blind=True)
    for what, measured in lower_precision_errors(case, torch.float32).items():
        assert measured <= LOGITS_OF_1E4[what], what


@given(cases(**SHORT, k3=some_kernels), st.sampled_from(["q1", "q2", "k1", "k2", "k3"]), st.sampled_from(DTYPES))
def test_features_of_exactly_zero_are_the_bare_policy_bit_for_bit(case, zero, dtype):
    kernels = replace(case.kernels, **{zero: getattr(case.kernels, zero) * 0})
    assert np.array_equal(case.run(kernels=kernels).out, case.run(kernels=None).out)
    less, bare = (
        allocate(case, dtype=dtype, kernels=fast_kernels(x, case.layer, wide(dtype), case.rho)) for x in (kernels, None)
    )
    qkv = batch(case, dtype=dtype)
    for now in slices(case.chunks):
        assert torch.equal(*(extend(case, state, qkv, now) for state in (less, bare)))
        assert held_by(less) == held_by(bare)


# 16 bits.


@given(cases(length=st.integers(1, 6), policy=ANY_POLICY), st.sampled_from(DTYPES))
def test_the_state_and_the_output_have_the_documented_dtypes(case, dtype):
    state, qkv = allocate(case, dtype=dtype), batch(case, dtype=dtype)
    for now in slices(case.chunks):
        assert extend(case, state, qkv, now).dtype == dtype
    assert state.n.dtype == torch.int64
    for part in state.parts:
        score = torch.int64 if isinstance(part.policy, less_fast.Scissorhands) else wide(dtype)
        mean = dtype if dtype.itemsize > 2 else torch.float16
        told = dict(k=dtype, v=dtype, position=torch.int32, score=score, free=torch.int64, mean=mean, z=wide(dtype))
        assert {name: tensor.dtype for name, tensor in part.tensors().items()} == told


@given(cases(**SHORT))
def test_float16_stays_within_the_measured_budgets(case):
    for what, measured in lower_precision_errors(case, torch.float16).items():
        assert measured <= BUDGETS[torch.float16][what], what


# Drift.


def from_the_history(q, k, v, held, kernels):
    """Streaming by its formulas, in float64, with sums over the history; held (T, Hkv, S): the positions after each step, and -1.
    Returns out (T, Hq, D), and of each KV head at the end H, z and H2O's scores of what is held."""
    (T, Hkv, _), G, scale, step = held.shape, len(q) // len(k), q.shape[-1] ** -0.5, np.arange(len(held))
    out, heads = np.zeros((T, *q.shape[::2])), []
    for g in range(Hkv):
        unseen = np.zeros(T + 1, int)  # the first step that does not see a token; the last of all is for -1
        unseen[held[:, g]] = step[:, None] + 2  # later steps overwrite earlier ones
        psi = kernels.psi(k[g], g)
        z, H = np.zeros((T + 2, psi.shape[1])), np.zeros((T + 2, psi.shape[1], v.shape[2]))
        z[unseen[:T]], H[unseen[:T]] = psi, psi[:, :, None] * v[g][:, None]  # at most one token goes at each step
        z, H = z.cumsum(0), H.cumsum(0)  # before each step
        seen = np.vstack([held[:1, g] * 0 - 1, held[:-1, g]])  # (T, S)
        seen[step, seen.argmin(1)] = step
        score, visible = np.zeros(T), seen >= 0
        for a in range(g * G, g * G + G):
            weight, phi = visible * np.exp(scale * np.einsum("td,tsd->ts", q[a], k[g][seen])), kernels.phi(q[a], a)
            above = np.einsum("tr,trd->td", phi, H[:T]) + np.einsum("ts,tsd->td", weight, v[g][seen])
            out[:, a] = above / ((phi * z[:T]).sum(1) + weight.sum(1))[:, None]
            score += np.bincount(seen[visible], (weight / weight.sum(1, keepdims=True))[visible], T)
        heads.append(dict(H=H[T], z=z[T], score=score[np.sort(held[-1, g])[1:]]))
    return out, heads


def drift(policy, length, seed=0):
    """The errors of float32 after each of the lengths in DRIFT, against float64 on the same bits and the same decisions."""
    case = Case(Layer(2, 2, 8, 4, 8), (1,) * length, (policy,) * 2, 1.0, None, seed)
    state, qkv, outs, held = allocate(case, dtype=torch.float32), batch(case, dtype=torch.float32), [], []
    for tokens in range(1, length + 1):
        outs.append(less_fast.extend(state, *at(qkv, slice(tokens - 1, tokens)))[0, :, 0])
        held.append(state.parts[0].slots.positions()[0].clone())
        if tokens in DRIFT:
            row = widened(x[0, :, :tokens] for x in qkv)
            out, heads = from_the_history(*row, torch.stack(held).numpy(), rounded(case.kernels, torch.float32))
            yield tokens, "out", error(torch.stack(outs), out)
            for head, wanted in zip(heads_of(state, 0), heads, strict=True):
                for what in ("H", "z", "score")[: 2 + (policy.fast.queries != 0)]:
                    yield tokens, what, error(getattr(head, what), wanted[what])


LONG = 100_000 if settings.get_current_profile_name() == "thorough" else 10_000  # the longest takes minutes


@pytest.mark.parametrize(("policy", "length"), [(Policy("H2O", (8, 8)), LONG), (Policy("Window", (16,)), 10_000)])
@torch.inference_mode()
def test_a_long_stream_in_float32_drifts_no_further_from_float64_than_was_measured(policy, length):
    for tokens, what, measured in drift(policy, length):
        assert measured <= DRIFT[tokens][what], (tokens, what)


class Given(Features):
    """The first numbers of a vector are its features, or their sizes."""

    def psi(self, k):
        return k[..., : self.rank].float().abs()

    phi = psi


class Signed(Given):
    def psi(self, k):
        return k[..., : self.rank].float()


def test_features_that_may_be_negative_are_refused():
    with pytest.raises(less_fast.LessError, match=r"Signed has negative features, .* make them positive"):
        LayerState.allocate(Window(1), 1, 1, 1, 32, Signed(1, 1, 32, 8))


def test_a_mean_in_16_bits_follows_values_that_change_though_each_changes_it_by_less_than_it_can_hold():
    torch.manual_seed(0)
    state = LayerState.allocate(Window(1), 1, 1, 1, 32, Given(1, 1, 32, 8), torch.bfloat16)
    (part,), leaves = state.parts, torch.ones(1, 1, 1, dtype=torch.bool)
    H, z = torch.zeros(8, 32).double(), torch.zeros(8).double()
    for step in range(10_000):
        k, v = torch.rand(1, 1, 1, 32).bfloat16(), (torch.randn(1, 1, 1, 32) + (step > 3000)).bfloat16()
        part.fold(k, v, leaves)
        H, z = H + k[0, 0, 0, :8, None].double() * v[0, 0].double(), z + k[0, 0, 0, :8].double()
    off = part.mean[0, 0].double() - H / z[:, None]  # of means between 0.65 and 0.75
    assert off.square().mean().sqrt() < 0.015
    assert off.mean().abs() < 0.005
