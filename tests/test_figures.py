"""What users read: every figure is computed here a second time, by a plain formula, from the losses of single tokens."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from memory import numbers_held
from models import make_kernels, make_model, reference_kernels, reference_policy, tokens
from transformers import DynamicCache

import less_ref
from less_fast import H2O, LessCache, Retention
from less_fast.budgets import Curves
from less_fast.hf.architecture import less_layers, sizes
from less_fast.measuring import compare as measuring
from less_fast.measuring.caches import describe
from less_fast.measuring.compare import compare, contenders, table
from less_fast.setting import Setting
from less_fast.training import Recipe, head_costs, layers
from less_fast.training.joint import mean_divergence
from paper_checks.architectures import tiny

LAYERS, WINDOWS, LENGTH = 2, 5, 24
POLICIES = [H2O(2, 2), H2O(3, 4)]
RANKS = {"ours": 3, "others": 6}  # which Baseline+ pays with different budgets


@pytest.fixture(scope="module")
def speaker():
    """A model that is sure of what it says, and texts that it said itself: it needs what it has read."""
    model = make_model(num_hidden_layers=LAYERS)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        ids, generator = tokens(WINDOWS, 1), torch.Generator().manual_seed(1)
        while ids.shape[1] < LENGTH:
            says = model(ids).logits[:, -1].softmax(-1)  # (W, vocabulary)
            ids = torch.cat([ids, torch.multinomial(says, 1, generator=generator)], 1)
    return model, ids


@pytest.fixture(scope="module")
def kernels(speaker):
    """By name; the first know a table for LESS, and another for the bare policy."""
    found = {name: make_kernels(speaker[0], rank) for name, rank in RANKS.items()}
    less, bare = ([[[1.0, 0.0] for _ in range(2)] for _ in range(LAYERS)] for _ in range(2))
    less[1][0] = bare[0][1] = [9.0, 0.0]  # the head in need
    found["ours"].curves["H2O"] = Curves(repr(H2O(2, 2)), [2, 30], bare, less, LENGTH, 1, "kl")
    return found


def token_losses(model, ids, cache):
    """-log p of every token but the first, as the model says it through a cache: (W, T - 1)."""
    with torch.no_grad():
        log_p = model(ids, past_key_values=cache).logits.log_softmax(-1).numpy()  # (W, T, vocabulary)
    return np.array([[-log_p[w, t, ids[w, t + 1]] for t in range(ids.shape[1] - 1)] for w in range(len(ids))])


def token_divergences(model, ids, make):
    """KL(full cache || one that `make` makes) at every token: (W, T), one window after the other."""
    found = []
    for window in ids.split(1):
        with torch.no_grad():
            caches = DynamicCache(config=model.config), make()
            full, ours = (model(window, past_key_values=cache).logits[0].log_softmax(-1).numpy() for cache in caches)
        found.append((np.exp(full) * (full - ours)).sum(-1))  # (T,)
    return np.array(found)


class Clock:
    """Time that passes when the model takes one token, so long in each turn of each cache; a prompt takes it 1000 seconds."""

    def __init__(self, caches):
        self.now, self.turns = 0.0, 0
        self.seconds = np.random.default_rng(0).exponential(1.0, (measuring.DECODED, caches)) + 0.1

    def tick(self, model, args, kwargs):
        if kwargs.get("input_ids") is None or kwargs["input_ids"].shape[1] > 1:
            self.now += 1000.0
            return
        self.now += self.seconds.flat[self.turns]
        self.turns += 1


@pytest.fixture(scope="module")
def compared(speaker, kernels):
    """The rows of `compare`, two windows in a forward pass, and the seconds that every turn took of decoding."""
    model, ids = speaker
    caches = 1 + len(POLICIES) * (1 + 2 * len(RANKS) + 2)
    clock = Clock(caches)
    hook = model.register_forward_pre_hook(clock.tick, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "token_losses", partial(measuring.token_losses, rows=2))
        patch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        rows = compare(model, ids, POLICIES, kernels)
    hook.remove()
    assert len(rows) == caches
    assert clock.turns == clock.seconds.size
    return rows, clock.seconds


def test_the_wider_the_model_and_the_longer_its_windows_the_fewer_go_through_it_together(speaker, monkeypatch):
    model, ids = speaker
    passes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda *call: passes.append(tuple(call[2]["input_ids"].shape)), with_kwargs=True
    )
    full = next(contenders(model, [], {}))
    for together, length in ((2, ids.shape[1]), (4, ids.shape[1] // 2), (1, 3 * ids.shape[1])):
        monkeypatch.setattr(measuring, "NUMBERS_AT_ONCE", 2 * ids.shape[1] * model.config.hidden_size)
        windows, passes[:] = ids.repeat(1, 3)[:4, :length], []
        measuring.token_losses(model, windows, full)
        assert passes[-1] == (together, length)
    hook.remove()


@pytest.fixture(scope="module")
def groups(compared):
    """The rows of each policy, its bare row first; and the full cache's."""
    full, *rest = compared[0]
    each = len(rest) // len(POLICIES)
    return full, [rest[start : start + each] for start in range(0, len(rest), each)]


