"""Kernels: their training, their files, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import make_model, recorded, reference_kernels, reference_policy, tokens
from safetensors.torch import load_file, save_file
from short_training import validation_errors

import less_ref
from less_fast import H2O, LayerKernels, LessCache, LessError, LessKernels, Window
from less_fast.hf.architecture import attention_modules
from less_fast.hub import CONFIG, WEIGHTS
from less_fast.layer.features import FAMILIES, _dropout_mask
from less_fast.layer.parallel import low_rank_part
from less_fast.training import RECIPES, Recipe, joint, layers, retention, together, train
from less_fast.training.descent import Descent
from less_fast.training.layers import loss, projected_error
from less_fast.training.recording import prepare

QUICK = {
    "paper": Recipe(rank=3, hidden=8, epochs=4, batch=2, halve_every=1, dropout=0.1),
    "exponential": replace(RECIPES["exponential"], rank=3, hidden=4, epochs=4, joint_steps=0),
}
EVERY_FAMILY = pytest.mark.parametrize("family", QUICK)


def quick_training(model, recipe):
    return train(model, tokens(12, 40), tokens(6, 40, seed=1), H2O(3, 3), recipe)


@pytest.fixture(scope="module", params=QUICK)
def trained(request):
    model = make_model().float()
    return model, quick_training(model, QUICK[request.param]), QUICK[request.param]


@pytest.mark.parametrize("group", [1, 3])
@EVERY_FAMILY
def test_the_loss_is_the_references_training_loss(family, group):
    torch.manual_seed(2)
    Hkv, D, T, policy = 2, 4, 30, H2O(3, 2)
    q, k, v = torch.randn(2, Hkv * group, T, D), torch.randn(2, Hkv, T, D), torch.randn(2, Hkv, T, D)
    kernels = FAMILIES[family](Hkv * group, Hkv, D, rank=3, hidden=5)
    torch.nn.init.normal_(kernels.k3)
    projection = torch.randn(Hkv * group * D, 7)
    data = prepare(q, k, v, policy, 0.4)
    wanted = []
    for row in range(2):
        arrays = [x[row].double().numpy() for x in (q, k, v)]
        trace = less_ref.run(*arrays, reference_policy(policy), reference_kernels(kernels), scale=0.4)
        e = less_ref.eviction_times(trace)
        full = less_ref.parallel(*arrays, np.full_like(e, np.inf), scale=0.4)
        wanted.append(less_ref.training_loss(trace.out, full, projection.double().numpy(), e))
    assert loss(kernels, data, projection, policy.budget).item() == pytest.approx(np.mean(wanted), rel=1e-4)


def test_training_reduces_the_error_that_it_reports(trained):
    model, kernels, recipe = trained
    untrained = quick_training(model, replace(recipe, learning_rate=0.0))
    assert [figures["less"] for figures in kernels.about["validation"]] == pytest.approx(
        validation_errors(model, kernels, tokens(6, 40, seed=1), H2O(3, 3))
    )
    for after, before in zip(kernels.about["validation"], untrained.about["validation"]):
        assert after["bare"] == before["bare"]
        assert after["less"] < before["less"]


def test_the_best_epoch_is_kept_not_the_last_nor_the_first(trained):
    """At this learning rate some epochs help a layer, and some spoil it."""
    model, *_ = trained
    wild = replace(QUICK["paper"], learning_rate=1.0, halve_every=10)
    run = [quick_training(model, replace(wild, epochs=n)) for n in (1, 2, 3)]
    lowest = [[figures["less"] for figures in kernels.about["validation"]] for kernels in run]
    assert (np.diff(lowest, axis=0) <= 0).all()
    assert (np.diff(lowest, axis=0) < 0).any()
    assert validation_errors(model, run[-1], tokens(6, 40, seed=1), H2O(3, 3)) == pytest.approx(lowest[-1])


def test_a_layer_that_no_epoch_improves_keeps_the_weights_it_began_with():
    model, recipe = make_model().float(), replace(QUICK["exponential"], epochs=1, learning_rate=0.0)
    began, kept = quick_training(model, recipe).about["validation"], 0
    for rate in (30.0, 1e3, 1e5):
        kernels = quick_training(model, replace(recipe, learning_rate=rate))
        for index, (before, after) in enumerate(zip(began, kernels.about["validation"])):
            assert after["less"] <= before["less"]
            kept += not kernels.layers[index].q2.any()  # they begin at zero
        errors = validation_errors(model, kernels, tokens(6, 40, seed=1), H2O(3, 3))
        assert [figures["less"] for figures in kernels.about["validation"]] == pytest.approx(errors)
    assert kept


@pytest.mark.parametrize(("head_dim", "share"), [(8, 1.0), (64, 1.0), (128, 0.5)])
def test_every_stage_takes_smaller_steps_for_wider_heads(monkeypatch, head_dim, share):
    rates = {}
    for module in (retention, layers, together, joint):

        class Watched(Descent):
            def __init__(self, kernels, rate, *rest, module=module):
                rates[module.__name__.rpartition(".")[2]] = rate
                super().__init__(kernels, rate, *rest)

        monkeypatch.setattr(module, "Descent", Watched)
    model = make_model(head_dim=head_dim, num_hidden_layers=1).float()
    recipe = replace(QUICK["exponential"], epochs=1, rho_steps=4, rho_hidden=2, rho_rate=1e-3, joint_steps=2, together_windows=2)
    for one in (recipe, replace(recipe, epochs=0, together_steps=2)):
        train(model, tokens(2, 40), tokens(2, 40), H2O(3, 3), one)
    wanted = dict(retention=1e-3, layers=recipe.learning_rate, together=recipe.learning_rate, joint=recipe.joint_rate)
    assert rates == {name: pytest.approx(share * rate) for name, rate in wanted.items()}


@EVERY_FAMILY
def test_training_starts_from_the_bare_policy(family):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 30, 8) for _ in range(3))
    data = prepare(q, k, v, Window(4), None)
    bare = projected_error(data.exact, data.full, torch.eye(16))
    assert loss(FAMILIES[family](2, 2, 8), data, torch.eye(16), 4).item() == pytest.approx(bare.item(), rel=1e-2)


def test_new_kernels_begin_beside_what_the_held_tokens_weigh_and_trained_ones_stay():
    """Logits are about 25: e^-10 beside e^25 has no gradient that Adam would follow."""
    torch.manual_seed(0)
    q, k, v = 3 + torch.randn(2, 4, 60, 8) / 4, 3 + torch.randn(2, 2, 60, 8) / 4, torch.randn(2, 2, 60, 8)
    data, kernels = prepare(q, k, v, H2O(3, 3), None), FAMILIES["exponential"](4, 2, 8)
    late = slice(7, None)

    def folded():  # what it weighs beside what is held, (N, Hq, L)
        mass = low_rank_part(kernels.phi(data.q), kernels.psi(data.k), data.v, data.e)[1][:, :, late]
        return mass * (-data.lse).exp()

    def gradient():
        error = loss(kernels, data, torch.eye(32), 6)
        (found,) = torch.autograd.grad(error, kernels.k3)
        return found.abs().max(), error.item()

    bare = projected_error(data.exact, data.full, torch.eye(32)).item()
    flat, _ = gradient()
    kernels.begin(data.lse, low_rank_part(kernels.phi(data.q), kernels.psi(data.k), data.v, data.e)[1][:, :, late])
    for head in range(2):  # and its two query heads
        weight = folded()[:, 2 * head : 2 * head + 2]
        assert (weight > np.exp(-1)).float().mean().item() <= 0.011
        assert weight.max() > np.exp(-1.001)
    steep, error = gradient()
    assert steep > 1e4 * flat
    assert error < 1.1 * bare
    trained = kernels.k3.clone()
    kernels.begin(data.lse, data.lse.exp())
    assert torch.equal(kernels.k3, trained)


def test_the_same_seed_gives_the_same_kernels_whatever_the_global_generator_does_and_another_seed_others(trained):
    model, kernels, recipe = trained
    torch.manual_seed(99)
    again, other = (quick_training(model, replace(recipe, seed=seed)) for seed in (recipe.seed, recipe.seed + 1))
    for name, weight in kernels.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
        assert not torch.equal(other.state_dict()[name], weight)


def test_recorded_tensors_give_the_models_own_attention_output():
    model = make_model().float()
    module, ids = attention_modules(model)[1], tokens(2, 12)
    seen = []
    hook = module.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    q, k, v, _ = recorded(model, ids, 1)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=module.scaling, enable_gqa=True)
    torch.testing.assert_close(full.transpose(1, 2).flatten(2), seen[0])


def test_dropout_keeps_the_mean_and_drops_the_wanted_share():
    torch.manual_seed(0)
    mask = _dropout_mask(torch.empty(999, 1001), 0.3)
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert mask.mean().item() == pytest.approx(1, abs=0.005)


def test_dropout_acts_in_training_alone():
    kernels = LayerKernels(2, 2, 4)
    kernels.dropout = 0.5
    q = torch.randn(1, 2, 5, 4)
    assert not torch.equal(kernels.train().phi(q), kernels.phi(q))
    assert torch.equal(kernels.eval().phi(q), kernels.phi(q))


def test_saved_kernels_come_back_bit_for_bit_and_serve_their_model(trained, tmp_path):
    model, kernels, _ = trained
    kernels.save_pretrained(tmp_path)
    again = LessKernels.from_pretrained(tmp_path)
    assert again.about == kernels.about
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), kernels.state_dict().values()))
    LessCache.for_model(model, H2O(3, 3), again)


def test_a_folder_without_kernels_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"holds no kernels: {WEIGHTS} is missing"):
        LessKernels.from_pretrained(tmp_path)


def test_a_name_that_is_neither_folder_nor_repository_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository"):
        LessKernels.from_pretrained("nobody/nothing")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights, config: weights.popitem(), "do not fit their"),
        (lambda weights, config: config.update(rank=5), "do not fit their"),
        (lambda weights, config: config.update(colour=5), "do not fit their"),
        (lambda weights, config: next(iter(weights.values())).fill_(torch.nan), "hold NaN or infinite weights"),
    ],
    ids=["missing weight", "other rank", "unknown field", "NaN"],
)
def test_spoiled_kernel_files_are_refused(trained, tmp_path, spoil, message):
    trained[1].save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    spoil(weights, config)
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        LessKernels.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_cut_off_kernel_files_are_refused(trained, tmp_path, name):
    trained[1].save_pretrained(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(ValueError, match="are broken, or do not fit their"):
        LessKernels.from_pretrained(tmp_path)


def test_a_model_whose_attention_is_not_finite_is_refused():
    model = make_model().float()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(LessError, match="attention of layer 0 is not finite"):
        train(model, tokens(2, 20), tokens(2, 20), H2O(3, 3), QUICK["paper"])


@EVERY_FAMILY
def test_steps_follow_the_recipes_learning_rate_and_its_largest_gradient(family, monkeypatch):
    """Six steps in each of four epochs and three layers. The paper's rate is halved; the other's rises and falls in a layer."""
    rates, norms, step = [], [], torch.optim.Adam.step

    def seen(adam):
        rates.append(adam.param_groups[0]["lr"])
        norms.append(torch.cat([weight.grad.flatten() for group in adam.param_groups for weight in group["params"]]).norm())
        return step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", seen)
    recipe = replace(QUICK[family], clip=1e-6)
    quick_training(make_model().float(), recipe)
    of_layer = np.array(rates).reshape(3, 24)
    assert (of_layer == of_layer[0]).all()
    if family == "paper":
        assert of_layer[0] == pytest.approx(np.repeat(recipe.learning_rate * 0.5 ** np.arange(4), 6))
    else:
        top = of_layer[0].argmax()
        assert of_layer[0, top] == pytest.approx(recipe.learning_rate, rel=0.05)
        assert 0 < top < 23
        assert (np.diff(of_layer[0]) * np.where(np.arange(23) < top, 1, -1) > 0).all()
        assert of_layer[0, -1] < 0.01 * recipe.learning_rate
    assert max(norms) <= 1.01e-6
