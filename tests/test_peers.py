"""The comparison with peers: what it counts, what it refuses, and its own side at a small size, without kvpress."""

import json
import sys
from dataclasses import asdict, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import make_kernels, make_model
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from less_fast import H2O, LessCache
from less_fast.demo import MODEL
from less_fast.layer import step
from paper_checks import peers
from paper_checks.peers import Contender, Pass, Refused, Setup

SETUP = Setup(prompt=20, steps=19, budget=6, batches=(1, 2), rounds=2, threads=1, compile=False)


def test_its_own_side_is_measured_where_kvpress_has_no_environment(tmp_path, capsys):
    out = tmp_path / "figures" / "peers.json"
    assert peers.main(["--quick", "--threads", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [*record["sides"]] == ["LESS"]
    rows = {row["cache"]: row for row in record["rows"]}
    assert {"DynamicCache", "H2O", "H2O with LESS", "Retention with LESS, by head"} <= rows.keys()
    assert rows["DynamicCache"]["worse"] == 0
    for name, row in rows.items():
        assert name in said
        assert row["held"] == (127 if row["budget"] is None else row["budget"])
        assert all(row["speed"][batch] > 0 for batch in ("1", "2"))
    assert rows["H2O"]["worse"] > rows["Retention with LESS, by head"]["worse"] > 0


def test_what_can_be_compiled_is_before_the_clock_runs_and_predicts_the_same(tmp_path, monkeypatch):
    """A side that answers here, in this process; torch traces its code, and for brevity generates none."""
    np.save(tmp_path / "tokens.npy", torch.randint(2048, (2, SETUP.length)).numpy())
    caches = ["StaticCache, compiled", "H2O with LESS", "H2O with LESS, step compiled", "H2O with LESS, compiled"]
    traced, said = [], []

    def traces(code, **how):
        traced.append(code)
        return own(code, backend="eager", **how)

    def requests():
        names = [contender["cache"] for contender in said[0]["contenders"]]
        return (json.dumps([names.index(name), 2, 0]) + "\n" for name in caches)

    own = torch.compile
    monkeypatch.setattr(torch, "compile", traces)
    monkeypatch.setattr(step, "_compiled", cache(step._compiled.__wrapped__))  # nothing of other tests, nor for them
    monkeypatch.setattr(sys, "stdin", (request for each in [requests] for request in each()))
    setup = replace(SETUP, compile=True)
    options = {"setup": asdict(setup), "tokens": str(tmp_path / "tokens.npy"), "model": str(MODEL), "dtype": "float32"}
    with torch._dynamo.config.patch(recompile_limit=peers.VARIANTS):
        peers._serve(peers.OURS, options, said.append)
    static, plain, *compiled = [measured["nats"] for measured in said[1:]]
    assert len(traced) == 3  # both models whole, and a step
    assert compiled == [pytest.approx(plain, abs=1e-3)] * 2
    assert static != pytest.approx(plain, abs=1e-3)


@torch.inference_mode()
def test_a_pass_tells_the_nats_of_the_decoded_half_and_what_is_held_at_most():
    model, windows = make_model(), torch.arange(3 * SETUP.length).reshape(3, -1) % 50
    run = Pass(model, model, DynamicCache(config=model.config))
    measured = peers.decode(run, windows, SETUP.prompt, SETUP.steps)
    logits = model(windows).logits[:, SETUP.prompt : -1]
    expected = [cross_entropy(row, targets).item() for row, targets in zip(logits, windows[:, SETUP.prompt + 1 :])]
    assert measured["nats"] == pytest.approx(expected, abs=1e-6)
    token = 2 * 3 * 2 * 8 * 8  # k and v, 3 layers, 2 KV heads of 8, float64
    assert (measured["held"], measured["bytes"]) == (SETUP.length - 1, (SETUP.length - 1) * token)


@torch.inference_mode()
@pytest.mark.parametrize("table", ["uniform", [[2, 10], [6, 6], [4, 8]]])
def test_a_less_cache_holds_its_budget_on_average_over_its_heads(table):
    model = make_model()
    cache = LessCache.for_model(model, H2O(3, 3), make_kernels(model), table)
    measured = peers.decode(Pass(model, model, cache), torch.ones(2, SETUP.length).long(), SETUP.prompt, SETUP.steps)
    assert measured["held"] == 6
    assert measured["bytes"] == sum(cache.memory().values()) // 2


def test_bytes_beside_a_cache_count_and_shared_memory_counts_once():
    part = torch.zeros(10)
    beside = SimpleNamespace(buffers={0: [part, part[:3]], 1: (torch.zeros(5), {"scale": torch.zeros(2)})}, name="a press")
    assert peers.held_bytes(beside) == 4 * (10 + 5 + 2)
    assert peers.held_bytes(None) == 0


def answer(nats, held=6, seconds=1.0):
    return {"nats": nats, "seconds": seconds, "held": held, "bytes": 100}


def result(cache, one, two, side="LESS", budget=None, equal=True, held=6, seconds=(1.0, 1.0)):
    """What two rounds of batches of 1 and 2 say: the same nats everywhere but for `two`."""
    passes = {
        1: [answer([one], held, wait) for wait in seconds],
        2: [answer([one, two], held, wait) for wait in seconds],
    }
    about = {"cache": cache, "side": side, "budget": budget, "target": None, "interval": None, "equal": equal}
    return about | {"passes": passes}


def test_rows_are_means_over_windows_beside_the_full_cache_and_medians_over_rounds():
    results = [result("DynamicCache", 1.0, 2.0), result("H2O", 1.5, 2.1, budget=6, seconds=(1.0, 3.0))]
    full, row = peers.rows_of(results, SETUP, "float32")
    assert (full["nats"], full["worse"], full["worse_stderr"]) == (1.5, 0, 0)
    assert (row["windows"], row["nats"], row["worse"]) == pytest.approx((4, 1.8, 0.3))
    assert row["worse_stderr"] == pytest.approx(torch.tensor([0.5, 0.1] * 2).std().item() / 2)
    assert row["speed"]["2"] == SETUP.steps * 2 / 2.0
    table = peers.markdown([full, row], SETUP).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| DynamicCache", "| H2O"]
    assert "0.300 ± 0.115" in table[-1]


def test_full_caches_that_differ_are_refused_and_a_quantized_one_may():
    ours = result("DynamicCache", 1.0, 1.0)
    peers.rows_of([ours, result("DynamicCache", 1.0 + 1e-4, 1.0 + 1e-4, "kvpress")], SETUP, "float32")
    peers.rows_of([ours, result("QuantizedCache, hqq, 4 bits", 1.1, 1.1, "kvpress")], SETUP, "float32")
    for wrong in (1.001, float("nan")):
        with pytest.raises(Refused, match="DynamicCache of kvpress is a full cache"):
            peers.rows_of([ours, result("DynamicCache", wrong, wrong, "kvpress")], SETUP, "float32")


def test_more_tokens_than_the_budget_are_refused_where_they_should_be_equal():
    ours, more = result("DynamicCache", 1.0, 1.0), dict(budget=6, held=7)
    with pytest.raises(Refused, match="A held 7 tokens, and its budget is 6"):
        peers.rows_of([ours, result("A", 1.0, 1.0, **more)], SETUP, "float32")
    row = peers.rows_of([ours, result("A", 1.0, 1.0, equal=False, **more)], SETUP, "float32")[1]
    assert "7 (budget 6)" in peers.markdown([row], SETUP)


ABOUT = {"tokens": "a", "weights": "b", "threads": 1, "versions": {"torch": "2", "python": "3"}}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"tokens": "c"}, "tokens"),
        ({"weights": "c"}, "weights"),
        ({"threads": 2}, "numbers of threads"),
        ({"versions": {"torch": "3", "python": "3"}}, "releases of torch"),
        ({"versions": {"torch": "2", "python": "4"}}, "releases of Python"),
    ],
)
def test_sides_that_measure_something_else_are_refused(other, what):
    sides = [SimpleNamespace(name=name, about=about) for name, about in (("LESS", ABOUT), ("kvpress", ABOUT | other))]
    peers.check_sides(sides[:1] * 2)
    with pytest.raises(Refused, match=f"different {what}"):
        peers.check_sides(sides)


