"""What training and measuring refuse, in a sentence, before anything is computed or written."""

import json
from dataclasses import replace

import pytest
import torch
from models import make_kernels, make_model, tokens

from less_fast import H2O, TOVA, FastGen, Lambda, LessError, Window
from less_fast.hf.architecture import sizes
from less_fast.hf.identity import identity
from less_fast.setting import Setting
from less_fast.training import RECIPES, Recipe, stages, train
from less_fast.training.head_costs import grid, measure
from less_fast.training.joint import divergence
from less_fast.training.tables import refine
from less_fast.training.work import Work
from paper_checks.architectures import tiny

RECIPE = replace(RECIPES["exponential"], rank=2, hidden=3, rho=0, uses=1, joint_steps=2, curves=0)
WINDOWS, SHORT = tokens(4, 30), tokens(2, 5)


class Kinds(H2O):
    """A policy that asks for the kinds of tokens, and evicts one at a time."""

    needs = "kinds"


def arguments(**changes):
    plain = dict(windows=WINDOWS, validation=tokens(2, 30, seed=1), policy=H2O(3, 3), recipe=RECIPE)
    return plain | changes


def setting(model, policy, kernels=None, budgets="uniform", **more):
    return Setting.of(sizes(model), range(3), policy, kernels, budgets, **more)


WRONG_WINDOWS = [
    (WINDOWS.int(), r"must be an int64 tensor \(windows, tokens\), not torch.int32 \(4, 30\)"),
    (WINDOWS.double(), "not torch.float64"),
    (WINDOWS[0], r"not torch.int64 \(30,\)"),
    (WINDOWS.tolist(), "not list"),
    (WINDOWS[:0], "hold no tokens"),
    (WINDOWS[:, :0], "hold no tokens"),
    (WINDOWS + 96, "hold tokens from 97 to 192, and LlamaForCausalLM knows 0 to 96"),
    (-WINDOWS, "hold tokens from -96 to -1"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({what: wrong}, f"{what}.* {message}") for what in ("windows", "validation") for wrong, message in WRONG_WINDOWS),
        ({"validation": tokens(2, 29)}, "windows have 30 tokens and validation 29: cut both to one length"),
        ({"policy": "h2o"}, "a policy is something like H2O"),
        ({"policy": FastGen(4, 1, 1, 0.5)}, "evicts one token at a time, and FastGen"),
        ({"policy": Kinds(3, 3)}, "asks for the kinds of tokens"),
        ({"policy": Window(999)}, "nothing is evicted within 30 tokens"),
        ({"policy": H2O(15, 14)}, "nothing is evicted within 30 tokens"),
        ({"policy": Lambda(4, 2)}, "a budget of 2 leaves no recent tokens beside 4 sinks"),
        (dict(policy=H2O(1, 0), recipe=replace(RECIPE, curves=1), windows=SHORT, validation=SHORT), "5 tokens are too short"),
        ({"recipe": replace(RECIPE, budgets=(9.0,))}, r"nothing is evicted within 30 tokens with the budgets"),
        ({"recipe": {"uses": 1}}, "a recipe is a Recipe"),
        ({"start": make_kernels(make_model(), rank=2)}, "the kernels to go on with are"),
        *(({"hours": hours}, "hours must be a number from 0") for hours in (-1, float("nan"), float("inf"), "1h")),
    ],
    ids=str,
)
def test_training_that_cannot_be_is_refused_before_the_model_runs_and_leaves_no_work_behind(
    changes, message, tmp_path, monkeypatch
):
    if "start" not in changes:
        monkeypatch.setattr(stages, "predictions", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(LessError, match=message):
        train(make_model().float(), **arguments(**changes), folder=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_model_made_in_inference_mode_is_refused(tmp_path):
    with torch.inference_mode():
        model = make_model().float()
    with pytest.raises(LessError, match=r"made under torch\.inference_mode: load it outside"):
        train(model, **arguments(), folder=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_model_whose_layers_attend_in_another_way_is_refused_and_leaves_no_work_behind(name, tmp_path):
    model = tiny(name)
    with pytest.raises(LessError, match="kernels and budget tables are made for"):
        train(model, **arguments(), folder=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: value}, f"{name} of a recipe must be an integer from 1") for name in ("batch", "rank", "round")
          for value in (0, -1, 1.5, "1")),
        *(({name: -1}, f"{name} of a recipe must be an integer from 0")
          for name in ("uses", "seed", "hidden", "rho", "joint_steps", "curves")),
        ({"uses": 1.5}, "uses of a recipe must be an integer from 0"),
        ({"hidden": 0}, "the paper's need at least 1"),
        *(({"rate": value}, "rate of a recipe must be a number from 0")
          for value in (-1e-3, float("nan"), float("inf"), None, "1e-3")),
        *(({"budgets": value}, "budgets of a recipe") for value in (2.0, (0.0,), (1.0, "2"), (float("nan"),))),
        ({"budgets": ()}, "one or more"),
        *(({"family": family}, "are not learned: choose one of paper, exponential") for family in ("performer", "mine", None)),
    ],
    ids=str,
)  # fmt: skip
def test_a_recipe_by_which_nothing_can_be_trained_is_refused(changes, message):
    with pytest.raises(LessError, match=message):
        Recipe(**changes)


