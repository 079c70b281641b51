"""LessCache in real transformers models: llama, mistral, qwen2 and qwen3, small and random."""

import pytest
import torch
from both_paths import heads_of
from caches import FASTGEN, KINDS, assert_same_states, feed, generate, left_padded
from closeness import assert_close
from models import (
    FAMILIES,
    make_kernels,
    make_kinds,
    make_model,
    recorded,
    reference_kernels,
    reference_policy,
    reference_rho,
    tokens,
)
from transformers import set_seed

import less_ref
from less_fast import H2O, TOVA, FastGen, Lambda, LessCache, LessError, Retention, Scissorhands, SnapKV, Window
from less_fast.hf.architecture import attention_modules
from less_fast.layer.attend import Logits


@pytest.fixture
def model():
    return make_model()


def named(policy):
    return type(policy).__name__


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "several beams", "samples"],
)
@pytest.mark.parametrize("policy", [H2O(heavy=20, recent=20), FastGen(40, 8, 8, 0.5)], ids=named)
def test_with_room_for_everything_generation_equals_the_full_cache_even_padded(family, options, policy):
    model = make_model(family)
    ids, mask = left_padded([9, 3, 6], 9)
    set_seed(5)
    wanted = generate(model, ids, mask=mask, **options)
    cache = LessCache.for_model(model, policy, make_kernels(model), token_kinds=KINDS)
    set_seed(5)
    assert torch.equal(generate(model, ids, cache, mask, **options), wanted)


