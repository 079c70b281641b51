"""Learned retention: what the policy's score is, what rho is trained towards, and how it is trained, measured and refused."""

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from both_paths import allocate, batch, extend, heads_of
from closeness import assert_close
from hypothesis import given
from models import make_kernels, make_model, recorded, tokens
from short_training import RECIPE, quick_training
from strategies import cases, fast_kernels, policies, slices

from less_fast import H2O, LayerState, LessError, LessKernels, Retention
from less_fast import extend as less_extend
from less_fast.demo import KERNELS, corpus
from less_fast.hf.architecture import sizes
from less_fast.layer.features import NoState, Rho
from less_fast.loading import load_model
from less_fast.measuring.compare import contenders
from less_fast.setting import Setting
from less_fast.text import windows
from less_fast.training import retention, train
from less_fast.training.joint import mean_divergence
from less_fast.training.recipe import Fit
from less_fast.training.retention import Seen, train_rho
from less_fast.training.work import Work

RHO = replace(RECIPE, rho=3, round=6, uses=5)


@given(cases(policy=policies("Retention")))
def test_a_score_is_what_rho_said_at_birth_and_the_attention_seen_since_fading_by_both_rates(case):
    """By the attention of what was held at each step, from the fast path's own slots."""
    state, qkv, seen = allocate(case), batch(case), {}
    q, k, _ = (x[0].numpy() for x in qkv)
    scale, G = case.layer.head_dim**-0.5 if case.scale is None else case.scale, case.layer.group
    rho, held = fast_kernels(None, case.layer, rho=case.rho).rho, [[] for _ in range(case.layer.kv_heads)]
    born = rho(qkv[0].unflatten(1, (case.layer.kv_heads, G)), *qkv[1:])[0].numpy()  # (Hkv, T, 4)
    for now in slices(case.chunks):
        for g in range(case.layer.kv_heads):
            for i in range(now.start, now.stop):
                visible = [*held[g], *range(now.start, i + 1)]
                weight = np.exp(scale * q[g * G : (g + 1) * G, i] @ k[g, visible].T)  # (G, E)
                attention = (weight / weight.sum(1, keepdims=True)).sum(0)
                for j, share in zip(visible, attention):
                    seen[g, j] = seen.get((g, j), np.zeros(2)) * [0.9, 0.99] + share
        extend(case, state, qkv, now)
        for g, head in enumerate(heads_of(state, 0)):
            held[g] = head.position.astype(int).tolist()
            assert_close(head.score[:, :4], born[g, held[g]])
            assert_close(head.score[:, 4:], np.array([seen[g, j] for j in held[g]]).reshape(-1, 2))


def test_rhos_of_some_heads_and_of_layers_together_say_what_each_says():
    torch.manual_seed(0)
    one, other = Rho(6, 3, 4, 5), Rho(6, 3, 4, 5)
    for weight in (*one.parameters(), *other.parameters()):
        torch.nn.init.normal_(weight)
    q, k, v = torch.randn(2, 6, 2, 7, 4), torch.randn(2, 6, 7, 4), torch.randn(2, 6, 7, 4)
    said = Rho.join([one, other])(q, k, v)
    assert_close(said[:, :3], one(q[:, :3], k[:, :3], v[:, :3]), 1e-6)  # float32
    assert_close(said[:, 3:], other(q[:, 3:], k[:, 3:], v[:, 3:]), 1e-6)
    alone = NoState(6, 3, 4)
    alone.rho = one
    some = alone.select_heads([2, 0]).rho
    assert_close(some(q[:, [2, 0]], k[:, [2, 0]], v[:, [2, 0]]), said[:, [2, 0]], 1e-6)


