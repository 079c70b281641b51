"""Budget tables: which KV head may keep how many tokens of a total.

A few heads cause most of the loss that eviction brings. `Curves` say what each head costs at each budget, as
`training/head_costs.py` measured it; everything here is arithmetic on them.
"""

import heapq
from dataclasses import dataclass, field, replace

import numpy as np

from .layer.checks import LessError
from .layer.names import policy_said
from .layer.policies import Policy

Table = list[list[int]]  # layers x KV heads


@dataclass(frozen=True)
class Curves:
    """What each KV head costs at each budget under one policy, all other heads keeping everything.

    budgets: ascending. less, bare: with the low-rank state and without it, nested lists (layers x KV heads x budgets), an empty
    one for a layer that LESS does not serve, in tables, too.
    refined: better tables for some totals, {"less" or "bare": {total: table}}.
    policy, window, windows, by: how they were measured: the policy, the tokens of a window, how many windows, kl or gradient.
    """

    policy: str
    budgets: list[int]
    bare: list[list[list[float]]]
    less: list[list[list[float]]] | None
    window: int
    windows: int
    by: str
    refined: dict[str, dict[str, Table]] = field(default_factory=dict)

    def __post_init__(self):
        if not _is_array(self.budgets, 1, "i") or min(self.budgets) < 1 or sorted(set(self.budgets)) != self.budgets:
            raise LessError(f"the budgets of curves are integers of at least 1 that ascend, and {self.budgets!r} are not")
        for costs in [self.bare] if self.less is None else [self.bare, self.less]:
            served = [layer for layer in costs if layer != []] if isinstance(costs, list) else costs
            if not _is_array(served, 3, "if") or np.shape(served)[2] != len(self.budgets):
                raise LessError(f"curves need one figure for each of the {len(self.budgets)} budgets, layers x KV heads of them")
        if not isinstance(self.refined, dict) or not all(isinstance(tables, dict) for tables in self.refined.values()):
            raise LessError("refined tables are told apart by less or bare, then by their totals")
        for total, refined in (pair for tables in self.refined.values() for pair in tables.items()):
            served = [layer for layer in refined if layer != []] if isinstance(refined, list) else refined
            fits = _is_array(served, 2, "i") and [len(layer) for layer in refined] == [len(layer) for layer in self.bare]
            if not fits or np.min(served) < 1 or str(np.sum(served)) != total:
                raise LessError(f"the refined table for {total} tokens in all is none: layers x KV heads of at least 1 token")

    @property
    def heads(self) -> int:
        """How many KV heads share what a table gives."""
        return sum(len(layer) for layer in self.bare)

    def describe(self, policy: Policy) -> bool:
        """Whether they were measured under this policy, at whatever budget: its fields decide, not the name of its class."""
        measured = policy_said(self.policy)
        return measured is not None and measured.is_scaled(policy)


def _is_array(lists, ndim: int, kinds: str) -> bool:
    """Whether nested lists are an array of finite numbers, integers (i) or floats (f), and hold something."""
    try:
        array = np.array(lists)
    except ValueError:  # ragged
        return False
    return array.ndim == ndim and array.size > 0 and array.dtype.kind in kinds and bool(np.isfinite(array).all())


def average(parts: list[Curves]) -> Curves:
    """The curves of all windows together, from those of a few each, all measured alike."""
    windows = sum(part.windows for part in parts)

    def mean(costs):
        weights = [part.windows for part in parts]
        return None if costs[0] is None else [np.average(layer, 0, weights).tolist() for layer in zip(*costs)]

    means = {name: mean([getattr(part, name) for part in parts]) for name in ("bare", "less")}
    return replace(parts[0], **means, windows=windows)


def table(curves: Curves, total: int, less: bool) -> Table | None:
    """The refined table of the given sum, or the budgets of least cost by the curves, each at least their first: greedy.

    If a curve bends the wrong way its lower convex hull is followed: the best step may be a long one. None if the total lies
    beyond what the curves cover, below the least budget of every head or above the largest; and for LESS if they were measured
    without kernels.
    """
    if known := curves.refined.get("less" if less else "bare", {}).get(str(total)):
        return known
    costs = curves.less if less else curves.bare
    if costs is None:
        return None
    heads = {(layer, g): curve for layer, row in enumerate(costs) for g, curve in enumerate(row)}
    if not curves.budgets[0] * len(heads) <= total <= curves.budgets[-1] * len(heads):
        return None
    budgets = [[curves.budgets[0]] * len(row) for row in costs]
    left = total - curves.budgets[0] * len(heads)
    steps = [step for head, curve in heads.items() for step in _steps(head, curve, curves.budgets)]
    heapq.heapify(steps)
    while left:
        _, (layer, g), tokens = heapq.heappop(steps)
        budgets[layer][g] += min(tokens, left)
        left -= min(tokens, left)
    return budgets


def _steps(head, curve, budgets):
    """(negative gain per token, head, tokens) along the lower convex hull of a curve."""
    here = 0
    while here < len(budgets) - 1:

        def gain(to, here=here):
            return (curve[here] - curve[to]) / (budgets[to] - budgets[here])

        to = max(range(here + 1, len(budgets)), key=gain)
        yield -gain(to), head, budgets[to] - budgets[here]
        here = to
