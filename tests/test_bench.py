"""The benchmark measures what it says: caches as full as they claim, in turns, with their memory."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import make_kernels, make_model
from transformers import DynamicCache

from less_fast import H2O, LayerState, LessCache, LessKernels, Retention, SnapKV, extend
from less_fast.hf.architecture import sizes
from less_fast.hf.cache import LessLayer
from less_fast.hf.shipped import kernels_for
from less_fast.loading import load_model
from less_fast.measuring import bench, caches
from less_fast.measuring.caches import held_bytes
from less_fast.setting import Setting
from paper_checks import performance
from paper_checks.architectures import tiny

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_steps_take_turns_and_the_first_turns_do_not_count():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    spent = bench.in_turns(steps, rounds=2, device=CPU, burst=3)
    assert "".join(calls) == "aaabbb" * (bench.WARM_UP + 2)
    assert {name: len(seconds) for name, seconds in spent.items()} == {"a": 6, "b": 6}


def test_a_row_has_the_median_and_all_tokens_of_the_batch():
    row = bench.row("prefill", "full", 3, 100, [4.0, 1.0, 2.0, 8.0, 3.0], 7, tokens=10)
    assert (row.seconds, row.tokens_per_second) == (3.0, 3 * 10 / 3.0)


def test_a_states_age_shifts_what_it_holds_and_leaves_empty_slots_empty():
    state = LayerState.allocate(H2O(2, 2), 1, 1, 1, 4)
    extend(state, *torch.randn(3, 1, 1, 3, 4))
    caches.age(state, 10)
    assert state.n.tolist() == [13]
    assert sorted(state.parts[0].slots.positions().flatten().tolist()) == [-1, -1, 10, 11, 12]


def test_decoding_measures_every_cache_with_the_bytes_it_holds_and_leaves_the_model_as_it_was():
    model, policy = make_model(), H2O(3, 3)
    kernels = make_kernels(model)
    contenders = {"bare": bench.maker(model, policy), "LESS": bench.maker(model, policy, kernels)}
    rows = bench.decode(model, contenders, batch=2, length=40, rounds=1, compile=False)
    shape, token = sizes(model), 2 * 3 * 2 * 8 * 8  # k and v, 3 layers, 2 KV heads of 8, float64
    steps = (bench.WARM_UP + 1) * bench.BURST + 1
    assert {row.cache: row.bytes for row in rows} == {
        "DynamicCache": 40 * token,
        "StaticCache": (40 + steps) * token + 3 * 8 // 2,  # each of its layers counts its tokens in a tensor
        "bare": Setting.of(shape, range(3), policy).memory(torch.float64),
        "LESS": Setting.of(shape, range(3), policy, kernels).memory(torch.float64),
    }
    assert all(row.tokens_per_second == 2 / row.seconds for row in rows)


@pytest.mark.parametrize(("moved", "computed"), [(1e6, 1e12), (1e12, 1e6)])
def test_the_limit_of_a_step_is_the_slower_of_what_must_be_moved_and_what_must_be_multiplied(moved, computed):
    model, step = make_model(), bench.row("decode", "LESS", 3, 40, [1.0], 1000)
    kernels, table = make_kernels(model), model.get_input_embeddings().weight
    weights = sum(weight.numel() for weight in model.parameters())
    weights -= 0 if model.get_output_embeddings().weight is table else table.numel()
    bytes_ = weights * 8 + kernels.memory() + 3 * 1000
    assert performance.limit(step, model, kernels, moved, computed) == max(bytes_ / moved, weights * 3 / computed)


def test_a_cache_that_is_measured_has_seen_the_length(monkeypatch):
    caches = []
    monkeypatch.setattr(bench, "in_turns", lambda steps, *_: caches.extend(step.args[1] for step in steps.values()) or {})
    model = make_model()
    bench.decode(model, {"bare": bench.maker(model, H2O(3, 3))}, 1, 40, 1, False)
    assert [int(cache.get_seq_length()) for cache in caches] == [40, 40, 40]
    assert [layer.state.n.item() for layer in caches[-1].layers] == [40] * 3


@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("gpt_oss", "eager")])
def test_full_caches_are_measured_with_transformers_own_attention_and_the_models_weights(name, attention):
    model = tiny(name)
    LessCache.for_model(model, H2O(3, 3))
    twin = bench._twin(model)
    assert (model.config._attn_implementation, twin.config._attn_implementation) == ("less", attention)
    assert [x.data_ptr() for x in twin.parameters()] == [x.data_ptr() for x in model.parameters()]
    assert twin(torch.tensor([[1, 2]]), past_key_values=DynamicCache()).logits.isfinite().all()


LENGTH = 40


@torch.inference_mode()
def after_so_many_tokens(model, cache, batch):
    """The cache after a prompt and one token alone, LENGTH tokens in all, that the model read."""
    for ids in torch.ones(batch, LENGTH, dtype=torch.int64).split([LENGTH - 1, 1], 1):
        model(ids, past_key_values=cache)
    return cache


@torch.inference_mode()
@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text", "gpt_oss", "gemma4_text"])
def test_of_a_mixed_model_each_layer_is_filled_with_what_it_holds(name, monkeypatch):
    """Windows hold their last tokens, recurrent layers their state; the layers that are LESS's alone are aged."""
    model, batch, filled = tiny(name), 2, {}

    def in_turns(steps, *_):
        filled.update({name: step.args[1] for name, step in steps.items()})
        return {name: [1.0] for name in steps}

    monkeypatch.setattr(bench, "in_turns", in_turns)
    equal_heads = name != "gemma4_text"  # if they differ, there are no kernels
    kernels = {"LESS": LessKernels(**sizes(model), rank=2, hidden=3)} if equal_heads else {}
    contenders = {name: bench.maker(model, H2O(3, 3), learned) for name, learned in {"bare": None, **kernels}.items()}
    rows = bench.decode(model, contenders, batch, LENGTH, 1, compile=False)
    expected = {"DynamicCache": after_so_many_tokens(bench._twin(model), DynamicCache(config=model.config), batch)}
    for contender, make in contenders.items():
        expected[contender] = after_so_many_tokens(model, make(), batch)
    told = {row.cache: row.bytes for row in rows}
    for contender, cache in expected.items():
        assert told[contender] == held_bytes(cache) // batch
        for layer, wanted in zip(filled[contender].layers, cache.layers):
            assert type(layer) is type(wanted)
            if isinstance(layer, LessLayer):
                assert layer.state.n.tolist() == wanted.state.n.tolist()
            elif hasattr(layer, "conv_states"):
                assert [x.shape for x in layer.conv_states.values()] == [x.shape for x in wanted.conv_states.values()]
                assert layer.has_previous_state == wanted.has_previous_state
            else:
                assert (layer.get_seq_length(), layer.keys.shape) == (LENGTH, wanted.keys.shape)
    assert [int(cache.get_seq_length()) for cache in filled.values()] == [LENGTH] * len(filled)
    for network, cache in [(bench._twin(model), filled["DynamicCache"]), (model, filled["bare"])]:
        assert network(torch.ones(batch, 1, dtype=torch.int64), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text"])
def test_a_mixed_model_is_benchmarked_in_all_parts(name):
    model = tiny(name)
    kernels = LessKernels(**sizes(model), rank=2, hidden=3)
    rows = bench.bench(model, H2O(3, 3), kernels, [1], LENGTH, rounds=1, compile=False)
    assert [(row.what, row.cache) for row in rows] == [
        *(("decode", cache) for cache in ("DynamicCache", "StaticCache", "bare", "LESS")),
        *(("prefill", cache) for cache in ("DynamicCache", "bare", "LESS")),
    ]


def test_only_by_head_has_a_table_of_budgets(monkeypatch):
    model, _ = load_model("")
    kernels, found = kernels_for(model), {}
    monkeypatch.setattr(bench, "decode", lambda _, contenders, *others: found.update(contenders) or [])
    monkeypatch.setattr(bench, "prefill", lambda *_: [])
    bench.bench(model, Retention(32, 4), kernels, [1], LENGTH, 1, compile=False)
    assert {name: make().setting.budgets is not None for name, make in found.items()} == {
        "bare": False, "LESS": False, "LESS by head": True,
    }  # fmt: skip


def test_a_contender_is_made_with_its_options():
    model = make_model().float()
    make = bench.maker(model, H2O(3, 3), make_kernels(model).float(), int8=True, chunk=2)
    assert (make().setting.int8, make().setting.chunk, make(compile=True).setting.int8) == (True, 2, True)


@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_all_is_compiled_but_a_model_with_layers_that_grow(name):
    model = tiny(name)
    makers = bench._makers(model, {"bare": bench.maker(model, H2O(3, 3))}, 1, LENGTH, 8, True)
    names = ["DynamicCache", "StaticCache", "StaticCache, compiled", "bare", "bare, step compiled", "bare, compiled"]
    assert [*makers] == [cache for cache in names if name == "llama" or ", compiled" not in cache]


def test_caches_with_a_budget_table_share_slices_of_the_kernels_which_are_counted_once():
    model = make_model().float()
    kernels, table = make_kernels(model).float(), [[2, 5], [3, 3], [1, 7]]
    own = kernels.memory()
    assert own == sum(weight.nbytes for weight in kernels.state_dict().values())

    def slices():
        cache = LessCache.for_model(model, SnapKV(4, 4, 1), kernels, table)  # heads of other windows go apart
        model(torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
        return [part.kernels for layer in cache.layers for part in layer.state.parts]

    first, told = slices(), kernels.memory()
    second = slices()
    assert [len(part.state_dict()) for part in first] == [5] * 5  # two of the first layer, the second's own, two of the third
    pointers = [[x.data_ptr() for part in parts for x in part.state_dict().values()] for parts in (first, second)]
    assert pointers[0] == pointers[1]
    copied = sum(x.nbytes for index in (0, 1, 3, 4) for x in first[index].state_dict().values())
    assert kernels.memory() == told == own + copied


def test_prefill_measures_every_cache_and_what_it_held_at_most():
    model = make_model()
    contenders = {"bare": bench.maker(model, H2O(3, 3)), "LESS": bench.maker(model, H2O(3, 3), make_kernels(model))}
    rows = bench.prefill(model, contenders, 2, 40, rounds=3)
    assert [(row.cache, row.batch, row.length) for row in rows] == [(name, 2, 40) for name in ("DynamicCache", "bare", "LESS")]
    assert {row.peak is None for row in rows} == {not Path("/proc/self/clear_refs").exists()}
    assert all(row.tokens_per_second == 2 * 40 / row.seconds for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_the_peak_is_that_of_the_block_alone():
    """The bounds are wide: the system counts pages in batches, and other threads allocate as well."""
    torch.ones(120_000_000)  # 480 MB that came and went before
    kept = torch.ones(60_000_000)
    assert 60e6 < bench.peak_of(lambda: torch.ones(20_000_000).sum(), CPU) < 200e6  # 80 MB, freed at once
    assert bench.peak_of(lambda: None, CPU) < 60e6
    assert kept.sum() == 60_000_000


def test_speed_is_measured_beyond_the_windows_of_the_kernels_without_a_warning():
    model = make_model()
    kernels = make_kernels(model)
    kernels.about["window"] = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contenders = {"LESS": bench.maker(model, H2O(3, 3), kernels)}
        rows = bench.decode(model, contenders, 1, 24, 1, compile=False) + bench.prefill(model, contenders, 1, 24, 1)
    assert [row.cache for row in rows] == ["DynamicCache", "StaticCache", "LESS", "DynamicCache", "LESS"]
    assert kernels.window == 8


def test_the_script_runs_at_a_small_size_and_writes_nothing():
    results = ROOT / "paper_checks" / "results"
    before = {file: file.stat().st_mtime_ns for file in results.iterdir()}
    command = [sys.executable, "-m", "paper_checks.performance", "--quick"]
    here = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }  # several threads wait for each other on a shared machine
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    assert done.returncode == 0, done.stderr
    assert "by head / uniform" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in results.iterdir()} == before
