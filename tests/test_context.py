"""Streams beyond a context: both paths move back alike, and a cache goes on as its policy does where nothing is moved."""

import numpy as np
import pytest
import torch
from both_paths import allocate, at, batch, empty, heads_of, kinds_of, logits_of, widened, with_pads
from caches import KINDS, feed, left_padded
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_kernels, make_model, tokens
from strategies import ANY_ATTENTION, ANY_POLICY, ANY_SLOTS, EVICTING, cases, chunkings, padded_batches, slices

import less_fast
import less_ref
from less_fast import H2O, FastGen, Lambda, LayerState, LessCache, LessError, Retention, Window
from less_fast.hf.positions import fitting, rotaries, trained_length
from less_fast.layer.context import Context, Rotary
from paper_checks.architectures import tiny

MODEL = make_model(num_hidden_layers=2)
KERNELS = make_kernels(MODEL)
WITH_RHO = make_kernels(MODEL, rho=5)
LENGTH = 16


@st.composite
def streams(draw):
    """A case whose chunks find room in a context, a padded batch of it, and the context's length, frequencies and layout."""
    half = draw(st.integers(2, 8))
    small = lambda length: chunkings(length).filter(lambda chunks: max(chunks) <= half)  # noqa: E731
    few = lambda length: st.lists(st.integers(1, half), min_size=1, max_size=length)  # noqa: E731
    chunks = lambda length: small(length) | few(length).map(tuple)  # noqa: E731
    case = draw(cases(length=EVICTING["length"], chunks=chunks, policy=ANY_POLICY, attention=ANY_ATTENTION, int8=ANY_SLOTS))
    pairs = draw(st.integers(0, case.layer.head_dim // 2))
    frequencies = tuple(100.0 ** (-np.arange(pairs) / max(pairs, 1)))
    return case, draw(padded_batches(case.length)), 2 * half + draw(st.integers(0, 1)), frequencies, draw(st.booleans())


@given(streams())
def test_a_stream_within_a_context_equals_the_reference_after_every_chunk(stream):
    case, valid, length, frequencies, interleaved = stream
    ours = Context(length, Rotary(frequencies, interleaved))
    theirs = less_ref.Context(length, less_ref.Rotary(np.array(frequencies), interleaved), case.int8)
    qkv, state = batch(case, len(valid)), allocate(case, len(valid), movable=True)
    kinds, real, references = kinds_of(case, len(valid)), torch.from_numpy(valid), [empty(case) for _ in valid]
    for now in slices(case.chunks):
        q, k, v = at(with_pads(qkv, valid, fill=0), now)
        q, k = ours.enter(state, q, k, real[:, now])
        out = less_fast.extend(state, q, k, v, real[:, now], logits_of(case), kinds[:, now])
        for row, mask in enumerate(valid):
            if mask[now].any():
                policies = case.reference_of(case.kinds(row)[mask])
                alone = widened(x[row][:, real[row, now]] for x in at(qkv, now))
                expected, references[row] = theirs.extend(
                    references[row], *alone, policies, case.kernels, case.scale, case.attention
                )
                assert_close(out[row][:, real[row, now]].transpose(0, 1), expected)
            assert (state.n[row], state.moved[row]) == (references[row].n, references[row].moved)
            for got, wanted in zip(heads_of(state, row, with_kinds=False), references[row].heads, strict=True):
                order = np.argsort(wanted.position)
                assert np.array_equal(got.position, wanted.position[order])
                for name in ("k", "v", "score"):
                    assert_close(getattr(got, name), getattr(wanted, name)[order].reshape(getattr(got, name).shape))
                assert_close(got.H, wanted.H)
                assert_close(got.z, wanted.z)


@given(st.integers(1, 6), st.integers(8, 20), st.integers(0, 2**16), st.booleans())
def test_a_window_that_fits_into_half_a_context_does_not_notice_it(budget, length, seed, interleaved):
    """Queries and keys of a window move together, so the distances between them stay: only what is far would come nearer."""
    budget, T = min(budget, length // 2), 3 * length + 1
    q, k, v = np.random.default_rng(seed).normal(size=(3, 2, T, 6))
    rotary = less_ref.Rotary(np.array([1.0, 0.3]), interleaved)
    q, k = (rotary.turn(x, np.arange(T)) for x in (q, k))
    policy = less_ref.Window(budget)
    within = less_ref.run(q, k, v, policy, step=less_ref.Context(length, rotary).extend)
    assert_close(within.out, less_ref.run(q, k, v, policy).out)


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_held_stands_where_its_true_position_less_what_was_moved_says_and_the_state_begins_anew(interleaved):
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 27, 6))
    rotary, state = less_ref.Rotary(np.array([1.0, 0.1]), interleaved), less_ref.empty_state(1, 6, less_ref.Elu(6))
    turned, context = rotary.turn(k, np.arange(27)), less_ref.Context(10, rotary)
    for i in range(27):
        token = rotary.turn(q, np.arange(27))[:, i : i + 1], turned[:, i : i + 1], v[:, i : i + 1]
        before, (_, state) = state, context.extend(state, *token, less_ref.Lambda(1, 4), less_ref.Elu(6))
        head = state.heads[0]
        assert_close(head.k, rotary.turn(k[0, head.position], np.maximum(head.position - state.moved, 0)))
        if i and state.moved > before.moved:  # all that is folded now left at this very step
            gone = np.setdiff1d(np.append(before.heads[0].position, i), head.position)
            assert len(gone) == 1
            assert_close(head.z, less_ref.Elu(6).psi(rotary.turn(k[0, gone], gone - state.moved)[0], 0))
    assert state.moved == 20


def test_slots_in_eight_bits_that_do_not_move_keep_their_bits_while_others_move():
    """They are unpacked and packed again."""
    rotary, generator = Rotary((1.0, 0.3)), torch.Generator().manual_seed(0)
    state = LayerState.allocate(Lambda(4, 40), 2, 32, 32, 8, movable=True, int8=True)
    q, k, v = (torch.randn(2, 32, 60, 8, generator=generator) for _ in range(3))
    valid = torch.arange(60) >= torch.tensor([[0], [30]])  # the second row has seen half as many
    less_fast.extend(state, q, k, v, valid)
    before = state.parts[0].slots.k.clone()  # (2, T, 12)
    Context(64, rotary).make_room(state, torch.tensor([8, 8]))
    assert state.moved.tolist() == [32, 0]
    slots = state.parts[0].slots
    moves = slots.position[0] > 0  # what stood at 0 stays there
    assert torch.equal(slots.k[1], before[1])
    assert torch.equal(slots.k[0, ~moves], before[0, ~moves])
    assert not (slots.k[0, moves, 4:] == before[0, moves, 4:]).all(-1).any()


def test_a_chunk_that_cannot_find_room_is_refused_and_changes_nothing():
    rotary = Rotary((1.0,))
    state = LayerState.allocate(H2O(2, 2), 2, 1, 1, 4, movable=True)
    q, k, v = (torch.randn(2, 1, 8, 4) for _ in range(3))
    less_fast.extend(state, *Context(8, rotary).enter(state, q, k), v)
    before = [tensor.clone() for _, tensor in state.tensors().items()]
    with pytest.raises(LessError, match="5 tokens at once find no room in a context of 8: give at most 4"):
        Context(8, rotary).enter(state, q[:, :, :5], k[:, :, :5])
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, state.tensors().items()))
    step = less_ref.Context(8, less_ref.Rotary(np.ones(1))).extend
    with pytest.raises(ValueError, match="give at most 4"):
        less_ref.run(*np.zeros((3, 1, 13, 4)), less_ref.Window(2), chunks=[8, 5], step=step)
    with pytest.raises(LessError, match="movable"):
        Context(8, rotary).enter(LayerState.allocate(H2O(2, 2), 2, 1, 1, 4), q, k)
    with pytest.raises(LessError, match="length of a context"):
        Context(1, rotary)


