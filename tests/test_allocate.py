"""Budget tables: what a KV head costs, how a total is shared out by it, and that caches take the tables up."""

import json
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import make_kernels, make_model, tokens

from less_fast import H2O, Lambda, LessCache, LessKernels, Retention, Window
from less_fast.budgets import Curves, average, table
from less_fast.hf.architecture import sizes
from less_fast.hub import CONFIG
from less_fast.measuring.compare import baseline_plus
from less_fast.setting import Setting
from less_fast.training import tables
from less_fast.training.head_costs import grid, measure
from less_fast.training.joint import divergence
from less_fast.training.tables import LARGEST, allocate, refine


def setting(model, policy, kernels, table):
    return Setting.of(sizes(model), range(3), policy, kernels, table)


def curves_of(damage, budgets, **more):
    known = dict(policy="H2O(heavy=1, recent=1)", bare=damage, less=None, window=99, windows=1, by="kl")
    return Curves(budgets=list(budgets), **known | more)


@st.composite
def any_curves(draw):
    heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    budgets = sorted(draw(st.sets(st.integers(1, 12), min_size=2, max_size=4)))
    costs = st.lists(st.integers(0, 40), min_size=len(budgets), max_size=len(budgets))
    return curves_of([[draw(costs) for _ in range(heads[1])] for _ in range(heads[0])], budgets)


def hull(curve, budgets):
    """The curve made to fall, and its lower convex hull, at every budget in between."""
    falling = np.minimum.accumulate(curve)
    every = np.arange(budgets[0], budgets[-1] + 1)
    chords = [
        np.interp(every, [budgets[a], budgets[b]], [falling[a], falling[b]], left=np.inf, right=np.inf)
        for a, b in product(range(len(budgets)), repeat=2)
        if a <= b
    ]
    return dict(zip(every.tolist(), np.min(chords, 0)))


@given(any_curves(), st.floats(0, 1))
def test_no_other_table_of_the_same_sum_costs_less_by_the_convex_hulls(curves, share):
    heads = [curve for layer in curves.bare for curve in layer]
    least, most = curves.budgets[0], curves.budgets[-1]
    total = round(len(heads) * (least + share * (most - least)))
    found = np.array(table(curves, total, less=False))
    assert found.shape == (len(curves.bare), len(curves.bare[0]))
    assert found.sum() == total
    assert least <= found.min() <= found.max() <= most
    costs = [hull(curve, curves.budgets) for curve in heads]
    best = {0: 0.0}  # by dynamic programming: the least cost of each sum
    for cost in costs:
        sums = {}
        for (so_far, paid), (budget, more) in product(best.items(), cost.items()):
            sums[so_far + budget] = min(sums.get(so_far + budget, np.inf), paid + more)
        best = sums
    assert sum(cost[budget] for cost, budget in zip(costs, found.flatten().tolist())) == pytest.approx(best[total])


def test_a_total_beyond_the_curves_has_no_table():
    curves = curves_of([[[3.0, 1.0]] * 2], [4, 9])
    assert table(curves, 7, less=False) is None
    assert table(curves, 8, less=False) == [[4, 4]]
    assert table(curves, 18, less=False) == [[9, 9]]
    assert table(curves, 19, less=False) is None


@pytest.mark.parametrize(
    ("budgets", "message"), [([4, 9, 20], "one figure for each of the 3"), ([9, 4], "ascend"), ([4, 4], "ascend")]
)
def test_curves_that_cannot_be_are_refused(budgets, message):
    with pytest.raises(ValueError, match=message):
        curves_of([[[3.0, 1.0]] * 2], budgets)


@torch.no_grad()
def test_curves_of_windows_apart_average_to_those_of_all():
    model, ids = make_model(), tokens(3, 20)
    kernels, given = make_kernels(model), dict(budgets=[2, 5])
    together = measure(model, ids, H2O(2, 2), kernels, **given)
    apart = average([measure(model, some, H2O(2, 2), kernels, **given) for some in ids.split([2, 1])])
    assert np.allclose(apart.bare, together.bare)
    assert np.allclose(apart.less, together.less)
    assert apart.windows == together.windows == 3
    assert average([measure(model, ids, H2O(2, 2), **given)]).less is None


def test_a_refined_table_costs_what_is_said_and_no_move_among_its_largest_heads_costs_less():
    model, ids, start = make_model(), tokens(3, 40), [[20, 2], [2, 16], [2, 2]]
    kernels = make_kernels(model)

    def cost(table):
        return divergence(model, ids, setting(model, H2O(1, 1), kernels, table)).item()

    refined, said = refine(model, ids, setting(model, H2O(1, 1), kernels, start))
    assert refined != start == [[20, 2], [2, 16], [2, 2]]
    assert np.sum(refined) == np.sum(start)
    with torch.no_grad():
        assert cost(refined) == pytest.approx(said)
        assert said < cost(start)
        places = sorted(product(range(3), range(2)), key=lambda place: -refined[place[0]][place[1]])[:LARGEST]
        for source, target in permutations(places, 2):
            moved = np.array(refined)
            half = moved[source] // 2
            moved[source] -= half
            moved[target] += half
            assert cost(moved.tolist()) >= said * (1 - 1e-9)


def test_refining_never_gives_a_head_less_than_its_policy_takes():
    table, _ = refine(make_model(), tokens(2, 24), setting(make_model(), Lambda(3, 1), None, [[4, 6], [4, 4], [7, 4]]))
    assert np.sum(table) == 29
    assert np.min(table) >= 4


