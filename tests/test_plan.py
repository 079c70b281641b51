"""What is planned is what is held: costs by counting, against real models and caches."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, make_kernels, make_model, tokens
from transformers import DynamicCache
from typer.testing import CliRunner

from less_fast import H2O, Lambda, LessCache, LessError, LessKernels
from less_fast.cli import app
from less_fast.demo import KERNELS, PAPER_KERNELS
from less_fast.hf.architecture import less_layers, sizes
from less_fast.loading import load_config
from less_fast.measuring.caches import held_bytes
from less_fast.measuring.plan import plan
from less_fast.setting import POLICIES, Setting
from paper_checks.architectures import tiny

MB = 10**6


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_bytes_are_those_of_the_model_its_kernels_and_its_cache(family):
    model = make_model(family)
    kernels = make_kernels(model)
    cache = LessCache.for_model(model, POLICIES["h2o"].with_budget(9), kernels)
    with torch.no_grad():
        model(tokens(1, 12), past_key_values=cache)
    told = plan(model.config, POLICIES["h2o"].with_budget(9), 3, hidden=5, dtype=torch.float64)
    assert told.weights == sum(x.numel() * 8 for x in model.parameters())
    assert told.less == sum(cache.memory().values())
    assert told.kernels == kernels.memory() // 2  # these are float64, and planned in float32
    assert told.full == 4096 * 2 * sum(layer.state.kv_heads for layer in cache.layers) * 8 * 8


MIXED = ["gemma2", "gemma3_text", "cohere2", "gpt_oss", "cwm"]  # windows of 6 tokens beside layers with full attention


@torch.no_grad()
def held(model, cache, length):
    """Bytes that the cache holds after a prompt and one token that came alone."""
    model(tokens(1, length - 1), past_key_values=cache)
    model(tokens(1, 1), past_key_values=cache)
    return held_bytes(cache)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("length", [5, 6, 7, 40])
def test_of_a_mixed_model_each_layer_is_planned_with_what_it_holds(name, length):
    model, policy = tiny(name), H2O(2, 2)
    kernels = LessKernels(**sizes(model), rank=2, hidden=3)
    told = plan(model.config, policy, 2, hidden=3, length=length, dtype=torch.float32)
    assert told.full == held(model, DynamicCache(config=model.config), length)
    assert told.less == held(model, LessCache.for_model(model, policy, kernels), length)
    read = sum(kernels.layers[index].memory() for index in less_layers(model))
    assert (told.kernels, told.less_moved - told.weights - told.less) == (kernels.memory(), read)


@pytest.mark.parametrize("name", MIXED)
def test_the_break_even_length_of_a_mixed_model_is_just_that(name):
    config, policy = tiny(name).config, Lambda(4, 20)
    even = plan(config, policy, 2, hidden=3, batch=3).break_even
    moved = [plan(config, policy, 2, hidden=3, batch=3, length=length) for length in (even - 1, even)]
    assert [told.less_moved < told.full_moved for told in moved] == [False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3_5_text", "what a recurrent layer holds is known only once the model runs"),
        ("gemma4_text", "the layers of this model differ in their heads"),
        ("gpt_neo", "has attention code of its own"),
    ],
)
def test_a_model_that_cannot_be_laid_out_or_served_is_refused(name, message):
    with pytest.raises(LessError, match=message):
        plan(tiny(name).config, H2O(2, 2))


@pytest.mark.parametrize("wrong", [dict(batch=0), dict(length=0), dict(length=2.5), dict(length=10**12)])
def test_batches_and_lengths_that_cannot_be_are_refused(wrong):
    with pytest.raises(LessError, match=f"the {next(iter(wrong))} must be an integer from 1 to"):
        plan(make_model().config, H2O(2, 2), **wrong)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policys_cache_is_planned_with_its_scores(name):
    model = make_model().float()
    kinds = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    rho = make_kernels(model, rho=3).float().without_state() if POLICIES[name].needs == "rho" else None
    cache = LessCache.for_model(model, POLICIES[name], rho, token_kinds=kinds)
    with torch.no_grad():
        model(tokens(1, 40), past_key_values=cache)
    shape = dict(layers=3, query_heads=4, kv_heads=2, head_dim=8)
    assert Setting.of(shape, range(3), POLICIES[name], rho).memory(torch.float32) == sum(cache.memory().values())


@given(
    batch=st.integers(1, 64),
    length=st.integers(1, 10_000),
    memory=st.integers(1, 200_000),
    rank=st.sampled_from([1, 8, 32]),
    budget=st.integers(1, 2000),
)
def test_the_break_even_length_and_the_largest_batches_are_just_that(batch, length, memory, rank, budget):
    config, policy = FAMILIES["llama"](vocab_size=10, num_hidden_layers=2), POLICIES["window"].with_budget(budget)
    told = plan(config, policy, rank, batch=batch, length=length, memory=memory * MB)
    longer = told.full // length * told.break_even
    step = told.kernels + batch * told.less
    assert batch * longer > step >= batch * (longer - told.full // length)
    assert (told.less_moved < told.full_moved) == (length >= told.break_even)
    fixed = told.weights + told.kernels
    for fits, weights, each in [(told.full_batch, told.weights, told.full), (told.less_batch, fixed, told.less)]:
        assert fits >= 0
        assert weights + (fits + 1) * each > memory * MB
        assert fits == 0 or weights + fits * each <= memory * MB


def test_the_named_shape_has_as_many_parameters_as_the_model():
    assert plan(load_config("llama-2-7b"), POLICIES["h2o"]).weights / 2 == pytest.approx(6.74e9, rel=1e-3)


def test_the_command_prints_the_table_and_the_same_as_json():
    arguments = ["plan", "--model", "llama-2-7b", "--memory", "80", "--batch", "8"]
    table = CliRunner().invoke(app, arguments)
    record = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert f"from {record['break_even']:,} tokens on" in table.stdout
    assert f"{record['less'] / 1e6:.2f} MB" in table.stdout
    assert f"{record['less_batch']}" in table.stdout


@pytest.mark.parametrize(("family", "folder"), [(["--policy", "retention"], KERNELS), (["--family", "paper"], PAPER_KERNELS)])
def test_the_embedded_models_own_kernels_are_as_large_as_planned(family, folder):
    record = json.loads(CliRunner().invoke(app, ["plan", *family, "--json"]).stdout)
    assert record["model"] == "embedded"
    assert record["kernels"] == LessKernels.from_pretrained(folder).memory()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "."], "no config of a model at ."),
        (["--budget", "0"], "a budget must be a whole number of tokens"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    refused = CliRunner().invoke(app, ["plan", *arguments])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert message in refused.stderr
