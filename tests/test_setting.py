"""How a cache is compressed is one value: what it gives each head, counts and refuses; and which curves fit a policy."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import make_kernels, make_model, tokens

from less_fast import H2O, TOVA, Lambda, LessCache, LessError, LessKernels, Retention, SnapKV, Window
from less_fast.budgets import Curves
from less_fast.demo import KERNELS
from less_fast.layer.features import Performer
from less_fast.layer.names import policy_of
from less_fast.setting import POLICIES, Setting, best_policy, policy_named

SHAPE = dict(layers=3, query_heads=4, kv_heads=2, head_dim=8)
TABLE = [[3, 9], [5, 5], [12, 1]]
WITH_BUDGET = [name for name in POLICIES if name != "full"]


@given(st.sampled_from(WITH_BUDGET), st.integers(5, 5000))
def test_a_budget_is_read_in_tokens_and_as_a_share(name, budget):
    assert policy_named(name, budget).budget == policy_named(name, f" {budget} ").budget == budget
    assert policy_named(name, "50%", 2 * budget + 1).budget == budget
    assert policy_named(name, f"{budget}.0") == POLICIES[name].with_budget(budget)


@given(st.sampled_from(WITH_BUDGET), st.integers(1, 10_000), st.integers(1, 100_000))
@example("h2o", 2900, 100)
@example("h2o", 5700, 100)
@example("h2o", 5800, 100)
def test_a_share_is_rounded_down_to_a_whole_number_of_tokens_and_by_nothing_else(name, hundredths, length):
    share, wanted = f"{hundredths // 100}.{hundredths % 100:02}%", hundredths * length // 10_000
    if wanted >= 5:  # every policy has room then
        assert policy_named(name, share, length).budget == wanted
    elif not wanted:
        with pytest.raises(LessError, match="at least 1"):
            policy_named(name, share, length)


@pytest.mark.parametrize(
    ("name", "budget", "length", "message"),
    [
        ("h20", 5, None, "no policy is called 'h20': choose one of window"),
        ("h2o", "much", None, "a number of tokens .* or a share"),
        ("h2o", "inf", None, "a number of tokens"),
        ("h2o", "nan%", 10, "a number of tokens"),
        ("h2o", "2.5", None, "a whole number of tokens"),
        ("h2o", "1/2%", 100, "a number of tokens"),
        ("h2o", "1e999999999%", 100, "a number of tokens"),
        ("h2o", "1e-999999999%", 100, "at least 1, and '1e-999999999%' is 0"),
        ("h2o", "-50%", 100, "at least 1, and '-50%' is -50"),
        ("h2o", "0.01%", 100, "at least 1, and '0.01%' is 0"),
        ("h2o", "5%", None, "in percent needs a known length"),
        ("lambda", "3", None, "leaves no recent tokens beside 4 sinks"),
    ],
)
def test_what_is_no_budget_is_refused(name, budget, length, message):
    with pytest.raises(LessError, match=message):
        policy_named(name, budget, length)


def test_each_head_gets_the_policy_and_the_kernels_that_the_setting_says():
    kernels = make_kernels(make_model())
    uniform = Setting.of(SHAPE, range(3), H2O(2, 2), kernels)
    assert uniform.layer(1) == (H2O(2, 2), kernels.layers[1])
    by_head = Setting.of(SHAPE, range(3), H2O(2, 2), kernels, TABLE)
    assert by_head.layer(2) == ([H2O(6, 6), H2O(1, 0)], kernels.layers[2])
    rule, features = by_head.shard(2, 1, 2)
    assert rule == [H2O(1, 0)]
    assert torch.equal(features.k3, kernels.layers[2].k3[1:])


@pytest.mark.parametrize("budgets", [None, TABLE])
@pytest.mark.parametrize("ranks", [None, 3, [4, 2, 5]])
@pytest.mark.parametrize("more", [{}, dict(context=64), dict(int8=True), dict(context=64, int8=True)], ids=str)
def test_the_bytes_that_are_counted_are_those_that_a_cache_holds(budgets, ranks, more):
    model = make_model()
    kernels = ranks and make_kernels(model, ranks)
    cache = LessCache.for_model(model, H2O(3, 3), kernels, budgets, **more)
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
    setting = Setting.of(SHAPE, range(3), H2O(3, 3), kernels, budgets, **more)
    assert setting.memory(torch.float64) == sum(cache.memory().values())


@pytest.mark.parametrize("more", [{}, dict(context=64), dict(int8=True), dict(context=64, int8=True)], ids=str)
def test_baseline_plus_is_the_first_budget_whose_bare_cache_holds_the_bytes_of_less(more):
    """Kept as LESS keeps them: in eight bits, and so that they can move."""
    setting = Setting.of(SHAPE, range(3), H2O(3, 3), make_kernels(make_model(), 5), **more)
    budget = setting.baseline_plus(torch.float32).budget
    smaller, enough = (Setting.of(SHAPE, range(3), H2O(b, 0), **more).memory(torch.float32) for b in (budget - 1, budget))
    assert smaller < setting.memory(torch.float32) <= enough


def test_the_best_policy_is_retention_with_rho_else_what_the_kernels_were_trained_for_and_without_kernels_snapkv():
    model = make_model()
    assert best_policy(None, 12) == SnapKV(12, 3, 3)
    told = {"Lambda(sinks=2, recent=30)": Lambda(2, 10), "of nobody": H2O(6, 6), None: H2O(6, 6)}
    for said, wanted in told.items():
        for rho, best in ((None, wanted), (3, Retention(12, 1))):
            kernels = make_kernels(model, rho=rho)
            kernels.about |= {} if said is None else {"policy": said}
            assert best_policy(kernels, 12) == best


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(policy="h2o"), "a policy is something like H2O"),
        (dict(kernels=torch.nn.Linear(1, 1)), "kernels are LessKernels"),
        (dict(kernels=LessKernels(2, 4, 2, 8, hidden=3)), "these kernels are for {'layers': 2"),
        (dict(chunk=0), "chunk must be an integer from 1"),
        (dict(budgets="even"), 'budgets are a table, None or "uniform"'),
        (dict(budgets=TABLE[:2]), "must be 3 layers x 2 KV heads"),
        (dict(budgets=[[3, 9], [5, 5], [12, 0]]), "a budget must be an integer from 1 to .*, not 0"),
        (dict(budgets=[[3, 9], [5, 5], [12, 2.5]]), "a budget must be an integer from 1 to .*, not 2.5"),
        (dict(budgets=TABLE, policy=TOVA(4)), "must be that of all its KV heads"),
        (dict(budgets=TABLE, sizes=None), "for a model whose layers have equal heads"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(LessError, match=message):
        Setting.of(**dict(sizes=SHAPE, less_layers=range(3), policy=H2O(2, 2)) | changes)


@pytest.mark.parametrize(("policy", "world_size", "message"), [(H2O(2, 2), 3, "2 KV heads cannot"), (TOVA(4), 2, "pools over")])
def test_heads_that_cannot_be_shared_out_are_refused(policy, world_size, message):
    with pytest.raises(LessError, match=message):
        Setting.of(SHAPE, range(3), policy).shard(0, 0, world_size)


@given(st.sampled_from(WITH_BUDGET), st.integers(5, 300), st.integers(5, 300))
def test_a_policy_is_the_same_at_every_budget(name, one, other):
    policy = POLICIES[name]
    assert policy.is_scaled(policy.with_budget(one))
    assert policy.with_budget(one).is_scaled(policy)
    different = next(rule for other_name, rule in POLICIES.items() if other_name not in (name, "full"))
    assert not policy.with_budget(one).is_scaled(different.with_budget(other))


@pytest.mark.parametrize(
    ("policy", "takes_a_table"),
    [
        (H2O(26, 25), True),
        (H2O(10, 10), True),
        (H2O(14, 10), True),
        (H2O(90, 12), False),
        (H2O(51, 0), False),
        (H2O(20, 31), False),
        (Lambda(4, 47), True),
        (Lambda(8, 43), False),
        (Lambda(5, 46), False),
        (Lambda(60, 4), False),
        (Window(51), False),
        (SnapKV(51, 12, 3), False),
    ],
)
def test_curves_serve_the_policy_that_they_were_measured_under_and_no_other_of_its_class(policy, takes_a_table):
    kernels = LessKernels.from_pretrained(KERNELS)
    assert (kernels.budgets_for(policy) is not None) == takes_a_table
    sizes = {name: kernels.sizes[name] for name in SHAPE}
    setting = Setting.of(sizes, range(4), policy, kernels)
    assert (setting.budgets is not None) == takes_a_table


def test_curves_of_a_policy_that_nobody_knows_serve_none():
    for text in ("H2O(heavy=1", "Unknown(budget=3)", "H2O(3, 4)", "H2O", "1 + 1", "H2O(heavy=print())"):
        curves = Curves(text, [1, 2], [[[1.0, 0.0]]], None, 9, 1, "kl")
        assert not curves.describe(H2O(1, 1))


@given(st.sampled_from(list(POLICIES)))
def test_a_policy_comes_back_from_its_name_and_fields(name):
    policy = POLICIES[name]
    assert policy_of(type(policy).__name__, vars(policy)) == policy
    assert policy_of("Nobody", {}) is None


def test_heads_apart_share_their_copies_of_the_kernels():
    kernels = make_kernels(make_model())
    layer, before = kernels.layers[0], kernels.memory()
    part = layer.select_heads([1])
    assert layer.select_heads((1,)) is part
    assert kernels.memory() == before + sum(weight.nbytes for weight in part.state_dict().values())
    half = layer.on(torch.device("cpu"), torch.float32)
    assert layer.on(torch.device("cpu"), torch.float32) is half
    assert layer.on(torch.device("cpu"), torch.float64) is layer


def other_weights(layer):
    return {name: torch.randn_like(weight) for name, weight in layer.state_dict().items()}


CHANGES = {
    "in place": lambda layer: layer.state_dict().popitem()[1].add_(1),
    "loaded": lambda layer: layer.load_state_dict(other_weights(layer)),
    "assigned": lambda layer: layer.load_state_dict(other_weights(layer), assign=True),
    "to float32": lambda layer: layer.float(),
    "to bfloat16": lambda layer: layer.to(torch.bfloat16),
    "to bfloat16 and back": lambda layer: layer.to(torch.bfloat16).double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("family", "rho"), [("paper", None), ("exponential", 3), ("performer", None), ("performer", 3)])
def test_copies_of_the_kernels_are_made_anew_after_the_weights_have_changed(family, rho, change):
    """Those of some heads, those of another dtype, and those of some heads of these."""
    layer = make_kernels(make_model(), family=family, rho=rho).layers[0]

    def copies(layer):
        half = layer.on(torch.device("cpu"), torch.float16)
        return layer.select_heads([1]), half, half.select_heads([1])

    copies(layer)
    CHANGES[change](layer)
    for got, wanted in zip(copies(layer), copies(copy.deepcopy(layer))):  # a deep copy shares nothing
        for (name, a), (_, b) in zip(got.state_dict().items(), wanted.state_dict().items(), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


def test_weights_that_are_assigned_again_and_again_are_never_taken_for_those_that_lay_there_before():
    layer = Performer(4, 2, 64, 8)
    for _ in range(20):
        layer.on(torch.device("cpu"), torch.float16)
        for _ in range(3):  # memory that is free is used anew
            layer.load_state_dict(other_weights(layer), assign=True)
        assert torch.equal(layer.on(torch.device("cpu"), torch.float16).w, layer.w.half())


@torch.no_grad()
def test_caches_of_one_model_share_the_kernels_of_heads_apart():
    model = make_model()
    kernels = make_kernels(model)
    caches = [LessCache.for_model(model, SnapKV(4, 4, 1), kernels, TABLE) for _ in range(2)]  # other windows, other parts
    for cache in caches:
        model(tokens(1, 5), past_key_values=cache)
    one, other = ([part.kernels for layer in cache.layers for part in layer.state.parts] for cache in caches)
    assert len(one) == 5
    assert all(a is b for a, b in zip(one, other, strict=True))


def test_a_budget_alone_asks_for_the_best_that_the_kernels_can_do():
    model = make_model()

    def policy(kernels, about=None):
        if about:
            kernels.about["policy"] = about
        return LessCache.for_model(model, kernels=kernels, budget=9).setting.policy

    assert policy(make_kernels(model, rho=3), "TOVA(budget=4)") == POLICIES["retention"].with_budget(9)
    assert policy(make_kernels(model), "TOVA(budget=4)") == TOVA(9)
    assert policy(make_kernels(model), "H2O(heavy=3, recent=1)") == H2O(3, 1).with_budget(9)
    assert policy(make_kernels(model), "a policy of mine") == policy(make_kernels(model)) == POLICIES["h2o"].with_budget(9)
    assert policy(None) == POLICIES["snapkv"].with_budget(9)
    assert LessCache.for_model(model, budget=9).setting.kernels is None
    for none in (None, 0, 2.5, True):
        with pytest.raises(LessError, match="budget, how many tokens each KV head keeps, must be an integer from 1"):
            LessCache.for_model(model, budget=none)
