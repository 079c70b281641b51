"""The check beyond text: how numbers become tokens, and a run of it in small."""

import builtins
import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from paper_checks import domains

WALK = np.clip(np.random.default_rng(0).normal(0, 2, 6000).cumsum() % domains.LEVELS, 0, domains.LEVELS - 1).astype(np.int64)


def test_numbers_become_equal_steps_and_what_lies_beyond_the_outermost():
    values = np.array([-5.0, 0.0, 0.99 / 32, 1.01 / 32, 0.5, 0.999, 1.0, 7.0])
    assert domains.steps(values, 0, 1).tolist() == [0, 0, 0, 1, 16, 31, 31, 31]
    assert domains.steps(10 * values - 3, -3, 7).tolist() == [0, 0, 0, 1, 16, 31, 31, 31]


def test_windows_are_whole_and_of_one_stream_each():
    streams = [np.arange(2 * domains.LENGTH + 5), np.arange(domains.LENGTH) + 7000, np.arange(9)]
    found = domains.windows(streams)
    assert found.shape == (3, domains.LENGTH)
    assert found[:, 0].tolist() == [0, domains.LENGTH, 7000]
    assert (found.diff() == 1).all()


def test_a_run_trains_measures_and_writes_every_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(domains, "LENGTH", 128)
    monkeypatch.setattr(domains, "BUDGETS", (8, 16))
    monkeypatch.setattr(domains, "RECIPE", replace(domains.RECIPE, uses=1, joint_steps=2))
    monkeypatch.setitem(domains.DOMAINS, "pulse", lambda: ([WALK[:4000]], [WALK[4000:]]))
    assert domains.main(["--domains", "pulse", "--tokens", "4096", "--windows", "4", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["rows"]["pulse"]
    assert [(row["cache"], row["budget"]) for row in found["rows"]][::3] == [("full", None), ("less", 8), ("less", 16)]
    assert (found["held_out"], found["training_windows"]) == (4, 31)
    assert all(row["perplexity"] < domains.LEVELS for row in found["rows"])
    assert "pulse, 4 held-out windows" in capsys.readouterr().out


def test_what_is_no_domain_and_data_that_is_not_there_are_said_with_what_to_do(tmp_path, monkeypatch, capsys):
    assert domains.main(["--domains", "pulse,music", "--out", str(tmp_path / "found.json")]) == 2
    assert "no domain here is called music: choose of pictures, pulse" in capsys.readouterr().err
    own = builtins.__import__

    def missing(name, *arguments, **more):
        if name.partition(".")[0] in ("skimage", "heartpy"):
            raise ImportError(f"No module named {name!r}")
        return own(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(domains, "find_spec", lambda name: None)
    for name in domains.DOMAINS:
        assert domains.main(["--domains", name, "--out", str(tmp_path / "found.json")]) == 2
        assert "pip install scikit-image heartpy" in capsys.readouterr().err
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("name", ["pictures", "pulse"])
def test_the_data_are_tokens_of_which_none_is_both_seen_and_held_out(name):
    if find_spec({"pictures": "skimage", "pulse": "heartpy"}[name]) is None:
        pytest.skip("its data are not installed here: pip install scikit-image heartpy")
    seen, held_out = domains.DOMAINS[name]()
    for stream in (*seen, *held_out):
        assert stream.dtype == np.int64
        assert 0 <= stream.min() <= stream.max() < domains.LEVELS
    rows = [
        {tuple(row) for row in torch.from_numpy(np.concatenate(part)).unfold(0, 64, 64).tolist()} for part in (seen, held_out)
    ]
    assert len(rows[0] & rows[1]) < 0.01 * len(rows[1])  # but for what is of one colour
