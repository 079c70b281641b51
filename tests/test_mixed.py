"""Models with other layers beside those that LESS serves: kernels, rho and budget tables are made for these alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import make_kernels, tokens
from short_training import RECIPE
from torch.nn.functional import kl_div
from transformers import DynamicCache

from less_fast import H2O, LessCache, LessError, LessKernels, Retention
from less_fast.hf.architecture import attention_modules, less_layers, output_weight, sizes
from less_fast.setting import Setting
from less_fast.training import train
from less_fast.training.joint import divergence
from less_fast.training.sensitivity import watch
from paper_checks.architectures import tiny

MIXED = {"gemma3_text": "a sliding window of 6 tokens", "qwen3_5_text": "recurrence"}
RECIPES_HERE = {
    "paper": replace(RECIPE, family="paper", budgets=(1.0,), joint_steps=4, curves=2),
    "exponential": replace(RECIPE, rho=3, joint_steps=0, curves=2),
}


def mixed_model(name):
    return tiny(name).double().requires_grad_(False)


def ranks(model, rank):
    return [rank * (index in less_layers(model)) for index in range(sizes(model)["layers"])]


def kernels_of(model, **more):
    """Random ones, with a state that matters."""
    return make_kernels(model, rank=ranks(model, 2), family="exponential", **more)


@pytest.fixture(scope="module", params=MIXED)
def model(request):
    return mixed_model(request.param)


@pytest.fixture(scope="module", params=RECIPES_HERE)
def trained(request, model):
    return train(model.float(), tokens(10, 30), tokens(4, 30, seed=1), H2O(3, 3), RECIPES_HERE[request.param])


def test_kernels_have_weights_in_the_layers_that_less_serves_and_in_no_others(model, trained):
    assert 0 < len(less_layers(model)) < sizes(model)["layers"]
    for index, layer in enumerate(trained.layers):
        served = index in less_layers(model)
        assert layer.rank == 2 * served
        assert bool(layer.memory()) == served
        assert (layer.rho is not None) == (served and "rho" in trained.sizes)


def test_training_learns_something_and_reports_it_for_each_layer_that_less_serves(model, trained):
    count = len(less_layers(model))
    shares = np.array(trained.about["layers"]["left"])
    assert shares.shape == (1 if trained.sizes["family"] == "paper" else 6, count)  # three budgets, with H2O and Retention
    assert shares.mean() < 1
    if "rho" in trained.about:
        assert len(trained.about["rho"]["after"]) == count
        assert np.mean(trained.about["rho"]["after"]) < np.mean(trained.about["rho"]["before"])
        assert all(trained.layers[index].rho.r2.any() for index in less_layers(model))  # it starts at zero


def test_each_layer_is_trained_before_its_own_projection(model):
    held = watch(model.float(), tokens(1, 12), 0, by_gradient=False)
    for index, module in attention_modules(model).items():
        if index in less_layers(model):
            assert torch.equal(held[index].projection, output_weight(module).T)


def test_what_was_trained_is_saved_found_again_and_used_with_its_tables(model, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    again = LessKernels.from_pretrained(tmp_path)
    assert again.curves == trained.curves
    assert f"for {len(less_layers(model))} of {sizes(model)['layers']} layers" in (tmp_path / "README.md").read_text()
    for name, weight in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    policy, ids = H2O(3, 3), tokens(2, 30, seed=2)
    table = again.budgets_for(policy)
    heads = len(less_layers(model)) * sizes(model)["kv_heads"]
    assert sum(map(sum, table)) == 6 * heads
    assert [index for index, row in enumerate(table) if row] == less_layers(model)
    cache = LessCache.for_model(model, policy, again, chunk=1)
    assert cache.setting.budgets == table
    with torch.no_grad():
        ours = model(ids, past_key_values=cache).logits
        wanted = model(ids, past_key_values=LessCache.for_model(model, policy, again, table, chunk=1)).logits
    assert torch.equal(ours, wanted)
    for index, layer in zip(less_layers(model), cache.less_layers, strict=True):
        for kv_heads, positions in layer.state.positions():
            held = torch.tensor(table[index])[kv_heads]  # (h,)
            assert torch.equal((positions >= 0).sum(-1), held.expand(2, -1))
    if "linear_attention" in model.config.layer_types:
        return  # a cache with recurrent layers cannot be saved
    cache.save(tmp_path / "text")
    loaded, more = LessCache.load(tmp_path / "text", model, again), tokens(2, 1, seed=3)
    with torch.no_grad():
        assert torch.equal(model(more, past_key_values=loaded).logits, model(more, past_key_values=cache).logits)


@torch.no_grad()
@pytest.mark.parametrize("policy", [H2O(3, 2), Retention(5, 2)])
def test_the_divergence_is_that_of_the_streaming_cache_from_the_full_one(model, policy):
    ids, kernels = tokens(2, 25), kernels_of(model.double(), rho=3)
    full = model(ids, past_key_values=DynamicCache(config=model.config)).logits.log_softmax(-1)
    ours = model(ids, past_key_values=LessCache.for_model(model, policy, kernels, chunk=1)).logits.log_softmax(-1)
    wanted = kl_div(ours, full, log_target=True, reduction="sum").item() / ids.numel()
    assert wanted > 1e-6
    setting = Setting.of(sizes(model), less_layers(model), policy, kernels, "uniform")
    assert divergence(model, ids, setting).item() == pytest.approx(wanted, rel=1e-4)


def test_ranks_that_no_layer_could_have_are_refused(model):
    with pytest.raises(LessError, match="rank 0 in all layers are none"):
        LessKernels(**sizes(model), rank=[0] * sizes(model)["layers"])
    with pytest.raises(LessError, match="the rank of kernels must be an integer from 0"):
        LessKernels(**sizes(model), rank=[-1] * sizes(model)["layers"])