def test_sides_take_turns():
    asked = []

    def side(name, caches):
        def measure(number, batch, first):
            asked.append((name, caches[number], batch, first))
            return answer([1.0] * batch)

        contenders = [Contender(cache, make=None).about() for cache in caches]
        return SimpleNamespace(name=name, contenders=contenders, measure=measure)

    results = peers.measure([side("LESS", "abc"), side("kvpress", "de")], SETUP, lambda stage: None)
    assert [cache for _, cache, batch, first in asked if (batch, first) == (1, 0)] == ["a", "d", "b", "e", "c"]
    assert [(batch, first) for _, cache, batch, first in asked if cache == "c"] == [(1, 0), (2, 0), (1, 2), (2, 2)]
    assert all(len(result["passes"][batch]) == 2 for result in results for batch in (1, 2))


def test_what_is_no_environment_is_refused(tmp_path, capsys):
    assert peers.main(["--quick", "--environment", str(tmp_path)]) == 2
    assert "is no environment of Python: make one as --help says" in capsys.readouterr().err


def test_those_caches_are_measured_that_are_asked_for_and_dynamic_cache():
    some, caches = replace(SETUP, only=("Knorm", "LESS")), ["DynamicCache", "KnormPress", "A with LESS", "H2O"]
    assert [cache for cache in caches if some.wants(cache)] == caches[:3]
    assert all(SETUP.wants(cache) for cache in caches)


def test_full_caches_in_16_bits_may_differ_by_more():
    both = [result("DynamicCache", 1.0, 1.0), result("DynamicCache", 1.01, 1.01, "kvpress")]
    peers.rows_of(both, SETUP, "bfloat16")
    with pytest.raises(Refused, match="is a full cache"):
        peers.rows_of(both, SETUP, "float32")


def test_a_model_without_kernels_is_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="no kernels in the package for this model"):
        list(peers.our_contenders(model, str(tmp_path), SETUP))


def test_more_windows_than_the_text_has_are_refused(capsys):
    assert peers.main(["--rounds", "100000"]) == 2
    assert "fewer windows" in capsys.readouterr().err
