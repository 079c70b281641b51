"""Setting: how the cache of a model is compressed, in one value. It is checked once, when it is made; the policy and kernels of
each KV head come out of it; and it alone counts the bytes that a cache holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import cast

import torch

from .budgets import Table
from .kernels import LessKernels
from .layer.checks import LessError, integer
from .layer.fastgen import FastGen
from .layer.features import Features
from .layer.names import policy_said
from .layer.policies import H2O, TOVA, Lambda, Policy, Retention, Scissorhands, SnapKV, Window
from .layer.slots import width
from .layer.state import LayerState, check_fit, need_policy

POLICIES: dict[str, Policy] = {
    "window": Window(32),
    "lambda": Lambda(4, 28),
    "h2o": H2O(16, 16),
    "tova": TOVA(32),
    "scissorhands": Scissorhands(32, 16, 32),
    "snapkv": SnapKV(32, 8, 3),
    "retention": Retention(32, 4),
    "fastgen": FastGen(32, 8, 8, 0.95),
}
"""Every policy by the name that the command line uses; `with_budget` turns the example into the one wanted."""


def policy_named(name: str, budget: str | int, length: int | None = None) -> Policy:
    """The policy of that name with a budget as `tokens_of` reads it. LessError if there is no such policy or budget."""
    if name not in POLICIES:
        raise LessError(f"no policy is called {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name].with_budget(tokens_of(budget, length))


def tokens_of(budget: str | int, length: int | None = None) -> int:
    """A budget in tokens ("51") or, if a length is known, as a share of it ("5%"), rounded down. LessError if it is none, or no
    whole number of tokens of at least 1."""
    text = str(budget).strip()
    said = text.removesuffix("%")
    try:
        rough = float(said)
        number = Fraction(said if 0 < abs(rough) < math.inf else rough)  # exactly: by floats 29% of 100 would be 28
    except (ValueError, OverflowError):
        raise LessError(f"a budget is a number of tokens (51) or a share of the length (5%), not {budget!r}") from None
    if text.endswith("%"):
        if length is None:
            raise LessError(f"a budget in percent needs a known length: say it in tokens, not {budget!r}")
        number = Fraction(number * length // 100)
    if number != int(number) or number < 1:
        raise LessError(f"a budget must be a whole number of tokens, at least 1, and {budget!r} is {float(number):g}")
    return int(number)


def need_less_kernels(kernels: object) -> LessKernels | None:
    """The kernels. LessError for anything that is neither kernels of a model nor None."""
    if kernels is not None and not isinstance(kernels, LessKernels):
        raise LessError(f"kernels are LessKernels (LessKernels.from_pretrained loads a folder) or None, not {kernels!r}")
    return kernels


def best_policy(kernels: LessKernels | None, budget: int) -> Policy:
    """The policy that does most with this budget: Retention if the kernels have rho, else the one that they were trained for;
    without kernels SnapKV."""
    if kernels is None:
        return POLICIES["snapkv"].with_budget(budget)
    if "rho" in kernels.sizes:
        return POLICIES["retention"].with_budget(budget)
    return (policy_said(str(kernels.about.get("policy"))) or POLICIES["h2o"]).with_budget(budget)


@dataclass(frozen=True)
class Setting:
    """Make one with `Setting.of`.

    sizes: layers, query_heads, kv_heads and head_dim of the model; None for a bare policy with uniform budgets, which fits any.
    less_layers: which of the layers LESS serves. budgets: a table (layers x KV heads), None for as many tokens in every head.
    context: within how many positions streams stay, None for as many as tokens. int8: slots are in eight bits.
    """

    sizes: dict[str, int] | None
    less_layers: tuple[int, ...]
    policy: Policy
    kernels: LessKernels | None = None
    budgets: Table | None = None
    chunk: int | None = None
    context: int | None = None
    int8: bool = False

    @classmethod
    def of(
        cls,
        sizes: dict[str, int] | None,
        less_layers: Sequence[int],
        policy: Policy,
        kernels: LessKernels | None = None,
        budgets: Sequence[Sequence[int]] | str | None = None,
        chunk: int | None = None,
        context: int | None = None,
        int8: bool = False,
    ) -> "Setting":
        """The setting that these arguments of `LessCache.for_model` ask for.

        budgets None: the table that the kernels have for this policy and as many tokens in all, else uniform ones.
        Raises LessError for what is no policy, kernels, table or chunk, or does not go together.
        """
        need_policy(policy)
        need_less_kernels(kernels)
        if kernels is not None and sizes is not None and not sizes.items() <= kernels.sizes.items():
            theirs = {name: kernels.sizes[name] for name in sizes}
            raise LessError(f"these kernels are for {theirs}, not for {sizes}: train kernels for this model with `less-kv train`")
        if chunk is not None:
            integer("chunk", chunk)
        if not (budgets is None or isinstance(budgets, list | tuple) or (isinstance(budgets, str) and budgets == "uniform")):
            raise LessError(f'budgets are a table, None or "uniform", not {budgets!r}')
        if budgets is None and kernels is not None:
            budgets = kernels.budgets_for(policy)
        if budgets is None or isinstance(budgets, str):
            setting = cls(sizes, tuple(less_layers), policy, kernels, None, chunk, context, int8)
        else:
            rows = [list(row) if isinstance(row, list | tuple) else [] for row in budgets]
            wanted = [] if sizes is None else [sizes["kv_heads"] * (index in less_layers) for index in range(sizes["layers"])]
            if sizes is None or [len(row) for row in rows] not in (wanted, [sizes["kv_heads"]] * sizes["layers"]):
                what = "for a model whose layers have equal heads" if sizes is None else "{layers} layers x {kv_heads} KV heads"
                raise LessError(f"the budget table must be {what.format(**sizes or {})}")
            table = [[integer("a budget", budget) for budget in row] for row in rows]
            setting = cls(sizes, tuple(less_layers), policy, kernels, table, chunk, context, int8)
        if context is not None:
            kept = policy.budget if setting.budgets is None else max(chain(*setting.budgets))
            if kept > integer("context", context, 2):
                raise LessError(f"{kept} tokens are kept, and a context of {context} has fewer positions: keep fewer")
        if not isinstance(int8, bool):
            raise LessError(f"int8 is True or False, not {int8!r}")
        if sizes is not None:
            if int8:
                width(sizes["head_dim"])
            for index in setting.less_layers:
                rule, features = setting.layer(index)
                check_fit(rule, sizes["query_heads"], sizes["kv_heads"], sizes["head_dim"], features)
        return setting

    def layer(self, index: int) -> tuple[Policy | list[Policy], Features | None]:
        """The policy of a layer, or of each of its KV heads, and its kernels."""
        features = None if self.kernels is None else cast(Features, self.kernels.layers[index])
        if self.budgets is None:
            return self.policy, features
        return [self.policy.with_budget(budget) for budget in self.budgets[index]], features

    def shard(self, index: int, rank: int, world_size: int) -> tuple[Policy | list[Policy], Features | None]:
        """The same for the KV heads of that layer which process `rank` of `world_size` has (tensor parallelism).

        LessError if the heads cannot be shared out.
        """
        rule, features = self.layer(index)
        if world_size == 1:
            return rule, features
        kv_heads = self._heads()["kv_heads"]
        if kv_heads % world_size:
            raise LessError(f"{kv_heads} KV heads cannot be shared out among {world_size} processes: start a divisor of it")
        if self.policy.pooled:
            raise LessError(f"{self.policy} pools over all heads of a layer, and tensor parallelism takes them apart")
        heads = list(range(kv_heads))[rank * kv_heads // world_size : (rank + 1) * kv_heads // world_size]
        return [rule[head] for head in heads] if isinstance(rule, list) else rule, features and features.select_heads(heads)

    def memory(self, dtype: torch.dtype) -> int:
        """Bytes that LESS's layers hold for one sequence, bookkeeping included: laid out on torch's "meta" device and counted.

        dtype: of keys and values. Kernels are shared by all sequences, and counted by `LessKernels.memory`.
        """
        held = 0
        for index in self.less_layers:
            rule, features = self.layer(index)
            sizes, movable = self._heads(), self.context is not None
            heads = sizes["query_heads"], sizes["kv_heads"], sizes["head_dim"]
            state = LayerState.allocate(rule, 1, *heads, features, dtype, "meta", movable, self.int8)
            held += sum(state.memory().values())
        return held

    def without_state(self) -> "Setting":
        """The same for the bare policy, where what is evicted is forgotten: no kernels, or rho alone if the policy needs it."""
        return replace(self, kernels=self.kernels.without_state() if self.kernels and self.policy.needs == "rho" else None)

    def baseline_plus(self, dtype: torch.dtype) -> Policy:
        """The policy with the smallest budget that, without kernels, holds at least as many bytes as this setting (Baseline+).

        The low-rank state is worth about R / 2 exact tokens, four for R = 8, and about twice as many in eight bits.
        """
        budget = self.policy.budget
        wanted, bare = self.memory(dtype), replace(self.without_state(), budgets=None)
        while bare.memory(dtype) < wanted:
            budget += 1
            bare = replace(bare, policy=self.policy.with_budget(budget))
        return bare.policy

    def _heads(self) -> dict[str, int]:
        if self.sizes is None:
            raise LessError("the layers of this model differ in their heads: its bytes are not counted, nor its heads shared out")
        return {name: self.sizes[name] for name in ("query_heads", "kv_heads", "head_dim")}
