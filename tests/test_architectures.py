"""Decoders of many architectures: with room for everything LESS is the full cache, with little it is the reference; and what
cannot work is refused, each class of models with its own sentence."""

import copy
from dataclasses import replace

import pytest
import torch
from caches import FASTGEN, KINDS, feed, generate, left_padded
from models import make_encoder_decoder, make_kernels, make_model, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from less_fast import H2O, TOVA, LessCache, LessError, Logits
from less_fast.hf import seam
from less_fast.hf.architecture import OUTPUTS, attention_modules, less_layers, output_weight, sizes
from less_fast.training import RECIPES, train
from paper_checks.architectures import KNOWN, ROOM, SMALL, measure, tiny

PROMISED = sorted(KNOWN)
MIXED = {"gemma2": [1, 3], "gemma3_text": [1, 3], "gpt_oss": [1, 3]}


@pytest.mark.parametrize("name", PROMISED)
def test_with_room_it_is_the_full_cache_and_with_little_the_reference(name):
    row = measure(name)
    assert not row.refused
    assert max(row.full, row.padded) < 1e-5
    assert row.reference < 1e-6


@pytest.mark.parametrize("name", PROMISED)
def test_with_room_generation_gives_the_full_caches_tokens_even_padded(name):
    model = tiny(name)
    ids, mask = left_padded([9, 4], 9)
    wanted = generate(model, ids, mask=mask, pad_token_id=0)
    assert torch.equal(generate(model, ids, LessCache.for_model(model, ROOM), mask, pad_token_id=0), wanted)
    assert torch.equal(generate(model, ids, mask=mask, pad_token_id=0), wanted)  # without the cache it is what it was


@pytest.mark.parametrize("name", MIXED)
def test_of_a_mixed_model_the_layers_with_full_attention_are_less(name):
    model = tiny(name)
    assert less_layers(model) == MIXED[name]
    cache = LessCache.for_model(model, SMALL)
    feed(model, tokens(2, 40), cache, prompt=20)
    before = cache.memory()
    feed(model, tokens(2, 40), cache, prompt=20)
    assert cache.memory() == before  # the other layers are constant, too
    assert before["others"] > 0


def test_a_hybrid_model_keeps_its_recurrent_layers():
    model = tiny("qwen3_5_text")
    assert 0 < len(less_layers(model)) < 4
    wanted = feed(model, tokens(2, 24), DynamicCache(config=model.config), prompt=12)
    torch.testing.assert_close(feed(model, tokens(2, 24), LessCache.for_model(model, ROOM), prompt=12), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "compiled"), [("llama", True), ("gemma2", False), ("qwen3_5_text", False), ("falcon", False)])
def test_generate_may_compile_where_every_layer_is_of_fixed_shape(name, compiled):
    assert LessCache.for_model(tiny(name), SMALL).is_compileable is compiled


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3_5_text"])
def test_a_reset_cache_of_a_mixed_model_is_a_new_one(name):
    model, (ids, mask) = tiny(name), left_padded([12, 7], 12)
    cache = LessCache.for_model(model, SMALL)
    first = feed(model, tokens(2, 20), cache, prompt=12)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(feed(model, tokens(2, 20), cache, prompt=12), first)
    cache.reset()
    wanted = generate(model, ids, LessCache.for_model(model, SMALL), mask, pad_token_id=0)
    assert torch.equal(generate(model, ids, cache, mask, pad_token_id=0), wanted)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3_5_text"])
@pytest.mark.parametrize("rows", [torch.tensor([3, 0, 1]), [3, 0, 1], [-1, 0, 1]], ids=["tensor", "list", "negative"])
def test_rows_of_a_mixed_model_are_repeated_selected_and_reordered_together(name, rows):
    model, ids = tiny(name), tokens(2, 20)
    cache, straight = LessCache.for_model(model, SMALL), LessCache.for_model(model, SMALL)
    feed(model, ids, cache, prompt=12)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(rows)
    feed(model, ids[[1, 0, 0]], straight, prompt=12)
    more = tokens(3, 5, seed=1)
    torch.testing.assert_close(feed(model, more, cache, prompt=1), feed(model, more, straight, prompt=1))


