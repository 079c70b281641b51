"""What a training is said to take, before it begins."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import make_kernels, make_model, tokens
from short_training import POLICY, RECIPE, quick_training

from less_fast.training import costs, head_costs, stages
from less_fast.training.costs import Costs
from less_fast.training.recording import bytes_on_disk

READING, STEP = 3.0, 0.25  # seconds of a clock that only the stages move
RHO = replace(RECIPE, rho_steps=40, rho_hidden=3, together_windows=4, together_uses=3)  # 6 steps of 2 windows in a round
AT_ONCE = replace(RHO, epochs=0, together_steps=9, joint_steps=0, table_steps=0)


@pytest.fixture
def clock(monkeypatch):
    """Stages that take so long for each window and each step, and compute nothing."""
    now = [0.0]

    def takes(windows, steps):
        now[0] += READING * windows + STEP * steps

    def rho(model, windows, validation, kernels, recipe, work):
        takes(
            -(-recipe.rho_steps * recipe.batch // (len(windows) * recipe.together_uses)) * len(windows) + len(validation),
            recipe.rho_steps,
        )

    def layers(kernels, model, windows, validation, policy, recipe, work, disk):
        takes(len(windows) + len(validation), recipe.epochs * -(-len(windows) // recipe.batch))

    def together(model, windows, validation, settings, recipe, work):
        takes(len(windows) + len(validation) * len(settings), recipe.together_steps)

    def joint(name, model, windows, validation, settings, judged, steps, recipe, work):
        takes(2 * len(settings) * len(validation), steps)

    def whole(model, windows, attention):  # what curves by kl are made of
        takes(len(windows), 0)

    def by_the_gradient(model, windows, policy, kernels, budgets, by):
        assert by == "gradient"
        takes(len(windows) * len(budgets), 0)

    stages_of = dict(train_rho=rho, train_layers=layers, train_together=together, distill=joint)
    for name, stage in (stages_of | dict(predictions=whole, measure=by_the_gradient)).items():
        monkeypatch.setattr(costs, name, stage)
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now[0]))


class Told(BaseException):
    pass


def told(recipe, **more):
    """What 10 windows, of which 4 more judge, are said to take; nothing is trained."""

    def stop(said):
        raise Told(said)

    with pytest.raises(Told) as stopped:
        quick_training(recipe=recipe, tell=stop, **more)
    return stopped.value.args[0]


def test_a_stage_takes_what_its_windows_and_its_steps_do(clock):
    said = told(replace(RHO, epochs=3, joint_steps=5))
    assert said.seconds == {
        "rho": pytest.approx(READING * (7 * 4 + 4) + STEP * 40),  # seven rounds of four windows
        "layers": pytest.approx(READING * (6 + 4) + STEP * 3 * 4),  # its four windows judge each epoch, of three steps
        "joint": pytest.approx(READING * 2 * 6 * 4 + STEP * (5 + RHO.table_steps)),  # three budgets, with two policies
    }
    assert told(AT_ONCE).seconds["all layers at once"] == pytest.approx(READING * (2 * 4 + 4 * 6) + STEP * 9)


def test_curves_take_what_the_passes_do_that_they_are_made_of(clock, monkeypatch):
    """A window is read whole, and then at each budget that evicts: with each head compressed, with kernels and without."""
    passes, own = [], head_costs.predictions
    monkeypatch.setattr(head_costs, "predictions", lambda *rest: passes.append(rest) or own(*rest))
    model = make_model().float()
    head_costs.measure(model, tokens(1, 30), POLICY, make_kernels(model).float())
    assert len(passes) == 1 + 3 * 3 * 2 * 2  # three budgets of 4, 8, 16 and the whole window, three layers, two KV heads
    for recipe, policies in ((RECIPE, 1), (replace(RHO, joint_steps=0, table_steps=0), 2)):
        said = told(recipe, curves=True).seconds["curves"]
        assert said == pytest.approx(READING * len(passes) * 8 * policies)  # eight windows of ten
    said = told(AT_ONCE, curves=True).seconds["curves"]
    assert said == pytest.approx(READING * 3 * 8 * 2)  # by the gradient, one pass at each budget that evicts


def test_all_stages_have_costs_that_are_told_once_and_change_no_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CURVE_WINDOWS", 1)
    recipe, said = replace(RHO, joint_steps=2, table_steps=2, joint_budgets=(1.0,)), []
    kernels = quick_training(tmp_path, recipe, curves=True, tell=said.append)
    again = quick_training(tmp_path, recipe, curves=True, tell=said.append)  # what is done is done
    (one,) = said
    assert [*one.seconds] == ["rho", "layers", "joint", "curves"]
    assert all(seconds > 0 for seconds in one.seconds.values())
    untold = quick_training(recipe=recipe, curves=True)
    for name, weight in kernels.state_dict().items():
        assert torch.equal(weight, untold.state_dict()[name]), name
        assert torch.equal(weight, again.state_dict()[name]), name
    assert kernels.curves == untold.curves


@pytest.mark.parametrize(("disk", "layers"), [(1e9, 3), (1.0, 1)])
def test_as_many_layers_lie_on_disk_as_may_and_at_least_one(clock, disk, layers):
    recorded = bytes_on_disk(make_model(), tokens(6 + 4, 30), POLICY, layers)
    assert told(RECIPE, disk=disk).disk == recorded
    assert told(AT_ONCE, disk=disk).disk == 0


def test_a_longer_round_takes_more_memory_and_is_said_to(clock, monkeypatch):
    monkeypatch.setattr(costs, "_peak", lambda device: 10**9)  # what was taken so far
    small, large = (told(replace(AT_ONCE, together_windows=size)).memory for size in (2, 10))
    floats = (2 + 2) * 4 + 2 * 2  # queries, outputs and two samples of gradients for 4 query heads, 2 KV heads' keys and values
    assert (small, large - small) == (10**9, 8 * 3 * floats * 30 * 8 * 4)  # eight windows more, 3 layers, 30 tokens, head_dim 8


def test_costs_are_spelled_in_units_that_a_reader_would_take():
    said = Costs({"rho": 40.0, "layers": 600.0, "joint": 7560.0}, disk=2_345_000_000, memory=900_000_000)
    assert str(said) == ("about 2.3 hours (rho 40 seconds, layers 10 minutes, joint 2.1 hours), 2.3 GB on disk, 0.9 GB of memory")


def test_where_the_system_tells_no_memory_the_rest_is_said(clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    said = told(AT_ONCE)
    assert said.memory is None
    assert str(said).endswith("GB on disk")
