"""What each KV head costs at each budget: the curves that budget tables are made of.

A model reads a few texts with one head compressed, its low-rank state in place, and all others whole. The cost is the KL
divergence from the full cache's predictions to these. That runs the model for every head and budget; by the gradient it is
estimated from one backward pass (sensitivity.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from ..budgets import Curves
from ..hf.architecture import check_model, less_layers, sizes
from ..hf.identity import check_kernels
from ..hf.seam import predictions
from ..kernels import LessKernels
from ..layer.checks import LessError, integer
from ..layer.names import written
from ..layer.parallel import dense, eviction_times, parallel
from ..layer.policies import Policy
from ..layer.state import need_policy
from ..setting import Setting
from .checks import check_setting, check_windows
from .sensitivity import eviction_times_of, watch

MEASURES = ("kl", "gradient")
BUDGETS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # as far as windows go
AT_ONCE = 2  # windows in one forward pass


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
    by: str = "kl",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Curves:
    """The curves of every KV head under `policy` with each of the budgets, with the kernels and without them.

    windows (W, T) int64, a few, and none of those on which results will be reported. budgets: ascending, None for `grid`.
    by: "kl", in nats per token, or "gradient", an estimate of that in time linear in layers.
    progress(done, of) is called on the way.
    Raises LessError for a policy that `check_policy` refuses; for windows, budgets or kernels that do not fit; and if a cost is
    not finite.
    """
    check_model(model)
    check_policy(policy)
    check_windows(model, windows)
    if by not in MEASURES:
        raise LessError(f"costs are measured by {' or '.join(MEASURES)}, not by {by!r}")
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
    parts = windows.to(model.device).split(AT_ONCE)
    done, steps = 0, len(parts) * len(served) * len(budgets)
    if by == "gradient":
        total = _by_gradient(model, parts, policy, budgets, settings, total, progress)
    for ids in () if by == "gradient" else parts:
        recorded: dict[int, tuple] = {}

        def recorder(index, *qkv, recorded=recorded):
            recorded[index] = qkv
            return dense(*qkv)

        predicted = predictions(model, ids, recorder)  # (N, T, vocabulary)
        for index, (q, k, v, scale) in recorded.items():
            full = dense(q, k, v, scale)  # (N, Hq, T, D)
            for column, budget in enumerate(budgets):
                done += 1
                progress(done, steps)
                if budget >= T - 1:
                    continue  # only the last query could miss anything, and does not
                e = eviction_times(q, k, v, policy.with_budget(budget), scale, kernels=settings[-1].layer(index)[1])
                for row, setting in enumerate(settings):
                    _, features = setting.layer(index)
                    out = parallel(q, k, v, e, features, scale).to(full.dtype)  # (N, Hq, T, D)
                    costs = _divergences(model, ids, index, full, out, predicted, kv_heads)
                    total[row, index, :, column] += (
                        torch.tensor(costs, dtype=torch.float64, device="cpu") * len(ids) / len(windows)
                    )
            if not total.isfinite().all():
                raise LessError(f"a cost in layer {index} is not finite: the weights of the model or the kernels are broken")
    bare, *less = ([row if index in served else [] for index, row in enumerate(costs)] for costs in total.tolist())
    return Curves(repr(policy), budgets, bare, less[0] if less else None, T, len(windows), by)


def _by_gradient(model, parts, policy, budgets, settings, total, progress):
    """What each head costs at each budget, added to total (settings, layers, KV heads, budgets), in nats per token."""
    tokens = sum(ids.numel() for ids in parts)
    for number, ids in enumerate(parts):
        layers = watch(model, ids, seed=number)
        for column, budget in enumerate(budgets):
            progress(number * len(budgets) + column + 1, len(parts) * len(budgets))
            if budget >= ids.shape[1] - 1:
                continue  # only the last query could miss anything, and does not
            times = eviction_times_of(layers, policy.with_budget(budget), settings[-1].kernels)
            for index, layer in layers.items():
                for row, setting in enumerate(settings):
                    out = parallel(layer.q, layer.k, layer.v, times[index], setting.layer(index)[1], layer.scale)
                    total[row, index, :, column] += layer.cost_of_heads(out).sum((0, 2)).double().cpu() / tokens
    if not total.isfinite().all():
        raise LessError("a cost is not finite: the weights of the model or the kernels are broken")
    return total


def _divergences(model, ids, index, full, out, predicted, kv_heads):
    """For each KV head of layer `index`: KL(predicted || with this head's outputs from `out`), in nats per token."""
    costs = []
    for heads in torch.arange(out.shape[1], device="cpu").chunk(kv_heads):
        one = full.index_copy(1, heads.to(out.device), out[:, heads])
        compressed = predictions(
            model, ids, lambda layer, *qkv, one=one: one if layer == index else dense(*qkv)
        )  # (N, T, vocabulary)
        costs.append(kl_div(compressed, predicted, log_target=True, reduction="sum").item() / ids.numel())
    return costs
