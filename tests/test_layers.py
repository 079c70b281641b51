"""The stage of the layers: what a change of attention costs, by the paper's objective and by one backward pass, and the
training of each layer on it in rounds of windows."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from models import make_kernels, make_model, reference_kernels, reference_policy, tokens
from short_training import PAPER, POLICY, RECIPE, quick_training, setting_of

import less_ref
from less_fast import H2O, Lambda, LessError, LessKernels, Retention
from less_fast.hf.architecture import sizes
from less_fast.layer.parallel import dense, eviction_times, exact_part, low_rank_part
from less_fast.training import joint, layers, retention, sensitivity, train
from less_fast.training.descent import Descent, rounds, single_steps
from less_fast.training.head_costs import measure
from less_fast.training.recipe import Fit
from less_fast.training.sensitivity import Watched, eviction_times_of, watch

LAYERS = replace(RECIPE, joint_steps=0)
EVERY_FAMILY = pytest.mark.parametrize("family", ["paper", "exponential"])
EVERY_RECIPE = pytest.mark.parametrize("recipe", [LAYERS, PAPER], ids=["exponential", "paper"])


def one_layer(q, k, v, policy, family, scale=0.4, **sizes):
    """What is watched of a layer with these queries, keys and values, by the paper's objective; what the bare policy does to it;
    and a setting of new kernels for it."""
    (_, Hq, _, D), Hkv = q.shape, k.shape[1]
    torch.manual_seed(2)
    kernels = LessKernels(1, Hq, Hkv, D, family=family, **sizes)
    layer = Watched(q, k, v, scale, dense(q, k, v, scale), None, torch.randn(Hq * D, 7))
    setting = setting_of_sizes(kernels, policy)
    return layer, layers.bare_of({0: layer}, setting)[0], setting


def setting_of_sizes(kernels, policy):
    names = ("layers", "query_heads", "kv_heads", "head_dim")
    return layers.Setting.of({name: kernels.sizes[name] for name in names}, range(1), policy, kernels, "uniform")


@pytest.mark.parametrize("group", [1, 3])
@EVERY_FAMILY
def test_the_papers_loss_is_the_references_training_loss(family, group):
    torch.manual_seed(2)
    Hkv, D, T, policy = 2, 4, 30, H2O(3, 2)
    q, k, v = torch.randn(2, Hkv * group, T, D), torch.randn(2, Hkv, T, D), torch.randn(2, Hkv, T, D)
    layer, bare, setting = one_layer(q, k, v, policy, family, rank=3, hidden=5)
    features = setting.kernels.layers[0]
    torch.nn.init.normal_(features.k3)
    wanted = []
    for row, kernels in product(range(2), (features, None)):
        arrays = [x[row].double().numpy() for x in (q, k, v)]
        trace = less_ref.run(*arrays, reference_policy(policy), kernels and reference_kernels(kernels), scale=0.4)
        evicted = less_ref.eviction_times(trace)
        full = less_ref.parallel(*arrays, np.full_like(evicted, np.inf), scale=0.4)
        wanted.append(less_ref.training_loss(trace.out, full, layer.projection.double().numpy(), evicted))
    found = [cost.item() for cost in layers.costs(layer, bare, setting, 0)]
    assert found == pytest.approx(np.mean(np.reshape(wanted, (2, 2)), 0), rel=1e-4)


@EVERY_FAMILY
def test_training_starts_from_the_bare_policy(family):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 30, 8) for _ in range(3))
    less, bare = layers.costs(*one_layer(q, k, v, H2O(2, 2), family), 0)
    assert less.item() == pytest.approx(bare.item(), rel=1e-2)


def test_new_kernels_begin_beside_what_the_held_tokens_weigh_and_trained_ones_stay():
    """Logits are about 25: e^-10 beside e^25 has no gradient that Adam would follow."""
    torch.manual_seed(0)
    q, k, v = 3 + torch.randn(2, 4, 60, 8) / 4, 3 + torch.randn(2, 2, 60, 8) / 4, torch.randn(2, 2, 60, 8)
    layer, held, setting = one_layer(q, k, v, H2O(3, 3), "exponential", scale=None)
    features, late = setting.kernels.layers[0], slice(7, None)

    def folded():  # what it weighs beside what is held, (N, Hq, L)
        lse, mass = exact_part(q, k, v, held.e)[1], low_rank_part(features.phi(q), features.psi(k), v, held.e)[1]
        return (mass * (-lse).exp())[:, :, late]

    def gradient():
        less, bare = layers.costs(layer, held, setting, 0)
        (found,) = torch.autograd.grad(less, features.k3)
        return found.abs().max(), (less / bare).item()

    flat, _ = gradient()
    layers.begin(({0: layer}, [{0: held}]), setting, 2)
    for head in range(2):  # and its two query heads
        weight = folded()[:, 2 * head : 2 * head + 2]
        assert (weight > np.exp(-0.9999)).float().mean().item() <= 0.011
        assert weight.max() > np.exp(-1.001)
    steep, share = gradient()
    assert steep > 1e4 * flat
    assert share < 1.1
    trained = features.k3.clone()
    layers.begin(({0: layer}, [{0: held}]), setting, 2)
    assert torch.equal(features.k3, trained)


def test_the_first_step_begins_new_kernels_with_its_round_and_not_those_that_go_on():
    still = replace(LAYERS, rate=0.0)
    new = quick_training(recipe=still)
    model, fresh = make_model().float(), LessKernels(**sizes(make_model()), rank=2, hidden=3, family="exponential")
    for layer, own in zip(fresh.layers, new.layers):  # as they were drawn
        layer.load_state_dict(own.state_dict() | {"k3": layer.k3})
    rows = rounds(10, still)[0][0][:2]
    held = sensitivity.watch_each(model, tokens(10, 30)[rows], rows.tolist(), True)
    setting = setting_of(model, H2O(1, 1), fresh)  # the first of three budgets
    layers.begin((held, [layers.bare_of(held, setting)]), setting, 2)
    for layer, own in zip(fresh.layers, new.layers):
        assert (layer.k3 != layer.START).all()
        torch.testing.assert_close(own.k3, layer.k3, atol=1e-3, rtol=1e-4)
    more = quick_training(recipe=still, start=new)
    assert all(torch.equal(one.k3, other.k3) for one, other in zip(new.layers, more.layers))


def alone(layer, head, budget, length):
    """The budget table in which one head is compressed and all others keep a whole text."""
    found = [[length] * 2 for _ in range(3)]
    found[layer][head] = budget
    return found


@torch.no_grad()
def test_costs_by_the_gradient_follow_the_divergences_of_a_model_that_compresses_one_head():
    model, ids, budgets = make_model().float(), tokens(8, 40), [4, 16]
    kernels = make_kernels(model).float()
    curves = measure(model, ids, POLICY, kernels, [*budgets, 39])
    for said, some in ((curves.bare, None), (curves.less, kernels)):
        estimated, shape = np.array(said), (3, 2, len(budgets))
        tables = (alone(layer, head, budgets[column], 40) for layer, head, column in np.ndindex(shape))
        settings = (setting_of(model, POLICY, some, table) for table in tables)
        measured = np.array([joint.divergence(model, ids, one).item() for one in settings]).reshape(shape)
        ranks = [costs.ravel().argsort().argsort() for costs in (measured, estimated[..., :-1])]
        assert np.corrcoef(ranks)[0, 1] > 0.95
        assert np.median(estimated[..., :-1] / measured) == pytest.approx(1, abs=0.15)
        assert not estimated[..., -1].any()
    assert curves.by == "gradient"


def test_the_cost_of_all_heads_is_that_of_the_layer_and_of_no_change_nothing():
    layer = watch(make_model().float(), tokens(2, 12), seed=0)[1]
    out = layer.full + torch.randn(layer.full.shape, generator=torch.Generator().manual_seed(0))
    one_head = layer.full.clone()
    one_head[:, 2:] = out[:, 2:]  # the query heads of the second KV head
    costs = layer.cost(layer.seen(out))
    torch.testing.assert_close(layer.cost_of_heads(layer.seen(out))[:, 1], layer.cost(layer.seen(one_head)))
    torch.testing.assert_close(layer.cost(layer.seen(out[:, :, 5:], 5), 5), costs[:, 5:])
    assert not layer.cost(layer.seen(layer.full)).any()


def test_the_seed_of_the_labels_decides_and_nothing_else():
    model, ids = make_model().float(), tokens(2, 12)
    torch.manual_seed(1)
    one = watch(model, ids, seed=3)[0].g
    torch.manual_seed(2)
    assert torch.equal(watch(model, ids, seed=3)[0].g, one)
    assert not torch.equal(watch(model, ids, seed=4)[0].g, one)


@pytest.mark.parametrize("at_once", [1, 2**26], ids=["window by window", "all windows at once"])
@pytest.mark.parametrize("policy", [POLICY, Lambda(1, 4), Retention(6, 2)])
def test_eviction_times_of_all_layers_at_once_are_those_of_each(policy, at_once, monkeypatch):
    monkeypatch.setattr(sensitivity, "AT_ONCE", at_once)
    model = make_model().float()
    held, kernels = watch(model, tokens(3, 30), seed=0), make_kernels(model, rho=3).float()
    times = eviction_times_of(held, policy, kernels)
    assert [*times] == [*held] == [0, 1, 2]
    for index, layer in held.items():
        alone = eviction_times(layer.q, layer.k, layer.v, policy, layer.scale, kernels=kernels.layers[index])
        assert torch.equal(times[index], alone)


def test_a_round_holds_what_the_model_computes_in_its_own_dtype_and_counts_in_float32():
    held = watch(make_model().bfloat16(), tokens(2, 12), seed=0)[1]
    assert {held.q.dtype, held.v.dtype, held.full.dtype, held.g.dtype} == {torch.bfloat16}
    wide = held.rows(torch.tensor([1]))
    assert {wide.q.dtype, wide.k.dtype, wide.full.dtype, wide.g.dtype} == {torch.float32}
    assert torch.equal(wide.g[0].bfloat16(), held.g[1])


@EVERY_RECIPE
def test_training_leaves_less_of_the_cost_and_reports_it(recipe):
    trained = quick_training(recipe=recipe)
    said = trained.about["layers"]
    assert said["budgets"] == ([6] if recipe is PAPER else [2, 6, 12])
    shares = np.array(said["left"])  # (budgets, layers)
    assert shares.shape == (len(said["budgets"]), 3)
    untrained = quick_training(recipe=replace(recipe, rate=0.0))
    assert (shares < np.minimum(1, untrained.about["layers"]["left"])).all()
    model = make_model().float()
    settings = [setting_of(model, POLICY.with_budget(budget), trained) for budget in said["budgets"]]
    assert np.allclose(layers.shares_left(model, tokens(4, 30, seed=1), settings, recipe), shares, rtol=1e-5)


@EVERY_RECIPE
def test_a_layer_that_training_only_harms_keeps_the_weights_it_began_with(recipe, tmp_path, monkeypatch):
    """Whether it was killed on the way or not. Weights that decayed at such a rate would be infinite."""
    monkeypatch.setattr(layers, "FITS", {name: fit._replace(decay=0.0) for name, fit in layers.FITS.items()})
    begun = quick_training(recipe=replace(recipe, rate=0.0))
    harmed = quick_training(recipe=replace(recipe, rate=1e4))
    assert harmed.about["layers"]["harmed"]
    for index in harmed.about["layers"]["harmed"]:
        for name, weight in begun.layers[index].state_dict().items():
            assert torch.equal(weight, harmed.layers[index].state_dict()[name]), name
    settings = [setting_of(make_model().float(), POLICY.with_budget(n), harmed) for n in harmed.about["layers"]["budgets"]]
    left = layers.shares_left(make_model().float(), tokens(4, 30, seed=1), settings, recipe)
    assert np.allclose(left, harmed.about["layers"]["left"], rtol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "shares_left", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quick_training(tmp_path, replace(recipe, rate=1e4))
    for name, weight in quick_training(tmp_path, replace(recipe, rate=1e4)).state_dict().items():
        assert torch.equal(weight, harmed.state_dict()[name]), name


@EVERY_RECIPE
def test_the_same_seed_gives_the_same_kernels_whatever_the_global_generator_does_and_another_seed_others(recipe):
    kernels = quick_training(recipe=recipe)
    torch.manual_seed(99)
    again, other = (quick_training(recipe=replace(recipe, seed=seed)) for seed in (recipe.seed, recipe.seed + 1))
    for name, weight in kernels.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
        assert not torch.equal(other.state_dict()[name], weight)


def test_the_paper_drops_out_hidden_features_of_layers_in_training_alone(monkeypatch):
    found, own = [], layers.costs

    def look(layer, bare, setting, index):
        features = setting.layer(index)[1]
        found.append((torch.is_grad_enabled(), not torch.equal(features.psi(layer.k), features.psi(layer.k))))
        return own(layer, bare, setting, index)

    monkeypatch.setattr(layers, "costs", look)
    quick_training(recipe=PAPER)
    assert {drops for steps, drops in found[3:] if steps} == {True}  # the first three tell whether anything is lost
    assert {drops for steps, drops in found[3:] if not steps} == {False}


class Killed(BaseException):
    pass


@EVERY_RECIPE
def test_a_training_that_is_killed_ends_in_the_same_weights(recipe, tmp_path, monkeypatch):
    whole, own = quick_training(recipe=recipe), layers.step_of_layers
    for steps in (5, 8, 6):  # more than a checkpoint's worth in all
        left = iter(range(steps))

        def dies(*args, left=left):
            if next(left, None) is None:
                raise Killed
            return own(*args)

        with monkeypatch.context() as patch:
            patch.setattr(layers, "step_of_layers", dies)
            patch.setattr("less_fast.training.descent.CHECKPOINT", 4)
            with pytest.raises(Killed):
                quick_training(tmp_path, recipe)
    again = quick_training(tmp_path, recipe)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name


@pytest.mark.parametrize(("count", "size", "lengths"), [(10, None, {10}), (10, 10, {10}), (10, 4, {3, 4}), (5, 2, {1, 2})])
def test_each_window_lies_in_one_round_and_is_used_so_often(count, size, lengths):
    turns = rounds(count, replace(RECIPE, round=size, uses=3, batch=2))
    held = {id(windows): windows for windows, _ in turns}
    assert sorted(torch.cat([*held.values()]).tolist()) == [*range(count)]
    assert {*map(len, held.values())} == lengths
    uses = Counter(row for windows, rows in turns for row in windows[rows].tolist())
    assert uses == dict.fromkeys(range(count), 3)
    assert [*held] == [id(turns[0][0]), *(id(b) for (a, _), (b, _) in pairwise(turns) if a is not b)]  # one after the other


def test_steps_of_their_own_take_every_window_before_one_comes_again():
    turns = single_steps(7, 7, replace(RECIPE, batch=3))
    taken = [window for windows, rows in turns for window in windows[rows].tolist()]
    assert [sorted(taken[at : at + 7]) for at in (0, 7, 14)] == [[*range(7)]] * 3


def test_steps_take_the_settings_in_turns_with_what_is_evicted_from_the_windows_under_them(monkeypatch):
    own, taken = layers.costs, []

    def look(layer, bare, setting, index):
        if torch.is_grad_enabled():
            policy = setting.policy
            assert torch.equal(bare.e, eviction_times(layer.q, layer.k, layer.v, policy, layer.scale))
            taken.append((index, policy.budget, len(bare.e)))
        return own(layer, bare, setting, index)

    monkeypatch.setattr(layers, "costs", look)
    train(make_model().float(), tokens(5, 30), tokens(2, 30, seed=1), POLICY, replace(LAYERS, round=3, uses=3))
    sizes_of_steps = [2, 2, 2, 2, 1, 2, 2, 2]  # rounds of three windows and of two
    wanted = [(index, (2, 6, 12)[step % 3], size) for step, size in enumerate(sizes_of_steps) for index in range(3)]
    assert taken == wanted


@pytest.mark.parametrize("recipe", [replace(LAYERS, uses=1), replace(PAPER, uses=1)], ids=["exponential", "paper"])
def test_the_gradient_of_each_layer_is_clipped_by_itself_unless_the_recipe_is_the_papers(recipe, monkeypatch):
    fits = {name: fit._replace(clip=fit.clip and 1e-6) for name, fit in layers.FITS.items()}
    monkeypatch.setattr(layers, "FITS", fits)
    norms, step = [], torch.optim.AdamW.step

    def look(adam):
        weights = [weight for group in adam.param_groups for weight in group["params"]]
        of_layers = zip(*[iter(weights)] * (len(weights) // 3))
        norms.extend(torch.cat([weight.grad.flatten() for weight in part]).norm().item() for part in of_layers)
        return step(adam)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    quick_training(recipe=recipe)
    assert len(norms) == 3 * 5
    if recipe.family == "paper":
        assert max(norms) > 1e-5
    else:
        assert norms == pytest.approx([1e-6] * 15, rel=0.01)


@pytest.mark.parametrize("recipe", [replace(LAYERS, uses=8), replace(PAPER, uses=8)], ids=["exponential", "paper"])
def test_steps_follow_the_recipes_learning_rate_and_decay(recipe, monkeypatch):
    """Forty steps. The paper's rate is halved after each quarter; the other's rises and falls once."""
    groups, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda adam: groups.append(dict(adam.param_groups[0])) or step(adam))
    quick_training(recipe=recipe)
    fit, rates = layers.FITS[recipe.family], [group["lr"] for group in groups]
    assert {group["weight_decay"] for group in groups} == {fit.decay}
    most = recipe.rate * fit.rate
    if recipe.family == "paper":
        assert rates == pytest.approx(np.repeat(most * 0.5 ** np.arange(4), 10))
    else:
        top = np.argmax(rates)
        assert rates[top] == pytest.approx(most, rel=0.05)
        assert 0 < top < 39
        assert (np.diff(rates) * np.where(np.arange(39) < top, 1, -1) > 0).all()
        assert rates[-1] < 0.01 * most


def test_weights_without_a_gradient_decay_by_their_rate_times_the_decay():
    part = torch.nn.Linear(3, 2)
    begun, descent = part.weight.detach().clone(), Descent([part], Fit(0.1, decay=2.0, clip=None), 4)
    rate = descent.adam.param_groups[0]["lr"]
    part.weight.grad = torch.zeros_like(part.weight)
    descent.take()
    assert torch.allclose(part.weight, begun * (1 - 2 * rate))
    assert rate > 0


@pytest.mark.parametrize(("head_dim", "share"), [(8, 1.0), (64, 1.0), (128, 0.5)])
def test_every_stage_takes_smaller_steps_for_wider_heads(monkeypatch, head_dim, share):
    rates = {}
    for module in (retention, layers, joint):

        class Seen(Descent):
            def __init__(self, parts, fit, steps, module=module):
                rates[module.__name__.rpartition(".")[2]] = fit.rate
                super().__init__(parts, fit, steps)

        monkeypatch.setattr(module, "Descent", Seen)
    model = make_model(head_dim=head_dim, num_hidden_layers=1).float()
    recipe = replace(RECIPE, rho=2, uses=4, joint_steps=2, rate=0.5)
    train(model, tokens(2, 40), tokens(2, 40), H2O(3, 3), recipe)
    wanted = dict(retention=0.5e-3, layers=0.5e-2, joint=0.25e-2)
    assert rates == {name: pytest.approx(share * rate) for name, rate in wanted.items()}


def test_training_that_diverges_is_refused(monkeypatch):
    own = layers.costs
    monkeypatch.setattr(layers, "costs", lambda *args: tuple(cost * torch.inf for cost in own(*args)))
    with pytest.raises(LessError, match="the training of layers diverged at step 0: lower the rate"):
        quick_training()


@EVERY_RECIPE
def test_a_model_whose_attention_is_not_finite_is_refused(recipe):
    model = make_model().float()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(LessError, match="attention of layer 0 is not finite"):
        train(model, tokens(2, 20), tokens(2, 20), POLICY, recipe)


def test_a_model_whose_predictions_are_not_finite_is_refused():
    model = make_model().float()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(LessError, match="predictions are not finite"):
        watch(model, tokens(2, 12), seed=0)


@EVERY_RECIPE
def test_a_layer_that_loses_nothing_is_refused(recipe):
    model = make_model().float()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    with pytest.raises(LessError, match="layer 1 loses nothing under the bare policy"):
        train(model, tokens(4, 30), tokens(2, 30, seed=1), POLICY, recipe)