def test_rho_is_trained_towards_the_largest_attention_that_each_token_is_still_to_get():
    model, ids = make_model(), tokens(2, 9)
    parts = [retention.watch(model, ids[:1], seed=3), retention.watch(model, ids[1:], seed=4)]
    layers = [Seen.join(of_layer) for of_layer in zip(*parts)]
    for index, layer in enumerate(layers):
        q, k, _, scale = recorded(model, ids, index)
        for n, g in np.ndindex(2, k.shape[1]):
            logits = (q[n].unflatten(0, (k.shape[1], -1))[g] * (scale or q.shape[-1] ** -0.5) @ k[n, g].T).double()  # (G, T, T)
            attention = logits.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf).softmax(-1).sum(0).numpy()
            for m, t in enumerate(layer.moments[n].tolist()):
                assert 1 <= t <= 7
                coming = np.array([attention[t + 1 :, j].max() if j <= t else 0 for j in range(9)])
                assert_close(layer.share[n, g, m], coming / coming.sum(), 1e-6)
                for which, decay in enumerate((0.9, 0.99)):
                    seen = sum(decay ** (t - i) * attention[i] for i in range(t + 1))
                    assert_close(layer.seen[n, g, m, :, which], seen, 1e-6)
    assert sorted(layer.moments[0].tolist()) == [1, 2, 3, 4, 5, 6, 7]
    rho = make_kernels(model, rho=3).layers[index].rho
    worth = torch.full((2, k.shape[1], 7, 9), -torch.inf).double()
    for n, g, m in np.ndindex(2, k.shape[1], 7):
        t = int(layer.moments[n, m])
        said = rho(layer.q, layer.k, layer.v)[n, g, : t + 1]  # (t + 1, 4)
        age = torch.arange(t, -1, -1).double()
        logs = (layer.seen[n, g, m, : t + 1] + 1e-4).log()
        worth[n, g, m, : t + 1] = said[:, 0] - said[:, 1] * (1 + age).log() + (said[:, 2:] * logs).sum(1)
    expected = -(layer.share * worth.log_softmax(-1).clamp(min=-1e9)).sum(-1).mean()
    assert layer.cross_entropy(rho).item() == pytest.approx(expected.item(), rel=1e-6)


def test_training_brings_rho_nearer_to_its_aim_whether_it_was_killed_or_not(tmp_path, monkeypatch):
    whole = quick_training(recipe=RHO)
    figures = whole.about["rho"]
    assert all(least <= after + 1e-6 for least, after in zip(figures["least"], figures["after"]))
    assert sum(figures["after"]) < sum(figures["before"])

    class Killed(BaseException):
        pass

    def dies(*arguments):
        raise Killed

    steps, own = [], retention.Descent.take
    with monkeypatch.context() as patch:
        patch.setattr(retention.Descent, "take", lambda self: steps.append(0) or (own(self) if len(steps) < 14 else dies()))
        with pytest.raises(Killed):
            quick_training(tmp_path, RHO)
    resumed = quick_training(tmp_path, RHO)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.fixture
def rho_of_three_layers(tmp_path):
    """Trains rho of new kernels on windows that the batches do not divide: (windows that judge, kernels, train)."""
    model = make_model().float()
    kernels = LessKernels(**sizes(model), rank=2, hidden=3, rho=3)
    recipe, held_out = replace(RHO, round=5, uses=3), tokens(3, 30, seed=1)
    return held_out, kernels, lambda: train_rho(model, tokens(5, 30), held_out, kernels, recipe, Work(tmp_path, {}))


def test_the_gradient_of_each_layers_rho_is_clipped_to_one_by_itself(rho_of_three_layers, monkeypatch):
    """The losses of the layers are made so large that all, some or none of their gradients are too long."""
    _, kernels, train = rho_of_three_layers
    own, step, wanted, found = Seen.cross_entropy, torch.optim.AdamW.step, [], []
    factors = cycle([1e4, 1.0, 1e-2])

    def enlarged(layer, rho):
        if not torch.is_grad_enabled():
            return own(layer, rho)
        loss = own(layer, rho) * next(factors)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*rho.parameters()], retain_graph=True)])
        wanted.append(gradient / gradient.norm().clamp(min=1.0))
        return loss

    def look(adam):
        rhos = [layer.rho for layer in kernels.layers]
        found.extend(torch.cat([weight.grad.flatten() for weight in rho.parameters()]) for rho in rhos)
        return step(adam)

    monkeypatch.setattr(Seen, "cross_entropy", enlarged)
    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    train()
    assert len(found) == len(wanted) == 8 * 3
    assert [gradient.norm().item() for gradient in found[::3]] == pytest.approx([1.0] * 8, rel=1e-4)
    assert 0 < max(gradient.norm() for gradient in found[2::3]) < 1
    for got, gradient in zip(found, wanted):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-7)


