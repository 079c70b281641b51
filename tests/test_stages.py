"""Training in stages: what the joint stage minimises, that a kill loses nothing, that processes share the work."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import SIZES, make_kernels, make_model, tokens
from short_training import POLICY, RECIPE, quick_training
from torch.nn.functional import kl_div
from transformers import DynamicCache

import less_fast.training.layers as train_module
from less_fast import H2O, Lambda, LessCache
from less_fast.hf.architecture import sizes
from less_fast.training.head_costs import divergence
from less_fast.training.layers import RECIPES, Work, train
from less_fast.training.recording import Recording, bytes_on_disk


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
    assert divergence(model, ids, policy, kernels).item() == pytest.approx(wanted, rel=1e-5)


def test_the_joint_stage_reduces_the_divergence_that_it_reports(uninterrupted):
    model, held_out = make_model().float(), tokens(4, 30, seed=1)
    joint = uninterrupted.about["joint"]
    assert joint["budgets"] == [2, 6, 12]
    assert joint["kept"]
    assert sum(joint["after"]) < sum(joint["before"])
    with torch.no_grad():
        found = [divergence(model, held_out, POLICY.with_budget(budget), uninterrupted).item() for budget in joint["budgets"]]
    assert found == pytest.approx(joint["after"], rel=1e-4)
    layers_alone = quick_training(recipe=replace(RECIPE, joint_steps=0))
    with torch.no_grad():
        found = [divergence(model, held_out, POLICY.with_budget(budget), layers_alone).item() for budget in joint["budgets"]]
    assert found == pytest.approx(joint["before"], rel=1e-4)


@torch.no_grad()
def test_the_stage_under_tables_judges_by_the_tables_of_its_own_curves(monkeypatch):
    seen, own = [], train_module._distill
    monkeypatch.setattr(train_module, "_distill", lambda *given: seen.append(given[5:7]) or own(*given))
    with torch.enable_grad():
        kernels = quick_training(curves=True)
    (rules, uniform), (tables, judged) = seen
    assert rules == uniform == [H2O(1, 1), POLICY, H2O(6, 6)]
    assert judged == [
        [[POLICY.with_budget(budget) for budget in row] for row in kernels.budgets_for(rule)] for rule in uniform[1:]
    ]  # two tokens for each head are fewer than the least of the curves
    assert tables == [judged[0], uniform[1], judged[1], uniform[2]]
    assert kernels.about["tables"]["budgets"] == [6, 12]
    found = [divergence(make_model().float(), tokens(4, 30, seed=1), table, kernels).item() for table in judged]
    assert found == pytest.approx(kernels.about["tables"]["after"], rel=1e-4)
    assert kernels.about["tables"]["kept"]


def test_every_step_takes_other_windows_and_the_next_budget(monkeypatch):
    seen, own = [], train_module.divergence

    def look(model, ids, policy, kernels):
        if torch.is_grad_enabled():
            seen.append((ids.tolist(), policy))
        return own(model, ids, policy, kernels)

    monkeypatch.setattr(train_module, "divergence", look)
    windows = tokens(30, 30)
    recipe = replace(RECIPE, joint_steps=12)
    train(make_model().float(), windows, tokens(4, 30, seed=1), POLICY, recipe)
    taken = [row for ids, _ in seen for row in ids]
    assert len(taken) == len({*map(tuple, taken)}) == 24
    assert {*map(tuple, taken)} < {*map(tuple, windows.tolist())}
    assert [rule for _, rule in seen] == [H2O(1, 1), POLICY, H2O(6, 6)] * 4


def test_budgets_below_every_table_leave_the_stage_under_tables_out():
    few = replace(RECIPE, joint_budgets=(0.4,))
    assert "tables" not in quick_training(recipe=few, curves=True).about


def test_a_joint_stage_that_only_harms_is_undone():
    harmed = quick_training(recipe=replace(RECIPE, joint_rate=30.0, clip=None))
    assert not harmed.about["joint"]["kept"]
    assert_equal_weights(harmed, quick_training(recipe=replace(RECIPE, joint_steps=0)))


def test_a_joint_stage_that_only_harms_is_undone_even_after_a_kill(tmp_path, monkeypatch):
    wild, own, steps = replace(RECIPE, joint_rate=30.0, clip=None), train_module.divergence, []

    def dies(*given):
        steps.append(torch.is_grad_enabled())
        if sum(steps) > 11:  # the checkpoint after ten steps is written
            raise Killed
        return own(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "divergence", dies)
        with pytest.raises(Killed):
            quick_training(tmp_path, wild)
    harmed = quick_training(tmp_path, wild)
    assert not harmed.about["joint"]["kept"]
    assert_equal_weights(harmed, quick_training(recipe=replace(RECIPE, joint_steps=0)))


class Killed(BaseException):
    pass


def kill_at(patch, count):
    """From now on the `count`-th file that training completes is its last."""
    left = iter(range(count))

    def rename(file, target, own=Path.rename):
        if next(left, None) is None:
            raise Killed
        return own(file, target)

    patch.setattr(Path, "rename", rename)


def files_of_a_training(tmp_path):
    """How many files a training completes."""
    done = []
    with pytest.MonkeyPatch.context() as patch:
        own = Path.rename
        patch.setattr(Path, "rename", lambda file, target: done.append(target) or own(file, target))
        quick_training(tmp_path / "counted", disk=0, curves=True)
    return len(done)


def test_a_training_that_is_killed_again_and_again_ends_in_the_same_weights(tmp_path):
    """Three times, after as many files each time, for numbers of files from few to almost all."""
    total, whole = files_of_a_training(tmp_path), quick_training(curves=True)
    assert total > 15
    for every in range(1, total, 4):
        folder, kills = tmp_path / str(every), 0
        while True:
            with pytest.MonkeyPatch.context() as patch:
                kill_at(patch, every) if kills < 3 else None
                try:
                    found = quick_training(folder, disk=0, curves=True)
                    break
                except Killed:
                    kills += 1
        assert kills > 0
        assert [name for name in found.about if "seconds" in name] == ["seconds_since_resumed"]
        assert_equal_weights(found, whole)
        assert found.curves == whole.curves
        assert found.about["joint"] == whole.about["joint"]
        assert found.about["tables"] == whole.about["tables"]


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    quick_training(tmp_path)
    for name in ("divergence", "_train_layer"):
        monkeypatch.setattr(train_module, name, lambda *given, **more: pytest.fail("computed again"))
    monkeypatch.setattr(Recording, "record", lambda *given: pytest.fail("recorded again"))
    assert_equal_weights(quick_training(tmp_path), quick_training(tmp_path))


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


def test_little_disk_gives_the_same_kernels(uninterrupted, tmp_path):
    assert_equal_weights(quick_training(tmp_path, disk=1), uninterrupted)


def test_work_on_another_order_is_refused_and_left_as_it_is(tmp_path):
    Work(tmp_path, {"recipe": 1, "text": "a"})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="an unfinished training with another recipe, window: go on with the options"):
        Work(tmp_path, {"recipe": 2, "text": "a", "window": 3})
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    Work(tmp_path, {"recipe": 1, "text": "a"})


PROCESS = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from pathlib import Path
from short_training import quick_training
kernels = quick_training(Path({folder!r}), disk=1.5e5)
assert (kernels is None) == (torch.distributed.get_rank() > 0)
if kernels:
    kernels.save_pretrained({folder!r} + "/kernels")
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_torchrun_give_the_kernels_of_one(tmp_path):
    from less_fast import LessKernels

    program = tmp_path / "program.py"
    program.write_text(PROCESS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = quick_training()
    finally:
        torch.set_num_threads(threads)
    assert_equal_weights(LessKernels.from_pretrained(tmp_path / "kernels"), alone)


def test_a_recipe_that_cannot_be_leaves_no_work_behind(tmp_path):
    with pytest.raises(ValueError, match="the hidden width of kernels must be"):
        quick_training(tmp_path / "work", replace(RECIPES["paper"], hidden=0))
    assert not (tmp_path / "work").exists()


def test_an_order_names_everything_that_the_weights_depend_on(tmp_path):
    quick_training(tmp_path)
    order = json.loads((tmp_path / "order.json").read_text())
    assert set(order) == {"fingerprint", "policy", "window", "sequences", "recipe", "text", "curves"}
    assert len(order["fingerprint"]) == SIZES["num_hidden_layers"] == sizes(make_model())["layers"]
    with pytest.raises(ValueError, match="with another text"):
        train(make_model().float(), tokens(10, 30, seed=5), tokens(4, 30, seed=1), POLICY, RECIPE, tmp_path)