# The cache.


def stream_logits(model, ids, cache, prompt=1):
    return feed(model, ids, cache, prompt)


@pytest.mark.parametrize("kind", ["llama", "cohere", "gpt_neox", "gemma3_text", "smollm3", "falcon"])
def test_a_model_with_a_window_says_the_same_far_beyond_its_context(kind):
    """Its layers attend to the last tokens alone, and rotary positions tell distances alone, so moving back changes nothing."""
    model = (tiny(kind) if kind != "llama" else MODEL).double()
    ids = tokens(2, 60, seed=4)
    moving = stream_logits(model, ids, LessCache.for_model(model, Window(5), context=LENGTH))
    assert_close(moving, stream_logits(model, ids, LessCache.for_model(model, Window(5))), 1e-5)  # models turn in float32


FEEDS = [(H2O(3, 2), False), (H2O(3, 2), True), (Retention(5, 2), False), (Retention(5, 2), True)]


@pytest.mark.parametrize(("policy", "compile"), [*FEEDS, (FastGen(6, 2, 2, 0.6), False)])
def test_a_stream_is_the_same_in_every_way_to_feed_it(policy, compile):
    ids = tokens(2, 50, seed=5)

    def cache(chunk=None):
        kernels = WITH_RHO if policy.needs == "rho" else KERNELS
        return LessCache.for_model(MODEL, policy, kernels, chunk=chunk, token_kinds=KINDS, compile=compile, context=LENGTH)

    one_by_one = stream_logits(MODEL, ids, cache())
    with torch.no_grad():
        at_once = MODEL(ids, past_key_values=cache(chunk=1)).logits
        in_two = cache(chunk=1)
        pieces = torch.cat([MODEL(part, past_key_values=in_two).logits for part in ids.split([23, 27], 1)], 1)
    assert_close(at_once, one_by_one)
    assert_close(pieces, one_by_one)


