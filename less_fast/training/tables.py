"""Better budget tables, by trial: tokens move between heads as long as that helps the model."""

from dataclasses import replace
from itertools import permutations

import torch
from transformers import PreTrainedModel

from ..budgets import Table
from ..hf.architecture import check_model
from ..hf.identity import check_kernels
from ..layer.checks import LessError
from ..setting import Setting
from .checks import check_setting, check_windows
from .head_costs import check_policy, takes
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
