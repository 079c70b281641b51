"""Which decoders of transformers LESS serves, measured on tiny random models: python -m paper_checks.architectures [TYPE ...]

Every causal language model of the installed transformers is made small, in float32. With room for everything LESS must give the
full cache's tokens and logits, padded rows included; with a small budget the first layer that is LESS's must hold what
less_ref holds. A model that is refused says why. --out writes the table.
"""

import argparse
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import less_ref
from less_fast import H2O, LessCache
from less_fast.files import write_text
from less_fast.hf.architecture import less_layers

from . import script

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, head_dim=8, max_position_embeddings=256, sliding_window=6, rotary_dim=4,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, num_kv_heads=2, eos_token_id=2, bos_token_id=1,
    pad_token_id=0, n_embd=32, n_layer=4, n_head=4, n_positions=256, n_inner=48, d_model=32, n_layers=4, n_heads=4, num_layers=4,
    num_heads=4, ffn_dim=48, word_embed_proj_dim=32, embedding_size=32, attention_chunk_size=6, moe_intermediate_size=16,
    num_local_experts=4, num_experts=4, num_experts_per_tok=2, n_routed_experts=4, shared_expert_intermediate_size=16,
    first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1,
    topk_group=1, state_size=8, time_step_rank=4, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, lru_width=32,
    global_head_dim=8, num_global_key_value_heads=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
    decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=2, encoder_attention_heads=4,
    encoder_ffn_dim=48, num_query_groups=2,
)  # fmt: skip
"""What a config may be asked for, each taken where it knows the name."""

MLA = dict(num_key_value_heads=4, qk_nope_head_dim=4)
OWN = dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), MLA) | {
    "bamba": dict(attn_layer_indices=[1, 3]),
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma4_text": dict(layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "ministral3": dict(sliding_window=None),
    "mistral": dict(sliding_window=None),
    "mixtral": dict(sliding_window=None),
    "phi3": dict(sliding_window=None),
    "recurrent_gemma": dict(num_key_value_heads=1),
    "starcoder2": dict(sliding_window=None),
    "xglm": dict(scale_embedding=False),
}
"""What a type wants besides, or else has no full attention: a window in every layer would leave LESS nothing to do."""

KNOWN = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt", "gpt2", "gpt_oss", "olmo2",
    "stablelm", "starcoder2", "cohere", "granite", "falcon",
}  # fmt: skip
"""Each is tested."""

ROOM, SMALL = H2O(heavy=40, recent=40), H2O(heavy=3, recent=4)
PROMPT, LENGTH = 12, 24


def tiny(model_type: str, **changes):
    """A random model of the type with a few layers of a few heads, float32."""
    kind = CONFIG_MAPPING[model_type]
    torch.manual_seed(0)
    config = kind(**_known(kind) | OWN.get(model_type, {}) | changes)
    text = config.get_text_config(decoder=True)
    if text is not config:
        config = kind(**_known(kind), text_config=type(text)(**_known(type(text))))
    with torch.device("meta"):
        count = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if count > 3e7:
        raise MemoryError(f"its config does not become small: {count / 1e6:.0f} million parameters")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and weight.numel() < 1e6:
            weight.mul_(3)  # attention of a fresh model is nearly uniform: sharpen it
        if name.endswith("sinks"):
            weight.normal_()
    return model


def _known(kind):
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", ())}
    return {name: size for name, size in SIZES.items() if name in known}


@dataclass
class Row:
    """What was measured: of how many layers LESS serves how many, the largest difference of logits, of padded logits and from the
    reference, each relative to the largest value; or why not."""

    model_type: str
    layers: str = ""
    full: float | None = None
    padded: float | None = None
    reference: float | None = None
    refused: str = ""


