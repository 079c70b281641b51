"""LayerState: everything that one attention layer remembers, in tensors whose shapes never change.

The KV heads lie in groups of equal policy (hence equal budget) and equal rank: with a uniform budget there is one group, and
with a budget table no head pays for another's budget. Only `step.py` changes what is in the tensors while tokens arrive.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .checks import LessError, integer
from .features import Features
from .policies import Policy


@dataclass
class Group:
    """KV heads that share a policy and a rank. S = budget + 1 slots, one of them scratch; an empty slot has position -1."""

    policy: Policy
    kernels: Features | None  # of these heads alone
    kv_heads: torch.Tensor | slice  # which of the layer's KV heads
    query_heads: torch.Tensor | slice  # which of its query heads
    k: torch.Tensor  # (N, H, S, D)
    v: torch.Tensor  # (N, H, S, D)
    position: torch.Tensor  # (N, H, S) int32, the true position
    score: torch.Tensor  # (N, H, S) float32 or wider, or what the policy says, perhaps (N, H, S, C)
    H: torch.Tensor  # (N, H, R, D) float32 or wider; R = 0 for the bare policy
    z: torch.Tensor  # (N, H, R)
    scratch: torch.Tensor  # (N, H, 1) the empty slot that the next token takes

    TENSORS = ("k", "v", "position", "score", "H", "z", "scratch")


class LayerState:
    """One layer's cache for a batch: `groups` of KV heads, and `n` (N,), the real tokens that each row has seen."""

    def __init__(self, groups: list[Group], n: torch.Tensor, query_heads: int, kv_heads: int):
        self.groups, self.n = groups, n
        self.query_heads, self.kv_heads = query_heads, kv_heads
        if len(groups) > 1:  # where each query head stands when the groups' outputs stand side by side
            self.place = torch.cat([group.query_heads for group in groups]).argsort()  # type: ignore[misc]

    @classmethod
    def allocate(
        cls,
        policy: Policy | Sequence[Policy],
        batch: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        kernels: Features | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "LayerState":
        """An empty state.

        policy: one for all KV heads, or a sequence with one for each; budgets may differ.
        kernels: the layer's kernels (PaperKernels or another family), or None for the bare policy.
        dtype: of keys and values; scores and the low-rank state are float32, or float64 if dtype is.
        Raises LessError (a ValueError) if sizes, policies and kernels are none or do not fit each other, or there is no room.
        """
        policies = check_fit(policy, query_heads, kv_heads, head_dim, kernels)
        integer("the batch", batch)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise LessError(f"keys and values are of a floating-point dtype, not of {dtype!r}")
        try:
            torch.zeros(batch, kv_heads, head_dim, max(rule.budget or 0 for rule in policies), device="meta")
            torch.zeros(0, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise LessError(
                f"there is no room for such a state on {device!r}, so choose a smaller batch or budget, or another device: "
                f"{str(error).splitlines()[0]}"
            ) from error
        with torch.inference_mode(False):  # the caller's autograd mode is not taken over
            return cls._empty(policies, batch, query_heads, kv_heads, head_dim, kernels, dtype, device)

    @classmethod
    def _empty(cls, policies, batch, query_heads, kv_heads, head_dim, kernels, dtype, device):
        ranks = kernels.ranks if kernels else [0] * kv_heads
        wide, both = torch.promote_types(dtype, torch.float32), list(zip(policies, ranks))
        groups = []
        for rule, rank in dict.fromkeys(both):  # in order of first appearance
            heads = [g for g in range(kv_heads) if both[g] == (rule, rank)]
            readers = [g * (query_heads // kv_heads) + a for g in heads for a in range(query_heads // kv_heads)]
            every = len(heads) == kv_heads
            shape = (batch, len(heads), 0 if rule.budget is None else rule.budget + 1)
            groups.append(
                Group(
                    policy=rule,
                    kernels=kernels.select_heads(heads) if kernels else None,
                    kv_heads=slice(None) if every else torch.tensor(heads, device=device),
                    query_heads=slice(None) if every else torch.tensor(readers, device=device),
                    k=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
                    v=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
                    position=torch.full(shape, -1, dtype=torch.int32, device=device),
                    score=torch.zeros(*shape, *rule.score_shape, dtype=rule.score_dtype or wide, device=device),
                    H=torch.zeros(batch, len(heads), rank, head_dim, dtype=wide, device=device),
                    z=torch.zeros(batch, len(heads), rank, dtype=wide, device=device),
                    scratch=torch.zeros(batch, len(heads), 1, dtype=torch.int64, device=device),
                )
            )
        return cls(groups, torch.zeros(batch, dtype=torch.int64, device=device), query_heads, kv_heads)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that the state holds, by name."""
        yield "n", self.n
        for index, group in enumerate(self.groups):
            for name in Group.TENSORS:
                yield f"{index}.{name}", getattr(group, name)

    def memory(self) -> dict[str, int]:
        """Bytes held, measured from the tensors: entries, low_rank and bookkeeping, for the whole batch."""
        parts = {"k": "entries", "v": "entries", "H": "low_rank", "z": "low_rank"}
        held = {"entries": 0, "low_rank": 0, "bookkeeping": 0}
        for name, tensor in self.tensors():
            held[parts.get(name.split(".")[-1], "bookkeeping")] += tensor.untyped_storage().nbytes()
        return held

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self) -> None:
        """Forgets everything, in place: as allocated."""
        for name, tensor in self.tensors():
            tensor.fill_(-1 if name.endswith("position") else 0)
        for group in self.groups:
            if group.policy.budget is None:
                for name in ("k", "v", "position", "score"):
                    setattr(group, name, getattr(group, name)[:, :, :0].clone())

    @torch.inference_mode(False)
    @torch.no_grad()
    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was (beam search, or another batch size: rows may be longer or shorter)."""
        self.n = self.n.index_select(0, rows)
        for group in self.groups:
            for name in Group.TENSORS:
                setattr(group, name, getattr(group, name).index_select(0, rows))

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def join(cls, states: Sequence["LayerState"]) -> "LayerState":
        """A new state with the rows of all these, in their order. Each row goes on as it would alone.

        LessError if there are none, or they were not allocated alike but for the number of rows: with the same kernels, too.
        """
        if not states or any(state._kind() != states[0]._kind() for state in states):
            raise LessError("states are joined if they were allocated alike: with equal policies and sizes, and the same kernels")
        groups = []
        for parts in zip(*(state.groups for state in states)):
            slots = max(part.k.shape[2] for part in parts)  # they differ under the policy full
            tensors = {name: [getattr(part, name) for part in parts] for name in Group.TENSORS}
            for name in ("k", "v", "position", "score"):
                tensors[name] = [_with_slots(x, slots, -1 if name == "position" else 0) for x in tensors[name]]
            groups.append(replace(parts[0], **{name: torch.cat(rows) for name, rows in tensors.items()}))
        return cls(groups, torch.cat([state.n for state in states]), states[0].query_heads, states[0].kv_heads)

    def _kind(self):
        heads = torch.arange(self.kv_heads, device=self.n.device)
        return self.query_heads, [
            (group.policy, id(group.kernels), heads[group.kv_heads].tolist(), group.k.shape[3], group.k.dtype, group.k.device)
            for group in self.groups
        ]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state as one safetensors file: written aside, then renamed. OSError if that fails."""
        from ..files import write  # this room needs torch alone; files need safetensors

        write(path, dict(self.tensors()), self._identity())

    def load(self, path: str | os.PathLike) -> None:
        """Takes over a saved state. LessError, and nothing changed, if the file is broken, or was saved with other policies,
        kernels, sizes or another number of rows."""
        from ..files import read

        tensors, about = read(path)
        mine = self._identity()
        if about.keys() < mine.keys():  # files of less-kv 0.1.0 tell neither rows nor kernels
            about = mine | about | {"rows": f"{len(tensors['n'])} rows"} if "n" in tensors else about
        if other := next((part for part in mine if about.get(part) != mine[part]), None):
            raise LessError(
                f"{path} holds a state of {about.get(other)}, not of {mine[other]}: load it into a state that is allocated as "
                f"that one was"
            )
        self.take_over(tensors)

    @torch.inference_mode(False)
    def take_over(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts other tensors, named as `tensors` names them, in the place of these."""
        self.n = tensors["n"].to(self.n.device)
        for index, group in enumerate(self.groups):
            for name in Group.TENSORS:
                setattr(group, name, tensors[f"{index}.{name}"].to(self.n.device))

    def _identity(self):
        from ..files import digest

        group, heads = self.groups[0], torch.arange(self.kv_heads, device=self.n.device)
        kernels = [digest(group.kernels.state_dict()) for group in self.groups if group.kernels]
        return {
            "groups": "; ".join(
                f"{group.policy} with rank {group.z.shape[-1]} on KV heads {heads[group.kv_heads].tolist()}"
                for group in self.groups
            ),
            "heads": f"{self.query_heads} query heads, {self.kv_heads} KV heads of {group.k.shape[-1]}",
            "dtype": f"{group.k.dtype}, {group.H.dtype}",
            "rows": f"{len(self.n)} rows",
            "kernels": f"kernels {', '.join(kernels)}" if kernels else "no kernels",
        }


def _with_slots(x, slots, value):
    """x (N, H, S, ...) -> (N, H, slots, ...): the new ones, behind the others, hold the value."""
    return torch.cat([x, x.new_full((*x.shape[:2], slots - x.shape[2], *x.shape[3:]), value)], 2)


def check_fit(policy, query_heads: int, kv_heads: int, head_dim: int, kernels: Features | None) -> list[Policy]:
    """The policy of each KV head. LessError if sizes, policies and kernels are none or do not fit each other."""
    for what, size in (("query_heads", query_heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        integer(what, size)
    need_kernels(kernels)
    policies = list(policy) if isinstance(policy, Sequence) else [policy] * kv_heads
    for rule in policies:
        need_policy(rule)
    if query_heads % kv_heads or len(policies) != kv_heads:
        raise LessError(
            f"{query_heads} query heads, {kv_heads} KV heads and {len(policies)} policies do not fit: query heads must be "
            f"a multiple of KV heads, and policies one, or one for each KV head"
        )
    if kernels is not None and (kernels.query_heads, kernels.kv_heads, kernels.head_dim) != (query_heads, kv_heads, head_dim):
        raise LessError(
            f"kernels for {kernels.query_heads} query heads and {kernels.kv_heads} KV heads of {kernels.head_dim} "
            f"do not fit a layer with {query_heads} and {kv_heads} of {head_dim}: take kernels made for this layer"
        )
    if any(rule.pooled for rule in policies) and len(set(policies)) > 1:
        raise LessError(f"a policy that pools over the layer must be that of all its KV heads, not {policies}")
    if any(rule.learned for rule in policies) and getattr(kernels, "rho", None) is None:
        raise LessError(
            "the policy Retention asks rho of the kernels, and there is none: take kernels that were trained with it (`less-kv "
            "train --rho-steps`), or another policy, SnapKV for example"
        )
    if kernels is not None and policies[0].pooled and len(set(kernels.ranks)) > 1:
        raise LessError(f"{policies[0]} pools over the layer, so its KV heads need kernels of one rank, not of {kernels.ranks}")
    return policies


def need_policy(policy) -> None:
    """LessError for anything that is no policy."""
    if not isinstance(policy, Policy):
        raise LessError(f"a policy is something like H2O(heavy=26, recent=25), its class inherits Policy: not {policy!r}")


def need_kernels(kernels) -> None:
    """LessError for anything that is neither the kernels of one layer nor None."""
    if kernels is not None and not isinstance(kernels, Features):
        raise LessError(f"the kernels of a layer are LayerKernels, an element of LessKernels.layers, or None: not {kernels!r}")
