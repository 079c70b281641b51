"""Kernels that were trained: their files, and what of these is refused."""

import json

import pytest
import torch
from models import make_model, recorded, tokens
from safetensors.torch import load_file, save_file
from short_training import PAPER, POLICY, RECIPE, quick_training

from less_fast import LayerKernels, LessCache, LessKernels
from less_fast.hf.architecture import attention_modules
from less_fast.hub import CONFIG, WEIGHTS


@pytest.fixture(scope="module", params=[RECIPE, PAPER], ids=["exponential", "paper"])
def trained(request):
    return quick_training(recipe=request.param)


def test_recorded_tensors_give_the_models_own_attention_output():
    model = make_model().float()
    module, ids = attention_modules(model)[1], tokens(2, 12)
    seen = []
    hook = module.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    q, k, v, _ = recorded(model, ids, 1)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=module.scaling, enable_gqa=True)
    torch.testing.assert_close(full.transpose(1, 2).flatten(2), seen[0])


def test_dropout_acts_in_training_alone():
    kernels = LayerKernels(2, 2, 4)
    kernels.dropout = 0.5
    q = torch.randn(1, 2, 5, 4)
    assert not torch.equal(kernels.train().phi(q), kernels.phi(q))
    assert torch.equal(kernels.eval().phi(q), kernels.phi(q))


def test_saved_kernels_come_back_bit_for_bit_and_serve_their_model(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    again = LessKernels.from_pretrained(tmp_path)
    assert again.about == trained.about
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), trained.state_dict().values()))
    LessCache.for_model(make_model().float(), POLICY, again)


def test_a_folder_without_kernels_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"holds no kernels: {WEIGHTS} is missing"):
        LessKernels.from_pretrained(tmp_path)


def test_a_name_that_is_neither_folder_nor_repository_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository"):
        LessKernels.from_pretrained("nobody/nothing")


def test_a_name_without_an_owner_is_refused_without_asking_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match=r"no kernels at fourier: there is no such folder, and .* OWNER/NAME"):
        LessKernels.from_pretrained("fourier")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights, config: weights.popitem(), "do not fit their"),
        (lambda weights, config: config.update(rank=5), "do not fit their"),
        (lambda weights, config: config.update(colour=5), "do not fit their"),
        (lambda weights, config: next(iter(weights.values())).fill_(torch.nan), "hold NaN or infinite weights"),
    ],
    ids=["missing weight", "other rank", "unknown field", "NaN"],
)
def test_spoiled_kernel_files_are_refused(trained, tmp_path, spoil, message):
    trained.save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    spoil(weights, config)
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        LessKernels.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_cut_off_kernel_files_are_refused(trained, tmp_path, name):
    trained.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(ValueError, match="are broken, or do not fit their"):
        LessKernels.from_pretrained(tmp_path)
