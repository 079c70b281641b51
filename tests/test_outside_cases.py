"""Situations that users reported, each with its kind: masks that contradict the past, autograd modes, gradients, other models,
weights that are no plain tensors, other processes, writers of one path, positions outside the cache."""

import copy
import io
import json
import pickle
import subprocess
import sys
import threading
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_kernels, make_kinds, make_model, tokens
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from less_fast import H2O, FastGen, LayerKernels, LayerState, LessCache, LessError, LessKernels, Window, extend
from less_fast.demo import MODEL
from less_fast.files import load_state, read, save_state
from less_fast.hf.architecture import less_layers
from less_fast.hf.identity import identity
from less_fast.hf.seam import predictions
from less_fast.layer.parallel import dense
from paper_checks.architectures import tiny

ROOT = Path(__file__).parent.parent
ROOM, SMALL = H2O(100, 100), H2O(3, 3)
KINDS = make_kinds()


@torch.no_grad()
def feed(model, ids, cache, mask=None, at_once=None):
    """Logits of tokens that come in chunks of `at_once`, all at once unless it says otherwise; mask: of all tokens, the past
    included."""
    before, logits = 0 if mask is None else mask.shape[1] - ids.shape[1], []
    for part in ids.split(at_once or ids.shape[1], 1):
        before += part.shape[1]
        now = None if mask is None else mask[:, :before]
        logits.append(model(input_ids=part, attention_mask=now, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def generate(model, ids, cache, new=4, **options):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)


def sharp(**changes):
    """A random Llama whose layers matter to each other, unlike those of a fresh one."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, **changes})
    return LlamaForCausalLM(config).eval()


# A mask that contradicts what was fed.


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma2", "gpt2", "qwen3_5_text"])
@pytest.mark.parametrize("change", ["a token masked later", "a pad unmasked"])
def test_a_mask_that_says_something_else_about_the_past_is_refused(name, change):
    model, ids, mask = tiny(name), tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    cache, straight = LessCache.for_model(model, ROOM), LessCache.for_model(model, ROOM)
    feed(model, ids[:, :9], cache, mask[:, :9], at_once=4)
    wrong = mask.clone()
    wrong[(1, 6) if change == "a token masked later" else (0, 2)] ^= 1
    with pytest.raises(LessError, match=r"one about the past, in rows \[(1|0)\].*or reset\(\) the cache and feed the whole text"):
        feed(model, ids[:, 9:], cache, wrong)
    cache.reset()
    wanted = feed(model, ids, straight, wrong)
    torch.testing.assert_close(feed(model, ids, cache, wrong), wanted)


def changed(operation, model, cache, mask, ids, folders):
    """The cache, which was fed ten columns, after the operation; and what it was fed then."""
    if operation == "swap":
        cache.batch_select_indices([1, 0])
        mask, ids = mask[[1, 0]], ids[[1, 0]]
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
        mask, ids = mask.repeat_interleave(2, 0), ids.repeat_interleave(2, 0)
    elif operation == "copy":
        cache = copy.deepcopy(cache)
    elif operation == "load":
        cache.save(path := folders.mktemp("changed") / "cache")
        cache = LessCache.load(path, model)
    elif operation == "reset":
        cache.reset()
        feed(model, ids[:, :10], cache, mask[:, :10])
    return cache, mask, ids


@given(
    bits=st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=2, max_size=2),
    at_once=st.integers(1, 10),
    chunk=st.sampled_from([None, 3]),
    operation=st.sampled_from(["none", "swap", "repeat", "copy", "load", "reset"]),
    row=st.integers(0, 1),
    column=st.integers(0, 9),
)
@settings(max_examples=60)
def test_masks_are_taken_if_and_only_if_they_repeat_what_was_fed(tmp_path_factory, bits, at_once, chunk, operation, row, column):
    model, mask, ids = make_model(num_hidden_layers=1), torch.tensor(bits).long(), tokens(2, 11)
    cache = LessCache.for_model(model, SMALL, chunk=chunk)
    feed(model, ids[:, :10], cache, mask[:, :10], at_once)
    cache, mask, ids = changed(operation, model, cache, mask, ids, tmp_path_factory)
    wrong = mask.clone()
    wrong[row, column] ^= 1
    with pytest.raises(LessError, match=rf"contradicts an earlier one about the past, in rows \[{row}\]"):
        feed(model, ids[:, 10:], copy.deepcopy(cache), wrong)
    feed(model, ids[:, 10:], cache, mask)


# Tokens of the past that are not those that were fed.


@pytest.mark.parametrize("operation", ["none", "swap", "repeat", "copy", "load", "reset", "join"])
@given(
    bits=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=2, max_size=2),
    at_once=st.integers(1, 10),
    row=st.integers(0, 1),
    column=st.integers(0, 9),
)
@settings(max_examples=8)
def test_a_text_is_gone_on_with_if_and_only_if_it_begins_with_what_was_fed(
    tmp_path_factory, bits, at_once, operation, row, column
):
    """`generate` has the whole text, and feeds what the cache has not seen. What stands at a pad is no part of it."""
    model, ids = make_model(num_hidden_layers=1), tokens(2, 12)
    mask = torch.cat([torch.tensor(bits).long(), torch.ones(2, 3, dtype=torch.long)], 1)
    cache = LessCache.for_model(model, SMALL)
    feed(model, ids[:, :10], cache, mask[:, :10], at_once)
    cache, mask, ids = changed(operation, model, cache, mask, ids, tmp_path_factory)
    if operation == "join":
        short = LessCache.for_model(model, SMALL)
        feed(model, ids[:1, 4:10], short, mask[:1, 4:10])
        cache, ids = LessCache.join([cache, short]), ids[[0, 1, 0]]
        mask = torch.cat([mask, torch.cat([torch.zeros(1, 4, dtype=torch.long), mask[:1, 4:]], 1)])
    other = ids.clone()
    other[row, column] = ids[row, column] % 90 + 1
    if mask[row, column]:
        with pytest.raises(LessError, match=rf"does not begin with the 10 tokens that this cache was fed, in rows \[{row}\]"):
            generate(model, other, copy.deepcopy(cache), new=1, attention_mask=mask)
    else:
        generate(model, other, copy.deepcopy(cache), new=1, attention_mask=mask)
    generate(model, ids, cache, new=3, attention_mask=mask)


def test_of_a_prompt_that_was_fed_as_embeddings_nobody_knows_the_tokens(tmp_path):
    model, ids = make_model(), tokens(1, 9)
    embedded = LessCache.for_model(model, ROOM)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids[:, :6]), past_key_values=embedded)
    embedded.save(tmp_path / "cache")
    other = ids.clone()
    other[0, 2] += 1
    for unknown in (LessCache.load(tmp_path / "cache", model), embedded):
        assert torch.equal(generate(model, other, unknown)[:, 9:], generate(model, ids, None)[:, 9:])
        unknown.reset()
        feed(model, ids[:, :6], unknown)
        with pytest.raises(LessError, match="does not begin with the 6 tokens"):
            generate(model, other, unknown)


@pytest.mark.parametrize("compiled", ["nothing", "steps", "whole model"])
def test_rows_that_ended_early_in_generate_cannot_be_masked_in_the_next_turn(compiled):
    model, ids = make_model(), tokens(2, 9)
    free = generate(model, ids, None, new=6)
    end = int(free[0, 11])  # row 0 ends after three tokens, and pads follow that `generate` feeds as tokens
    assert end not in free[1, 9:]
    cache, everywhere = LessCache.for_model(model, ROOM, compile=compiled == "steps"), CompileConfig(mode=None, fullgraph=True)
    everywhere._compile_all_devices = True
    said = generate(model, ids, cache, new=6, eos_token_id=end, compile_config=everywhere if compiled == "whole model" else None)
    assert (said[0, 12:] == 0).all()
    turn = torch.cat([said, tokens(2, 3, seed=1)], 1)
    with pytest.raises(LessError, match=r"rows that ended early in `generate`"):
        generate(model, turn, copy.deepcopy(cache), attention_mask=(turn != 0).long())
    with pytest.raises(LessError, match=r"in rows \[0\]"):
        generate(model, turn, copy.deepcopy(cache))  # it guesses the mask from the pads
    wanted = generate(model, turn, None, attention_mask=torch.ones_like(turn))
    assert torch.equal(generate(model, turn, cache, attention_mask=torch.ones_like(turn)), wanted)


def test_what_came_as_a_token_is_one_even_if_it_is_nan():
    model, ids = make_model(), tokens(1, 8).masked_fill(torch.arange(8) == 3, 13)
    with torch.no_grad():
        model.get_input_embeddings().weight[13] = torch.nan
    cache, mask = LessCache.for_model(model, ROOM), torch.ones(1, 8, dtype=torch.long)
    feed(model, ids[:, :6], cache, mask[:, :6])
    feed(model, ids[:, 6:7], cache, mask[:, :7])
    mask[0, 3] = 0
    with pytest.raises(LessError, match="contradicts an earlier one"):
        feed(model, ids[:, 7:], cache, mask)


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_no_mask_is_one_without_pads_unless_a_single_token_comes(name):
    """`generate` leaves masks without pads away."""
    model, ids, mask = tiny(name), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    padded, whole = LessCache.for_model(model, ROOM), LessCache.for_model(model, ROOM)
    feed(model, ids[:, :6], padded, mask[:, :6])
    with pytest.raises(LessError, match=r"nor a pad unmasked \(by no mask at all, for example\)"):
        feed(model, ids[:, 6:], copy.deepcopy(padded))
    with pytest.raises(LessError, match=r"in rows \[0\]"):
        generate(model, ids, copy.deepcopy(padded), attention_mask=torch.ones_like(ids))
    one, other = copy.deepcopy(padded), copy.deepcopy(padded)
    torch.testing.assert_close(feed(model, ids[:, 6:], one, at_once=1), feed(model, ids[:, 6:], other, mask))
    feed(model, ids[:, :6], whole)
    torch.testing.assert_close(
        feed(model, ids[:, 6:], copy.deepcopy(whole)), feed(model, ids[:, 6:], whole, torch.ones_like(ids))
    )


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_a_mask_that_does_not_cover_the_past_is_refused(name):
    model = tiny(name)
    cache = LessCache.for_model(model, ROOM)
    feed(model, tokens(1, 8), cache)
    with pytest.raises(LessError, match=r"covers 3 tokens, but 8 were seen before these 3: .*or reset\(\) the cache"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 3), past_key_values=cache, use_cache=True)


# Autograd modes.

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
OPERATIONS = ["go on", "reset", "select", "repeat", "copy", "load", "generate"]


def operate(model, cache, operation, kernels, path):
    if operation == "reset":
        cache.reset()
    elif operation == "select":
        cache.batch_select_indices([1, 0])
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
    elif operation == "copy":
        return copy.deepcopy(cache)
    elif operation == "load":
        cache.save(path)
        return LessCache.load(path, model, kernels)
    elif operation == "generate":
        generate(model, torch.cat([tokens(2, 9)] * 2, 1), cache)
    return cache


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("name", "policy"),
    [("llama", SMALL), ("llama", Window(999)), ("llama", FastGen(8, 2, 2, 0.6)), ("gemma2", SMALL), ("qwen3_5_text", SMALL)],
)
def test_a_prompt_in_one_autograd_mode_is_gone_on_with_in_any_other(tmp_path, name, policy, operation):
    def run(begin, between, after):
        model = tiny(name)
        with MODES[begin]():
            kernels = make_kernels(model).float() if name == "llama" and policy != Window(999) else None
            cache = LessCache.for_model(model, policy, kernels, token_kinds=KINDS)
            model(input_ids=tokens(2, 9), past_key_values=cache)
        with MODES[between]():
            cache = operate(model, cache, operation, kernels, tmp_path / "cache")
        with MODES[after]():
            ids = tokens(2, 4, seed=1).repeat_interleave(2 if operation == "repeat" else 1, 0)
            return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(3, 1)], 1).detach()

    if (name, operation) == ("qwen3_5_text", "load"):
        pytest.skip("recurrent layers are not saved")
    wanted = run("no_grad", "no_grad", "no_grad")
    for modes in product(MODES, repeat=3):
        assert torch.equal(run(*modes), wanted), modes


@pytest.mark.parametrize("operation", ["go on", "reset", "reorder", "load"])
@pytest.mark.parametrize("policy", [SMALL, Window(999), FastGen(8, 2, 2, 0.6)], ids=repr)
def test_a_layers_state_goes_on_in_any_autograd_mode(tmp_path, policy, operation):
    def tokens_of(seed):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(2, heads, 7, 8, generator=generator) for heads in (4, 2, 2))
        return q, k, v, torch.randint(0, 3, (2, 7), generator=generator)

    def go_on(state, q, k, v, kinds):
        return extend(state, q, k, v, kinds=kinds)

    def run(begin, between, after):
        with MODES[begin]():
            torch.manual_seed(0)
            kernels = None if policy == Window(999) else LayerKernels(4, 2, 8, 3, 5).requires_grad_(False)
            state = LayerState.allocate(policy, 2, 4, 2, 8, kernels)
            go_on(state, *tokens_of(0))
        with MODES[between]():
            if operation == "reset":
                state.reset()
            elif operation == "reorder":
                state.reorder(torch.tensor([1, 0]))
            elif operation == "load":
                save_state(state, tmp_path / "layer")
                load_state(state, tmp_path / "layer")
        with MODES[after]():
            out = [go_on(state, *tokens_of(1))]
            one = [x[:, :, :1] if x.ndim == 4 else x[:, :1] for x in tokens_of(2)]
            return torch.cat([*out, go_on(state, *one)], 2).clone()

    wanted = run("no_grad", "no_grad", "no_grad")
    for modes in product(MODES, repeat=3):
        assert torch.equal(run(*modes), wanted), modes


# Gradients.


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma2"])
@pytest.mark.parametrize("of", ["a soft prompt", "the weights"])
def test_gradients_through_the_cache_are_refused_and_inference_is_not(name, of):
    model, cache = tiny(name).requires_grad_(of == "the weights"), None
    for policy in (SMALL, Window(999)):
        cache = LessCache.for_model(model, policy)
        feed(model, tokens(1, 9), cache)
        soft = model.get_input_embeddings()(tokens(1, 4)).detach().requires_grad_(of == "a soft prompt")
        twin = copy.deepcopy(cache)
        logits = model(inputs_embeds=soft, past_key_values=cache, use_cache=True).logits
        with pytest.raises(LessError, match="carries no gradients: train without it"):
            logits.sum().backward()
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=soft, past_key_values=twin, use_cache=True).logits, logits)
        assert not any(tensor.requires_grad for layer in cache.less_layers for _, tensor in layer.state.tensors().items())


# Which model it is.


def change(model, what):
    """The model, changed in a way that decides what a cache holds."""
    layers = model.model.layers
    with torch.no_grad():
        if what.startswith("noise"):
            generator = torch.Generator().manual_seed(int(what[-1]))
            for weight in model.parameters():
                weight += torch.randn(weight.shape, generator=generator).to(weight) * weight.std().nan_to_num() * 0.05
        elif what == "MLPs":
            for layer in layers:
                layer.mlp.down_proj.weight *= 1.3
        elif what == "one layer's keys":
            layers[1].self_attn.k_proj.weight *= 1.05
        elif what == "rotation":
            frequencies = model.model.rotary_emb.inv_freq
            frequencies.copy_(500_000 ** -torch.linspace(0, 1, len(frequencies) + 1)[:-1])
        elif what == "adapter":
            for layer in layers:
                layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
                layer.self_attn.k_proj = Adapted(layer.self_attn.k_proj)
        elif what == "norms":
            layers[0].input_layernorm.weight[:7] *= 1.5
        elif what == "embeddings":
            model.get_input_embeddings().weight += 0.1 * model.get_input_embeddings().weight.roll(1, 0)
    return model


class Adapted(torch.nn.Module):
    """A linear layer with an adapter of rank 2, as LoRA has."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        generator = torch.Generator().manual_seed(1)
        down, up = ((2, inner.in_features), (inner.out_features, 2))
        scale = inner.weight.std() * 0.3
        self.down = torch.nn.Parameter(torch.randn(down, generator=generator).to(inner.weight) * scale)
        self.up = torch.nn.Parameter(torch.randn(up, generator=generator).to(inner.weight))

    def forward(self, x):
        return self.inner(x) + x @ self.down.T @ self.up.T


class Hidden(torch.nn.Module):
    """A linear layer whose weight is no attribute of that name, as quantised ones have it."""

    def __init__(self, inner):
        super().__init__()
        self.packed, self.scale = torch.nn.Buffer((inner.weight.detach() * 64).round().to(torch.int8)), 1 / 64

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) * self.scale).T