def test_layers_that_differ_in_their_heads_work_without_kernels_and_tables():
    model = tiny("gemma4_text", global_head_dim=16)
    row = measure("gemma4_text")
    if row.refused:
        pytest.skip(f"this version of transformers: {row.refused}")
    assert row.reference < 1e-5
    feed(model, tokens(1, 20), LessCache.for_model(model, SMALL), prompt=12)
    with pytest.raises(ValueError, match="differ in their heads"):
        LessCache.for_model(model, SMALL, budgets=[[7, 7]] * 4)


def test_kernels_serve_a_model_with_a_softcap():
    """Kernels cannot be trained for it yet, but the state that they fill is used."""
    model, ids = tiny("gemma2").double(), tokens(1, 24)
    cache, bare = LessCache.for_model(model, SMALL, make_kernels(model)), LessCache.for_model(model, SMALL)
    assert (feed(model, ids, cache, prompt=12) - feed(model, ids, bare, prompt=12)).abs().max() > 1e-3
    assert cache.memory()["low_rank"] > 0 == bare.memory()["low_rank"]


@pytest.mark.parametrize(("name", "kv_heads"), [("falcon", 1), ("gpt_bigcode", 1), ("gpt2", 4), ("gpt_neox", 4), ("phi3", 2)])
def test_sizes_are_those_of_what_the_cache_is_given(name, kv_heads):
    model = tiny(name)
    assert sizes(model) == dict(layers=4, query_heads=4, kv_heads=kv_heads, head_dim=8)
    cache = LessCache.for_model(model, SMALL)
    feed(model, tokens(1, 9), cache, prompt=9)
    state = cache.layers[0].state
    assert (state.query_heads, state.kv_heads, state.parts[0].slots.k.shape[-1]) == (4, kv_heads, 8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "opt"])
def test_the_output_weight_is_that_of_the_projection_whichever_way_it_lies(name):
    for module in attention_modules(tiny(name)).values():
        projection = next(getattr(module, part) for part in OUTPUTS if hasattr(module, part))
        x = torch.randn(3, 32)
        torch.testing.assert_close(projection(x) - projection(torch.zeros(3, 32)), x @ output_weight(module).T)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "phi3"])
def test_kernels_are_trained_for_other_architectures_and_bring_the_layers_closer_to_the_full_cache(name):
    model, ids = tiny(name), tokens(16, 48)
    recipe = replace(RECIPES["exponential"], rank=2, hidden=3, rho=0, joint_steps=2, curves=0)
    kernels = train(model, ids[:12], ids[12:], H2O(3, 3), recipe)
    assert all(share < 1 for shares in kernels.about["layers"]["left"] for share in shares)
    assert len(kernels.about["identity"]["layers"]) == 4
    cache = LessCache.for_model(model, H2O(3, 3), kernels, chunk=1)
    feed(model, tokens(1, 20), cache, prompt=20)
    assert cache.memory()["low_rank"] > 0


# What cannot work is refused.


def refused(model, match, at_once=True):
    if at_once:
        with pytest.raises(ValueError, match=match):
            LessCache.for_model(model, SMALL)
        assert model.config.get_text_config(decoder=True)._attn_implementation != "less"
    else:
        cache = LessCache.for_model(model, SMALL)
        with pytest.raises(ValueError, match=match):
            feed(model, tokens(1, 9), cache, prompt=9)


@pytest.mark.parametrize("name", ["bloom", "gptj", "mpt", "rwkv"])
def test_attention_code_of_its_own_is_refused(name):
    refused(tiny(name), "attention code of its own")


def test_alibi_is_refused():
    refused(tiny("falcon", alibi=True), "alibi")


def test_attention_to_later_tokens_is_refused():
    refused(tiny("bert"), "attends to later tokens")


def test_an_encoder_decoder_is_refused():
    refused(make_encoder_decoder(), "has an encoder")


@pytest.mark.parametrize("name", ["mamba", "ministral"])
def test_a_model_without_full_attention_is_refused(name):
    refused(tiny(name), "memory is constant already")


def test_multi_head_latent_attention_is_refused_at_the_first_step():
    refused(tiny("deepseek_v3"), "did not take its keys|multi-head latent", at_once=False)


def test_values_of_another_size_than_keys_are_refused_at_the_first_step():
    layer = LessCache.for_model(make_model(), SMALL).layers[0]
    key, value = layer.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"another shape than its keys.*latent"):
        layer.read(torch.zeros(1, 4, 3, 8), key, value, None, None)


def test_anything_that_is_no_model_of_transformers_is_refused():
    with pytest.raises(ValueError, match="use LayerState and extend"):
        LessCache.for_model(torch.nn.Linear(2, 2), SMALL)