def assert_the_first_layer_follows_the_reference(model, policy, kernels, chunk=None, budgets=None):
    """The first layer's inputs do not depend on the cache, so the reference can follow it on the model's own q, k, v."""
    ids = tokens(1, 21)
    cache = LessCache.for_model(model, policy, kernels, budgets, chunk, KINDS)
    feed(model, ids, cache, prompt=17)
    q, k, v = (x[0].numpy() for x in recorded(model, ids, 0)[:3])
    policies = [policy] * 2 if budgets is None else [policy.with_budget(budget) for budget in budgets[0]]
    rho = reference_rho(kernels.layers[0])
    prompt = [17] if chunk is None else [chunk] * (17 // chunk) + [17 % chunk] * (17 % chunk > 0)
    rest = reference_kernels(kernels.layers[0]), prompt + [1] * 4
    trace = less_ref.run(q, k, v, [reference_policy(rule, KINDS[ids[0]].tolist(), rho) for rule in policies], *rest)
    for g, head in enumerate(heads_of(cache.layers[0].state, 0, with_kinds=False)):
        assert head.position.tolist() == trace.kept[-1][g].tolist()
        for name in ("score", "H", "z"):
            assert_close(getattr(head, name), getattr(trace.heads[-1][g], name))


SCORED = [H2O(3, 2), TOVA(5), Scissorhands(5, 2, 4), SnapKV(5, 2, 1), Retention(5, 1), FASTGEN]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize(
    "policy", [H2O(3, 2), TOVA(5), Scissorhands(5, 2, 4), SnapKV(5, 2, 1), Retention(5, 1), FASTGEN], ids=named
)
def test_the_first_layer_holds_what_the_reference_holds(family, chunk, policy):
    model = make_model(family)
    assert_the_first_layer_follows_the_reference(model, policy, make_kernels(model, rho=3), chunk)


@pytest.mark.parametrize("family", ["exponential", "performer", "elu"])
def test_the_first_layer_folds_through_control_kernels_as_the_reference_does(model, family):
    assert_the_first_layer_follows_the_reference(model, H2O(3, 2), make_kernels(model, 4, family=family), chunk=4)


@pytest.mark.parametrize("policy", [H2O(3, 2), Retention(5, 1), FASTGEN], ids=named)
@pytest.mark.parametrize("budgets", [None, [[6, 9], [5, 5], [12, 1]]], ids=["one budget", "budget table"])
def test_heads_with_budgets_of_their_own_follow_the_reference(model, policy, budgets):
    assert_the_first_layer_follows_the_reference(model, policy, make_kernels(model, rho=3), budgets=budgets)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("policy", [H2O(2, 2), FASTGEN], ids=named)
def test_a_row_of_a_padded_batch_is_the_row_alone(model, policy, chunk):
    kernels = make_kernels(model)
    ids, mask = left_padded([15, 4, 9], 15)

    def cache():
        return LessCache.for_model(model, policy, kernels, chunk=chunk, token_kinds=KINDS)

    together, alone = cache(), [cache() for _ in range(3)]
    out = generate(model, ids, together, mask)
    for row, length in enumerate([15, 4, 9]):
        assert torch.equal(generate(model, ids[row : row + 1, -length:], alone[row])[0, length:], out[row, 15:])
    assert_same_states(together, alone, [0, 0, 0])


def test_right_padded_prompts_give_each_row_its_own_logits(model):
    kernels = make_kernels(model)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        both = model(ids, attention_mask=mask, past_key_values=LessCache.for_model(model, H2O(2, 2), kernels, chunk=1)).logits
        alone = model(ids[1:, :6], past_key_values=LessCache.for_model(model, H2O(2, 2), kernels, chunk=1)).logits
    torch.testing.assert_close(both[1, :6], alone[0])


@pytest.mark.parametrize("policy", [Lambda(1, 4), FASTGEN], ids=named)
def test_a_second_turn_goes_on_where_the_first_ended(model, policy):
    cache, replay = (LessCache.for_model(model, policy, make_kernels(model), token_kinds=KINDS) for _ in range(2))
    first = generate(model, tokens(2, 11), cache, new=5)
    assert cache.get_seq_length() == 15  # the last token was generated, not fed
    turn = torch.cat([first, tokens(2, 6, seed=7)], 1)
    second = generate(model, turn, cache, new=4)
    feed(model, turn[:, :15], replay, prompt=11)
    logits = feed(model, second[:, 15:-1], replay, prompt=7)
    assert torch.equal(second[:, 22:], logits[:, 6:].argmax(-1))
    assert_same_states(cache, [replay] * 2, [0, 1])


def test_chunk_1_is_one_token_at_a_time(model):
    kernels, ids = make_kernels(model), tokens(2, 14)
    once = LessCache.for_model(model, H2O(2, 3), kernels, chunk=1)
    steps = LessCache.for_model(model, H2O(2, 3), kernels)
    torch.testing.assert_close(feed(model, ids, once, prompt=14), feed(model, ids, steps, prompt=1))


@pytest.mark.parametrize("family", ["paper", "exponential", "performer", "elu"])
def test_low_rank_state_changes_the_output_and_zero_kernels_do_not(model, family):
    ids, kernels = tokens(1, 20), make_kernels(model, 4, family=family)
    silent = make_kernels(model)
    for layer in silent.layers:
        layer.k3.zero_()
    with torch.no_grad():
        bare, none, some = (
            model(ids, past_key_values=LessCache.for_model(model, Window(4), k, chunk=1)).logits for k in (None, silent, kernels)
        )
    torch.testing.assert_close(bare, none)
    assert some.isfinite().all()
    assert (bare - some).abs().max() > 1e-3


def test_each_layer_folds_through_its_own_kernels(model):
    kernels = make_kernels(model)
    kernels.layers[1].k3.zero_()
    cache = LessCache.for_model(model, Window(4), kernels)
    generate(model, tokens(1, 12), cache)
    assert [bool(layer.state.parts[0].z.any()) for layer in cache.layers] == [True, False, True]


def test_the_models_own_scaling_is_used(model):
    for module in attention_modules(model).values():
        module.scaling = 0.05
    ids = tokens(2, 9)
    with torch.no_grad():
        wanted = model(ids).logits
        got = model(ids, past_key_values=LessCache.for_model(model, H2O(20, 20))).logits
    torch.testing.assert_close(got, wanted)


def test_a_budget_table_gives_each_head_and_ranks_give_each_layer_its_own_and_memory_is_what_they_say(model):
    budgets, ranks = [[3, 9], [5, 5], [12, 1]], [1, 2, 5]
    cache = LessCache.for_model(model, H2O(1, 1), make_kernels(model, rank=ranks), budgets)
    assert generate(model, tokens(2, 15), cache).shape == (2, 27)
    heads = [heads_of(layer.state, 0) for layer in cache.layers]
    assert [[len(head.position) for head in layer] for layer in heads] == budgets
    assert [[len(head.z) for head in layer] for layer in heads] == [[rank] * 2 for rank in ranks]
    bytes_held = cache.memory()
    slots = sum(budget + 1 for row in budgets for budget in row)  # one of each head is free
    assert bytes_held["entries"] == 2 * 8 * slots * 2 * 8  # rows, bytes, slots, keys and values, head_dim
    assert bytes_held["low_rank"] == 2 * 8 * 2 * sum(ranks) * (8 + 1)  # rows, bytes, KV heads, features, head_dim + 1


def test_memory_is_constant_while_the_text_grows(model):
    cache = LessCache.for_model(model, H2O(4, 4), make_kernels(model))
    ids = tokens(2, 60)
    generate(model, ids[:, :10], cache, new=1)
    before = cache.memory()
    generate(model, ids, cache, new=40)
    assert cache.memory() == before
    assert sum(before.values()) > 0


def test_the_first_keys_find_room_for_all_layers_and_a_layer_of_another_size_for_itself(model):
    first, second, third = LessCache.for_model(model, H2O(3, 3)).less_layers

    def attend(layer, kv_heads):
        q, k = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, kv_heads))
        assert layer.attend(q, k, k, None, Logits()).shape == q.shape
        assert (layer.state.kv_heads, int(layer.state.n[0])) == (kv_heads, 9)

    attend(first, 2)
    held = second.state
    assert not held.n.any()
    assert third.state is not None
    attend(second, 2)
    assert second.state is held
    attend(third, 4)