def quantised(model, way):
    """The same model with weights in int8, by torch or by hand."""
    if way == "torch":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    for layer in model.model.layers:
        for part in "qkv":
            setattr(layer.self_attn, f"{part}_proj", Hidden(getattr(layer.self_attn, f"{part}_proj")))
    return model


def embedded(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()


def kernels_for(model):
    sizes = dict(layers=model.config.num_hidden_layers, query_heads=4, kv_heads=model.config.num_key_value_heads)
    head_dim = model.model.layers[0].self_attn.head_dim
    return LessKernels(**sizes, head_dim=head_dim, family="elu", about={"identity": json.loads(json.dumps(identity(model)))})


ALIKE = {
    "itself": lambda make: make(),
    "loaded in bfloat16": lambda make: make().bfloat16(),
    "turned to float16": lambda make: make().half(),
    "in float64": lambda make: make().double(),
    "quantised": lambda make: quantised(make(), "torch"),
    "with other attention": lambda make: set_attention(make(), "eager"),
    "in train mode": lambda make: make().train(),
}
CHANGES = ["noise 0", "noise 1", "noise 2", "MLPs", "one layer's keys", "rotation", "adapter"]


def set_attention(model, way):
    model.set_attn_implementation(way)
    return model


@pytest.mark.parametrize("make", [embedded, sharp], ids=["the embedded model", "random"])
def test_kernels_serve_their_model_in_any_precision_and_no_other(make):
    kernels = kernels_for(make())
    for name, alike in ALIKE.items():
        assert LessCache.for_model(alike(make), SMALL, kernels), name
    for what in CHANGES:
        with pytest.raises(LessError, match=r"another model of the same shape: .*differ from this model's by .*`less-kv train`"):
            LessCache.for_model(change(make(), what), SMALL, kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_is_loaded_into_the_model_that_saved_it_and_into_no_other(tmp_path, dtype):
    model = sharp().to(dtype)
    cache = LessCache.for_model(model, SMALL)
    feed(model, tokens(1, 9), cache)
    cache.save(tmp_path / "cache")
    twin, more = sharp().to(dtype), tokens(1, 3)
    assert torch.equal(feed(twin, more, LessCache.load(tmp_path / "cache", twin)), feed(model, more, cache))
    for what in [*CHANGES, "norms", "embeddings"]:
        with pytest.raises(LessError, match=r"was saved with another model: .* with the same adapters and quantisation"):
            LessCache.load(tmp_path / "cache", change(sharp().to(dtype), what))


def test_rotations_that_differ_only_far_from_the_beginning_are_told_apart(tmp_path):
    model = sharp(max_position_embeddings=4096)
    cache = LessCache.for_model(model, SMALL)
    feed(model, tokens(1, 9), cache)
    cache.save(tmp_path / "cache")
    other = sharp(max_position_embeddings=4096)
    other.model.rotary_emb.inv_freq[-1] *= 1.3  # the slowest rotation
    with pytest.raises(LessError, match="was saved with another model"):
        LessCache.load(tmp_path / "cache", other)
    scaled = sharp(max_position_embeddings=4096, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=1.001))
    with pytest.raises(LessError, match='its rope_type is "default", and this model\'s is "linear"'):
        LessCache.load(tmp_path / "cache", scaled)


@pytest.mark.parametrize("way", ["torch", "by hand"])
def test_a_quantised_model_is_served_saved_loaded_and_told_from_others(tmp_path, way):
    model = quantised(sharp(), way)
    for kernels in (None, kernels_for(sharp())):
        cache = LessCache.for_model(model, SMALL, kernels)
        said = generate(model, tokens(1, 9), cache)
        cache.save(tmp_path / "cache")
        loaded = LessCache.load(tmp_path / "cache", model, kernels)
        turn = torch.cat([said, tokens(1, 2)], 1)
        assert torch.equal(generate(model, turn, loaded), generate(model, turn, cache))
        for other in (sharp(), quantised(change(sharp(), "MLPs"), way)):
            with pytest.raises(LessError, match="was saved with another model"):
                LessCache.load(tmp_path / "cache", other, kernels)


def test_an_offloaded_model_is_served_saved_and_loaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    wanted, kernels = identity(model), make_kernels(make_model())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert identity(model) == wanted
    for policy in (SMALL, FastGen(8, 2, 2, 0.6)):
        cache = LessCache.for_model(model, policy, token_kinds=KINDS)
        feed(model, tokens(1, 9), cache)
        cache.save(tmp_path / "cache")
        more = tokens(1, 3)
        assert torch.equal(feed(model, more, LessCache.load(tmp_path / "cache", model)), feed(model, more, cache))
    assert LessCache.for_model(model, SMALL, kernels)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "falcon", "gpt2", "opt", "qwen3_5_text", "mixtral", "phi3"])
