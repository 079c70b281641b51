"""A compiled decoding step equals the reference, in every policy and dtype, and is compiled once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from both_paths import (
    allocate,
    assert_extends_alike,
    assert_identical,
    assert_rows_equal_the_reference_alone,
    batch,
    empty,
    kinds_of,
    lower_precision_errors,
    with_pads,
)
from both_paths import extend as run_eager
from caches import feed, generate, left_padded
from closeness import BUDGETS
from hypothesis import given
from hypothesis import strategies as st
from models import make_kernels, make_kinds, make_model, tokens
from strategies import ANY_ATTENTION, ANY_POLICY, ANY_SLOTS, Case, Layer, Policy, cases, padded_batches, slices
from transformers import CompileConfig

import less_fast
from less_fast import H2O, FastGen, LessCache, Window
from less_fast.layer import step as step_module
from less_fast.layer.step import compiled, extend
from paper_checks.architectures import tiny

LAYER = Layer(3, 2, 4, 2, 3)
CHUNKS = (5, *(1,) * 9, 3, *(1,) * 6)
H2O_HERE = Policy("H2O", (2, 2))
TABLES = {
    "h2o": (H2O_HERE,) * 3,
    "window": (Policy("Window", (4,)),) * 3,
    "lambda": (Policy("Lambda", (1, 3)),) * 3,
    "tova": (Policy("TOVA", (4,)),) * 3,
    "scissorhands": (Policy("Scissorhands", (4, 1, 5)),) * 3,
    "snapkv": (Policy("SnapKV", (4, 2, 1)),) * 3,
    "retention": (Policy("Retention", (4, 1)),) * 3,
    "retention by head": (Policy("Retention", (4, 1)), Policy("Retention", (2, 1)), Policy("Retention", (4, 1))),
    "unequal": (H2O_HERE, Policy("Window", (2,)), H2O_HERE),
    "by head, int8": (H2O_HERE, Policy("H2O", (1, 1)), H2O_HERE),
}


SEEDS = st.integers(0, 2**16)


def a_case(table, seed, k3=1.0):
    return Case(LAYER, CHUNKS, TABLES[table], k3, None, seed, int8="int8" in table)


@pytest.fixture
def compile_steps(monkeypatch):
    """Every single token goes through compiled code, whoever calls `less_fast.extend`."""

    def step(state, q, *rest):
        return (compiled(state, q, rest[3]) if q.shape[2] == 1 else extend)(state, q, *rest)

    monkeypatch.setattr(less_fast, "extend", step)


@pytest.mark.parametrize(
    ("table", "k3"),
    [*((name, 1.0) for name in TABLES), *(("h2o", k3) for k3 in (None, "exponential", "performer"))],
)
@pytest.mark.usefixtures("compile_steps")
def test_compiled_steps_equal_the_reference(table, k3):
    @given(SEEDS)
    def check(seed):
        case = a_case(table, seed, k3)
        assert_extends_alike(case, allocate(case), empty(case), batch(case), slices(case.chunks))

    check()


@pytest.mark.parametrize("table", ["h2o", "unequal"])
@pytest.mark.usefixtures("compile_steps")
def test_compiled_steps_with_a_softcap_and_sinks_equal_the_reference(table):
    case = replace(a_case(table, 5), softcap=1.5, sinking=True)
    assert_extends_alike(case, allocate(case), empty(case), batch(case), slices(case.chunks))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "falcon"])
def test_other_architectures_compile_their_steps_to_the_same_logits(name):
    model, ids = tiny(name), tokens(2, 20)
    compiled, eager = (LessCache.for_model(model, H2O(3, 4), compile=some) for some in (True, False))
    torch.testing.assert_close(feed(model, ids, compiled, prompt=9), feed(model, ids, eager, prompt=9), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("table", ["retention", "unequal"])
@pytest.mark.usefixtures("compile_steps")
def test_compiled_steps_equal_the_reference_in_every_row_of_a_padded_batch(table):
    @given(SEEDS, padded_batches(sum(CHUNKS)), st.sampled_from([torch.nan, 1.0]))
    def check(seed, valid, fill):
        case, valid = a_case(table, seed), np.resize(valid, (4, valid.shape[1]))
        qkv = with_pads(batch(case, 4), valid, fill)
        assert_rows_equal_the_reference_alone(case, allocate(case, 4), [empty(case)] * 4, qkv, valid)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("compile_steps")
def test_compiled_steps_stay_within_the_measured_budgets_in_lower_precision(dtype):
    @given(SEEDS)
    def check(seed):
        for what, measured in lower_precision_errors(a_case("h2o", seed), dtype).items():
            assert measured <= BUDGETS[dtype][what], what

    check()


@given(cases(policy=ANY_POLICY, attention=ANY_ATTENTION, int8=ANY_SLOTS), st.integers(1, 3))
def test_the_work_that_is_left_out_where_nothing_is_masked_would_change_nothing(case, rows):
    """On a CPU the eager path asks whether masks are needed. Compiled code and a GPU do not ask. Chunks are contiguous, as their
    masked copies are: sums over other strides may differ in the last bit."""
    states, kinds = [allocate(case, rows) for _ in "12"], kinds_of(case, rows)
    for now in slices(case.chunks):
        chunk = [x[:, :, now].contiguous() for x in batch(case, rows)], slice(None), None, kinds[:, now]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "known_true", lambda condition: False)
            masked = run_eager(case, states[0], *chunk)
        assert torch.equal(run_eager(case, states[1], *chunk), masked)
        assert_identical(*states)


def decode(model, cache, ids, prompt):
    """Logits of the tokens after a prompt of so many, one at a time."""
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])], 1)


@pytest.fixture
def no_recompiles():
    return lambda: torch._dynamo.config.patch(error_on_recompile=True)


def test_a_cache_compiles_its_steps_once_for_all_layers_prompts_and_caches(no_recompiles):
    model, policy = make_model(), H2O(heavy=3, recent=3)
    kernels = make_kernels(model)
    counters = torch._dynamo.utils.counters["stats"]

    def cache(compile=True):
        return LessCache.for_model(model, policy, kernels, compile=compile)

    before = counters["unique_graphs"]
    ids, mask = left_padded([9, 4], 9)
    assert torch.equal(generate(model, ids, cache(), mask), generate(model, ids, cache(False), mask))
    assert counters["unique_graphs"] == before + 1
    with no_recompiles():
        ids, mask = left_padded([3, 17], 17)
        reused = cache()
        wanted = generate(model, ids, cache(False), mask)
        assert torch.equal(generate(model, ids, reused, mask), wanted)
        reused.reset()
        assert torch.equal(generate(model, ids, reused, mask), wanted)
        unpadded = tokens(2, 6)
        assert torch.equal(generate(model, unpadded, cache(), new=40), generate(model, unpadded, cache(False), new=40))
    assert counters["unique_graphs"] == before + 1


@pytest.mark.parametrize(("policy", "context"), [(H2O(heavy=4, recent=3), None), (H2O(heavy=2, recent=4), 16)])
def test_a_stream_is_compiled_once_whatever_the_lengths_of_its_pieces(no_recompiles, policy, context):
    """By policies that no other test compiles, or nothing would be compiled here."""
    model, ids = make_model(), tokens(2, 40)
    kernels = make_kernels(model)

    def logits(*cuts, compile=True):
        cache = LessCache.for_model(model, policy, kernels, chunk=1, compile=compile, context=context)
        return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in zip((0, *cuts), (*cuts, 40))], 1)

    wanted, before = logits(compile=False), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(logits(7, 30), wanted, rtol=0, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    with no_recompiles():
        torch.testing.assert_close(logits(1, 2, 21), wanted, rtol=0, atol=1e-9)


def test_a_compiled_stream_knows_pads():
    model, (ids, mask) = make_model(), left_padded([24, 17], 24)
    kernels, rows = make_kernels(model), mask.bool()

    def logits(compile):
        cache = LessCache.for_model(model, H2O(heavy=5, recent=3), kernels, chunk=1, compile=compile)
        first = model(ids[:, :15], attention_mask=mask[:, :15], past_key_values=cache).logits
        return torch.cat([first, model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits], 1)[rows]

    torch.testing.assert_close(logits(True), logits(False), rtol=0, atol=1e-9)


def test_more_kinds_of_layers_are_compiled_than_torch_holds_variants_of_one_function():
    """Here one; by default eight. Each layer has budgets of its own."""
    model, ids = make_model(), tokens(1, 16)
    budgets = [[4, 4], [5, 5], [6, 6]]
    caches = [LessCache.for_model(model, H2O(3, 3), None, budgets, compile=compile) for compile in (True, False)]
    with torch._dynamo.config.patch(recompile_limit=1):
        got, wanted = (decode(model, cache, ids, 12) for cache in caches)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-10)


def test_generate_compiles_the_whole_model_once_where_it_is_told_to(no_recompiles):
    """As it does by itself on a GPU."""
    model, policy = make_model(), H2O(heavy=3, recent=3)
    kernels, everywhere = make_kernels(model), CompileConfig(mode=None, fullgraph=True)
    everywhere._compile_all_devices = True

    def cache():
        return LessCache.for_model(model, policy, kernels)

    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    ids, mask = left_padded([9, 4], 9)
    got = generate(model, ids, cache(), mask, compile_config=everywhere)
    assert torch.equal(got, generate(model, ids, cache(), mask, disable_compile=True))
    assert counters["unique_graphs"] == before + 1
    with no_recompiles():
        for ids, mask in (left_padded([3, 17], 17), (tokens(2, 6), torch.ones(2, 6))):
            got = generate(model, ids, cache(), mask, compile_config=everywhere)
            assert torch.equal(got, generate(model, ids, cache(), mask, disable_compile=True))


def test_what_cannot_be_compiled_is_refused_and_never_compiled_by_generate():
    model, policy = make_model(), FastGen(11, 2, 2, 0.6)
    with pytest.raises(ValueError, match="cannot be compiled"):
        LessCache.for_model(model, policy, token_kinds=make_kinds(), compile=True)
    assert not LessCache.for_model(model, policy, token_kinds=make_kinds()).is_compileable
    assert LessCache.for_model(model, Window(4)).is_compileable
    assert not LessCache.for_model(model, Window(4), context=16).is_compileable  # rows move when they are full
