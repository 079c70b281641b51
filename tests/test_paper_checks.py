"""The checks of the paper's claims: every script runs, and a planted error in what it looks at changes its verdict."""

import copy
import importlib
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import paper_checks.__main__ as command
from less_fast import H2O, Full, LessKernels
from less_fast import step as step_module
from less_fast.demo import KERNELS, MODEL, PAPER_KERNELS
from paper_checks.check import FAILS, HOLDS, IN_PART, MOST, UNMEASURED, Setting, verdict
from paper_checks.memory import check as memory


@pytest.fixture(scope="module")
def here():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    kernels = [LessKernels.from_pretrained(where) for where in (KERNELS, PAPER_KERNELS)]
    return Setting(model, AutoTokenizer.from_pretrained(MODEL), *kernels, length=256, quick=True)


def check(name, setting):
    return importlib.import_module(f"paper_checks.{name}").check(setting)


@pytest.mark.parametrize("name", command.NAMES)
def test_every_check_runs_and_says_what_it_found(name, here):
    module = importlib.import_module(f"paper_checks.{name}")
    found = module.check(here)
    assert found.verdict in (HOLDS, IN_PART, FAILS, UNMEASURED)
    assert all(isinstance(text, str) and text for text in (module.CLAIM, module.PAPER, found.sentence))
    json.dumps(found.figures)
    assert all(len(row) == len(found.headings) for row in found.rows)