@pytest.mark.parametrize("context", [None, LENGTH, 2 * LENGTH])
@pytest.mark.parametrize("prompt", [1, LENGTH])
def test_more_tokens_than_the_kernels_were_trained_on_are_warned_of_once_or_the_stream_stays_within(context, prompt, recwarn):
    kernels = make_kernels(MODEL)
    kernels.about["window"] = LENGTH
    cache = LessCache.for_model(MODEL, H2O(3, 2), kernels, context=context)
    stream_logits(MODEL, tokens(2, LENGTH, seed=6), cache, prompt)
    assert not [one for one in recwarn if "trained on windows" in str(one.message)]
    with torch.no_grad():
        for _ in range(3):
            MODEL(tokens(2, 1), past_key_values=cache)
    said = [str(one.message) for one in recwarn if "trained on windows" in str(one.message)]
    assert len(said) == (context != LENGTH)
    assert all(f"has {LENGTH + 1} tokens" in one and f"context={LENGTH}, leave the kernels out" in one for one in said)


def test_a_bare_policy_and_kernels_of_unknown_windows_are_not_warned_of(recwarn):
    for kernels in (None, KERNELS):
        stream_logits(MODEL, tokens(2, 3 * LENGTH, seed=6), LessCache.for_model(MODEL, H2O(3, 2), kernels))
    assert not [one for one in recwarn if "trained on windows" in str(one.message)]


@pytest.mark.parametrize("window", [None, 0, -3, 2.5, "20", True, 20, 10**6])
def test_the_trained_length_is_the_least_that_model_and_kernels_know(window):
    kernels = make_kernels(MODEL)
    kernels.about |= {} if window is None else {"window": window}
    own = MODEL.config.max_position_embeddings
    assert trained_length(MODEL, kernels) == (20 if window == 20 else own)
    assert trained_length(MODEL) == own


def test_until_the_context_is_full_nothing_changes():
    ids = tokens(2, LENGTH, seed=6)
    for prompt in (1, 9, LENGTH):
        caches = [LessCache.for_model(MODEL, H2O(3, 2), KERNELS, context=context) for context in (None, LENGTH)]
        one, other = (stream_logits(MODEL, ids, cache, prompt) for cache in caches)
        assert torch.equal(one, other)


def test_a_prompt_beyond_the_context_enters_in_pieces_of_half_of_it():
    ids = tokens(2, 30, seed=7)
    whole, in_pieces = (LessCache.for_model(MODEL, H2O(3, 2), KERNELS, context=LENGTH) for _ in range(2))
    with torch.no_grad():
        logits = MODEL(ids, past_key_values=whole).logits
        pieces = [MODEL(part, past_key_values=in_pieces).logits for part in ids.split(LENGTH // 2, 1)]
    assert_close(logits, torch.cat(pieces, 1))


@settings(max_examples=15)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 2**16))
def test_each_row_of_a_padded_batch_moves_when_it_is_full(lengths, seed):
    ids, mask = left_padded(lengths, max(lengths))
    more = tokens(len(lengths), 25, seed=seed)
    together = LessCache.for_model(MODEL, H2O(3, 2), KERNELS, chunk=1, context=LENGTH)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        width = max(lengths)
        MODEL(ids, attention_mask=mask[:, :width], position_ids=positions[:, :width], past_key_values=together)
        logits = MODEL(more, attention_mask=mask, position_ids=positions[:, width:], past_key_values=together).logits
        for row, length in enumerate(lengths):
            alone = LessCache.for_model(MODEL, H2O(3, 2), KERNELS, chunk=1, context=LENGTH)
            MODEL(ids[row : row + 1, width - length :], past_key_values=alone)
            assert_close(logits[row : row + 1], MODEL(more[row : row + 1], past_key_values=alone).logits)


