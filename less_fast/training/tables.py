"""Budget tables: curves of what each KV head costs, stored with the kernels whose caches will use them, and tables refined by
trial, where tokens move between heads as long as that helps the model."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..budgets import Curves, Table, table
from ..hf.architecture import check_model, less_layers, sizes
from ..hf.identity import check_kernels
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.policies import Policy
from ..setting import Setting
from .checks import check_setting, check_windows
from .head_costs import check_policy, grid, measure, takes
from .joint import mean_divergence

LARGEST = 3  # heads, the largest, between which tokens move
AT_ONCE = 4  # windows in one forward pass


def refine(model: PreTrainedModel, windows: torch.Tensor, setting: Setting) -> tuple[Table, float]:
    """A better table of the same sum than the setting's, and its divergence from the full cache on the windows.

    Curves are measured head by head, and so do not see that heads stand in for each other: of several that copy it may be best
    to serve one well. Half of what one of the LARGEST heads has goes to another, as long as that helps.
    windows (W, T) int64, a few, of those that curves are measured on.
    Raises LessError if windows, table or kernels do not fit the model, or the divergence is not finite.
    """
    check_model(model)
    check_policy(setting.policy)
    check_windows(model, windows)
    check_setting(model, setting)
    if setting.kernels is not None:
        check_kernels(model, setting.kernels)
    if setting.budgets is None:
        raise LessError("there is no table to refine: give the setting one, from `less_fast.budgets.table` for example")
    table, best = [[*row] for row in setting.budgets], mean_divergence(model, windows, setting, AT_ONCE)
    if not best < float("inf"):
        raise LessError("the divergence is not finite: the weights of the model or the kernels are broken")
    tried = set()
    while True:
        heads = [(layer, head) for layer, row in enumerate(table) for head in range(len(row))]
        largest = sorted(heads, key=lambda place: -table[place[0]][place[1]])[:LARGEST]
        for (from_layer, from_head), (to_layer, to_head) in permutations(largest, 2):
            moved = [[*row] for row in table]
            half = min(table[from_layer][from_head] // 2, windows.shape[1] - 1 - table[to_layer][to_head])
            moved[from_layer][from_head] -= half
            moved[to_layer][to_head] += half
            if half < 1 or not takes(setting.policy, moved[from_layer][from_head]) or (key := str(moved)) in tried:
                continue
            tried.add(key)
            if (cost := mean_divergence(model, windows, replace(setting, budgets=moved), AT_ONCE)) < best:
                best, table = cost, moved
                break
        else:
            return table, best


def allocate(
    model: PreTrainedModel,
    windows: torch.Tensor,
    policy: Policy,
    kernels: LessKernels,
    out: str | os.PathLike,
    refined: Sequence[Policy] = (),
) -> Curves:
    """The curves under the policy, stored with the kernels in the folder `out`.

    windows (W, T) int64; refined: policies whose tables, of LESS and of its Baseline+, are refined by trial: then curves that are
    there are used again. What is done is stored after each part. Raises LessError if they do not reach a budget to refine.
    """
    name = type(policy).__name__
    known = kernels.curves.get(name) if refined else None
    reach = known.budgets if known else grid(policy, windows.shape[1])
    if beyond := [rule.budget for rule in refined if not reach[0] <= rule.budget <= reach[-1]]:
        raise LessError(
            f"curves reach from {reach[0]} to {reach[-1]} tokens, so there is no table of {beyond[0]} to refine: take another"
        )
    if known is None:
        kernels.curves[name] = measure(model, windows, policy, kernels)
        kernels.save_pretrained(out)
    curves = kernels.curves[name]
    for rule in tqdm(refined, desc="refining", unit="budget", disable=not refined):
        less = Setting.of(sizes(model), less_layers(model), rule, kernels, "uniform")
        plus = replace(less.without_state(), policy=less.baseline_plus(model.dtype))
        for kind, setting in (("less", less), ("bare", plus)):
            total = setting.policy.budget * curves.heads
            if budgets := table(curves, total, kind == "less"):
                better, _ = refine(model, windows, replace(setting, budgets=budgets))
                curves.refined.setdefault(kind, {})[str(total)] = better
        kernels.save_pretrained(out)
    return curves
