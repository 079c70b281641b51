"""Training in stages: what the joint stage minimises, that a kill loses nothing, that processes share the work."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from models import SIZES, make_kernels, make_model, tokens
from short_training import POLICY, RECIPE, quick_training
from torch.nn.functional import kl_div
from transformers import DynamicCache

from less_fast import H2O, Lambda, LessCache, LessError, LessKernels, Retention
from less_fast.files import aside
from less_fast.hf.architecture import sizes
from less_fast.setting import Setting
from less_fast.training import joint, layers, recording, stages, train, work
from less_fast.training.joint import distill, divergence
from less_fast.training.recording import Recording, bytes_on_disk


def setting(model, policy, kernels=None, budgets="uniform"):
    return Setting.of(sizes(model), range(3), policy, kernels, budgets)


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
    kernels = quick_training(curves=True)
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
    seen, own = [], joint.divergence

    def look(model, ids, setting):
        if torch.is_grad_enabled():
            seen.append((ids.tolist(), setting.policy))
        return own(model, ids, setting)

    monkeypatch.setattr(joint, "divergence", look)
    windows = tokens(30, 30)
    recipe = replace(RECIPE, joint_steps=12)
    train(make_model().float(), windows, tokens(4, 30, seed=1), POLICY, recipe)
    taken = [row for ids, _ in seen for row in ids]
    assert len(taken) == len({*map(tuple, taken)}) == 24
    assert {*map(tuple, taken)} < {*map(tuple, windows.tolist())}
    assert [rule for _, rule in seen] == [H2O(1, 1), POLICY, H2O(6, 6)] * 4


@pytest.mark.parametrize("clip", [None, 1e-5])
def test_steps_of_the_joint_stage_follow_the_gradient_cut_to_the_recipes_largest(clip, monkeypatch, tmp_path):
    model, taken, take, step = make_model(num_hidden_layers=2).float(), [], joint.Descent.take, torch.optim.Adam.step
    kernels = make_kernels(model, family="exponential").float()

    def gradient():
        return torch.cat([weight.grad.flatten() for weight in kernels.parameters()])

    monkeypatch.setattr(joint.Descent, "take", lambda descent: taken.append([gradient()]) or take(descent))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: taken[-1].append(gradient()) or step(adam))
    settings = [Setting.of(sizes(model), range(2), policy, kernels, "uniform") for policy in (POLICY, Lambda(1, 3))]
    recipe = replace(RECIPE, clip=clip)
    distill("joint", model, tokens(5, 20), tokens(1, 20), settings, settings[:1], 3, recipe, work.Work(tmp_path, {}))
    assert len(taken) == 3
    for raw, used in taken:
        assert raw.norm() > 2e-5
        torch.testing.assert_close(used, raw * min(1.0, (clip or torch.inf) / raw.norm().item()), rtol=1e-2, atol=0)


def test_budgets_below_every_table_leave_the_stage_under_tables_out():
    few = replace(RECIPE, joint_budgets=(0.4,))
    assert "tables" not in quick_training(recipe=few, curves=True).about


def test_a_joint_stage_that_only_harms_is_undone():
    harmed = quick_training(recipe=replace(RECIPE, joint_rate=30.0, clip=None))
    assert not harmed.about["joint"]["kept"]
    assert_equal_weights(harmed, quick_training(recipe=replace(RECIPE, joint_steps=0)))


def test_a_joint_stage_that_only_harms_is_undone_even_after_a_kill(tmp_path, monkeypatch):
    wild, own, steps = replace(RECIPE, joint_rate=30.0, clip=None), joint.divergence, []

    def dies(*arguments):
        steps.append(torch.is_grad_enabled())
        if sum(steps) > 11:  # the checkpoint after ten steps is written
            raise Killed
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(joint, "divergence", dies)
        with pytest.raises(Killed):
            quick_training(tmp_path, wild)
    harmed = quick_training(tmp_path, wild)
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

    for module in (work, recording):
        patch.setattr(module, "aside", dying)
    return done


def test_a_training_that_is_killed_again_and_again_ends_in_the_same_weights(tmp_path, monkeypatch):
    """Whenever it has written one more file, or some more: between them these leave no file out."""
    monkeypatch.setattr(stages, "CURVE_WINDOWS", 2)
    with pytest.MonkeyPatch.context() as patch:
        done = kill_at(patch, None)
        whole = quick_training(tmp_path / "whole", disk=1, curves=True)
    assert {"layer-002", "joint", "curves-h2o-1", "tables"} < {path.name for path in done}
    assert_equal_weights(whole, quick_training(curves=True))
    for every in (1, 8):
        folder, kills = tmp_path / str(every), 0
        while kills < 2 * len(done):
            with pytest.MonkeyPatch.context() as patch:
                kill_at(patch, every)
                try:
                    resumed = quick_training(folder, disk=1, curves=True)
                    break
                except Killed:
                    kills += 1
        assert kills >= len(done) // every - 1 > -1
        assert [name for name in resumed.about if "seconds" in name] == ["seconds_since_resumed"]
        assert_equal_weights(resumed, whole)
        assert resumed.curves == whole.curves
        assert resumed.about["joint"] == whole.about["joint"]
        assert resumed.about["tables"] == whole.about["tables"]


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    quick_training(tmp_path, curves=True)
    for module, name in ((joint, "divergence"), (layers, "_train_layer"), (stages, "measure"), (Recording, "record")):
        monkeypatch.setattr(module, name, lambda *arguments, **more: pytest.fail("computed again"))
    assert_equal_weights(*(quick_training(tmp_path, curves=True) for _ in range(2)))


def test_recordings_are_of_the_size_that_is_said_and_gone_when_their_layer_is_done(tmp_path, monkeypatch):
    model, windows, seen = make_model().float(), tokens(10, 30), []
    forget = Recording.forget

    def look(recording, layer):
        seen.append(sum(file.stat().st_size for file in recording.folder.glob(f"layer-{layer:03}*")))
        forget(recording, layer)

    monkeypatch.setattr(Recording, "forget", look)
    quick_training(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    said = [bytes_on_disk(model, part, POLICY, 1) for part in (windows[:6], tokens(4, 30))]
    assert seen == pytest.approx(said * 3, rel=0.1)


def test_recordings_that_a_kill_left_behind_are_gone_in_the_end(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        done = kill_at(patch, None)
        patch.setattr(Recording, "forget", lambda *_: (_ for _ in ()).throw(Killed))  # all layers are done, no recording is gone
        with pytest.raises(Killed):
            quick_training(tmp_path)
    assert done[-1].name == "layer-002"
    half = tmp_path / "train" / ".layer-001-shard-00000.0123abcd.safetensors"
    half.write_bytes(b"half")
    quick_training(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_recordings_take_no_more_disk_than_they_may(tmp_path, monkeypatch):
    each = bytes_on_disk(make_model().float(), tokens(10, 30), POLICY, 1)  # six windows and four for validation
    seen, own = [], layers._train_layer

    def look(*arguments):
        seen.append(sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")))
        own(*arguments)

    monkeypatch.setattr(layers, "_train_layer", look)
    quick_training(tmp_path, disk=2.5 * each)
    assert seen == pytest.approx([2 * each, 2 * each, each], rel=0.1)


def test_little_disk_gives_the_same_kernels(uninterrupted, tmp_path):
    assert_equal_weights(quick_training(tmp_path, disk=1), uninterrupted)


PROCESS = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from pathlib import Path
from short_training import quick_training
from dataclasses import replace
from short_training import RECIPE
from less_fast import H2O, Retention
for name, policy, rho in {trainings}:
    recipe = replace(RECIPE, rho_steps=rho, rho_rate=0.01, windows=10)
    kernels = quick_training(Path({folder!r}, name), recipe, policy, disk=1.5e5)
    assert (kernels is None) == (torch.distributed.get_rank() > 0)
    if kernels:
        kernels.save_pretrained(Path({folder!r}, "kernels-" + name))
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_torchrun_give_the_kernels_of_one(tmp_path):
    trainings = [("h2o", POLICY, 0), ("retention", Retention(6, 1), 12)]
    program = tmp_path / "program.py"
    program.write_text(PROCESS.format(paths=sys.path, folder=str(tmp_path), trainings=trainings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, policy, rho in trainings:
        alone = quick_training(recipe=replace(RECIPE, rho_steps=rho, rho_rate=0.01, windows=10), policy=policy)
        assert_equal_weights(LessKernels.from_pretrained(tmp_path / f"kernels-{name}"), alone)


@pytest.mark.parametrize("together", [0, 2], ids=["each layer alone", "all layers at once"])
def test_training_neither_heeds_nor_moves_the_callers_random_generator(together, tmp_path):
    """Told what it will take or not, through every stage: rho, layers with dropout, the joint stage, curves and their tables."""
    recipe = replace(RECIPE, family="paper", dropout=0.3, epochs=1 - together // 2, together_steps=together, joint_budgets=(1.0,))
    recipe = replace(recipe, joint_steps=2, table_steps=2, rho_steps=6, rho_hidden=2, rho_rate=0.02, together_windows=4)
    windows, found = tokens(2, 20), []  # which judge, too, so that rho learns in a few steps
    for seed, folder, tell in ((0, None, str), (1, tmp_path, None)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = make_model(num_hidden_layers=2).float()  # it has a seed of its own
        torch.set_rng_state(before)
        found.append(train(model, windows, windows, Retention(6, 1), recipe, folder, curves=True, tell=tell))
        assert torch.equal(torch.get_rng_state(), before)
    assert {"rho", "together" if together else "validation", "joint", "tables"} <= {*found[0].about}
    assert_equal_weights(*found)


def test_an_order_names_everything_that_the_weights_depend_on(tmp_path):
    quick_training(tmp_path)
    order = json.loads((tmp_path / "order.json").read_text())
    assert set(order) == {"identity", "policy", "window", "sequences", "recipe", "text", "curves", "dtype", "start", "format"}
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
    kernels = train(make_model(), tokens(10, 30), tokens(4, 30, seed=1), POLICY, RECIPE, curves=True)
    assert {weight.dtype for weight in kernels.state_dict().values()} == {torch.float32}
    assert kernels.about["joint"]["kept"]
    assert kernels.about["tables"]["kept"]


def test_budgets_with_which_nothing_is_evicted_are_left_out_of_the_joint_stage():
    kernels = quick_training(recipe=replace(RECIPE, joint_budgets=(1.0, 4.7, 4.84, 5.0)))
    assert kernels.about["joint"]["budgets"] == [6, 28]  # 29 evict one of 30 tokens after the last query


def test_training_that_diverges_is_refused(monkeypatch):
    for module, name, message in ((layers, "loss", "training layer 0 diverged"), (joint, "divergence", "diverged at step 0")):
        own = getattr(module, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *arguments, own=own: own(*arguments) * torch.nan)
            with pytest.raises(LessError, match=f"{message}.*lower"):
                quick_training()