def test_a_reset_cache_is_a_new_cache(model):
    cache = LessCache.for_model(model, H2O(2, 2), make_kernels(model))
    first = generate(model, tokens(2, 10), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, tokens(2, 10), cache), first)


def test_caches_of_one_model_do_not_meet_whatever_their_policies_and_tables(model):
    """Alone, each on a model of its own; then on one model, in turns."""
    rules = [(FASTGEN, KINDS), (FASTGEN, make_kinds(seed=4)), (H2O(2, 2), None), (H2O(2, 2), None), (TOVA(4), KINDS)]
    texts = [tokens(2, 16, seed=seed) for seed in (0, 0, 0, 1, 2)]

    def cache(model, rule):
        return LessCache.for_model(model, rule[0], make_kernels(model), token_kinds=rule[1])

    alone = [feed(twin, ids, cache(twin, rule), 9) for ids, rule in zip(texts, rules) for twin in [make_model()]]
    caches = [cache(model, rule) for rule in rules]
    for now in [slice(9), *(slice(i, i + 1) for i in range(9, 16))]:
        for ids, wanted, one in zip(texts, alone, caches):
            assert torch.equal(feed(model, ids[:, now], one, 9), wanted[:, now])
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # the tables matter


def test_a_model_that_served_fastgen_serves_all_others_as_before(model):
    ids, mask = left_padded([9, 4], 9)
    wanted = generate(model, ids, mask=mask)
    for seed in range(3):
        generate(model, ids, LessCache.for_model(model, FASTGEN, token_kinds=make_kinds(seed)), mask)
    assert len(model.base_model._forward_pre_hooks) == 1
    assert torch.equal(generate(model, ids, mask=mask), wanted)
    assert torch.equal(generate(model, ids, mask=mask, use_cache=False), wanted)
    assert torch.equal(generate(model, None, mask=mask, inputs_embeds=model.get_input_embeddings()(ids)), wanted[:, 9:])


def test_ids_beyond_the_table_are_of_no_kind(model):
    short, padded = KINDS[:60], torch.cat([KINDS[:60], torch.zeros(37, dtype=torch.long)])
    caches = [LessCache.for_model(model, FASTGEN, token_kinds=table) for table in (short, padded, KINDS)]
    short, padded, longer = (feed(model, tokens(2, 20), cache, prompt=14) for cache in caches)
    assert torch.equal(short, padded)
    assert not torch.equal(short, longer)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("policy", [H2O(2, 2), FASTGEN, TOVA(4), SnapKV(5, 2, 1)], ids=named)
def test_a_token_that_is_nan_shows_in_its_own_logits_and_leaves_no_other_trace(model, policy, chunk):
    ids, broken = tokens(2, 18), torch.zeros(18, dtype=torch.bool)
    broken[[5, 15]] = True  # in the prompt, and later
    ids = ids.masked_fill(ids == 13, 14).masked_fill(broken, 13)
    with torch.no_grad():
        model.get_input_embeddings().weight[13] = torch.nan
    with_them, without = (
        LessCache.for_model(model, policy, make_kernels(model), chunk=chunk, token_kinds=KINDS) for _ in range(2)
    )
    logits = feed(model, ids, with_them, prompt=12)
    assert logits[:, broken].isnan().all()
    there = torch.arange(18)[~broken]
    assert_close(logits[:, ~broken], feed(model, ids[:, ~broken], without, prompt=11, positions=there))
    assert_same_states(with_them, [without] * 2, [0, 1])


@pytest.mark.parametrize("policy", [H2O(2, 2), FASTGEN], ids=named)
def test_repeating_and_selecting_rows_carries_the_state_along(model, policy):
    cache, straight = (LessCache.for_model(model, policy, make_kernels(model), token_kinds=KINDS) for _ in range(2))
    ids, more, rows = tokens(2, 14), tokens(3, 8, seed=1), [1, 0, 0]
    feed(model, ids, cache, prompt=9)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    feed(model, ids[rows], straight, prompt=9)
    torch.testing.assert_close(feed(model, more, cache, prompt=4), feed(model, more, straight, prompt=4))
    assert_same_states(cache, [straight] * 3, [0, 1, 2])


