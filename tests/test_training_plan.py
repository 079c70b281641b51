"""What a training does in the time and the memory that there are, and that it says so before it begins."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import make_kernels, make_model, tokens
from short_training import POLICY, RECIPE, quick_training, setting_of

from less_fast import LessError
from less_fast.training import layers, plan, retention, sensitivity
from less_fast.training.plan import Costs, bytes_of_joint, bytes_of_reading, bytes_of_window, free_memory, share_out

WHOLE = replace(RECIPE, rho=3, uses=6, joint_steps=75, curves=8)
CPU = torch.device("cpu")
seconds = st.floats(0.01, 100)
EACH = Costs(rho_read=2.0, rho_step=0.5, read=3.0, times=1.0, step=0.25, joint=4.0)


@given(st.builds(Costs, *[seconds] * 5, st.none() | seconds), st.integers(1, 600), st.integers(1, 40), st.floats(1, 1e6))
def test_a_plan_takes_no_more_than_the_time_that_is_given(costs, most, judges, given_seconds):
    try:
        found = share_out(costs, most, judges, 3, [8], WHOLE, given_seconds)
    except LessError:
        return
    assume(given_seconds > 60)  # where the windows that must be there are not nearly all of it
    assert found.windows == min(most, 8) or sum(found.seconds.values()) <= given_seconds
    assert 1 <= found.windows <= most
    assert 1 <= found.validation <= judges
    assert 1 <= found.curves <= WHOLE.curves
    assert found.joint_steps in (0, *range(40, WHOLE.joint_steps + 1))
    assert costs.joint is not None or found.joint_steps == 0


def test_with_all_the_time_the_whole_recipe_is_carried_out_and_with_less_less_of_each():
    plans = [share_out(EACH, 256, 16, 3, [8], WHOLE, 3600 * hours) for hours in (100.0, 1.0, 0.3)]
    assert (plans[0].windows, plans[0].validation, plans[0].joint_steps, plans[0].curves) == (256, 16, 75, 8)
    for more, less in pairwise(plans):
        assert (more.windows, more.joint_steps) > (less.windows, less.joint_steps)
        assert sum(more.seconds.values()) > sum(less.seconds.values())


def test_few_steps_of_all_layers_give_their_time_to_windows():
    short, enough = (share_out(EACH, 256, 16, 3, [8], WHOLE, given) for given in (1500.0, 1600.0))
    assert (short.joint_steps, enough.joint_steps) == (0, 42)
    assert short.windows > 1.5 * enough.windows


def test_too_little_time_is_refused_with_the_least_that_suffices():
    with pytest.raises(LessError, match=r"give it (\S+) hours at least") as refused:
        share_out(EACH, 256, 16, 3, [8], WHOLE, 10.0)
    least = float(str(refused.value).split("give it ")[1].split()[0])
    enough = share_out(EACH, 256, 16, 3, [8], WHOLE, 3600 * least)
    assert enough.windows >= 8
    assert sum(enough.seconds.values()) <= plan.SPENT * 3600 * least
    with pytest.raises(LessError):
        share_out(EACH, 256, 16, 3, [8], WHOLE, 3600 * (least - 0.011))


def test_the_parts_of_a_plan_take_what_their_windows_and_steps_do():
    found = share_out(EACH, 32, 2, 3, [8], replace(WHOLE, joint_steps=10), 1e6)
    assert list(found.seconds.values()) == pytest.approx(
        [
            32 * (2 + 6 * 0.5) + 2 * (2 + 2 * 0.5),  # rho
            32 * (3 + 3 * 1 + 6 * 0.25) + 2 * (3 + 3 * (1 + 0.25)),  # layers: three settings
            2 * (10 * 2 * 4 + 3 * 2 * 4 / 2),  # all layers, twice: steps of two windows, and two windows that judge
            8 * (3 + 8 * (1 + 0.25)),  # curves: eight budgets
        ]
    )


def held_by(*tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_holds_as_much_for_each_window_as_is_said(dtype):
    model, ids = make_model().to(dtype), tokens(3, 40)
    held = sensitivity.watch_each(model, ids, [0, 1, 2], True)
    bare = layers.bare_of(held, setting_of(model, POLICY, None))
    of_layers = sum(held_by(layer.q, layer.k, layer.v, layer.full, layer.g) for layer in held.values())
    of_layers += 2 * sum(held_by(*of) for of in bare.values())
    seen = [retention.Seen.join([one, one]) for one in retention.watch(model, ids[:1], 0)]
    of_rho = sum(held_by(layer.q, layer.k, layer.v, layer.seen, layer.share) for layer in seen) / 2
    for recipe, wanted in ((replace(RECIPE, rho=0), of_layers / 3), (WHOLE, max(of_layers / 3, of_rho))):
        assert bytes_of_window(model, 40, recipe, 2) == pytest.approx(wanted, rel=0.05)


def test_rounds_are_as_large_as_the_free_memory_allows(monkeypatch):
    each, reading = bytes_of_window(make_model().float(), 30, RECIPE, 3), bytes_of_reading(make_model().float(), tokens(1, 30))
    for free, size in ((2 * reading + 20.5 * each, 10), (2 * reading + 8.5 * each, 4), (0, 1), (None, 10)):
        monkeypatch.setattr(plan, "free_memory", lambda device, free=free: free)
        assert quick_training(recipe=replace(RECIPE, uses=1, joint_steps=0)).about["recipe"]["round"] == size


def test_all_layers_together_are_left_out_where_their_memory_is_not_there(monkeypatch):
    said = []
    monkeypatch.setattr(plan, "free_memory", lambda device: 10_000)
    kernels = quick_training(hours=1.0, tell=said.append)
    assert "joint" not in kernels.about
    assert any("more than there is: that is left out" in line for line in said)


def test_what_a_joint_step_holds_is_found_from_few_tokens(monkeypatch):
    model, window = make_model(hidden_size=256, intermediate_size=1024).float(), tokens(1, 512)  # weights are not counted
    setting = setting_of(model, POLICY, make_kernels(model, family="exponential").float().requires_grad_())
    small = bytes_of_joint(model, window, setting)
    monkeypatch.setattr(plan, "FEW", 256)
    assert small == pytest.approx(bytes_of_joint(model, window, setting), rel=0.03)


def test_free_memory_is_some_and_no_more_than_the_container_may_take(tmp_path, monkeypatch):
    assert free_memory(CPU) > 1e6
    (tmp_path / "memory.max").write_text("5000")
    (tmp_path / "memory.stat").write_text("file 7\nanon 2000\n")
    monkeypatch.setattr(plan, "GROUP", tmp_path)
    assert free_memory(CPU) == 3000
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(CPU) > 1e6


def test_each_part_is_told_before_it_is_measured_and_what_will_be_done_before_it_begins(tmp_path, monkeypatch):
    said, own = [], layers.descend
    monkeypatch.setattr(layers, "descend", lambda *rest: said.append("layers begin") or own(*rest))
    recipe = replace(RECIPE, uses=2, joint_steps=2, curves=1)
    kernels = quick_training(tmp_path, recipe, hours=1.0, tell=said.append)
    measured = [line for line in said if line.startswith("measuring")]
    assert said[: len(measured)] == measured
    assert said[len(measured)].startswith("10 windows to train on, in rounds of 10")
    assert said[len(measured) + 1 :] == ["layers begin"]
    again, told = quick_training(tmp_path, recipe, hours=1.0, tell=said.append), said[-1]
    assert told == said[len(measured)]  # the plan from before, and nothing measured
    assert len(said) == len(measured) + 3
    for name, weight in kernels.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