def test_work_on_another_order_is_refused_and_left_as_it_is(tmp_path):
    Work(tmp_path, {"recipe": 1, "text": "a"})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LessError, match="an unfinished training with another recipe, window: go on with the options"):
        Work(tmp_path, {"recipe": 2, "text": "a", "window": 3})
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    Work(tmp_path, {"recipe": 1, "text": "a"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"recipe": 1}), "holds a training that another version of LESS began"),
        (json.dumps({"recipe": 1, "format": 1}), "holds a training that another version of LESS began"),
        ('{"recipe": 1, "for', "order.json is broken, so nobody knows what was begun there: delete"),
        ("[1]", "order.json is broken"),
        ("\udcff", "order.json is broken"),
    ],
    ids=["before there were formats", "of another format", "cut off", "no object", "no text"],
)
def test_work_of_another_version_or_with_a_broken_order_is_refused_and_left_as_it_is(text, message, tmp_path):
    (tmp_path / "order.json").write_bytes(text.encode(errors="surrogateescape"))
    before = (tmp_path / "order.json").read_bytes()
    with pytest.raises(LessError, match=message):
        Work(tmp_path, {"recipe": 1})
    assert (tmp_path / "order.json").read_bytes() == before


@pytest.mark.parametrize("name", ["plan", "layers", "joint"])
@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "other", "cut off"])
def test_a_broken_file_of_an_unfinished_training_is_named_and_can_be_deleted(name, content, tmp_path):
    model = make_model().float()
    kernels = train(model, **arguments(), folder=tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.raises(LessError, match=f"{name} is broken: delete it"):
        train(model, **arguments(), folder=tmp_path)
    file.unlink()
    again = train(model, **arguments(), folder=tmp_path)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in kernels.state_dict().items())


def test_a_training_goes_on_only_with_a_model_of_the_same_dtype(tmp_path):
    """The identity of a model hardly depends on its dtype."""
    model = make_model().bfloat16()
    train(model, **arguments(), folder=tmp_path)
    with pytest.raises(LessError, match="an unfinished training with another dtype"):
        train(model.float(), **arguments(), folder=tmp_path)


def test_a_training_goes_on_only_with_the_same_model_whatever_the_last_digits_of_its_identity(tmp_path):
    train(make_model().float(), **arguments(), folder=tmp_path)
    order = json.loads((tmp_path / "order.json").read_text())
    first, *others = order["identity"]["layers"][0].split()
    order["identity"]["layers"][0] = " ".join([f"{float(first) + 1e-4:.4f}", *others])
    (tmp_path / "order.json").write_text(json.dumps(order))
    train(make_model().float(), **arguments(), folder=tmp_path)
    with pytest.raises(LessError, match="was saved with another model"):
        train(other_model().float(), **arguments(), folder=tmp_path)


@torch.no_grad()
def other_model():
    """Another model of the same shape."""
    model = make_model()
    for weight in model.parameters():
        weight.mul_(2)
    return model


def kernels_of_another_model():
    kernels = make_kernels(other_model())
    kernels.about["identity"] = identity(other_model())
    return kernels


