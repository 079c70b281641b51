"""LessCache in real transformers models: llama, mistral, qwen2 and qwen3, small and random."""

import numpy as np
import pytest
import torch
from models import FAMILIES, make_kernels, make_model, tokens
from transformers import AutoModelForCausalLM, GPT2Config, set_seed

import less_ref
from less_fast import H2O, Full, Lambda, LessCache, Window
from less_fast.hf import attention_modules, record_layer


@pytest.fixture
def model():
    return make_model()


def generate(model, ids, cache=None, mask=None, new=12, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, **{"do_sample": False, **options})


def left_padded(lengths, width):
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return tokens(len(lengths), width) * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.8}], ids=["greedy", "beams", "sampling"]
)
def test_with_room_for_everything_generation_equals_the_full_cache_even_padded(family, options):
    model = make_model(family)
    ids, mask = left_padded([9, 3, 6], 9)
    set_seed(5)
    wanted = generate(model, ids, mask=mask, **options)
    cache = LessCache.for_model(model, H2O(heavy=20, recent=20), make_kernels(model))
    set_seed(5)
    assert torch.equal(generate(model, ids, cache, mask, **options), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_the_first_layer_holds_what_the_reference_holds(family, chunk):
    """The first layer's inputs do not depend on the cache, so the reference can follow it on the model's own q, k, v."""
    model = make_model(family)
    kernels = make_kernels(model)
    ids = tokens(1, 21)
    cache = LessCache.for_model(model, H2O(heavy=3, recent=2), kernels, chunk=chunk)
    with torch.no_grad():
        model(ids[:, :17], past_key_values=cache)
        for step in range(17, 21):
            model(ids[:, step : step + 1], past_key_values=cache)
    q, k, v = (x[0].numpy() for x in record_layer(model, ids, 0))
    weights = [getattr(kernels.layers[0], name).numpy() for name in ("q1", "q2", "k1", "k2", "k3")]
    prompt = [17] if chunk is None else [chunk] * (17 // chunk) + [17 % chunk] * (17 % chunk > 0)
    trace = less_ref.run(q, k, v, less_ref.H2O(3, 2), less_ref.Kernels(*weights), prompt + [1] * 4)
    group = cache.layers[0].state.groups[0]
    for head in range(2):
        held = group.position[0, head]
        assert sorted(held[held >= 0].tolist()) == trace.kept[-1][head].tolist()
    np.testing.assert_allclose(group.H[0].numpy(), trace.H[-1], rtol=1e-9, atol=1e-9)


def test_a_row_of_a_padded_batch_is_the_row_alone(model):
    kernels = make_kernels(model)
    ids, mask = left_padded([15, 4, 9], 15)
    together = LessCache.for_model(model, H2O(2, 2), kernels)
    out = generate(model, ids, together, mask)
    for row, length in enumerate([15, 4, 9]):
        alone = LessCache.for_model(model, H2O(2, 2), kernels)
        assert torch.equal(generate(model, ids[row : row + 1, -length:], alone)[0, length:], out[row, 15:])
        for a, b in zip(together.layers, alone.layers):
            assert a.state.n[row] == b.state.n[0]
            torch.testing.assert_close(a.state.groups[0].H[row], b.state.groups[0].H[0])


def test_right_padded_prompts_give_each_row_its_own_logits(model):
    kernels = make_kernels(model)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        both = model(ids, attention_mask=mask, past_key_values=LessCache.for_model(model, H2O(2, 2), kernels, chunk=1)).logits
        alone = model(ids[1:, :6], past_key_values=LessCache.for_model(model, H2O(2, 2), kernels, chunk=1)).logits
    torch.testing.assert_close(both[1, :6], alone[0])


def test_a_second_turn_goes_on_where_the_first_ended(model):
    kernels = make_kernels(model)
    cache = LessCache.for_model(model, Lambda(1, 4), kernels)
    first = generate(model, tokens(2, 11), cache, new=5)
    assert cache.get_seq_length() == 15  # the last token was generated, not fed
    turn = torch.cat([first, tokens(2, 6, seed=7)], 1)
    second = generate(model, turn, cache, new=4)
    replay = LessCache.for_model(model, Lambda(1, 4), kernels)
    with torch.no_grad():
        model(turn[:, :11], past_key_values=replay)
        for step in range(11, 15):
            model(turn[:, step : step + 1], past_key_values=replay)
        logits = model(turn[:, 15:], past_key_values=replay).logits[:, -1]
        for step in range(22, 26):
            assert torch.equal(second[:, step], logits.argmax(-1))
            logits = model(second[:, step : step + 1], past_key_values=replay).logits[:, -1]


def test_chunk_1_is_one_token_at_a_time(model):
    kernels, ids = make_kernels(model), tokens(2, 14)
    once = LessCache.for_model(model, H2O(2, 3), kernels, chunk=1)
    steps = LessCache.for_model(model, H2O(2, 3), kernels)
    with torch.no_grad():
        together = model(ids, past_key_values=once).logits
        single = torch.cat([model(ids[:, i : i + 1], past_key_values=steps).logits for i in range(14)], 1)
    torch.testing.assert_close(together, single)


def test_low_rank_state_changes_the_output_and_zero_kernels_do_not(model):
    ids, kernels = tokens(1, 20), make_kernels(model)
    silent = make_kernels(model)
    for layer in silent.layers:
        layer.k3.zero_()
    with torch.no_grad():
        bare, none, some = (
            model(ids, past_key_values=LessCache.for_model(model, Window(4), k, chunk=1)).logits for k in (None, silent, kernels)
        )
    torch.testing.assert_close(bare, none)
    assert (bare - some).abs().max() > 1e-3


def test_each_layer_folds_through_its_own_kernels(model):
    kernels = make_kernels(model)
    kernels.layers[1].k3.zero_()
    cache = LessCache.for_model(model, Window(4), kernels)
    generate(model, tokens(1, 12), cache)
    assert [bool(layer.state.groups[0].z.any()) for layer in cache.layers] == [True, False, True]


def test_the_models_own_scaling_is_used(model):
    for module in attention_modules(model):
        module.scaling = 0.05
    ids = tokens(2, 9)
    with torch.no_grad():
        wanted = model(ids).logits
        got = model(ids, past_key_values=LessCache.for_model(model, H2O(20, 20))).logits
    torch.testing.assert_close(got, wanted)


def test_a_budget_table_gives_each_head_its_own_budget(model):
    table = [[3, 9], [5, 5], [12, 1]]
    cache = LessCache.for_model(model, H2O(1, 1), make_kernels(model), budgets=table)
    out = generate(model, tokens(2, 15), cache)
    assert out.shape == (2, 27)
    for layer, row in zip(cache.layers, table):
        held = dict.fromkeys(range(2))
        for group in layer.state.groups:
            heads = range(2) if isinstance(group.kv_heads, slice) else group.kv_heads.tolist()
            held |= {head: (group.position[0, i] >= 0).sum().item() for i, head in enumerate(heads)}
        assert held == dict(enumerate(row))
    numbers = [less_ref.memory([less_ref.Window(budget) for budget in row], 8) for row in table]
    bytes_held = cache.memory()
    assert bytes_held["entries"] == 2 * 8 * sum(part["entries"] for part in numbers)
    assert bytes_held["low_rank"] == 2 * 8 * 3 * 2 * 3 * (8 + 1)  # rows, bytes, layers, heads, rank, head_dim + 1


def test_memory_is_constant_while_the_text_grows(model):
    cache = LessCache.for_model(model, H2O(4, 4), make_kernels(model))
    generate(model, tokens(2, 10), cache, new=1)
    before = cache.memory()
    generate(model, tokens(2, 60), cache, new=40)
    assert cache.memory() == before
    assert sum(before.values()) > 0


def test_a_reset_cache_is_a_new_cache(model):
    cache = LessCache.for_model(model, H2O(2, 2), make_kernels(model))
    first = generate(model, tokens(2, 10), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, tokens(2, 10), cache), first)


def test_two_caches_of_one_model_do_not_meet(model):
    kernels, ids = make_kernels(model), tokens(1, 12)
    a, b, alone = (LessCache.for_model(model, H2O(2, 2), kernels) for _ in range(3))
    other = tokens(1, 12, seed=3)
    with torch.no_grad():
        for i in range(12):
            mixed = model(ids[:, i : i + 1], past_key_values=a).logits
            model(other[:, i : i + 1], past_key_values=b)
            assert torch.equal(mixed, model(ids[:, i : i + 1], past_key_values=alone).logits)


def test_repeating_and_selecting_rows_carries_the_state_along(model):
    cache = LessCache.for_model(model, H2O(2, 2), make_kernels(model))
    ids = tokens(2, 9)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        swapped = model(tokens(2, 1), past_key_values=cache).logits
        straight = LessCache.for_model(model, H2O(2, 2), make_kernels(model))
        model(ids.flip(0), past_key_values=straight)
        torch.testing.assert_close(model(tokens(2, 1), past_key_values=straight).logits, swapped)


def test_the_policy_full_keeps_everything_and_grows(model):
    cache = LessCache.for_model(model, Full())
    ids = tokens(2, 9)
    wanted = generate(model, ids)
    assert torch.equal(generate(model, ids, cache), wanted)
    assert cache.layers[0].state.groups[0].k.shape[2] == cache.get_seq_length()


def test_a_half_precision_model_holds_half_precision_entries_and_a_wide_state(model):
    model = model.bfloat16()
    cache = LessCache.for_model(model, H2O(4, 4), make_kernels(model))
    out = generate(model, tokens(2, 20), cache)
    group = cache.layers[0].state.groups[0]
    assert (group.k.dtype, group.score.dtype, group.H.dtype, group.z.dtype) == (torch.bfloat16, *[torch.float32] * 3)
    assert out.shape == (2, 32)


@pytest.mark.parametrize("padded", [False, True])
def test_without_a_less_cache_the_attention_is_dense_and_trains(model, padded):
    ids, mask = left_padded([9, 4], 9) if padded else (tokens(2, 9), torch.ones(2, 9, dtype=torch.long))
    wanted = model(ids, attention_mask=mask).logits[mask.bool()]
    LessCache.for_model(model, H2O(2, 2))
    assert model.config._attn_implementation == "less"
    got = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_another_cache_under_less_attention_is_dense(model):
    ids, mask = left_padded([9, 4], 9)
    wanted = generate(model, ids, mask=mask)
    LessCache.for_model(model, H2O(2, 2))
    assert torch.equal(generate(model, ids, mask=mask), wanted)


# What cannot work is refused.


def test_models_with_other_attention_are_refused():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(ValueError, match="type 'gpt2' are not supported"):
        LessCache.for_model(gpt2, H2O(2, 2))
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding_attention; only full attention is supported"):
        LessCache.for_model(sliding, H2O(2, 2))
    with pytest.raises(ValueError, match="only full attention is supported"):
        LessCache.for_model(make_model("mistral", sliding_window=8), H2O(2, 2))
    assert sliding.config._attn_implementation != "less"


def test_kernels_of_another_model_are_refused(model):
    with pytest.raises(ValueError, match="query_heads is 4 in the kernels and 2 in the model"):
        LessCache.for_model(make_model(num_attention_heads=2, num_key_value_heads=1), H2O(2, 2), make_kernels(model))
    twin = make_model()
    with torch.no_grad():
        twin.model.layers[1].self_attn.k_proj.weight.mul_(1.05)
    with pytest.raises(ValueError, match="another model of the same shape"):
        LessCache.for_model(twin, H2O(2, 2), make_kernels(model))


@pytest.mark.parametrize("table", [[[3, 3]] * 2, [[3]] * 3, [[3, 3, 3]] * 3])
def test_budget_tables_of_the_wrong_shape_are_refused(model, table):
    with pytest.raises(ValueError, match="must be 3 layers x 2 KV heads"):
        LessCache.for_model(model, H2O(2, 2), budgets=table)


def test_calls_that_would_run_wrong_are_refused(model):
    def cache():
        return LessCache.for_model(model, H2O(2, 2))

    ids = tokens(2, 8)
    with pytest.raises(ValueError, match="use_cache=False"):
        generate(model, ids, cache(), use_cache=False)
    with pytest.raises(ValueError, match="2D attention mask"):
        model(ids, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool), past_key_values=cache())
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache().crop(1)
    with pytest.raises(ValueError, match="not offloaded"):
        cache().offload(0, only_non_sliding=False)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        LessCache.for_model(model, H2O(2, 2), chunk=0)
    second = cache()
    model(ids, past_key_values=second)
    with pytest.raises(ValueError, match="the attention mask covers 3 tokens"):
        model(ids[:, :3], attention_mask=torch.ones(2, 3), past_key_values=second)


def test_assisted_generation_is_refused(model):
    cache = LessCache.for_model(model, H2O(2, 2))
    with pytest.raises(ValueError, match="crop"):
        generate(model, tokens(1, 8), cache, prompt_lookup_num_tokens=2)


def test_a_model_whose_attention_was_switched_away_is_refused(model):
    cache = LessCache.for_model(model, H2O(2, 2))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="did not take its keys from the LessCache"):
        model(tokens(1, 8), past_key_values=cache)


def test_training_with_the_cache_is_refused(model):
    cache = LessCache.for_model(model, H2O(2, 2))
    with pytest.raises(ValueError, match="carries no gradients"):
        model.train()(tokens(1, 8), past_key_values=cache)


def test_caches_do_not_change_the_kernels_they_are_given(model):
    kernels = make_kernels(model).float()
    generate(model, tokens(1, 8), LessCache.for_model(model, H2O(2, 2), kernels))
    assert {weight.dtype for weight in kernels.parameters()} == {torch.float32}


def test_output_attentions_is_refused(model):
    cache = LessCache.for_model(model, H2O(2, 2))
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(1, 8), past_key_values=cache, output_attentions=True)
