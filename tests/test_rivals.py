"""The controls of paper_checks/rivals.py compute what they say."""

import json
from functools import partial

import pytest
import torch
from closeness import assert_close, error
from models import make_kernels, make_model, tokens
from torch.nn.functional import scaled_dot_product_attention

from less_fast import H2O, LayerState, LessCache, Retention, Window
from less_fast.layer.parallel import dense
from less_fast.measuring.compare import Contender, window_losses
from paper_checks import rivals

BUDGET = 6


def qkv(N=2, H=2, G=2, T=30, D=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, heads, T, D, generator=generator) for heads in (H * G, H, H)]


@pytest.mark.parametrize("policy", [H2O(3, 3), Retention(6, 2), Window(6)], ids=repr)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_its_loop_is_that_of_a_cache(policy, int8, with_state):
    model, windows = make_model().float(), tokens(2, 40)
    kernels = make_kernels(model, rho=5).float()
    memory = rivals.LowRank if with_state else None
    found = rivals.losses(model, windows, [rivals.Contender("", policy, memory, int8).attention(x) for x in kernels.layers])
    own = kernels if with_state else kernels.without_state() if policy.needs == "rho" else None
    cache = Contender("less", policy, None, lambda chunk: LessCache.for_model(model, policy, own, "uniform", chunk, int8=int8))
    assert error(found, window_losses(model, windows, cache)) < 1e-5


def test_as_many_centroids_as_tokens_that_were_evicted_lose_nothing():
    q, k, v = qkv()
    out = rivals.streamed(Window(BUDGET), lambda shape: rivals.Centroids(24, shape), False, None, q, k, v)
    assert_close(out, dense(q, k, v), 1e-5)
    few = rivals.streamed(Window(BUDGET), lambda shape: rivals.Centroids(3, shape), False, None, q, k, v)
    bare = rivals.streamed(Window(BUDGET), None, False, None, q, k, v)
    assert error(bare, dense(q, k, v)) > error(few, dense(q, k, v)) > 1e-3


def test_moments_are_exact_for_keys_that_are_one_and_to_the_first_order_for_keys_that_are_near():
    q, k, v = qkv()
    k = k[:, :, :1].expand_as(k)
    attend = partial(rivals.streamed, Window(BUDGET), rivals.Moments, False, None)
    assert_close(attend(q, k, v), dense(q, k, v), 1e-5)
    errors = []
    for far in (0.1, 0.01):
        near = k + far * torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
        errors.append(error(attend(q, near, v).double(), dense(q.double(), near.double(), v.double())))
    assert errors[1] < errors[0] / 30  # the second order is what is missing


def test_the_oracle_keeps_what_will_be_attended_to_most():
    q, k, v = qkv(N=1, H=1, G=1, T=12)
    p = (q[0, 0] @ k[0, 0].T * 8**-0.5).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    found = rivals.look_ahead(q[:, None], k, 8**-0.5)[0, 0]
    for now in range(11):
        assert_close(found[now, : now + 1], p[now + 1 :].amax(0)[: now + 1], 1e-6)
    kept: set = set()
    out = rivals.streamed(rivals.Oracle(4), None, False, None, q, k, v)
    for now in range(12):
        kept.add(now)
        seen = sorted(kept)
        alone = scaled_dot_product_attention(q[0, 0, now : now + 1], k[0, 0, seen], v[0, 0, seen])
        assert_close(out[0, 0, now : now + 1], alone, 1e-5)
        if len(kept) > 4:
            kept.remove(min(kept, key=lambda token: found[now, token]))


def test_all_contenders_hold_as_many_bytes_and_the_script_writes_what_it_found(tmp_path, capsys):
    layer = make_kernels(make_model()).layers[0]
    D, state = layer.head_dim, rivals.LowRank.bytes(layer, layer.head_dim)
    bf16 = LayerState.allocate(H2O(25, 25), 1, layer.query_heads, layer.kv_heads, D, layer, torch.bfloat16)
    assert layer.kv_heads * state == bf16.memory()["low_rank"]
    held = {each.name: each.policy.budget for each in rivals.contenders(layer, 50, "h2o")}
    room = 50 * (4 * D + 8) + state
    assert held["bare"] == held["LESS"] == 50 < held["Baseline+"] == room // (4 * D + 8)
    assert held["int8"] == room // (2 * (D + 4) + 8)
    assert held["8 centroids"] * (4 * D + 8) + 8 * (4 * D + 4) <= room
    out = tmp_path / "out.json"
    short = ["--windows", "2", "--length", "64", "--budgets", "10%", "--out", str(out)]
    assert rivals.main([*short, "--policies", "h2o,oracle"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["cache"] for row in rows if row["policy"] == "oracle"} == {"bare", "Baseline+", "LESS"}
    assert rows[0]["recovered"] == 0
    assert rows[-1]["recovered"] > 0
    assert rivals.main([*short, "--policies", "h3o"]) == 2
    assert "no policy here is called h3o: choose of h2o" in capsys.readouterr().err
    assert rivals.main([*short, "--caches", "bare,int4"]) == 2
    assert "no cache here is called int4: choose of bare" in capsys.readouterr().err