def test_the_cross_entropies_of_rho_are_means_over_all_windows_and_moments(rho_of_three_layers, monkeypatch):
    """Before training rho says the same of every token."""
    held_out, kernels, train = rho_of_three_layers
    own, watched = retention.watch, []
    monkeypatch.setattr(retention, "watch", lambda *rest: watched.append((rest[1], own(*rest))) or watched[-1][1])
    figures = train()
    parts = [layers for ids, layers in watched[-3:]]
    assert torch.equal(torch.cat([ids for ids, _ in watched[-3:]]), held_out)
    for index in range(3):
        sums, least = {"before": [], "after": []}, []
        for layer in (layers[index] for layers in parts):
            q, k, v = layer.q, layer.k, layer.v
            with torch.no_grad():
                said = {"after": kernels.layers[index].rho(q, k, v).double(), "before": torch.tensor(Rho.START).double()}
            for n, g, m in np.ndindex(*layer.share.shape[:3]):
                t = int(layer.moments[n, m])
                share = layer.share[n, g, m, : t + 1].double()
                least.append(-(share * share.clamp(min=1e-300).log()).sum().item())
                for when, numbers in said.items():
                    a, b, *rest = (numbers if numbers.ndim == 1 else numbers[n, g, : t + 1]).unbind(-1)
                    age, logs = torch.arange(t, -1, -1).double(), (layer.seen[n, g, m, : t + 1].double() + 1e-4).log()
                    worth = a - b * (1 + age).log() + rest[0] * logs[:, 0] + rest[1] * logs[:, 1]
                    sums[when].append(-(share * worth.log_softmax(-1)).sum().item())
        assert len(least) == 3 * 2 * layer.moments.shape[1]
        for when, nats in (sums | {"least": least}).items():
            assert figures[when][index] == pytest.approx(np.mean(nats), rel=1e-4)


def test_a_rho_that_ends_farther_from_its_aim_than_it_began_is_what_it_began_as(monkeypatch):
    monkeypatch.setattr(retention, "RHO", Fit(4e1))
    harmed, still = (quick_training(recipe=replace(RHO, rate=rate)) for rate in (1.0, 0.0))
    figures = harmed.about["rho"]
    kept = [index for index in range(3) if figures["after"][index] == figures["before"][index]]
    assert kept
    for index in kept:
        for name, weight in still.layers[index].rho.state_dict().items():
            assert torch.equal(harmed.layers[index].rho.state_dict()[name], weight)


def test_training_that_goes_on_judges_rho_by_what_it_began_with():
    first = quick_training(recipe=RHO)
    second = quick_training(recipe=RHO, start=first)
    assert second.about["rho"]["before"] == pytest.approx(first.about["rho"]["after"], rel=1e-5)


def test_with_rho_the_stages_train_for_the_policy_and_for_retention_in_turns():
    kernels = quick_training(recipe=replace(RHO, joint_steps=2, curves=2))
    assert {*kernels.curves} == {"H2O", "Retention"}
    assert kernels.about["joint"]["budgets"] == [2, 2, 6, 6, 12, 12]
    assert kernels.about["tables"]["budgets"] == [6, 6, 12, 12]
    assert kernels.budgets_for(Retention(6, 0)) is not None