class Altered(torch.nn.Module):
    """An attention module whose way with its cache is altered."""

    def __init__(self, inner, update):
        super().__init__()
        self.inner, self.change, self.layer_idx = inner, update, inner.layer_idx

    def forward(self, *args, past_key_values=None, **kwargs):
        return self.inner(*args, past_key_values=past_key_values and self.change(past_key_values), **kwargs)


class Twice:
    """Attends twice to the keys of one update."""

    def __init__(self, cache):
        self.cache = cache

    def update(self, key, value, layer_idx):
        key, value = self.cache.update(key, value, layer_idx)
        key.less_layer.read(torch.randn(1, 4, key.shape[2], 8, dtype=key.dtype), key, value, None, Logits())
        return key, value


class Copied(Twice):
    """Changes its keys after the cache."""

    def update(self, key, value, layer_idx):
        key, value = self.cache.update(key, value, layer_idx)
        return key * 1, value


class Ignored(Twice):
    """Leaves the cache alone."""

    def update(self, key, value, layer_idx):
        return key, value


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (Twice, "attends twice to the keys"),
        (Copied, "did not take its keys from the LessCache"),
        (Ignored, "did not give its keys to the cache"),
    ],
)
def test_attention_that_uses_its_cache_in_another_way_is_refused_at_that_step_in_every_layer(layer, change, match, later):
    model = make_model()
    cache, block = LessCache.for_model(model, SMALL), model.model.layers[layer]
    if later:
        feed(model, tokens(1, 9), cache, prompt=9)
    block.self_attn = Altered(block.self_attn, change)
    with pytest.raises(ValueError, match=match):
        feed(model, tokens(1, 9), cache, prompt=9)


def test_a_cache_serves_the_model_that_it_was_made_for_and_no_other():
    model, fresh, watched = make_model(), make_model(), make_model()
    LessCache.for_model(watched, SMALL)
    for other in (fresh, watched):
        with pytest.raises(ValueError, match="not the one that the cache was made for"):
            generate(other, tokens(1, 9), LessCache.for_model(model, SMALL))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_after_a_pass_that_was_broken_off_a_cache_wants_to_be_reset(name):
    model, ids = tiny(name), tokens(1, 12)
    cache = LessCache.for_model(model, SMALL)
    wanted = feed(model, ids, cache, prompt=9)
    layer = model.get_decoder().layers[2]
    layer.forward, forward = (lambda *args, **kwargs: 1 / 0), layer.forward
    with pytest.raises(ZeroDivisionError):
        feed(model, ids, cache, prompt=9)
    layer.forward = forward
    with pytest.raises(ValueError, match="was broken off"):
        feed(model, ids, cache, prompt=9)
    cache.reset()
    assert torch.equal(feed(model, ids, cache, prompt=9), wanted)


def test_a_decoder_that_is_no_decoder_by_its_name_is_watched():
    """ModernBERT calls its last linear layer so."""
    model = tiny("modernbert-decoder")
    with pytest.raises(ValueError, match="carries no gradients"):
        feed(model.train(), tokens(1, 9), LessCache.for_model(model, SMALL), prompt=9)


@pytest.mark.parametrize("width", [1, 4])
def test_falcon_refuses_a_mask_of_ones_own(width):
    model, ids = tiny("falcon"), tokens(1, 8)
    own = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(3 if width == 1 else 0).triu(-width)
    with pytest.raises(ValueError, match="takes a 2D attention mask"):
        model(ids, attention_mask=own, past_key_values=LessCache.for_model(model, SMALL), use_cache=True)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_kernels_are_not_made_for_models_with_a_softcap_or_sinks(name):
    from less_fast.hf.seam import predictions
    from less_fast.layer.parallel import dense

    with pytest.raises(LessError, match="not yet with a softcap or sinks"):
        predictions(tiny(name), tokens(1, 9), lambda _, *qkv: dense(*qkv))


# Phi-3 drops a cache where its rotation changes.