@pytest.mark.parametrize("mode", MODES)
def test_the_probe_leaves_every_model_as_it_was(name, mode):
    model, seen = tiny(name).train(), []
    model.get_decoder().register_forward_hook(lambda *_: seen.append(1))
    LessCache.for_model(copy.deepcopy(model).eval(), SMALL)

    def everything():
        held = {f"{name}.{key}": id(x) for name, module in model.named_modules() for key, x in vars(module).items()}
        tensors = {key: x.sum().item() for key, x in [*model.state_dict().items(), *model.named_buffers()]}
        attention = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
        return (
            held,
            tensors,
            attention,
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    with MODES[mode]():
        before = everything()
        one, other = identity(model), identity(model)
        assert everything() == before
    assert one == other
    assert len(one["layers"]) == len(less_layers(model))
    assert len(seen) == 2


def test_the_probe_and_a_cache_in_use_do_not_meet():
    model, ids = make_model(), tokens(1, 12)
    wanted, alone = feed(model, ids, LessCache.for_model(model, SMALL), at_once=4), identity(make_model())
    cache, logits = LessCache.for_model(model, SMALL), []
    for part in ids.split(4, 1):
        logits.append(feed(model, part, cache))
        assert identity(model) == alone
    assert torch.equal(torch.cat(logits, 1), wanted)


def test_the_probe_runs_models_whose_layers_are_compiled_without_compiling_anything():
    model = make_model()
    for layer in model.model.layers:
        layer.compile()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    assert identity(model) == identity(make_model())
    assert counters["unique_graphs"] == before


def test_a_model_that_does_not_run_is_refused_and_left_as_it_was():
    model = make_model()
    kernels = kernels_for(make_model())
    model.model.layers[1].mlp.forward = None
    with pytest.raises(
        LessError, match="a forward pass over 16 tokens fails, so LlamaForCausalLM cannot be identified: make it run"
    ):
        LessCache.for_model(model, SMALL, kernels)
    assert model.config._attn_implementation != "less"


def test_kernels_of_an_earlier_version_that_tell_their_model_by_its_weights_are_refused():
    kernels = kernels_for(make_model())
    kernels.about = {"fingerprint": [1.0, 2.0, 3.0]}
    with pytest.raises(LessError, match="do not tell what their model computes: train them anew"):
        LessCache.for_model(make_model(), SMALL, kernels)


def test_kernels_whose_identity_is_broken_are_refused():
    for broken in ({}, {"rope": {}, "layers": ["1 2 3"] * 3}, {"rope": {}, "layers": [None] * 3}, [1], None):
        kernels = kernels_for(make_model())
        kernels.about["identity"] = broken
        with pytest.raises(LessError, match="another model of the same shape: what is known of that one is broken"):
            LessCache.for_model(make_model(), SMALL, kernels)
    kernels.about["identity"] = {"rope": {}, "layers": identity(make_model())["layers"][:2]}
    with pytest.raises(LessError, match="it has 2 layers with full attention, and this model 3"):
        LessCache.for_model(make_model(), SMALL, kernels)


def test_nan_in_the_weights_is_another_model():
    kernels, model = kernels_for(make_model()), make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(LessError, match="another model of the same shape"):
        LessCache.for_model(model, SMALL, kernels)


def layer_state(rows=2, kernels=None, policy=SMALL):
    state = LayerState.allocate(policy, rows, 4, 2, 8, kernels)
    extend(state, *(torch.randn(rows, heads, 9, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)))
    return state


def test_a_layer_is_loaded_only_into_a_state_of_as_many_rows_and_the_same_kernels(tmp_path):
    torch.manual_seed(0)
    kernels, others = (LayerKernels(4, 2, 8, 3, 5).requires_grad_(False) for _ in range(2))
    for torch_kernels in (kernels, None):
        save_state(layer_state(2, torch_kernels), tmp_path / "layer")
        wrong = [(layer_state(3, torch_kernels), "of 2 rows, not of 3 rows")]
        wrong += [(layer_state(2, others), "kernels")] if torch_kernels else []
        for state, match in wrong:
            before = [tensor.clone() for _, tensor in state.tensors().items()]
            with pytest.raises(LessError, match=match):
                load_state(state, tmp_path / "layer")
            assert all(torch.equal(a, b) for a, (_, b) in zip(before, state.tensors().items(), strict=True))
        state = LayerState.allocate(SMALL, 2, 4, 2, 8, torch_kernels)
        load_state(state, tmp_path / "layer")
        saved = dict(layer_state(2, torch_kernels).tensors().items())
        assert all(torch.equal(tensor, saved[name]) for name, tensor in state.tensors().items())


@pytest.mark.parametrize(("length", "other", "taken"), [(20, 16, False), (20, 4, False), (6, 16, True), (6, 4, False)])
def test_a_sliding_window_is_loaded_into_a_model_of_that_window(tmp_path, length, other, taken):
    """With weights that cannot tell windows apart: the layers with windows put out nothing."""

    def windowed(window):
        model = tiny("gemma2", sliding_window=window)
        with torch.no_grad():
            for layer in model.model.layers[::2]:
                layer.self_attn.o_proj.weight.zero_()
        return model

    model = windowed(8)
    cache = LessCache.for_model(model, SMALL)
    feed(model, tokens(1, length), cache)
    cache.save(tmp_path / "cache")
    LessCache.load(tmp_path / "cache", windowed(8))
    if taken:
        LessCache.load(tmp_path / "cache", windowed(other))
    else:
        with pytest.raises(LessError, match=f"this model's window of {other} would hold .* that it was saved with"):
            LessCache.load(tmp_path / "cache", windowed(other))


# Other processes, and copies.


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_model_that_has_had_a_cache_generates_in_another_process(tmp_path, name):
    model = tiny(name, original_max_position_embeddings=20) if name == "phi3" else tiny(name)
    wanted = generate(model, tokens(1, 9), LessCache.for_model(model, SMALL)).tolist()
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)\n"
        "model.generate(ids, **options)\n"
        "from less_fast import H2O, LessCache\n"
        "print(model.generate(ids, past_key_values=LessCache.for_model(model, H2O(3, 3)), **options).tolist())\n"
        "cache = LessCache.for_model(model, H2O(3, 3))\n"
        "try:\n    model.generate(ids.repeat(1, 4), past_key_values=cache, **options)\n"
        "except ValueError as error:\n    print(error)"
    )
    ids = str(tokens(1, 9).tolist())
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model", ids], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr[-2000:]
    said, *refusal = done.stdout.splitlines()
    assert json.loads(said) == wanted
    assert (["drops its cache there" in line for line in refusal] == [True]) == (name == "phi3")