def test_a_moved_cache_is_saved_copied_joined_and_reset(tmp_path):
    def cache():
        return LessCache.for_model(MODEL, Lambda(1, 4), KERNELS, context=LENGTH)

    ids, more = tokens(1, 40, seed=8), tokens(1, 20, seed=9)
    one, other = cache(), cache()
    stream_logits(MODEL, ids, one)
    stream_logits(MODEL, ids[:, :7], other)
    held = one.memory()
    one.save(tmp_path / "stream.safetensors")
    again = LessCache.load(tmp_path / "stream.safetensors", MODEL, KERNELS)
    joined = LessCache.join([one, other])
    rows = []
    for token in more.T[:, :, None]:
        with torch.no_grad():
            where = joined.lengths[:, None]
            rows.append(MODEL(token.expand(2, 1), position_ids=where, past_key_values=joined).logits)
    expected = stream_logits(MODEL, more, one)
    assert torch.equal(expected, stream_logits(MODEL, more, again))
    together = torch.cat(rows, 1)
    assert_close(together[:1], expected)
    assert_close(together[1:], stream_logits(MODEL, more, other))
    assert one.memory() == held
    one.reset()
    assert torch.equal(stream_logits(MODEL, more, one), stream_logits(MODEL, more, cache()))


def test_what_cannot_stay_within_a_context_is_refused():
    with pytest.raises(LessError, match="not rotary"):
        LessCache.for_model(tiny("gpt2"), Window(4), context=LENGTH)
    with pytest.raises(LessError, match="a context of 16 has fewer positions"):
        LessCache.for_model(MODEL, Window(17), context=16)
    with pytest.raises(LessError, match="a context of 16 has fewer positions"):
        LessCache.for_model(MODEL, Window(4), budgets=[[2, 17], [2, 2]], context=16)
    with pytest.raises(LessError, match="context"):
        LessCache.for_model(MODEL, Window(1), context=1)
    with pytest.raises(LessError, match="leave context out"):
        LessCache.for_model(
            make_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}), Window(4), context=16
        )


def test_layers_without_positions_have_no_frequencies_and_the_others_the_models_own():
    found = rotaries(tiny("smollm3"))
    assert [len(rotary.frequencies) for rotary in found] == [4, 4, 4, 0]
    assert found[0].frequencies == tuple(tiny("smollm3").model.rotary_emb.inv_freq.double().tolist())


@pytest.mark.parametrize(
    ("dtype", "others", "found"),
    [(torch.bfloat16, 2, True), (torch.bfloat16, 3, False), (torch.float32, 0, True), (torch.float32, 1, False)],
)
def test_positions_are_told_by_most_tokens_since_rounding_to_16_bits_may_change_one_altogether(dtype, others, found):
    turned, later = Rotary((1.0, 0.1)), 64
    here = [torch.randn(1, 2, 16, 4, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3)]
    there = [*(turned.turn(x, torch.tensor([[[later]]])) for x in here[:2]), here[2].clone()]
    for x in there:
        x[:, :, :others] += 9
    arguments = [torch.tensor(turned.frequencies, dtype=torch.float64)], [here], [there], later, "this"
    if found:
        assert fitting(*arguments) == [turned]
    else:
        with pytest.raises(LessError, match="not rotary"):
            fitting(*arguments)


def test_a_state_that_moved_under_inference_mode_is_reset_outside_of_it():
    state = LayerState.allocate(H2O(2, 2), 1, 1, 1, 4, movable=True)
    with torch.inference_mode():
        for _ in range(3):
            q, k, v = torch.randn(3, 1, 1, 4, 4)
            less_fast.extend(state, *Context(8, Rotary((1.0,))).enter(state, q, k), v)
    assert state.moved.tolist() == [4]
    state.reset()
    assert not state.moved.any()
