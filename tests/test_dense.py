"""Without a LessCache a model attends as it did before it ever had one; with room for everything it does so with one, too, at
lengths on both sides of every block and window; and what asks for dense attention behind the seam gets the model's own."""

from functools import cache

import pytest
import torch
from models import make_model, tokens
from transformers import DynamicCache, StaticCache

from less_fast import H2O, TOVA, Lambda, LessCache, SnapKV
from less_fast.hf.architecture import less_layers
from less_fast.hf.identity import observed, probe
from less_fast.hf.seam import predictions
from less_fast.layer.parallel import dense
from less_fast.layer.prompt import QUERIES_AT_ONCE
from paper_checks.architectures import SIZES, SMALL, difference, tiny

UNUSUAL = ["gemma2", "vaultgemma", "gpt_oss", "flint", "granite_swa", "granitemoe_swa"]  # a softcap, or sinks, beside windows
SHARP = {name: dict(query_pre_attn_scalar=1, attn_logit_softcapping=0.5) for name in ("gemma2", "vaultgemma")}
"""Logits so large, and a softcap so low, that it matters."""
WINDOW = SIZES["sliding_window"]


@cache
def before_and_after(name):
    """A model that never had a LessCache, and the same one after it had."""
    models = [tiny(name, **SHARP.get(name, {})) for _ in range(2)]
    LessCache.for_model(models[1], SMALL)
    return models


@torch.no_grad()
def logits(model, ids, mask, pieces, past):
    """Of tokens that come in pieces of these lengths, into a cache or into none."""
    found, end = [], 0
    for m in pieces:
        now, end = slice(end, end + m), end + m
        seen = None if mask is None else mask[:, :end]
        found.append(model(ids[:, now], attention_mask=seen, past_key_values=past, use_cache=past is not None).logits)
    return torch.cat(found, 1)


def masks(length):
    """None, one without pads, and one with pads on the left of a row."""
    ones = torch.ones(2, length, dtype=torch.long)
    padded = ones.clone()
    padded[1, :3] = 0
    return None, ones, padded


CACHES = {
    "no cache": lambda model, length: None,
    "dynamic": lambda model, length: DynamicCache(config=model.config),
    "static": lambda model, length: StaticCache(config=model.config, max_cache_len=length + 2),
    "static, full at the end": lambda model, length: StaticCache(config=model.config, max_cache_len=length),
}


@pytest.mark.parametrize("pieces", [(3, 1), *((prompt, 1, 3, 1) for prompt in (1, WINDOW - 1, WINDOW, WINDOW + 1))], ids=str)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", [*UNUSUAL, "llama", "gemma3_text"])
def test_dense_attention_without_a_less_cache_is_what_the_model_had(name, kind, pieces):
    pieces = pieces[:1] if kind == "no cache" else pieces
    length, models = sum(pieces), before_and_after(name)
    for mask in masks(length):
        wanted, got = (logits(model, tokens(2, length), mask, pieces, CACHES[kind](model, length)) for model in models)
        real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(got[real], wanted[real])


def assert_with_room_it_is_the_dynamic_cache(model, policy, mask, pieces):
    length = sum(pieces)
    wanted = logits(model, tokens(2, length), mask, pieces, DynamicCache(config=model.config))
    got = logits(model, tokens(2, length), mask, pieces, LessCache.for_model(model, policy))
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask.bool()
    assert difference(got[real], wanted[real]) < 1e-5


SIDES = [lengths * QUERIES_AT_ONCE + more for lengths in (1, 4) for more in (-1, 0, 1)]  # 63, 64, 65, 255, 256, 257


@pytest.mark.parametrize("length", SIDES)
@pytest.mark.parametrize("policy", [H2O(300, 300), Lambda(300, 300), TOVA(600), SnapKV(600, 70, 2)], ids=repr)
def test_with_room_it_is_the_full_cache_on_both_sides_of_every_block_of_queries(policy, length):
    model = make_model(max_position_embeddings=600, num_hidden_layers=2)
    for mask in masks(length + 1)[::2]:
        assert_with_room_it_is_the_dynamic_cache(model, policy, mask, (length, 1))
    assert_with_room_it_is_the_dynamic_cache(model, policy, None, (2, length))


@pytest.mark.parametrize(
    "pieces", [(3, 1), *((prompt, 1, 1) for prompt in (WINDOW - 1, WINDOW, WINDOW + 1, *SIDES[:3]))], ids=str
)
@pytest.mark.parametrize("name", [*UNUSUAL, "gemma3_text"])
def test_with_room_it_is_the_full_cache_on_both_sides_of_every_window(name, pieces):
    model = tiny(name, **SHARP.get(name, {}))
    for mask in masks(sum(pieces))[::2]:
        assert_with_room_it_is_the_dynamic_cache(model, H2O(100, 100), mask, pieces)


@pytest.mark.parametrize("name", [*UNUSUAL, "llama", "gemma3_text"])
def test_a_model_is_told_by_the_keys_and_values_that_it_has_under_its_own_attention(name):
    model, _ = before_and_after(name)
    ids, positions = probe(model.config)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[None], position_ids=positions[None], past_key_values=past)
    for index, layer in zip(less_layers(model), observed(model, positions), strict=True):
        for got, wanted in zip(layer.qkv[1:], (past.layers[index].keys, past.layers[index].values)):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_of_a_half_precision_model_are_normalised_in_float32(dtype):
    model = make_model().to(dtype)
    with torch.no_grad():
        found = predictions(model, tokens(2, 9), lambda _, *qkv: dense(*qkv))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(2, 9), atol=1e-6, rtol=0)