@pytest.mark.parametrize(
    ("policy", "length"),
    [(Lambda(64, 8), 40), (Lambda(8, 8), 10), (H2O(2, 2), 5), (H2O(2, 2), 1)],
    ids=str,
)
def test_windows_too_short_for_two_budgets_have_no_grid(policy, length):
    with pytest.raises(LessError, match=f"windows of {length} tokens are too short for curves of {type(policy).__name__}"):
        grid(policy, length)
    with pytest.raises(LessError, match=f"windows of {length} tokens are too short"):
        measure(make_model(), tokens(1, length), policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"windows": wrong}, message) for wrong, message in WRONG_WINDOWS),
        ({"budgets": [8, 4]}, r"must ascend, one or more, not \[8, 4\]"),
        ({"budgets": [4, 4]}, "must ascend"),
        ({"budgets": []}, "must ascend, one or more"),
        ({"budgets": [4, 31]}, "a budget of curves must be an integer from 1 to 30, not 31"),
        ({"budgets": [0, 4]}, "must be an integer from 1 to 30, not 0"),
        ({"budgets": [4.0]}, "must be an integer from 1 to 30, not 4.0"),
        ({"budgets": [2, 8], "policy": Lambda(3, 1)}, "a budget of 2 leaves no recent tokens"),
        *(({"policy": policy}, "whose heads each keep a number of their own")
          for policy in (TOVA(4), FastGen(4, 1, 1, 0.9), Kinds(2, 2))),
        ({"policy": "h2o"}, "a policy is something like H2O"),
        ({"kernels": "mine"}, "kernels are LessKernels"),
        ({"kernels": make_kernels(make_model(num_hidden_layers=2))}, "for a model of other sizes"),
        ({"kernels": make_kernels(make_model(num_hidden_layers=4))}, "for a model of other sizes"),
        ({"kernels": kernels_of_another_model()}, "another model of the same shape"),
        ({"kernels": make_kernels(make_model()).float()}, "these kernels must be torch.float64 on cpu for this model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_curves_that_cannot_be_measured_are_refused_before_the_model_runs(changes, message, monkeypatch):
    monkeypatch.setattr("less_fast.training.head_costs.watch", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(LessError, match=message):
        measure(make_model(), **{"windows": WINDOWS, "policy": H2O(2, 2)} | changes)


def test_a_model_in_training_mode_is_not_measured():
    model = make_model().train()
    with pytest.raises(LessError, match=r"the model is in training mode.*model.eval"):
        measure(model, WINDOWS, H2O(2, 2))
    with pytest.raises(LessError, match=r"the model is in training mode.*model.eval"):
        divergence(model, WINDOWS, setting(model, H2O(2, 2)))


def broken():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    return model


def test_costs_of_a_broken_model_are_refused():
    with pytest.raises(LessError, match=r"the attention of layer \d is not finite|predictions are not finite"):
        measure(broken(), WINDOWS, H2O(2, 2))
    with pytest.raises(LessError, match="the divergence is not finite"):
        refine(broken(), WINDOWS, setting(broken(), H2O(2, 2), budgets=[[4, 4]] * 3))


def test_a_table_that_cannot_be_refined_is_refused():
    model = make_model()
    with pytest.raises(LessError, match="there is no table to refine"):
        refine(model, WINDOWS, setting(model, H2O(2, 2)))
    with pytest.raises(LessError, match="whose heads each keep a number of their own"):
        refine(model, WINDOWS, setting(model, TOVA(4)))
    with pytest.raises(LessError, match="must be an int64 tensor"):
        refine(model, WINDOWS.int(), setting(model, H2O(2, 2), budgets=[[4, 4]] * 3))
    with pytest.raises(LessError, match="for a model of other sizes than LlamaForCausalLM"):
        refine(make_model(num_hidden_layers=2), WINDOWS, setting(model, H2O(2, 2), budgets=[[4, 4]] * 3))
    with pytest.raises(LessError, match="another model of the same shape"):
        refine(model, WINDOWS, setting(model, H2O(2, 2), kernels_of_another_model(), [[4, 4]] * 3))


def test_settings_that_are_not_streamed_token_by_token_have_no_divergence():
    model = make_model()
    with pytest.raises(LessError, match="this setting has chunks of 4"):
        divergence(model, WINDOWS, setting(model, H2O(2, 2), chunk=4))
    with pytest.raises(LessError, match="evicts one token at a time, and FastGen"):
        divergence(model, WINDOWS, setting(model, FastGen(4, 1, 1, 0.5)))
    with pytest.raises(LessError, match="texts must be an int64 tensor"):
        divergence(model, WINDOWS.float(), setting(model, H2O(2, 2)))
    assert divergence(model, WINDOWS, setting(model, Window(999))).item() == pytest.approx(0, abs=1e-12)
