"""What each KV head costs at each budget: the curves that budget tables are made of.

A model reads a few texts with one head compressed, its low-rank state in place, and all others whole. The cost is the KL
divergence from the full cache's predictions to these. Much cheaper, and a poorer guide: how far the layer's output moves.
"""

from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch.nn.functional import kl_div

from ..budgets import Curves, Table
from ..hf.architecture import attention_modules, check_model, output_weight, sizes
from ..hf.seam import predictions
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.parallel import dense, eviction_times, linear_parallel

MEASURES = ("kl", "error")
BUDGETS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # as far as windows go
AT_ONCE = 2  # windows in one forward pass
RIVALS = 3  # heads between which a table is refined


def grid(policy, length: int) -> list[int]:
    """The budgets at which curves are measured in windows of `length` tokens: from the least that the policy takes, 4 or more,
    to the whole window."""
    least = next(budget for budget in range(BUDGETS[0], length) if _takes(policy, budget))
    return [least, *(budget for budget in BUDGETS if least < budget < length - 1), length - 1]


def _takes(policy, budget):
    try:
        policy.with_budget(budget)
    except LessError:
        return False
    return True


def check_policy(policy) -> None:
    """LessError for a policy whose heads do not choose alone, or that may evict several tokens at once."""
    if policy.pooled or not policy.one_leaves:
        raise LessError(f"budget tables are for policies whose heads each keep a number of their own, and {policy} is none")


@torch.no_grad()
def measure(
    model,
    windows: torch.Tensor,
    policy,
    kernels: LessKernels | None = None,
    budgets: Sequence[int] | None = None,
    by: str = "kl",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Curves:
    """The curves of every KV head under `policy` with each of the budgets, with the kernels and without them.

    windows (W, T) int64, a few, and none of those on which results will be reported. by: "kl", in nats per token, or "error",
    the squared change of the layer's output relative to that output. progress(done, of) is called on the way.
    Raises LessError for a policy that `check_policy` refuses.
    """
    check_model(model)
    check_policy(policy)
    if by not in MEASURES:
        raise LessError(f"damage is measured by {' or '.join(MEASURES)}, not by {by!r}")
    budgets = list(budgets or grid(policy, windows.shape[1]))
    shape, modules = sizes(model), attention_modules(model)
    kinds = [None] if kernels is None else [None, kernels]
    total = torch.zeros(len(kinds), shape["layers"], shape["kv_heads"], len(budgets), dtype=torch.float64)
    parts = windows.to(model.device).split(AT_ONCE)
    done, steps = 0, len(parts) * len(modules) * len(budgets)
    for ids in parts:
        recorded = [None] * len(modules)

        def keep(index, recorded=recorded):
            def attention(*qkv):
                recorded[index] = qkv
                return dense(*qkv)

            return attention

        wanted = predictions(model, ids, [keep(index) for index in range(len(modules))])
        for index, module in enumerate(modules):
            q, k, v, scale = recorded[index]
            full = dense(q, k, v, scale)  # (N, Hq, T, D)
            for column, budget in enumerate(budgets):
                done += 1
                progress(done, steps)
                if budget >= ids.shape[1] - 1:
                    continue  # only the last query could miss anything, and does not
                e = eviction_times(q, k, v, policy.with_budget(budget), scale)
                for kind, some in enumerate(kinds):
                    out = linear_parallel(q, k, v, e, some and some.layers[index], scale).to(full.dtype)
                    if by == "kl":
                        costs = _divergences(model, ids, index, full, out, wanted, shape["kv_heads"])
                    else:
                        costs = _output_errors(module, full, out, shape["kv_heads"])
                    total[kind, index, :, column] += torch.tensor(costs) * len(ids) / len(windows)
    bare, *less = total.tolist()
    return Curves(repr(policy), budgets, bare, less[0] if less else None, windows.shape[1], len(windows), by)


def divergence(model, ids: torch.Tensor, policy, kernels: LessKernels | None) -> torch.Tensor:
    """KL(full cache || streaming with the kernels) in nats per token, of texts ids (N, T); differentiable.

    policy: one, or a table of them (layers x KV heads).
    """

    def streamed(rule, layer):
        def attention(q, k, v, scale):
            e = eviction_times(q.detach(), k.detach(), v.detach(), rule, scale)
            return linear_parallel(q, k, v, e, layer, scale).to(q.dtype)

        return attention

    count = sizes(model)["layers"]
    rules = policy if isinstance(policy, list) else [policy] * count
    with torch.no_grad():
        wanted = predictions(model, ids, [dense] * count)
    found = predictions(model, ids, [*map(streamed, rules, kernels.layers if kernels else [None] * count)])
    return kl_div(found, wanted, log_target=True, reduction="sum") / ids.numel()


@torch.no_grad()
def refine(model, windows: torch.Tensor, policy, kernels: LessKernels | None, table: Table) -> tuple[Table, float]:
    """A better table of the same sum, and its divergence on the windows: tokens move between the heads that have most.

    Curves are measured head by head, and so do not see that heads stand in for each other: of several that copy it may be best
    to serve one well. Half of what one of the RIVALS largest heads has goes to another, as long as that helps.
    windows (W, T) int64, a few, of those that curves are measured on.
    """

    def cost(budgets):
        rules = [[policy.with_budget(budget) for budget in row] for row in budgets]
        parts = windows.split(2 * AT_ONCE)
        return sum(divergence(model, ids, rules, kernels).item() * len(ids) for ids in parts) / len(windows)

    best, table = cost(table), [[*row] for row in table]
    tried = set()
    while True:
        places = [(layer, g) for layer, row in enumerate(table) for g in range(len(row))]
        largest = sorted(places, key=lambda place: -table[place[0]][place[1]])[:RIVALS]
        for (from_layer, from_head), (to_layer, to_head) in permutations(largest, 2):
            moved = [[*row] for row in table]
            half = min(table[from_layer][from_head] // 2, windows.shape[1] - 1 - table[to_layer][to_head])
            moved[from_layer][from_head] -= half
            moved[to_layer][to_head] += half
            if half < 1 or not _takes(policy, moved[from_layer][from_head]) or (key := str(moved)) in tried:
                continue
            tried.add(key)
            if (found := cost(moved)) < best:
                best, table = found, moved
                break
        else:
            return table, best


def _divergences(model, ids, index, full, out, wanted, kv_heads):
    """For each KV head of layer `index`: KL(wanted || with this head's outputs from `out`), in nats per token."""
    costs = []
    for heads in torch.arange(out.shape[1]).chunk(kv_heads):
        one = full.index_copy(1, heads.to(out.device), out[:, heads])
        attentions = [dense] * len(attention_modules(model))
        attentions[index] = lambda *_, one=one: one
        found = predictions(model, ids, attentions)
        costs.append(kl_div(found, wanted, log_target=True, reduction="sum").item() / ids.numel())
    return costs


def _output_errors(module, full, out, kv_heads):
    """For each KV head: |change of the layer's output|^2 / |output|^2, the mean over texts. full, out (N, Hq, T, D)."""
    weight = output_weight(module).unflatten(1, (out.shape[1], -1))  # (hidden size, Hq, D)

    def size(x, heads):  # (N,)
        return torch.einsum("nhtd,ohd->nto", x[:, heads], weight[:, heads]).square().sum((1, 2))

    every = torch.arange(out.shape[1])
    return [(size(out - full, heads) / size(full, every)).mean().item() for heads in every.chunk(kv_heads)]