@pytest.fixture(scope="module")
def losses(speaker, kernels, groups):
    """For the rows in their order: the losses of single tokens (W, T - 1), through caches that are made here."""
    model, ids = speaker
    full, policies = groups
    found = [token_losses(model, ids, DynamicCache(config=model.config))]
    for policy, rows in zip(POLICIES, policies):
        for row in rows:
            rule, less = policy.with_budget(row.budget), row.cache == "less"
            assert row.policy == repr(rule)
            budgets = kernels["ours"].budgets_for(rule, less) if row.budgets == "by head" else "uniform"
            found.append(token_losses(model, ids, LessCache.for_model(model, rule, kernels.get(row.kernels), budgets, chunk=1)))
    return dict(zip(map(id, [full, *itertools.chain(*policies)]), found))


def perplexity(nats):
    return math.exp(nats.mean())


def assert_share(said, full, bare, nats, of):
    """(bare - nats) / (bare - full) of the mean losses, and the jackknife's error, each window left out once."""

    def share(windows):
        full_cache, lost, got = (of(x[windows]) for x in (full, bare, nats))
        return (lost - got) / (lost - full_cache)

    W = len(full)
    without = [share([w for w in range(W) if w != left_out]) for left_out in range(W)]
    error = math.sqrt((W - 1) / W * sum((one - sum(without) / W) ** 2 for one in without))
    assert said == (pytest.approx(share(range(W)), rel=1e-3), pytest.approx(error, rel=1e-3))


def test_tables_are_measured_beside_uniform_budgets_and_baseline_plus_once_for_each_rank(speaker, kernels, groups):
    full, policies = groups
    assert (full.cache, full.policy, full.budget, full.budgets, full.kernels) == ("full", *[None] * 4)
    for policy, rows in zip(POLICIES, policies):
        ours, others = (measuring.baseline_plus(speaker[0], policy, some).budget for some in kernels.values())
        assert [(row.cache, row.budget, row.budgets, row.kernels) for row in rows] == [
            ("bare", policy.budget, "uniform", None),
            ("baseline+", ours, "uniform", None),
            ("baseline+", others, "uniform", None),
            ("less", policy.budget, "uniform", "ours"),
            ("less", policy.budget, "uniform", "others"),
            ("baseline+", ours, "by head", None),
            ("less", policy.budget, "by head", "ours"),
        ]


def test_the_cases_tell_the_rows_apart(groups, losses):
    """Or a figure of the wrong row would go unseen."""
    full, policies = groups
    assert len({round(perplexity(nats), 4) for nats in losses.values()}) == len(losses)
    for rows in policies:
        assert perplexity(losses[id(rows[0])]) > 1.05 * perplexity(losses[id(full)])
        assert len({row.budget for row in rows}) == 1 + len(RANKS)


