"""Small random models of every supported family, kernels for them, and tokens."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from less_fast import LessKernels
from less_fast.hf import fingerprint, sizes

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)
FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def make_model(family="llama", **changes):
    extra = {"sliding_window": None} if family == "mistral" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**{**SIZES, **extra, **changes})).eval()
    with torch.no_grad():  # attention of a fresh model is nearly uniform: sharpen it
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
    return model.double()


def make_kernels(model, rank=3, hidden=5):
    torch.manual_seed(1)
    kernels = LessKernels(**sizes(model), rank=rank, hidden=hidden, about={"fingerprint": fingerprint(model)})
    for layer in kernels.layers:
        torch.nn.init.normal_(layer.k3)
    return kernels.double().requires_grad_(False)


def tokens(*shape, seed=0):
    return torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