@pytest.mark.parametrize("name", ["gemma2", "llama", "qwen3_5_text"])
@pytest.mark.parametrize("call", [lambda cache: cache.crop(-2), lambda cache: cache.activate_past_recording()])
def test_a_refused_crop_leaves_every_layer_as_it_was(name, call):
    """Those before the first of LESS's, too."""
    model, ids = tiny(name), tokens(1, 15)
    cache = LessCache.for_model(model, ROOM)
    feed(model, ids[:, :12], cache)
    twin = copy.deepcopy(cache)
    with pytest.raises(LessError, match="cannot be cropped"):
        call(cache)
    assert torch.equal(feed(model, ids[:, 12:], cache), feed(model, ids[:, 12:], twin))


def test_a_cache_is_not_pickled_and_says_what_to_do():
    cache = LessCache.for_model(make_model(), SMALL)
    for attempt in (pickle.dumps, copy.copy, lambda cache: torch.save(cache, io.BytesIO())):
        with pytest.raises(TypeError, match=r"a LessCache is not pickled.*: save\(path\) it, and LessCache.load it there"):
            attempt(cache)


@pytest.mark.parametrize(
    ("name", "policy"),
    [("llama", SMALL), ("llama", Window(999)), ("llama", FastGen(8, 2, 2, 0.6)), ("gemma2", SMALL), ("qwen3_5_text", SMALL)],
)
@pytest.mark.parametrize("mode", MODES)
def test_copies_of_a_cache_go_on_independently_and_share_the_model_and_the_kernels(name, policy, mode):
    model = tiny(name)
    kernels = make_kernels(model).float() if name == "llama" and policy != Window(999) else None
    cache = LessCache.for_model(model.requires_grad_(True), policy, kernels, token_kinds=KINDS)
    with MODES[mode]():
        model(input_ids=tokens(2, 12), past_key_values=cache)
        twin = copy.deepcopy(cache)
    assert twin.model() is model
    assert all(a.kernels is b.kernels for a, b in zip(twin.less_layers, cache.less_layers))
    assert twin.setting is cache.setting
    one, other = (feed(model, tokens(2, 6, seed=seed), either, at_once=3) for seed, either in ((1, cache), (2, twin)))
    for seed, logits in ((1, one), (2, other)):
        alone = LessCache.for_model(model, policy, kernels, token_kinds=KINDS)
        feed(model, tokens(2, 12), alone)
        assert torch.equal(feed(model, tokens(2, 6, seed=seed), alone, at_once=3), logits)


