"""Small random models of every supported family, kernels for them, tokens and their kinds, and a tokenizer that talks."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

import less_ref
from less_fast import LayerKernels, LessKernels
from less_fast.demo import MODEL
from less_fast.hf.architecture import sizes
from less_fast.hf.seam import predictions
from less_fast.layer.features import Learned
from less_fast.layer.parallel import dense

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


def make_encoder_decoder():
    """A model that LESS does not serve."""
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def make_kernels(model, rank=3, hidden=5, family="paper", rho=None):
    torch.manual_seed(1)
    kernels = LessKernels(**sizes(model), rank=rank, hidden=hidden, family=family, rho=rho)
    with_rank = [layer for layer in kernels.layers if layer.rank or family == "none"]
    for layer in with_rank if rho else ():
        torch.nn.init.normal_(layer.rho.r0, std=0.3)
        torch.nn.init.normal_(layer.rho.r2, std=0.3)
    if family in ("paper", "exponential"):  # as trained: they start from the bare policy
        for layer in with_rank:
            torch.nn.init.normal_(layer.k3)
    return kernels.double().requires_grad_(False)


def tokens(*shape, seed=0):
    return torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def recorded(model, ids, index):
    """q, k, v and the scale of one layer under the full cache."""
    kept = {}

    def attention(layer, *qkv):
        kept[layer] = qkv
        return dense(*qkv)

    predictions(model, ids, attention)
    return kept[index]


def make_kinds(seed=0, size=SIZES["vocab_size"]):
    """A kind for each token id; what is in no table is of kind 0."""
    share = torch.tensor([0.6, 0.25, 0.15])
    return torch.multinomial(share, size, replacement=True, generator=torch.Generator().manual_seed(seed))


def reference_policy(policy, kinds=None, rho=None):
    """kinds (T,): of the tokens by position, and rho, for policies that ask."""
    more = dict(kinds=tuple(kinds)) if policy.needs == "kinds" else dict(rho=rho) if policy.needs == "rho" else {}
    return getattr(less_ref, type(policy).__name__)(**vars(policy), **more)


def reference_kernels(layer):
    """The kernels of one layer for the reference."""
    weights = {name: weight.detach().double().numpy() for name, weight in layer.state_dict().items() if "." not in name}
    if isinstance(layer, Learned):
        family = less_ref.Kernels if isinstance(layer, LayerKernels) else less_ref.Exponential
        return family(**weights)
    extra = {"Performer": dict(scale=layer.head_dim**-0.5), "Elu": dict(rank=layer.head_dim)}
    name = type(layer).__name__
    return getattr(less_ref, name)(**weights, **extra[name])


TEMPLATE = """{% for message in messages %}{{ '<|turn|>' + message.role + '\n' + message.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"""


def make_talking(template=TEMPLATE, **changes):
    """A model, and the embedded model's tokenizer with that chat template; `<|end|>` ends what the model says."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    tokenizer.chat_template = template
    model = make_model(vocab_size=len(tokenizer), **changes)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    return model, tokenizer


def reference_rho(layer):
    """The rho of one layer for the reference, or None."""
    weights = layer.rho and {name: weight.detach().double().numpy() for name, weight in layer.rho.state_dict().items()}
    return weights and less_ref.Rho(**weights)