INDICES = [[2, 0], [-1], slice(1, None), slice(None, None, 2), torch.tensor([2, 0, 2]), torch.tensor([True, False, True])]


@pytest.mark.parametrize("indices", INDICES, ids=str)
def test_rows_are_selected_by_whatever_indexes_a_tensor(model, indices):
    cache, (ids, mask) = LessCache.for_model(model, H2O(3, 3)), left_padded([9, 4, 7], 9)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    wanted = cache.lengths[indices]
    cache.batch_select_indices(indices)
    assert torch.equal(cache.lengths, wanted)
    assert cache.batch_size == len(wanted)


def test_a_cache_that_keeps_everything_generates_as_the_full_one(model):
    ids = tokens(2, 9)
    assert torch.equal(generate(model, ids, LessCache.for_model(model, Window(999))), generate(model, ids))


@pytest.mark.parametrize("family", ["paper", "exponential", "performer", "elu"])
def test_a_half_precision_model_holds_half_precision_entries_and_means(model, family):
    model = model.bfloat16()
    cache = LessCache.for_model(model, H2O(4, 4), make_kernels(model, 4, family=family))
    assert feed(model, tokens(2, 32), cache, prompt=20).isfinite().all()
    group = cache.layers[0].state.parts[0]
    assert (group.slots.k.dtype, group.mean.dtype) == (torch.bfloat16, torch.float16)
    assert group.slots.scores().dtype == group.z.dtype == torch.float32
    assert all(weight.dtype == torch.float32 for weight in group.kernels.state_dict().values())


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


def test_kernels_of_another_model_are_refused(model):
    with pytest.raises(ValueError, match="query_heads is 4 in the kernels and 2 in the model"):
        LessCache.for_model(make_model(num_attention_heads=2, num_key_value_heads=1), H2O(2, 2), make_kernels(model))


@pytest.mark.parametrize("table", [[[3, 3]] * 2, [[3]] * 3, [[3, 3, 3]] * 3])
def test_budget_tables_of_the_wrong_shape_are_refused(model, table):
    with pytest.raises(ValueError, match="must be 3 layers x 2 KV heads"):
        LessCache.for_model(model, H2O(2, 2), budgets=table)


@pytest.mark.parametrize("table", [None, KINDS[None], KINDS[0]], ids=["none", "2-D", "a number"])
@pytest.mark.parametrize("budgets", [None, [[9, 9]] * 3])
def test_fastgen_without_a_table_of_kinds_is_refused_before_the_model_is_changed(model, table, budgets):
    with pytest.raises(ValueError, match="needs token_kinds, the kind of each token id"):
        LessCache.for_model(model, FASTGEN, budgets=budgets, token_kinds=table)
    assert model.config._attn_implementation != "less"
    assert not model.base_model._forward_pre_hooks


def test_tova_needs_one_budget_in_a_layer_and_says_so_before_the_model_is_changed(model):
    with pytest.raises(ValueError, match="must be that of all its KV heads"):
        LessCache.for_model(model, TOVA(4), make_kernels(model), budgets=[[4, 4], [4, 5], [4, 4]])
    assert model.config._attn_implementation != "less"


def test_fastgen_refuses_embeddings_in_place_of_ids(model):
    cache = LessCache.for_model(model, FASTGEN, token_kinds=KINDS)
    with pytest.raises(ValueError, match="give the model input_ids, not embeddings"):
        model(inputs_embeds=model.get_input_embeddings()(tokens(2, 9)), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_cache_given_by_position_is_watched_too(model):
    cache, other = (LessCache.for_model(model, FASTGEN, token_kinds=KINDS) for _ in range(2))
    with torch.no_grad():
        hidden = model.base_model(tokens(2, 14), None, None, cache).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), feed(model, tokens(2, 14), other, prompt=14))
    assert_same_states(cache, [other] * 2, [0, 1])


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
    with pytest.raises(ValueError, match="chunk must be an integer from 1 to"):
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


def test_another_number_of_rows_is_refused_by_that_word_whatever_the_masks(model):
    ids, mask = left_padded([9, 4], 9)
    for rows in (1, 4):
        cache = LessCache.for_model(model, H2O(3, 2))
        out = generate(model, ids, cache, mask, new=3)
        longer, valid = (torch.nn.functional.pad(x, (0, 15 - x.shape[1]), value=1).repeat(2, 1)[:rows] for x in (out, mask))
        with pytest.raises(LessError, match=f"this cache holds 2 sequences, and {rows} came"):
            generate(model, longer, cache, valid)