def test_a_model_that_would_drop_its_cache_is_refused_there_and_serves_below():
    model = tiny("phi3", original_max_position_embeddings=20)
    with pytest.raises(ValueError, match="beyond 20 tokens and drops its cache"):
        generate(model, tokens(1, 15), LessCache.for_model(model, SMALL), new=10)
    with pytest.raises(ValueError, match="beyond 20 tokens and drops its cache"):
        generate(model, tokens(1, 25), LessCache.for_model(model, SMALL), new=10)
    assert generate(model, tokens(1, 9), LessCache.for_model(model, SMALL), new=10).shape == (1, 19)
    assert generate(model, tokens(1, 15), new=10).shape == (1, 25)  # without LESS it does as it always did


def test_copies_of_a_watched_model_are_watched_and_their_own():
    model = tiny("phi3", original_max_position_embeddings=20)
    LessCache.for_model(model, SMALL)
    twin = copy.deepcopy(model)
    assert twin.prepare_inputs_for_generation.model() is twin
    with pytest.raises(ValueError, match="drops its cache"):
        generate(twin, tokens(1, 15), LessCache.for_model(twin, SMALL), new=10)


# Versions of transformers.


def test_a_version_that_is_too_old_is_refused_and_one_that_is_newer_warns(monkeypatch):
    model = make_model()
    monkeypatch.setattr(seam.transformers, "__version__", "5.2.0")
    with pytest.raises(ImportError, match="needs transformers 5"):  # of whatever version is installed
        LessCache.for_model(model, SMALL)
    monkeypatch.setattr(seam.transformers, "__version__", "99.1.0")
    with pytest.warns(UserWarning, match="was tested with transformers up to"):
        LessCache.for_model(model, SMALL)


# Generation.


@pytest.mark.parametrize("policy", [H2O(4, 4), TOVA(8), FASTGEN], ids=repr)
def test_generation_goes_far_beyond_the_context_of_a_rotary_model(policy):
    model = make_model(max_position_embeddings=32)
    cache = LessCache.for_model(model, policy, make_kernels(model), token_kinds=KINDS)
    out = generate(model, tokens(1, 10), cache, new=150)
    assert out.shape == (1, 160)
    assert int(cache.get_seq_length()) == 159


def test_a_prompt_that_generate_feeds_in_chunks_is_the_prompt_fed_in_chunks():
    model, ids = make_model(), tokens(2, 21)
    kernels = make_kernels(model)
    one, other = (LessCache.for_model(model, H2O(4, 4), kernels) for _ in range(2))
    wanted = generate(model, ids, LessCache.for_model(model, H2O(4, 4), kernels, chunk=8))
    assert torch.equal(generate(model, ids, one, prefill_chunk_size=8), wanted)
    assert not torch.equal(generate(model, ids, other), wanted)


def test_tokens_stream_out_one_by_one():
    from transformers.generation.streamers import BaseStreamer

    class Heard(BaseStreamer):
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, heard = make_model(), Heard()
    out = generate(model, tokens(1, 7), LessCache.for_model(model, H2O(2, 2)), streamer=heard)
    assert [token for part in heard.parts for token in part] == out[0].tolist()
    assert heard.ended
    assert [len(part) for part in heard.parts] == [7] + [1] * 12


def test_a_pipeline_generates_as_the_model_does(tmp_path):
    from transformers import AutoTokenizer, pipeline

    from less_fast.demo import MODEL

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    cache, straight = (LessCache.for_model(model, H2O(8, 8)) for _ in range(2))
    inputs = tokenizer("def main():\n", return_tensors="pt")
    wanted = model.generate(**inputs, past_key_values=straight, max_new_tokens=20, do_sample=False)
    said = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "def main():\n", past_key_values=cache, max_new_tokens=20, do_sample=False
    )
    assert said[0]["generated_text"] == tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert int(cache.get_seq_length()) == int(straight.get_seq_length()) == wanted.shape[1] - 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_5_text"])
def test_another_batch_size_is_refused_even_after_a_reset(name):
    model = tiny(name)
    cache = LessCache.for_model(model, H2O(2, 2))
    feed(model, tokens(2, 8), cache, prompt=8)
    cache.reset()
    with pytest.raises(ValueError, match="this cache holds 2 sequences, and 3 came"):
        feed(model, tokens(3, 8), cache, prompt=8)


def test_other_caches_beside_it_are_refused_by_generate():
    model = make_model()
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, tokens(1, 8), LessCache.for_model(model, H2O(2, 2)), cache_implementation="static")


def test_speculative_decoding_is_refused():
    model, draft = make_model(), make_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="cannot be cropped"):
        generate(model, tokens(1, 8), LessCache.for_model(model, H2O(2, 2)), assistant_model=draft)