@pytest.mark.parametrize("by", ["threads", "processes"])
def test_several_writers_of_one_path_leave_one_whole_file(tmp_path, by):
    model = make_model()
    caches = [LessCache.for_model(model, ROOM) for _ in range(3)]
    for seed, cache in enumerate(caches):
        feed(model, tokens(1, 9, seed=seed), cache)
    if by == "threads":
        failures = []

        def save(cache):
            try:
                for _ in range(15):
                    cache.save(tmp_path / "cache")
            except Exception as error:
                failures.append(error)

        writers = [threading.Thread(target=save, args=(cache,)) for cache in caches]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert not failures
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1  # threads leave torch.compile as it was
    else:
        code = (
            "import sys, torch\nfrom less_fast import LayerState, H2O, save_state\n"
            "state = LayerState.allocate(H2O(3, 3), 1, 4, 2, 8)\n"
            "[save_state(state, sys.argv[1]) for _ in range(200)]"
        )
        run = [sys.executable, "-c", code, tmp_path / "cache"]
        writers = [subprocess.Popen(run, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    read(tmp_path / "cache")


# Positions that the model keeps outside the cache.


def image_model():
    torch.manual_seed(0)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ends = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
    text = dict(vocab_size=120, initializer_range=0.3, rope_parameters=rope, **sizes, **ends)
    vision = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, spatial_merge_size=1, temporal_patch_size=2, mlp_ratio=1)
    special = dict(image_token_id=119, video_token_id=118, vision_start_token_id=117, vision_end_token_id=116)
    config = Qwen2VLConfig(text_config=text, vision_config=dict(patch_size=14, **vision), **special)
    return Qwen2VLForConditionalGeneration(config).eval()


TEXT, MORE = tokens(1, 15) % 90 + 3, tokens(1, 6, seed=1) % 90 + 3
IMAGE = torch.cat([TEXT[:, :3], torch.tensor([[117] + [119] * 16 + [116]]), TEXT[:, 3:]], 1)  # of 4 x 4
PIXELS = dict(
    pixel_values=torch.randn(16, 1176, generator=torch.Generator().manual_seed(0)), image_grid_thw=torch.tensor([[1, 4, 4]])
)


def see(model, ids, cache, pixels=None):
    """Four logits that `generate` finds."""
    options = dict(attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 119).int(), **pixels or {})
    out = generate(model, ids, cache, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("turns", [[TEXT], [IMAGE], [TEXT, MORE], [IMAGE, MORE], [TEXT, IMAGE], [TEXT, IMAGE, MORE]], ids=len)
def test_texts_with_images_are_served_turn_by_turn(turns):
    def run(make):
        model = image_model()
        cache, ids, logits = make(model), torch.zeros(1, 0, dtype=torch.long), []
        for turn in turns:
            ids, new = see(model, torch.cat([ids, turn], 1), cache, PIXELS if turn is IMAGE else None)
            logits.append(new)
        return torch.cat(logits)

    wanted = run(lambda model: DynamicCache(config=model.config))
    torch.testing.assert_close(run(lambda model: LessCache.for_model(model, ROOM)), wanted, atol=1e-4, rtol=1e-4)


STALE = r"positions of another text than this cache's \(model.rope_deltas\).*reset\(\) the cache"


@pytest.mark.parametrize("first", [TEXT, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("way", ["generate", "forward"])
def test_texts_that_take_turns_on_a_model_with_positions_of_its_own_are_refused(first, way):
    model, second = image_model(), IMAGE if first is TEXT else TEXT
    one, other = LessCache.for_model(model, ROOM), LessCache.for_model(model, ROOM)
    ids, _ = see(model, first, one, PIXELS if first is IMAGE else None)
    see(model, second, other, PIXELS if second is IMAGE else None)
    with pytest.raises(LessError, match=STALE):
        see(model, torch.cat([ids, MORE], 1), one) if way == "generate" else feed(model, MORE, one)
    see(model, torch.cat([second, MORE, MORE], 1), other)  # the one that came last goes on


def test_a_text_on_a_model_that_still_holds_positions_of_an_image_is_refused():
    model = image_model()
    wanted = feed(image_model(), TEXT, DynamicCache(config=model.config))
    see(model, IMAGE, LessCache.for_model(model, ROOM), PIXELS)
    with pytest.raises(LessError, match=STALE):
        feed(model, TEXT, LessCache.for_model(model, ROOM), at_once=9)
    model.model.rope_deltas = None
    torch.testing.assert_close(feed(model, TEXT, LessCache.for_model(model, ROOM), at_once=9), wanted, atol=1e-4, rtol=1e-4)


def test_a_saved_text_goes_on_in_a_model_without_positions_of_an_image_and_an_image_is_not_saved(tmp_path):
    model = image_model()
    cache, pictured = LessCache.for_model(model, ROOM), LessCache.for_model(model, ROOM)
    ids, _ = see(model, TEXT, cache)
    cache.save(tmp_path / "text")
    ids = torch.cat([ids, MORE], 1)
    _, wanted = see(model, ids, cache)
    fresh = image_model()
    assert torch.equal(see(fresh, ids, LessCache.load(tmp_path / "text", fresh))[1], wanted)
    see(fresh, IMAGE, LessCache.for_model(fresh, ROOM), PIXELS)
    with pytest.raises(LessError, match=STALE):
        see(fresh, ids, LessCache.load(tmp_path / "text", fresh))
    see(model, IMAGE, pictured, PIXELS)
    with pytest.raises(LessError, match=r"cannot be saved: it has positions that the model keeps outside the cache \(model\)"):
        pictured.save(tmp_path / "image")


def test_rows_and_their_positions_are_selected_together():
    model = image_model()
    both = torch.cat([IMAGE, tokens(1, IMAGE.shape[1], seed=5) % 90 + 3])
    cache = LessCache.for_model(model, ROOM)
    with torch.no_grad():
        model(input_ids=both, past_key_values=cache, mm_token_type_ids=(both == 119).int(), **PIXELS)
    swapped, repeated, more = copy.deepcopy(cache), copy.deepcopy(cache), MORE.repeat(2, 1)
    swapped.batch_select_indices([1, 0])
    repeated.batch_repeat_interleave(2)
    wanted = feed(model, more, cache)
    torch.testing.assert_close(feed(model, more.repeat(2, 1), repeated), wanted.repeat_interleave(2, 0))
    with pytest.raises(LessError, match=STALE):
        feed(model, more, swapped)
    swapped.reset()
    model.model.rope_deltas = None
    feed(model, more, swapped)


DYNAMIC = dict(max_position_embeddings=24, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))


def test_a_rotation_that_another_text_has_stretched_is_refused(tmp_path):
    model, long, short = make_model(**DYNAMIC), tokens(1, 40), tokens(1, 20)
    wanted = feed(make_model(**DYNAMIC), long, DynamicCache(), at_once=10)
    one, other = LessCache.for_model(model, ROOM), LessCache.for_model(model, ROOM)
    assert not one.is_compileable
    feed(model, short, one)
    one.save(tmp_path / "short")
    torch.testing.assert_close(feed(model, long, other, at_once=10), wanted)
    stretched = model.model.rotary_emb.inv_freq.clone()
    with pytest.raises(LessError, match=r"positions of another text than this cache's \(model.rotary_emb.max_seq_len_cached\)"):
        feed(model, short[:, :1], one)
    with pytest.raises(LessError, match=r"positions of another text|saved with another model"):  # some versions leave it so
        feed(model, short[:, :1], LessCache.load(tmp_path / "short", model))
    with pytest.raises(LessError, match="cannot be saved: it has positions that the model keeps"):
        other.save(tmp_path / "long")
    identity(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, stretched)
    feed(model, short[:, :1], other)


def test_a_rotation_that_changes_beyond_a_length_is_refused_in_a_loop_of_ones_own():
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    rope |= dict(original_max_position_embeddings=24, factor=2.0)
    model = make_model(max_position_embeddings=48, rope_parameters=rope)
    cache = LessCache.for_model(model, ROOM)
    feed(model, tokens(1, 20), cache)
    with pytest.raises(LessError, match=r"rotates keys in another way beyond 24 tokens, .* stay below that length"):
        feed(model, tokens(1, 10), cache, at_once=1)
    beyond, frequencies = LessCache.for_model(model, ROOM), model.model.rotary_emb.inv_freq.clone()
    assert identity(model)["layers"]
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    wanted = feed(model, tokens(1, 35), DynamicCache(), at_once=30)
    torch.testing.assert_close(feed(model, tokens(1, 35), beyond, at_once=30), wanted)


# Lengths, and what refusals say.


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_the_length_of_a_cache_is_an_int(name):
    model = tiny(name)
    cache = LessCache.for_model(model, SMALL)
    for length in (0, 7):
        assert json.dumps([cache.get_seq_length(), [layer.get_seq_length() for layer in cache.layers]])
        assert cache.get_seq_length() == length
        feed(model, tokens(1, 7), cache)


def test_refusals_say_what_to_do(tmp_path):
    model, ids = make_model().float(), tokens(1, 9)
    cache = LessCache.for_model(model, SMALL)

    def refused(match, call):
        with pytest.raises(LessError, match=match):
            call()
        cache.reset()

    with torch.autocast("cpu", torch.bfloat16):
        refused("bring them to one dtype, and leave torch.autocast", lambda: model(ids, past_key_values=cache))
    own = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    refused("leave out masks of your own, token_type_ids", lambda: model(ids, attention_mask=own, past_key_values=cache))
    feed(model, ids, cache)
    refused(r"new tokens behind it, or reset\(\) the cache before another text", lambda: generate(model, ids[:, :4], cache))
    feed(model, ids, cache)
    refused(r"no new tokens came after the 9 .* or reset\(\) the cache", lambda: generate(model, ids, cache))
    feed(model, ids, cache)
    refused(r"no new tokens came after the 9 .* or reset\(\) the cache", lambda: generate(model, ids[:, :8], cache))
    refused("so leave it out", lambda: model(ids, past_key_values=cache, output_attentions=True))
    refused("leave out the assistant, or save the cache before", lambda: cache.crop(1))
    gone = LessCache.for_model(tiny("llama"), SMALL)
    refused("its model is gone.*; save it before", lambda: gone.save(tmp_path / "gone"))


def test_token_type_ids_of_images_are_refused_with_what_to_leave_out():
    gemma = pytest.importorskip("transformers.models.gemma3").Gemma3ForConditionalGeneration
    text = tiny("gemma3_text").config.to_dict()
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model, ids = gemma(config).eval(), tokens(1, 9)
    kinds = torch.zeros_like(ids)
    kinds[0, 2:6] = 1
    with pytest.raises(LessError, match="leave out masks of your own, token_type_ids"):
        model(input_ids=ids, token_type_ids=kinds, past_key_values=LessCache.for_model(model, SMALL))


# Predictions of models with other layers beside LESS's.


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text", "llama"])
def test_predictions_ask_the_function_in_the_layers_that_less_serves(name):
    model, ids, asked = tiny(name), tokens(2, 12), []

    def attention(layer, *qkv):
        asked.append(layer)
        return dense(*qkv)

    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
        torch.testing.assert_close(predictions(model, ids, attention), wanted, atol=1e-5, rtol=1e-5)
        assert asked == less_layers(model)
        last = less_layers(model)[-1]
        other = predictions(model, ids, lambda layer, *qkv: dense(*qkv) * (layer != last))
        assert (other - wanted).abs().max() > 1e-3
