"""What a change of attention costs by one backward pass, and the training of all layers at once on it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import make_kernels, make_model, tokens

from less_fast import H2O, Lambda, LessError, LessKernels, Retention
from less_fast.hf.architecture import less_layers, sizes
from less_fast.layer.parallel import eviction_times, exact_part, low_rank_part
from less_fast.setting import Setting
from less_fast.training import RECIPES, together, train
from less_fast.training.head_costs import measure
from less_fast.training.sensitivity import eviction_times_of, watch

POLICY = H2O(3, 3)
RECIPE = replace(
    RECIPES["exponential"],
    epochs=0,
    together_steps=24,
    together_windows=4,
    together_uses=3,
    joint_steps=0,
    table_steps=0,
    rank=2,
    hidden=3,
)


def quick_training(folder=None, recipe=RECIPE, **more):
    return train(make_model().float(), tokens(10, 30), tokens(4, 30, seed=1), POLICY, recipe, folder, **more)


def test_costs_by_the_gradient_follow_the_measured_divergences():
    model, ids = make_model().float(), tokens(8, 40)
    kernels = make_kernels(model).float()
    measured, estimated = (measure(model, ids, POLICY, kernels, by=by) for by in ("kl", "gradient"))
    for name in ("bare", "less"):
        one, other = (np.array(getattr(curves, name))[..., :-1] for curves in (measured, estimated))
        ranks = [costs.ravel().argsort().argsort() for costs in (one, other)]
        assert np.corrcoef(ranks)[0, 1] > 0.95
        assert np.median(other / one) == pytest.approx(1, abs=0.15)
        assert not np.array(getattr(estimated, name))[..., -1].any()
    assert (estimated.by, estimated.budgets) == ("gradient", measured.budgets)


def test_the_cost_of_all_heads_is_that_of_the_layer_and_of_no_change_nothing():
    layer = watch(make_model().float(), tokens(2, 12), seed=0)[1]
    out = layer.full + torch.randn(layer.full.shape, generator=torch.Generator().manual_seed(0))
    one_head = layer.full.clone()
    one_head[:, 2:] = out[:, 2:]  # the query heads of the second KV head
    torch.testing.assert_close(layer.cost_of_heads(out)[:, 1], layer.cost(one_head))
    torch.testing.assert_close(layer.cost(out[:, :, 5:], 5), layer.cost(out)[:, 5:])
    assert not layer.cost(layer.full).any()


def test_the_seed_of_the_labels_decides_and_nothing_else():
    model, ids = make_model().float(), tokens(2, 12)
    torch.manual_seed(1)
    one = watch(model, ids, seed=3)[0].g
    torch.manual_seed(2)
    assert torch.equal(watch(model, ids, seed=3)[0].g, one)
    assert not torch.equal(watch(model, ids, seed=4)[0].g, one)


@pytest.mark.parametrize("policy", [POLICY, Lambda(1, 4), Retention(6, 2)])
def test_eviction_times_of_all_layers_at_once_are_those_of_each(policy):
    model = make_model().float()
    layers, kernels = watch(model, tokens(2, 30), seed=0), make_kernels(model, rho=3).float()
    times = eviction_times_of(layers, policy, kernels)
    assert [*times] == [*layers] == [0, 1, 2]
    for index, layer in layers.items():
        alone = eviction_times(layer.q, layer.k, layer.v, policy, layer.scale, kernels=kernels.layers[index])
        assert torch.equal(times[index], alone)


def test_training_leaves_less_of_the_cost_and_reports_it():
    trained = quick_training()
    assert trained.about["together"]["budgets"] == [2, 6, 12]
    shares = np.array(trained.about["together"]["left"])  # (budgets, layers)
    assert shares.shape == (3, 3)
    assert (shares < 1).all()
    untrained = quick_training(recipe=replace(RECIPE, learning_rate=0.0))
    assert (shares < np.array(untrained.about["together"]["left"])).all()
    model = make_model().float()
    setting = Setting.of(sizes(model), less_layers(model), POLICY, trained, "uniform")
    assert together.shares_left(model, tokens(4, 30, seed=1), setting, RECIPE) == pytest.approx(shares[1], rel=1e-5)


def test_new_kernels_begin_with_what_the_first_round_weighs_and_those_that_go_on_do_not():
    new = quick_training(recipe=replace(RECIPE, learning_rate=0.0))
    model, fresh = make_model().float(), LessKernels(**sizes(make_model()), rank=2, hidden=3, family="exponential")
    for layer, own in zip(fresh.layers, new.layers):  # as they were drawn
        layer.load_state_dict(own.state_dict() | {"k3": layer.k3})
    order = torch.randperm(10, generator=torch.Generator().manual_seed(RECIPE.seed))
    layers = watch(model, tokens(10, 30)[order][:2], seed=RECIPE.seed)
    for index, layer in layers.items():
        e = eviction_times(layer.q, layer.k, layer.v, H2O(1, 1), layer.scale)  # the first of three budgets
        features, late = fresh.layers[index], slice(3, None)
        mass = low_rank_part(features.phi(layer.q), features.psi(layer.k), layer.v, e)[1]
        features.begin(exact_part(layer.q, layer.k, layer.v, e, layer.scale)[1][:, :, late], mass[:, :, late])
        assert (features.k3 != features.START).all()
        torch.testing.assert_close(new.layers[index].k3, features.k3, atol=1e-3, rtol=1e-4)
    more = quick_training(recipe=replace(RECIPE, learning_rate=0.0), start=new)
    assert all(torch.equal(one.k3, other.k3) for one, other in zip(new.layers, more.layers))


def test_a_model_in_float64_is_trained_where_gradients_are_off():
    model = make_model()
    with torch.inference_mode():
        kernels = train(model, tokens(10, 30), tokens(4, 30, seed=1), POLICY, RECIPE, curves=True)
        curves = measure(model, tokens(1, 30), POLICY, by="gradient")
    assert (np.array(kernels.about["together"]["left"]) < 1).all()
    assert {weight.dtype for weight in kernels.state_dict().values()} == {torch.float32}
    assert curves == measure(model, tokens(1, 30), POLICY, by="gradient")


class Killed(BaseException):
    pass


def test_a_training_that_is_killed_ends_in_the_same_weights_and_curves(tmp_path, monkeypatch):
    whole, own = quick_training(curves=True), together.Round.step
    for steps in (5, 8, 9):  # more than a checkpoint's worth in all
        left = iter(range(steps))

        def dies(*args, left=left):
            if next(left, None) is None:
                raise Killed
            return own(*args)

        with monkeypatch.context() as patch:
            patch.setattr(together.Round, "step", dies)
            patch.setattr(together, "CHECKPOINT", 4)
            with pytest.raises(Killed):
                quick_training(tmp_path, curves=True)
    again = quick_training(tmp_path, curves=True)
    assert again.curves == whole.curves
    assert again.curves["H2O"].by == "gradient"
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name


def test_steps_take_each_window_of_a_round_so_often_with_what_is_evicted_from_it(monkeypatch):
    """Of five windows in steps of two, each used three times; a setting after the other, in the next round, too."""
    own, taken, budgets = together.share_left, [], []

    def look(layer, e, features, budget):
        if torch.is_grad_enabled():
            assert torch.equal(e, eviction_times(layer.q, layer.k, layer.v, POLICY.with_budget(budget), layer.scale))
            taken.append(layer.q)
            budgets.append(budget)
        return own(layer, e, features, budget)

    monkeypatch.setattr(together, "share_left", look)
    windows = tokens(5, 30)
    recipe = replace(RECIPE, together_steps=10, together_windows=5)
    train(make_model().float(), windows, tokens(2, 30, seed=1), POLICY, recipe)
    assert budgets == [budget for step in range(10) for budget in [(2, 6, 12)[step % 3]] * 3]  # three layers
    taken = taken[: 8 * 3]  # the first round
    of_first = torch.cat(taken[::3])  # layer
    known = watch(make_model().float(), windows, seed=0)[0].q
    uses = [sum(torch.allclose(row, one, atol=1e-5) for row in of_first) for one in known]
    assert (uses, [len(q) for q in taken[::3]]) == ([3] * 5, [2] * 7 + [1])


@pytest.mark.parametrize("clip", [None, 1e-6])
def test_the_gradient_of_each_layer_is_clipped_as_the_recipe_says(clip, monkeypatch):
    norms, take = [], together.Descent.take

    def look(descent):
        norms.extend(torch.cat([w.grad.flatten() for w in layer.parameters()]).norm() for layer in descent.kernels.layers)
        take(descent)

    monkeypatch.setattr(together.Descent, "take", look)
    quick_training(recipe=replace(RECIPE, clip=clip, together_steps=2))
    assert (max(norms) <= 1.01e-6) == (clip is not None)


def test_training_that_diverges_is_refused(monkeypatch):
    own = together.share_left
    monkeypatch.setattr(together, "share_left", lambda *args: own(*args) * torch.inf)
    with pytest.raises(LessError, match="training diverged at step 0: lower the learning rate"):
        quick_training()


def test_a_model_whose_predictions_are_not_finite_is_refused():
    model = make_model().float()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(LessError, match="predictions are not finite"):
        watch(model, tokens(2, 12), seed=0)
