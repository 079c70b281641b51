"""A model whose heads are shared out among processes generates what it generates in one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from closeness import assert_close
from models import make_kernels, make_model

from less_fast import H2O, TOVA, LessCache
from less_fast.hf import cache as cache_module

SCRIPT = """
import json, os, sys, warnings
warnings.filterwarnings("ignore")
import torch
from transformers import AutoModelForCausalLM
from less_fast import H2O, LessCache, LessKernels
from less_fast.demo import KERNELS, MODEL, PAPER_KERNELS
from less_fast.hf.identity import identity

torch.set_num_threads(1)
several = int(os.environ.get("WORLD_SIZE", 1)) > 1
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, **{"tp_plan": "auto"} if several else {}).eval()
found, held, lines = [], [], identity(model)["layers"]
for where in (KERNELS, PAPER_KERNELS, None):
    for budgets in (None, "uniform"):
        kernels = where and LessKernels.from_pretrained(where)
        cache = LessCache.for_model(model, H2O(heavy=6, recent=6), kernels, budgets)
        ids = torch.arange(100, 160)[None]
        found.append(model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)[0, 60:].tolist())
        held.append(cache.memory()["entries"])
with open(os.path.join(sys.argv[1], os.environ.get("RANK", "alone")), "w") as file:
    json.dump([found, held, [[float(number) for number in line.split()] for line in lines]], file)
"""


def test_two_processes_generate_what_one_does_and_share_the_memory(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], torchrun):
        done = subprocess.run([*command, script, tmp_path], capture_output=True, text=True, env=environment)
        assert not done.returncode, done.stderr[-3000:]
    said = [json.loads((tmp_path / name).read_text()) for name in ("alone", "0", "1")]
    (alone, whole, lines), (first, half, lines_of_first), (second, other, lines_of_second) = said
    assert first == second == alone
    assert [a + b for a, b in zip(half, other)] == whole
    assert len({str(tokens) for tokens in alone}) > 1
    assert lines_of_first == lines_of_second
    torch.testing.assert_close(torch.tensor(lines_of_first), torch.tensor(lines), atol=1e-3, rtol=0)


@pytest.mark.parametrize("place", [0, 1])
def test_a_part_has_the_tables_and_kernels_of_its_heads(monkeypatch, place):
    monkeypatch.setattr(cache_module, "tensor_parallel", lambda model: (place, 2))
    model, table = make_model(), [[3, 9], [5, 5], [12, 1]]
    kernels = make_kernels(model, rank=[1, 2, 5])
    cache = LessCache.for_model(model, H2O(1, 1), kernels, table)
    assert [[rule.budget for rule in layer.policy] for layer in cache.layers] == [[row[place]] for row in table]
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    for layer, whole in zip(cache.layers, kernels.layers):
        mine = slice(2 * place, 2 * place + 2)
        assert_close(layer.kernels.phi(x[:, mine]), whole.phi(x)[:, mine])


def test_what_cannot_be_shared_out_is_refused(monkeypatch, tmp_path):
    model = make_model()
    monkeypatch.setattr(cache_module, "tensor_parallel", lambda model: (0, 2))
    with pytest.raises(ValueError, match="pools over all heads of a layer"):
        LessCache.for_model(model, TOVA(4))
    cache = LessCache.for_model(model, H2O(2, 2))
    with pytest.raises(ValueError, match="heads on several processes"):
        cache.save(tmp_path / "cache")
    monkeypatch.setattr(cache_module, "tensor_parallel", lambda model: (0, 4))
    with pytest.raises(ValueError, match="2 KV heads cannot be shared out among 4"):
        LessCache.for_model(model, H2O(2, 2))


def test_layers_on_several_devices_each_hold_their_state_where_their_keys_are():
    """The meta device stands in for a second one: it has no numbers, but a place."""
    layers = LessCache.for_model(make_model(), H2O(2, 2), make_kernels(make_model())).layers
    for layer, device in zip(layers, ("cpu", "meta", "cpu")):
        layer.allocate(1, 4, 2, 8, torch.float32, torch.device(device))
    assert [layer.state.n.device.type for layer in layers] == ["cpu", "meta", "cpu"]
    assert [layer.kernels.q1.device.type for layer in layers] == ["cpu", "meta", "cpu"]