def measure(model_type: str) -> Row:
    """ValueError (LESS refuses it) becomes a row; anything else that a model raises without LESS is raised."""
    model = tiny(model_type)
    ids = torch.randint(1, SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    wanted = [feed(model, ids, pads, DynamicCache(config=model.config)) for pads in (None, mask)]
    try:
        got = [feed(model, ids, pads, LessCache.for_model(model, ROOM)) for pads in (None, mask)]
        reference = from_reference(model, ids[:1])
    except ValueError as why:
        return Row(model_type, refused=" ".join(str(why).split()))
    served, layers = len(less_layers(model)), len(DynamicCache(config=model.config).layers)
    real = mask.bool()
    full, padded = difference(got[0], wanted[0]), difference(got[1][real], wanted[1][real])
    return Row(model_type, f"{served} of {layers}", full, padded, reference)


@torch.no_grad()
def feed(model, ids, mask, cache) -> torch.Tensor:
    """Logits of a prompt and of tokens that come one by one."""
    logits = []
    for now in [slice(PROMPT), *(slice(i, i + 1) for i in range(PROMPT, LENGTH))]:
        seen = None if mask is None else mask[:, : now.stop]
        logits.append(model(input_ids=ids[:, now], attention_mask=seen, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def from_reference(model, ids) -> float:
    """How far the first of LESS's layers is from the reference with a small budget, on the layer's own queries, keys and values:
    what lies before it has forgotten nothing."""
    cache, calls = LessCache.for_model(model, SMALL, chunk=1), []
    layer, attend = cache.less_layers[0], cache.less_layers[0].attend
    layer.attend = lambda *inputs: calls.append((*inputs, out := attend(*inputs))) or out
    feed(model, ids, None, cache)
    q, k, v, _, (logits, *_), out = zip(*calls)
    q, k, v, out = (torch.cat(x, 2)[0].double().numpy() for x in (q, k, v, out))  # (H, T, D)
    sinks = None if logits.sinks is None else logits.sinks.double().numpy()
    step = partial(less_ref.extend, attention=less_ref.Logits(logits.softcap, sinks))
    trace = less_ref.run(q, k, v, less_ref.H2O(**vars(SMALL)), scale=logits.scale, step=step)
    if any(layer.state.head(0, g)["position"].tolist() != kept.tolist() for g, kept in enumerate(trace.kept[-1])):
        return math.inf
    return difference(torch.from_numpy(out), torch.from_numpy(trace.out).transpose(0, 1))


def difference(got, wanted) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def measured(model_types) -> Iterator[Row | tuple[str, str]]:
    """A row for each, or (type, reason) where the model cannot be made small or does not run without LESS either."""
    for model_type in model_types:
        try:
            yield measure(model_type)
        except Exception as failure:
            yield model_type, f"{type(failure).__name__} {failure}".splitlines()[0][:160]


def summary(rows) -> str:
    """Types that fare alike in one line: served, then refused, and at last not tried."""
    groups: dict[tuple, list] = {}
    for row in rows:
        if not isinstance(row, Row):
            groups.setdefault((2, "not tried: no small model of it could be made, or run with any cache"), []).append(row[0])
        elif row.refused:
            why = re.sub(r"\b[A-Z]\w*(ForCausalLM|LMHeadModel|Decoder|ConditionalGeneration)\b", "it", row.refused).split(":")[0]
            why = re.sub("it needs a .* of transformers.*", "it needs cache layers of its own", why)
            groups.setdefault((1, f"refused: {why}"), []).append(row.model_type)
        else:
            layers = "all" if len({*row.layers.split(" of ")}) == 1 else "those with full attention"
            groups.setdefault((0, layers), []).append(row)
    lines = []
    for (kind, what), alike in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]))):
        figures = ["", ""]
        if kind == 0:
            figures = [f"{max(max(row.full, row.padded) for row in alike):.0e}", f"{max(row.reference for row in alike):.0e}"]
            alike = [row.model_type for row in alike]
        lines.append([", ".join(alike), str(len(alike)), what, *figures])
    return script.markdown(["types", "how many", "layers served", "from the full cache", "from less_ref"], lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all that are causal language models unless named")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for row in measured(chosen.types or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))):
        rows.append(row)
        print(row, flush=True)
    if chosen.out:
        head = HEAD.format(version=transformers.__version__, torch=torch.__version__)
        write_text(chosen.out, head + summary(rows))


HEAD = """# Architectures

Which decoders of transformers LESS serves. Every type of causal language model of transformers {version} was made small, with
random weights, in float32 (torch {torch}):

- With room for every token LESS has to give the full cache's logits, padded rows included.
- With a small budget its first layer has to give what `less_ref.py` does.

The last two columns are the largest differences, relative to the largest value. Each type by itself, with what it said:

    python -m paper_checks.architectures --out paper_checks/ARCHITECTURES.md

"""

if __name__ == "__main__":
    main()