def test_kernels_go_on_where_others_ended_with_their_curves():
    start = quick_training(recipe=replace(RECIPE, curves=2))
    still = replace(RECIPE, rho=3, uses=0, joint_steps=0, curves=2)
    kernels = quick_training(recipe=still, start=start)
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, kernels.state_dict()[name]), name
    assert kernels.curves["H2O"] == start.curves["H2O"]
    assert kernels.curves["Retention"].policy.startswith("Retention")
    kept = quick_training(recipe=replace(still, rho=0, joint_steps=1), start=kernels)
    assert torch.equal(kept.layers[0].rho.r1, kernels.layers[0].rho.r1)
    for changes in ({"rank": 5}, {"rho": 2}):
        with pytest.raises(LessError, match=r"the kernels to go on with are .* and the recipe trains"):
            quick_training(recipe=replace(still, **changes), start=kernels)


def test_the_bare_policy_and_baseline_plus_choose_by_rho_and_fold_nothing():
    model = make_model().float()
    kernels = make_kernels(model, rho=3).float()
    measured = list(contenders(model, [Retention(6, 2)], {"ours": kernels}))
    assert [one.cache for one in measured] == ["full", "bare", "baseline+", "less"]
    _, bare, plus, less = (one.make(1) for one in measured)
    for cache in (bare, plus):
        assert cache.setting.kernels.sizes["family"] == "none"
        assert cache.setting.kernels.layers[0].rho is kernels.layers[0].rho
    held = []
    for cache in (bare, plus, less):
        model(tokens(1, 40), past_key_values=cache)
        held.append(cache.memory())
    assert held[0]["low_rank"] == held[1]["low_rank"] == 0 < held[2]["low_rank"]
    assert sum(held[0].values()) < sum(held[2].values()) <= sum(held[1].values())
    assert held[0]["entries"] == held[2]["entries"]


def test_retention_without_rho_is_refused(tmp_path):
    model = make_model().float()
    for kernels in (None, make_kernels(model).float()):
        with pytest.raises(LessError, match="asks rho of the kernels, and there is none"):
            Setting.of(sizes(model), range(3), Retention(6, 2), kernels)
    with pytest.raises(LessError, match="asks rho of the kernels"):
        LayerState.allocate(Retention(6, 2), 1, 2, 2, 4)
    with pytest.raises(LessError, match="Retention needs recent within the budget"):
        Retention(3, 4)
    with pytest.raises(LessError, match="needs rho: give the recipe a width of it"):
        train(model, tokens(10, 30), tokens(4, 30, seed=1), Retention(6, 1), RECIPE)


@torch.no_grad()
def test_on_the_embedded_model_shipped_rho_keeps_what_is_worth_more_than_what_h2o_keeps():
    model, tokenizer = load_model("")
    kernels = LessKernels.from_pretrained(KERNELS)
    held_out = windows(tokenizer, [text for _, text in corpus.documents("test")], 512, 2, 0)
    shape = Setting.of(sizes(model), range(4), H2O(13, 12), kernels, "uniform")
    h2o, learned = (
        mean_divergence(model, held_out, replace(shape, policy=rule).without_state()) for rule in (H2O(13, 12), Retention(25, 3))
    )
    assert learned < 0.75 * h2o


def test_what_early_queries_of_a_long_prompt_gave_has_faded_beneath_the_rounding(monkeypatch):
    """And it had not with a tenth of the queries."""
    torch.manual_seed(0)
    kernels = LessKernels(1, 2, 1, 4, rank=2, hidden=0, family="exponential", rho=2).layers[0]
    q, k, v = torch.randn(1, 2, 3400, 4), torch.randn(1, 1, 3400, 4), torch.randn(1, 1, 3400, 4)
    scores = {}
    for queries in (None, Retention.queries, Retention.queries // 10):
        monkeypatch.setattr(Retention, "queries", queries)
        state = LayerState.allocate(Retention(3390, 5), 1, 2, 1, 4, kernels)  # old tokens, too
        less_extend(state, q, k, v)
        scores[queries] = state.head(0, 0)["score"][:, 4:]
    every, enough, few = scores.values()
    torch.testing.assert_close(enough, every, atol=1e-9, rtol=1e-5)
    assert (few - every).abs().max() > 1e-3
