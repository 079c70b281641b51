"""Training in stages: what the joint stage minimises, and that a kill loses nothing."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from models import SIZES, make_kernels, make_model, tokens
from short_training import POLICY, RECIPE, quick_training
from short_training import setting_of as setting
from torch.nn.functional import kl_div
from transformers import DynamicCache

from less_fast import H2O, Lambda, LessCache, LessError, Retention
from less_fast.files import aside
from less_fast.training import joint, layers, stages, train, work
from less_fast.training.joint import distill, divergence
from less_fast.training.recipe import Fit

TABLES = replace(RECIPE, curves=2)


@pytest.fixture(scope="module")
def uninterrupted():
    return quick_training()


def assert_equal_weights(one, other):
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@torch.no_grad()
@pytest.mark.parametrize("family", [None, "paper", "exponential"])
@pytest.mark.parametrize("policy", [H2O(3, 2), Lambda(1, 3)])
def test_the_joint_stage_minimises_the_divergence_from_the_full_cache_to_the_streaming_one(policy, family):
    model, ids = make_model(), tokens(2, 25)
    kernels = family and make_kernels(model, family=family)
    full = model(ids, past_key_values=DynamicCache(config=model.config)).logits.log_softmax(-1)
    ours = model(ids, past_key_values=LessCache.for_model(model, policy, kernels, chunk=1)).logits.log_softmax(-1)
    wanted = kl_div(ours, full, log_target=True, reduction="sum").item() / ids.numel()
    assert wanted > 1e-4
    assert divergence(model, ids, setting(model, policy, kernels)).item() == pytest.approx(wanted, rel=1e-5)


def test_a_joint_step_on_texts_one_by_one_has_the_gradients_of_all_together():
    model, ids, found = make_model().float(), tokens(3, 25), []
    for step in (joint.step_of_all, lambda *three: (loss := divergence(*three)).backward() or loss.item()):
        kernels = make_kernels(model, family="exponential").float().requires_grad_()
        loss = step(model, ids, setting(model, H2O(3, 2), kernels))
        found.append([torch.tensor(loss), *(weight.grad for weight in kernels.parameters() if weight.grad is not None)])
    assert len(found[0]) > 5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_joint_stage_reduces_the_divergence_that_it_reports(uninterrupted):
    model, held_out = make_model().float(), tokens(4, 30, seed=1)
    figures = uninterrupted.about["joint"]
    assert figures["budgets"] == [2, 6, 12]
    assert figures["kept"]
    assert sum(figures["after"]) < sum(figures["before"])
    layers_alone = quick_training(recipe=replace(RECIPE, joint_steps=0))
    for when, kernels in (("before", layers_alone), ("after", uninterrupted)):
        settings = [setting(model, POLICY.with_budget(budget), kernels) for budget in figures["budgets"]]
        assert [divergence(model, held_out, one).item() for one in settings] == pytest.approx(figures[when], rel=1e-4)


def test_the_stage_under_tables_judges_by_the_tables_of_its_own_curves(monkeypatch):
    seen, own = [], stages.distill
    monkeypatch.setattr(stages, "distill", lambda *arguments: seen.append(arguments[4:6]) or own(*arguments))
    kernels = quick_training(recipe=TABLES)
    (uniform, judged_uniform), (turns, judged) = seen
    assert uniform == judged_uniform
    assert [(one.policy, one.budgets, one.kernels) for one in uniform] == [
        (policy, None, kernels) for policy in (H2O(1, 1), POLICY, H2O(6, 6))
    ]
    assert [one.budgets for one in judged] == [kernels.budgets_for(policy) for policy in (POLICY, H2O(6, 6))]  # curves begin at 4
    assert turns == [judged[0], uniform[1], judged[1], uniform[2]]
    assert kernels.about["tables"]["budgets"] == [6, 12]
    after = [divergence(make_model().float(), tokens(4, 30, seed=1), one).item() for one in judged]
    assert after == pytest.approx(kernels.about["tables"]["after"], rel=1e-4)
    assert kernels.about["tables"]["kept"]


def test_every_step_takes_other_windows_and_the_next_budget(monkeypatch):
    seen, own = [], joint.step_of_all

    def look(model, ids, setting):
        seen.append((ids.tolist(), setting.policy))
        return own(model, ids, setting)

    monkeypatch.setattr(joint, "step_of_all", look)
    windows = tokens(30, 30)
    train(make_model().float(), windows, tokens(4, 30, seed=1), POLICY, RECIPE)
    taken = [row for ids, _ in seen for row in ids]
    assert len(taken) == len({*map(tuple, taken)}) == 24
    assert {*map(tuple, taken)} < {*map(tuple, windows.tolist())}
    assert [rule for _, rule in seen] == [H2O(1, 1), POLICY, H2O(6, 6)] * 4


def test_budgets_below_every_table_leave_the_stage_under_tables_out():
    assert "tables" not in quick_training(recipe=replace(TABLES, budgets=(0.4,))).about


def test_a_joint_stage_that_only_harms_is_undone(monkeypatch):
    monkeypatch.setattr(joint, "JOINT", Fit(30.0))
    harmed = quick_training()
    assert not harmed.about["joint"]["kept"]
    assert_equal_weights(harmed, quick_training(recipe=replace(RECIPE, joint_steps=0)))


def test_a_joint_stage_that_only_harms_is_undone_even_after_a_kill(tmp_path, monkeypatch):
    own, steps = joint.step_of_all, []
    monkeypatch.setattr(joint, "JOINT", Fit(30.0))

    def dies(*arguments):
        steps.append(1)
        if len(steps) > 11:  # the checkpoint after ten steps is written
            raise Killed
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(joint, "step_of_all", dies)
        with pytest.raises(Killed):
            quick_training(tmp_path)
    harmed = quick_training(tmp_path)
    assert not harmed.about["joint"]["kept"]
    assert_equal_weights(harmed, quick_training(recipe=replace(RECIPE, joint_steps=0)))


class Killed(BaseException):
    pass


def kill_at(patch, count):
    """From now on training is killed when it would complete the next file after `count` of them. Returns those completed."""
    done = []

    @contextmanager
    def dying(path):
        with aside(path) as temporary:
            yield temporary
            if len(done) == count:
                raise Killed
            done.append(path)

    patch.setattr(work, "aside", dying)
    return done


def test_a_training_that_is_killed_again_and_again_ends_in_the_same_weights(tmp_path, monkeypatch):
    """Whenever it has written one more file, or some more: between them these leave no file out."""
    recipe = replace(TABLES, rho=2, budgets=(1.0,))
    with pytest.MonkeyPatch.context() as patch:
        done = kill_at(patch, None)
        whole = quick_training(tmp_path / "whole", recipe)
    assert {"plan", "rho", "layers", "joint", "curves-h2o-1", "tables"} < {path.name for path in done}
    assert_equal_weights(whole, quick_training(recipe=recipe))
    for every in (1, 4):
        folder, kills = tmp_path / str(every), 0
        while kills < 2 * len(done):
            with pytest.MonkeyPatch.context() as patch:
                kill_at(patch, every)
                try:
                    resumed = quick_training(folder, recipe)
                    break
                except Killed:
                    kills += 1
        assert kills >= len(done) // every - 1
        assert [name for name in resumed.about if "seconds" in name] == ["seconds_since_resumed"]
        assert_equal_weights(resumed, whole)
        assert resumed.curves == whole.curves
        assert resumed.about["joint"] == whole.about["joint"]
        assert resumed.about["tables"] == whole.about["tables"]


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    quick_training(tmp_path, TABLES)
    for module, name in ((joint, "divergence"), (layers, "watch"), (stages, "measure"), (stages, "plan")):
        monkeypatch.setattr(module, name, lambda *arguments, **more: pytest.fail("computed again"))
    assert_equal_weights(*(quick_training(tmp_path, TABLES) for _ in range(2)))


@pytest.mark.parametrize("family", ["paper", "exponential"])
def test_training_neither_heeds_nor_moves_the_callers_random_generator(family, tmp_path):
    """Through every stage, and with what a probe measures or without."""
    recipe = replace(TABLES, family=family, rho=2, uses=6, joint_steps=2, budgets=(1.0,))
    windows, found = tokens(2, 20), []  # which judge, too, so that rho learns in a few steps
    for seed, folder, hours in ((0, None, 1.0), (1, tmp_path, None)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = make_model(num_hidden_layers=2).float()  # it has a seed of its own
        torch.set_rng_state(before)
        found.append(train(model, windows, windows, Retention(6, 1), recipe, folder, hours=hours))
        assert torch.equal(torch.get_rng_state(), before)
    assert {"rho", "layers", "joint", "tables"} <= {*found[0].about}
    assert_equal_weights(*found)


def test_an_order_names_everything_that_the_weights_depend_on(tmp_path):
    quick_training(tmp_path)
    order = json.loads((tmp_path / "order.json").read_text())
    assert set(order) == {"identity", "policy", "window", "windows", "recipe", "text", "hours", "dtype", "start", "format"}
    assert len(order["identity"]["layers"]) == SIZES["num_hidden_layers"]
    with pytest.raises(ValueError, match="with another text"):
        train(make_model().float(), tokens(10, 30, seed=5), tokens(4, 30, seed=1), POLICY, RECIPE, tmp_path)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_works_and_is_the_same_where_gradients_are_off(mode, uninterrupted):
    model = make_model().float()
    with mode():
        kernels = train(model, tokens(10, 30), tokens(4, 30, seed=1), POLICY, RECIPE)
    assert_equal_weights(kernels, uninterrupted)


def test_a_model_in_float64_is_trained_through_all_stages_and_its_kernels_are_float32():
    kernels = train(make_model(), tokens(10, 30), tokens(4, 30, seed=1), POLICY, TABLES)
    assert {weight.dtype for weight in kernels.state_dict().values()} == {torch.float32}
    assert kernels.about["joint"]["kept"]
    assert kernels.about["tables"]["kept"]


def test_budgets_with_which_nothing_is_evicted_are_left_out():
    kernels = quick_training(recipe=replace(RECIPE, budgets=(1.0, 4.7, 4.84, 5.0)))
    for stage in ("layers", "joint"):
        assert kernels.about[stage]["budgets"] == [6, 28]  # 29 evict one of 30 tokens after the last query


def test_the_gradient_of_the_joint_stage_is_cut_to_its_largest_over_all_layers(monkeypatch, tmp_path):
    model, norms, step = make_model(num_hidden_layers=2).float(), [], torch.optim.AdamW.step
    kernels = make_kernels(model, family="exponential").float()

    def look(adam):
        norms.append(torch.cat([weight.grad.flatten() for weight in kernels.parameters()]).norm().item())
        return step(adam)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    monkeypatch.setattr(joint, "JOINT", joint.JOINT._replace(clip=1e-5))
    settings = [setting(model, policy, kernels) for policy in (POLICY, Lambda(1, 3))]
    recipe = replace(RECIPE, joint_steps=3)
    distill("joint", model, tokens(5, 20), tokens(1, 20), settings, settings[:1], recipe, work.Work(tmp_path, {}))
    assert norms == pytest.approx([1e-5] * 3, rel=1e-2)


def test_a_joint_stage_that_diverges_is_refused(monkeypatch):
    own = joint.divergence
    monkeypatch.setattr(joint, "divergence", lambda *arguments: own(*arguments) * torch.nan)
    with pytest.raises(LessError, match="the training of joint diverged at step 0: lower the rate"):
        quick_training()