def test_perplexity_and_its_standard_error_are_those_of_the_losses_of_single_tokens(compared, losses):
    for row in compared[0]:
        nats = losses[id(row)]
        assert row.perplexity == pytest.approx(perplexity(nats), rel=1e-5)
        of_windows = [sum(window) / len(window) for window in nats]
        mean = sum(of_windows) / WINDOWS
        variance = sum((loss - mean) ** 2 for loss in of_windows) / (WINDOWS - 1)
        assert row.stderr == pytest.approx(perplexity(nats) * math.sqrt(variance / WINDOWS), rel=1e-4)


def test_the_recovered_share_is_that_of_what_the_bare_policy_of_the_same_budget_loses(groups, losses):
    full, policies = groups
    assert full.recovered is full.recovered_stderr is None
    for bare, *rows in policies:
        assert bare.recovered is bare.recovered_stderr is None
        for row in rows:
            said = row.recovered, row.recovered_stderr
            assert_share(said, losses[id(full)], losses[id(bare)], losses[id(row)], perplexity)


def test_the_removed_share_is_that_of_what_baseline_plus_of_the_same_bytes_loses(speaker, kernels, groups, losses):
    full, policies = groups
    for policy, rows in zip(POLICIES, policies):
        for row in rows:
            if row.cache != "less":
                assert row.removed is row.removed_stderr is None
                continue
            plus = measuring.baseline_plus(speaker[0], policy, kernels[row.kernels])
            (equal,) = (one for one in rows if (one.cache, one.budgets, one.budget) == ("baseline+", row.budgets, plus.budget))
            said = row.removed, row.removed_stderr
            assert_share(said, losses[id(full)], losses[id(equal)], losses[id(row)], np.mean)


def test_bytes_are_those_that_one_sequence_needs(groups):
    """Counted from budgets, ranks and sizes alone. Numbers are float64, but positions int32; each KV head notes in an int64
    which slot the next token takes, and each layer how many tokens it saw."""
    full, policies = groups
    assert full.bytes == 8 * LAYERS * 2 * 2 * 8 * LENGTH  # keys and values of 2 KV heads of 8 numbers
    for row in itertools.chain(*policies):
        numbers = sum(numbers_held([row.budget] * 2, [RANKS.get(row.kernels, 0)] * 2, [1] * 2, head_dim=8).values())
        slots = 2 * (row.budget + 1)
        assert row.bytes == LAYERS * (8 * numbers - 4 * slots + 8 * 2 + 8)


