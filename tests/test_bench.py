"""The benchmark measures what it says: caches as full as they claim, in turns, with their memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from both_paths import heads_of
from models import make_kernels, make_model
from transformers import DynamicCache

from less_fast import H2O, LayerState, Window
from less_fast.hf.architecture import sizes
from less_fast.measuring import bench
from less_fast.setting import Setting

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_steps_take_turns_and_the_first_turns_do_not_count():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    spent = bench.in_turns(steps, rounds=2, device=CPU, burst=3)
    assert "".join(calls) == "aaabbb" * (bench.WARM_UP + 2)
    assert {name: len(seconds) for name, seconds in spent.items()} == {"a": 6, "b": 6}


def test_a_row_has_the_median_the_quartiles_and_all_tokens_of_the_batch():
    row = bench.row("prefill", "full", 3, 100, [4.0, 1.0, 2.0, 8.0, 3.0], 7, tokens=10)
    assert (row.seconds, row.quartiles) == (3.0, (2.0, 4.0))
    assert row.tokens_per_second == 3 * 10 / 3.0


@pytest.mark.parametrize(("length", "kept"), [(3, range(3)), (6, range(6)), (50, range(44, 50))])
def test_a_filled_state_is_one_after_so_many_tokens(length, kept):
    state = LayerState.allocate([Window(6), Window(2)], 2, 2, 2, 4)
    bench.fill(state, length)
    assert state.n.tolist() == [length] * 2
    for row in range(2):
        window, narrow = (head.position.tolist() for head in heads_of(state, row))
        assert window == list(kept)
        assert narrow == list(kept)[-2:]


def test_a_states_age_shifts_what_it_holds_and_leaves_empty_slots_empty():
    state = LayerState.allocate(H2O(2, 2), 1, 1, 1, 4)
    bench.fill(state, 3)
    bench.age(state, 10)
    assert state.n.tolist() == [13]
    assert sorted(state.groups[0].position.flatten().tolist()) == [-1, -1, 10, 11, 12]


def test_decoding_measures_every_cache_with_the_bytes_it_holds_and_leaves_the_model_as_it_was():
    model, policy = make_model(), H2O(3, 3)
    kernels = make_kernels(model)
    rows = bench.decode(model, policy, {"bare": None, "LESS": kernels}, batch=2, length=40, rounds=1, compile=False)
    shape, token = sizes(model), 2 * 3 * 2 * 8 * 8  # k and v, 3 layers, 2 KV heads of 8, float64
    steps = (bench.WARM_UP + 1) * bench.BURST + 1
    assert {row.cache: row.bytes for row in rows} == {
        "DynamicCache": 40 * token,
        "StaticCache": (40 + steps) * token + 3 * 8 // 2,  # each of its layers counts its tokens in a tensor
        "bare": Setting.of(shape, range(3), policy).memory(torch.float64),
        "LESS": Setting.of(shape, range(3), policy, kernels).memory(torch.float64),
    }
    assert all(row.tokens_per_second == 2 / row.seconds for row in rows)


def test_an_attention_step_is_measured_with_the_bytes_that_each_sequence_holds():
    layer = dict(query_heads=4, kv_heads=2, head_dim=8)
    contenders = {"small": (H2O(3, 3), None), "unequal": ([Window(20), H2O(3, 3)], None)}
    rows = bench.attention_steps(layer, contenders, 3, 40, 1, torch.float32, "cpu", compile=False)
    small, window = (Setting.of(layer, [0], policy).memory(torch.float32) for policy in (H2O(3, 3), Window(20)))
    assert {row.cache: row.bytes for row in rows} == {
        "full": 40 * 2 * 2 * 8 * 4,
        "small": small,
        "unequal": (small + window) // 2,
    }


def test_only_the_cache_asked_for_is_measured():
    rows = bench.decode(make_model(), H2O(3, 3), {"bare": None}, 1, 40, 1, False, only="bare")
    assert [row.cache for row in rows] == ["bare"]


def test_a_cache_that_is_measured_has_seen_the_length(monkeypatch):
    caches = []
    monkeypatch.setattr(bench, "in_turns", lambda steps, *_: caches.extend(step.args[1] for step in steps.values()) or {})
    bench.decode(make_model(), H2O(3, 3), {"bare": None}, 1, 40, 1, False)
    assert [int(cache.get_seq_length()) for cache in caches] == [40, 40, 40]
    assert [layer.state.n.item() for layer in caches[-1].layers] == [40] * 3


def test_full_caches_are_measured_with_a_models_own_attention_and_its_own_weights():
    model = make_model()
    twin = bench._twin(model, "eager")
    assert (model.config._attn_implementation, twin.config._attn_implementation) == ("sdpa", "eager")
    assert [x.data_ptr() for x in twin.parameters()] == [x.data_ptr() for x in model.parameters()]
    assert twin(torch.tensor([[1, 2]]), past_key_values=DynamicCache()).logits.isfinite().all()


def test_prefill_measures_every_cache_and_what_it_held_at_most():
    model = make_model()
    rows = bench.prefill(model, H2O(3, 3), {"bare": None, "LESS": make_kernels(model)}, 2, 40, rounds=3)
    assert [(row.cache, row.batch, row.length) for row in rows] == [(name, 2, 40) for name in ("DynamicCache", "bare", "LESS")]
    assert all(row.tokens_per_second == 2 * 40 / row.seconds for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_the_peak_is_that_of_the_block_alone():
    torch.ones(60_000_000)  # came and went before
    kept = torch.ones(10_000_000)
    with bench.Peak(CPU) as peak:
        torch.ones(20_000_000)  # 80 MB, freed at once
    assert 79e6 < peak.bytes < 90e6  # the system counts pages in batches
    assert kept.sum() == 10_000_000


@pytest.mark.parametrize("script", ["performance", "table6_latency"])
def test_the_script_runs_at_a_small_size_and_writes_nothing(script):
    results = ROOT / "paper_checks" / "results"
    before = {file: file.stat().st_mtime_ns for file in results.iterdir()}
    command = [sys.executable, ROOT / "paper_checks" / f"{script}.py", "--quick"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # several wait for each other where the machine is shared
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert "LESS" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in results.iterdir()} == before