def test_refining_never_gives_a_head_more_than_a_whole_window():
    table, _ = refine(make_model(), tokens(1, 20), setting(make_model(), H2O(1, 1), None, [[16, 16], [2, 2], [16, 2]]))
    assert np.max(table) <= 19


def test_a_refined_table_comes_before_the_curves_for_its_own_total_alone():
    better = [[5, 3]]
    curves = curves_of([[[3.0, 1.0]] * 2], [2, 9], less=[[[3.0, 1.0]] * 2], refined={"less": {"8": better}})
    assert table(curves, 8, less=True) == better
    assert table(curves, 8, less=False) != better
    assert table(curves, 10, less=True) != better


@pytest.mark.parametrize("policy", [H2O(2, 2), Retention(4, 1)])
def test_the_table_of_baseline_plus_is_refined_without_the_low_rank_state(policy, tmp_path, monkeypatch):
    model, settings = make_model(), []
    kernels = make_kernels(model, rank=[3, 5, 3], rho=2)
    curves = curves_of([[[3.0, 2.0, 0.0]] * 2] * 3, [2, 5, 19], policy=repr(policy), less=[[[9.0, 1.0, 0.0]] * 2] * 3)
    kernels.curves[type(policy).__name__] = curves
    plus = baseline_plus(model, policy, kernels)

    def another(model, windows, setting):
        settings.append(setting)
        return [[*row] for row in reversed(setting.budgets)], 0.0

    monkeypatch.setattr(tables, "refine", another)
    known = [table(curves, rule.budget * 6, less) for rule, less in ((policy, True), (plus, False))]
    found = allocate(model, tokens(1, 20), policy, kernels, tmp_path, refined=[policy])
    less, bare = settings
    assert (less.policy, less.kernels, less.budgets) == (policy, kernels, known[0])
    assert (bare.policy, bare.budgets) == (plus, known[1])
    assert plus.budget > policy.budget
    if policy.needs == "rho":  # rho stays
        assert [layer.rank for layer in bare.kernels.layers] == [0, 0, 0]
        assert [layer.rho for layer in bare.kernels.layers] == [layer.rho for layer in kernels.layers]
    else:
        assert bare.kernels is None
    refined = {name: {str(np.sum(rows)): rows[::-1]} for name, rows in zip(("less", "bare"), known)}
    stored = LessKernels.from_pretrained(tmp_path).curves[type(policy).__name__]
    assert found.refined == stored.refined == refined


def test_the_grid_begins_where_the_policy_can_and_ends_at_the_whole_window():
    assert grid(H2O(2, 2), 100) == [4, 8, 16, 32, 64, 99]
    assert grid(Lambda(7, 2), 100) == [8, 16, 32, 64, 99]
    assert grid(Lambda(4, 2), 65) == [5, 8, 16, 32, 64]


@pytest.fixture
def allocated():
    """A model and kernels that know curves for H2O, with another head in need with them than without."""
    model = make_model()
    kernels = make_kernels(model)
    less, bare = [[[[1.0, 0.0] for _ in range(2)] for _ in range(3)] for _ in range(2)]
    less[2][1] = bare[0][0] = [9.0, 0.0]
    kernels.curves["H2O"] = curves_of(bare, [2, 30], less=less)
    return model, kernels


def budgets_of(cache, model):
    model(tokens(1, 3), past_key_values=cache)
    return [[policy.budget for policy in layer.state.policies()] for layer in cache.layers]


@torch.no_grad()
def test_a_cache_takes_the_table_of_its_kernels_unless_told_otherwise(allocated):
    model, kernels = allocated
    wanted = [[2, 2], [2, 2], [2, 14]]
    assert kernels.budgets_for(H2O(2, 2)) == wanted
    assert kernels.budgets_for(H2O(2, 2), less=False) == [[14, 2], [2, 2], [2, 2]]
    assert budgets_of(LessCache.for_model(model, H2O(2, 2), kernels), model) == wanted
    for policy, some, budgets in [(H2O(2, 2), kernels, "uniform"), (Window(4), kernels, None), (H2O(2, 2), None, None)]:
        assert budgets_of(LessCache.for_model(model, policy, some, budgets), model) == [[4, 4]] * 3
    table = [[3, 4], [5, 6], [7, 8]]
    assert budgets_of(LessCache.for_model(model, H2O(2, 2), kernels, table), model) == table
    assert budgets_of(LessCache.for_model(model, H2O(15, 16), kernels), model) == [[31, 31]] * 3  # beyond the curves
    with pytest.raises(ValueError, match="budgets are a table, None or \"uniform\", not 'even'"):
        LessCache.for_model(model, H2O(2, 2), kernels, "even")


def test_curves_are_stored_with_the_kernels_and_checked_when_read(allocated, tmp_path):
    _, kernels = allocated
    kernels.save_pretrained(tmp_path)
    assert LessKernels.from_pretrained(tmp_path).curves == kernels.curves
    assert "curves for H2O" in (tmp_path / "README.md").read_text()
    config = json.loads((tmp_path / CONFIG).read_text())
    config["curves"]["H2O"]["bare"].pop()
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the curves of H2O do not fit 3 layers of 2 KV heads"):
        LessKernels.from_pretrained(tmp_path)


def test_less_curves_without_the_kernels_they_were_measured_with_are_not_used(allocated):
    _, kernels = allocated
    kernels.curves["H2O"] = replace(kernels.curves["H2O"], less=None)
    assert kernels.budgets_for(H2O(2, 2)) is None
    assert kernels.budgets_for(H2O(2, 2), less=False) is not None