def test_tokens_per_second_are_those_of_all_sequences_in_the_median_turn(compared):
    rows, seconds = compared
    for row, spent in zip(rows, seconds.T):
        fast, slow = sorted(spent)[measuring.DECODED // 2 - 1 : measuring.DECODED // 2 + 1]
        assert row.tokens_per_second == pytest.approx(WINDOWS / ((fast + slow) / 2), rel=1e-6)


def test_the_table_prints_the_figures_of_its_rows(compared):
    rows, _ = compared
    *_, budget, perplexities, errors, recovered, removed, held, speed = (column._cells for column in table(rows, "").columns)
    assert budget == ["all"] + [f"{row.budget}, by head" if row.budgets == "by head" else str(row.budget) for row in rows[1:]]
    for cells, figures in ((perplexities, "perplexity"), (errors, "stderr")):
        assert cells == [f"{getattr(row, figures):.2f}" for row in rows]
    for cells, figure in ((recovered, "recovered"), (removed, "removed")):
        shares = [(getattr(row, figure), getattr(row, f"{figure}_stderr")) for row in rows]
        assert cells == ["" if part is None else f"{100 * part:.1f}% ± {100 * error:.1f}%" for part, error in shares]
    assert held == [f"{row.bytes:,}" for row in rows]
    assert speed == [f"{row.tokens_per_second:,.0f}" for row in rows]


@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_without_their_state_have_the_tables_of_the_bare_policy(kernels, policy):
    ours = kernels["ours"]
    assert ours.without_state().budgets_for(policy) == ours.budgets_for(policy, less=False) != ours.budgets_for(policy)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("context", [None, 64])
@pytest.mark.parametrize("by_head", [None, POLICIES[1:]], ids=["beside uniform", "alone"])
def test_every_cache_that_is_compared_is_made_as_asked_and_baseline_plus_holds_just_the_bytes_of_less(
    speaker, kernels, int8, context, by_head
):
    def held(policy, some=None):
        return Setting.of(sizes(speaker[0]), range(LAYERS), policy, some, "uniform", int8=int8).memory(torch.float64)

    _, *rows = contenders(speaker[0], POLICIES[:1], kernels, int8=int8, context=context, by_head=by_head)
    told = {(row.cache, row.budgets) for row in rows}
    assert told >= {("less", "uniform"), ("less", "by head"), ("baseline+", "by head")}
    assert (("bare", "by head") in told) == (by_head is not None)
    for row in rows:
        made = row.make(3).setting
        table = kernels["ours"].budgets_for(row.policy, row.cache == "less") if row.budgets == "by head" else None
        assert (made.policy, made.budgets, made.chunk) == (row.policy, table, 3)
        assert (made.int8, made.context, made.kernels) == (int8, context, kernels.get(row.kernels))
        if row.cache == "less":
            less = held(row.policy, kernels[row.kernels])
            assert held(row.plus.with_budget(row.plus.budget - 1)) < less <= held(row.plus)


@pytest.mark.parametrize("lost", [0.0, -0.1])
def test_of_what_loses_nothing_there_is_no_share(speaker, kernels, monkeypatch, lost):
    """What the bare policy and Baseline+ lose, in nats per token; LESS loses 0.2."""
    model, ids = speaker
    full = 2 + torch.rand(WINDOWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    more = {"full": 0.0, "less": 0.2}
    for cache, others in (("bare", "baseline+"), ("baseline+", "bare")):
        nats = {cache: lost, others: 0.3} | more
        monkeypatch.setattr(measuring, "window_losses", lambda model, windows, one, nats=nats: full + nats[one.cache])
        monkeypatch.setattr(measuring, "decode", lambda model, windows, caches: [(1, 1.0)] * len(caches))
        rows = [row for row in compare(model, ids, POLICIES[:1], {"ours": kernels["ours"]}) if row.cache == "less"]
        assert len(rows) == 2
        for row in rows:
            shares = row.recovered, row.removed
            assert [part is None for part in shares] == [cache == "bare", cache == "baseline+"]
            assert [part is None for part in (row.recovered_stderr, row.removed_stderr)] == [part is None for part in shares]


def test_a_divergence_is_the_mean_over_all_tokens_of_all_windows(speaker, kernels):
    """Of three windows in passes of two the last is alone."""
    model, ids = speaker[0], speaker[1][2:]
    for some in (None, *kernels.values()):
        costs = token_divergences(model, ids, lambda some=some: LessCache.for_model(model, H2O(2, 2), some, "uniform", 1))
        assert abs(costs[2].mean() - costs.mean()) > 0.02 * costs.mean()  # or weights would not show
        setting = Setting.of(sizes(model), range(LAYERS), H2O(2, 2), some, "uniform")
        assert mean_divergence(model, ids, setting) == pytest.approx(costs.mean(), rel=1e-6)


def output(layer, row, policy, features):
    """What a layer puts out for one text where the policy evicts: (Hq, T, D), by the reference."""
    q, k, v = (getattr(layer, name)[row].double().numpy() for name in "qkv")
    out = less_ref.run(q, k, v, reference_policy(policy), features and reference_kernels(features), scale=layer.scale).out
    return out.transpose(1, 0, 2)


def test_costs_by_the_gradient_are_means_over_all_tokens(speaker, kernels, monkeypatch):
    """Half the squared product of gradient and change, query by query."""
    model, ids = speaker
    own, seen = head_costs.watch, []
    monkeypatch.setattr(head_costs, "watch", lambda *rest, **more: seen.append(own(*rest, **more)) or seen[-1])
    budgets = [2, 5]
    curves = head_costs.measure(model, ids[:3], H2O(2, 2), kernels["ours"], budgets)
    for said, some in ((curves.bare, None), (curves.less, kernels["ours"])):
        for index, (column, budget) in itertools.product(range(LAYERS), enumerate(budgets)):
            costs = []  # of every token, by KV head
            for layer in (held[index] for held in seen):
                change = output(layer, 0, H2O(2, 2).with_budget(budget), some and some.layers[index])
                moved = layer.g[0].numpy() * (change - layer.full[0].numpy())  # (samples, Hq, T, D)
                by_head = moved.sum(-1).reshape(len(moved), 2, -1, LENGTH).sum(2)  # (samples, Hkv, T)
                costs += (by_head**2 / 2).mean(0).T.tolist()
            assert len(costs) == 3 * LENGTH
            assert [said[index][head][column] for head in range(2)] == pytest.approx(np.mean(costs, 0), rel=1e-6)


@pytest.mark.parametrize("family", ["exponential", "paper"])
def test_what_is_left_of_the_bare_policys_cost_counts_every_window_alike(family, speaker, kernels, monkeypatch):
    """By the gradient, and by the paper's objective."""
    model, ids = speaker
    own, seen = layers.watch, []
    monkeypatch.setattr(layers, "watch", lambda *rest, **more: seen.append(own(*rest, **more)) or seen[-1])
    setting = Setting.of(sizes(model), range(LAYERS), H2O(2, 2), kernels["ours"], "uniform")
    (said,) = layers.shares_left(model, ids, [setting], Recipe(family))
    assert len(seen) == WINDOWS
    for index in range(LAYERS):
        costs = np.zeros(2)  # with LESS, and under the bare policy
        for layer in (held[index] for held in seen):
            for kind, features in enumerate((kernels["ours"].layers[index], None)):
                change = (output(layer, 0, H2O(2, 2), features) - layer.full[0].numpy())[:, 5:]  # (Hq, L, D)
                if family == "paper":
                    costs[kind] += np.square(np.concatenate([*change], -1) @ layer.projection.numpy()).sum()
                else:
                    costs[kind] += ((layer.g[0].numpy()[:, :, 5:] * change).sum((1, 3)) ** 2).sum()
        assert said[index] == pytest.approx(costs[0] / costs[1], rel=1e-6)


@torch.no_grad()
def test_what_is_said_of_a_cache_names_the_features_of_the_layers_that_less_serves_or_that_tokens_are_forgotten():
    mixed, plain = tiny("gemma2"), make_model()
    ranks = [5 * (index in less_layers(mixed)) for index in range(sizes(mixed)["layers"])]
    assert 0 in ranks
    rho = make_kernels(plain, rho=3)
    for model, policy, kernels, said in (
        (mixed, H2O(3, 3), make_kernels(mixed, ranks).float(), "folded into 5 features"),
        (plain, H2O(3, 3), make_kernels(plain, [4, 2, 3]), "folded into 2 to 4 features"),
        (plain, Retention(6, 2), rho, "folded into 3 features"),
        (plain, Retention(6, 2), rho.without_state(), "forgotten"),
        (plain, H2O(3, 3), None, "forgotten"),
    ):
        cache = LessCache.for_model(model, policy, kernels, "uniform")
        model(tokens(1, 9), past_key_values=cache)
        assert f"9 through the cache: each KV head keeps 6, the others are {said}; " in describe(cache)
