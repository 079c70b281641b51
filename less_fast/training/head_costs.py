"""What each KV head costs at each budget: the curves that budget tables are made of.

A cost is the KL divergence from the full cache's predictions to those with one head compressed, its low-rank state in place, and
all others whole. It is estimated from one backward pass (sensitivity.py): time is linear in layers. Under the tables that follow
the embedded model diverges 0.81 to 1.03 times as much as under those of measured costs (by "kl", which shipped curves are).
"""

from collections.abc import Sequence
from itertools import product

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..budgets import Curves
from ..hf.architecture import check_model, less_layers, sizes
from ..hf.identity import check_kernels
from ..kernels import LessKernels
from ..layer.checks import LessError, integer
from ..layer.names import written
from ..layer.parallel import parallel
from ..layer.policies import Policy
from ..layer.state import need_policy
from ..setting import Setting
from .checks import check_setting, check_windows
from .sensitivity import eviction_times_of, watch

BUDGETS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # as far as windows go


def grid(policy: Policy, length: int) -> list[int]:
    """The budgets at which curves are measured in windows of `length` tokens: from the least that the policy takes, 4 or more,
    to the whole window. LessError if the windows are too short for two budgets."""
    least = next((budget for budget in range(BUDGETS[0], length - 1) if takes(policy, budget)), None)
    if least is None:
        raise LessError(f"windows of {length} tokens are too short for curves of {policy}: use longer ones, or another policy")
    return [least, *(budget for budget in BUDGETS if least < budget < length - 1), length - 1]


def takes(policy: Policy, budget: int) -> bool:
    """Whether the policy can be had with this budget."""
    try:
        policy.with_budget(budget)
    except LessError:
        return False
    return True


def check_policy(policy: Policy) -> None:
    """LessError for a policy whose heads do not choose alone, or that may evict several tokens at once."""
    need_policy(policy)
    if policy.pooled or policy.needs == "kinds" or not policy.one_leaves:
        raise LessError(
            f"budget tables are for policies whose heads each keep a number of their own, and {policy} is none: try H2O"
        )
    written(policy)  # tables are found again by its name and fields


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    windows: torch.Tensor,
    policy: Policy,
    kernels: LessKernels | None = None,
    budgets: Sequence[int] | None = None,
) -> Curves:
    """The curves of every KV head under `policy` with each of the budgets, with the kernels and without them.

    windows (W, T) int64, a few, and none of those on which results will be reported. budgets: ascending, None for `grid`.
    In nats per token.
    Raises LessError for a policy that `check_policy` refuses; for windows, budgets or kernels that do not fit; and if a cost is
    not finite.
    """
    check_model(model)
    check_policy(policy)
    check_windows(model, windows)
    T = windows.shape[1]
    budgets = grid(policy, T) if budgets is None else [integer("a budget of curves", budget, 1, T) for budget in budgets]
    if not budgets or sorted(set(budgets)) != budgets:
        raise LessError(f"the budgets of curves must ascend, one or more, not {budgets}")
    for budget in budgets:
        policy.with_budget(budget)
    with_state = Setting.of(None, (), policy, kernels, "uniform")
    settings = [with_state.without_state()] + ([] if kernels is None else [with_state])
    check_setting(model, settings[-1])
    if kernels is not None:
        check_kernels(model, kernels)
    served, kv_heads = less_layers(model), sizes(model)["kv_heads"]
    total = torch.zeros(len(settings), sizes(model)["layers"], kv_heads, len(budgets), dtype=torch.float64, device="cpu")
    evicting = [(column, budget) for column, budget in enumerate(budgets) if budget < T - 1]  # or nothing is missed
    for number, ids in enumerate(windows.split(1)):
        layers = watch(model, ids, seed=0)
        wide = {index: layer.rows(slice(None)) for index, layer in layers.items()}
        for column, budget in tqdm(evicting, desc=f"curves, window {number + 1}", unit="budget", leave=False):
            times = eviction_times_of(layers, policy.with_budget(budget), kernels)
            for (index, layer), (row, setting) in product(wide.items(), enumerate(settings)):
                out = parallel(layer.q, layer.k, layer.v, times[index], setting.layer(index)[1], layer.scale)
                cost = layer.cost_of_heads(layer.seen(out)).sum((0, 2))  # (Hkv,)
                total[row, index, :, column] += cost.double().cpu() / windows.numel()
    if not total.isfinite().all():
        raise LessError("a cost is not finite: the weights of the model or the kernels are broken")
    bare, *less = ([row if index in served else [] for index, row in enumerate(costs)] for costs in total.tolist())
    return Curves(repr(policy), budgets, bare, less[0] if less else None, T, len(windows), "gradient")