def test_a_report_holds_every_check_and_its_pictures(tmp_path, capsys):
    names = ["memory", "residual_rank"]
    assert command.main([*names, "--quick", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert [*report["checks"]] == names
    assert report["about"]["quick"] is True
    for file in ("report.md", "report.html"):
        text = (tmp_path / file).read_text()
        for name in names:
            assert report["checks"][name]["sentence"] in text.replace("&#x27;", "'").replace("&quot;", '"')
    assert "residual_rank.png" in (tmp_path / "report.md").read_text()
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()
    assert (tmp_path / "residual_rank.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["perplexiti"], "no check is called perplexiti"), (["--model", "some/model"], "--model needs --kernels")],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_kernels_of_another_model_are_refused(tmp_path, capsys):
    LessKernels(2, 4, 4, 64, hidden=3).save_pretrained(tmp_path)
    assert command.main(["memory", "--kernels", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "these kernels are for another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [False, True])
def test_windows_for_training_are_none_of_those_held_out(given, here):
    setting = replace(here, texts=[f"{number} = {number}\n" for number in range(10_000)] if given else None)
    training, held_out = (setting.windows(MOST[split], split=split).tolist() for split in ("train", "test"))
    assert len(training) == 8
    assert len(held_out) == 2
    assert not [window for window in training if window in held_out]


def test_data_are_files_and_data_sets(tmp_path, capsys):
    texts = [f"{number} = {number}\n" for number in range(10_000)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    (tmp_path / "some.txt").write_text("a file")
    data, out = ["--data", f"{tmp_path},,train,body", "--data", str(tmp_path / "some.txt")], tmp_path / "out"
    assert command.setting(command.options(["--quick", *data])).texts == [*texts, "a file"]
    assert command.main(["memory", "tables_of_other_texts", "--quick", *data, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["about"]["text"] == f"{tmp_path},,train,body, {tmp_path}/some.txt"
    assert report["checks"]["tables_of_other_texts"]["verdict"] == UNMEASURED


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{},,train,none", "no texts from the data set"),
        ("{}/nowhere", "no texts from the data set"),
        ("{},,train,body,more", "a data set is NAME[,CONFIG[,SPLIT[,COLUMN]]]"),
        ("{},,train,body", "0 windows of 256, and 1 are wanted"),
        ("{}/short.txt", "11 windows of 256 tokens, a third of them for training, and 8 are wanted for that"),
    ],
)
def test_data_that_cannot_serve_are_refused(data, message, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(json.dumps({"body": "too short"}))
    (tmp_path / "short.txt").write_text("x = 1\n" * 750)
    assert command.main(["memory", "--quick", "--data", data.format(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_verdict_needs_all_parts_to_hold():
    assert [verdict(parts) for parts in ([True] * 2, [True, False], [False] * 2)] == [HOLDS, IN_PART, FAILS]


def without_state(setting):
    """The same setting with kernels that add nothing."""
    broken = copy.deepcopy(setting)
    for kernels in (broken.kernels, broken.paper_kernels):
        for layer in kernels.layers:
            layer.k3.fill_(-1e3 if kernels is broken.kernels else 0)
    return broken


@pytest.mark.parametrize("name", ["perplexity", "attention_maps", "performer", "long_sequences", "unequal_budgets"])
def test_kernels_that_add_nothing_change_the_verdict(name, here):
    healthy, broken = check(name, here).verdict, check(name, without_state(here)).verdict
    assert healthy != broken
    assert broken in (IN_PART, FAILS)


def test_transferred_kernels_that_add_nothing_or_do_as_well_as_matched_ones_change_the_verdict(here, monkeypatch):
    weak, strong, nothing = here.paper_kernels, here.kernels, without_state(here)

    def found(transferred, matched, setting=here):
        monkeypatch.setattr(Setting, "train", lambda setting, policy: transferred if isinstance(policy, H2O) else matched)
        return check("transfer", setting).verdict

    assert found(weak, strong) == HOLDS
    assert found(strong, weak) == found(nothing.kernels, strong) == IN_PART
    assert found(weak, strong, nothing) == IN_PART


def test_a_rank_that_is_ignored_or_too_small_changes_the_verdict_on_kernel_sizes(here, monkeypatch):
    by_rank = {1: here.paper_kernels, 8: here.kernels}
    monkeypatch.setattr(Setting, "train", lambda setting, policy, rank, hidden: by_rank[rank])
    for kernels in by_rank.values():
        monkeypatch.setitem(kernels.about, "validation", [{"less": 1, "bare": 2}])
    assert check("kernel_size", here).verdict == HOLDS
    monkeypatch.setattr("paper_checks.kernel_size.SUFFICES", 1.1)
    assert check("kernel_size", here).verdict == IN_PART
    monkeypatch.undo()
    monkeypatch.setattr(Setting, "train", lambda setting, policy, rank, hidden: here.kernels)
    monkeypatch.setitem(here.kernels.about, "validation", [{"less": 1, "bare": 2}])
    assert check("kernel_size", here).verdict == IN_PART


def test_uniform_tables_change_the_verdict_on_tables_of_other_texts(here, monkeypatch):
    module = importlib.import_module("paper_checks.tables_of_other_texts")
    assert module.check(here).verdict in (HOLDS, IN_PART)
    shape = here.kernels.sizes
    monkeypatch.setattr(module, "table", lambda *given, less: [[here.policies()[0].budget] * shape["kv_heads"]] * shape["layers"])
    assert module.check(here).verdict == FAILS


def test_swapped_tables_change_the_verdict_on_tables_of_other_texts(here, monkeypatch):
    module = importlib.import_module("paper_checks.tables_of_other_texts")
    code = [here.windows(1, split="train")[:1].tolist(), here.windows(2).tolist()]

    def kind(windows):
        return "code" if windows.tolist() in code else "prose"

    def losses(setting, windows, policy=None, kernels=None, budgets=None):
        loss = {None: 3.0, "uniform": 2.0, kind(windows): 1.4}.get(budgets, 1.6) if policy else 1.0
        return loss + torch.tensor([0.0, 0.1], dtype=torch.float64)

    monkeypatch.setattr(module, "measure", lambda model, windows, *given: kind(windows))
    monkeypatch.setattr(module, "table", lambda curves, *given, less: curves)
    monkeypatch.setattr(Setting, "losses", losses)
    assert module.check(here).verdict == HOLDS
    monkeypatch.setattr(module, "table", lambda curves, *given, less: {"code": "prose", "prose": "code"}[curves])
    assert module.check(here).verdict == IN_PART


def test_a_budget_that_is_ignored_changes_the_verdict_on_memory(here, monkeypatch):
    assert memory(here).verdict == HOLDS
    monkeypatch.setattr(Setting, "policies", lambda setting: [Full()])
    assert memory(here).verdict != HOLDS


def test_a_copy_in_the_place_of_replacement_changes_the_verdict(here, monkeypatch):
    assert check("inplace", here).verdict == HOLDS
    evict = step_module._evict

    def elsewhere(group, *given):
        evict(group, *given)
        group.k = group.k.clone()

    monkeypatch.setattr(step_module, "_evict", elsewhere)
    assert check("inplace", here).verdict != HOLDS


@pytest.mark.parametrize("name", ["parallel_equals_recurrent", "near_ties", "residual_rank"])
def test_a_planted_error_changes_the_verdict_of_the_exact_checks(name, here, monkeypatch):
    module = importlib.import_module(f"paper_checks.{name}")
    healthy = module.check(here).verdict
    assert healthy in (HOLDS, IN_PART)
    if name == "parallel_equals_recurrent":  # rows swapped
        own = module.divergence
        monkeypatch.setattr(module, "divergence", lambda model, ids, *given: own(model, ids.flip(1), *given))
    elif name == "near_ties":  # everything is close
        monkeypatch.setattr(module, "CLOSE", 1e9)
    else:  # no singular value larger than another, in map and residual
        own = torch.linalg.svdvals
        monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: own(torch.eye(matrix.shape[-1]) + 0 * matrix))
    assert module.check(here).verdict == FAILS != healthy
