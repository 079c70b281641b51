"""LayerState: everything that one attention layer remembers, in tensors whose shapes never change.

The KV heads lie in groups of equal policy (hence equal budget) and equal rank: with a uniform budget there is one group, and
with a budget table no head pays for another's budget. Only `step.py` changes what is in the tensors while tokens arrive.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .kernels import Features
from .policies import Policy
from .store import read, write


@dataclass
class Group:
    """KV heads that share a policy and a rank. S = budget + 1 slots, one of them scratch; an empty slot has position -1."""

    policy: object
    kernels: Features | None  # of these heads alone
    kv_heads: torch.Tensor | slice  # which of the layer's KV heads
    query_heads: torch.Tensor | slice  # which of its query heads
    k: torch.Tensor  # (N, H, S, D)
    v: torch.Tensor  # (N, H, S, D)
    position: torch.Tensor  # (N, H, S) int32, the true position
    score: torch.Tensor  # (N, H, S) float32 or wider, or what the policy says, (N, H, S, C) too
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
            self.place = torch.cat([group.query_heads for group in groups]).argsort()

    @classmethod
    def allocate(
        cls,
        policy,
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
        kernels: the layer's kernels (LayerKernels or another family), or None for the bare policy.
        dtype: of keys and values; scores and the low-rank state are float32, or float64 where dtype is.
        Raises ValueError where sizes, policies and kernels are none or do not fit each other, or there is no room.
        """
        policies = check_fit(policy, query_heads, kv_heads, head_dim, kernels)
        need_whole("a batch", batch)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"keys and values are of a floating-point dtype, not of {dtype!r}")
        try:
            torch.zeros(batch, kv_heads, head_dim, max(rule.budget or 0 for rule in policies), device="meta")
            torch.zeros(0, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(f"there is no room for such a state on {device!r}: {str(error).splitlines()[0]}") from error
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
                    kernels=kernels.of_heads(heads) if kernels else None,
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
        """Bytes held, measured from the tensors: entries, low_rank and bookkeeping (SPEC section 6), for the whole batch."""
        kinds = {"k": "entries", "v": "entries", "H": "low_rank", "z": "low_rank"}
        held = {"entries": 0, "low_rank": 0, "bookkeeping": 0}
        for name, tensor in self.tensors():
            held[kinds.get(name.split(".")[-1], "bookkeeping")] += tensor.untyped_storage().nbytes()
        return held

    def reset(self) -> None:
        """Forgets everything, in place: as allocated."""
        for name, tensor in self.tensors():
            tensor.fill_(-1 if name.endswith("position") else 0)
        for group in self.groups:
            if group.policy.budget is None:
                for name in ("k", "v", "position", "score"):
                    setattr(group, name, getattr(group, name)[:, :, :0].clone())

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was (beam search, or another batch size: rows may be longer or shorter)."""
        self.n = self.n.index_select(0, rows)
        for group in self.groups:
            for name in Group.TENSORS:
                setattr(group, name, getattr(group, name).index_select(0, rows))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state as one safetensors file: written aside, then renamed. OSError where that fails."""
        write(path, dict(self.tensors()), self._identity())

    def load(self, path: str | os.PathLike) -> None:
        """Takes over a saved state. ValueError, and nothing changed, where the file is broken or was saved with other policies or
        sizes."""
        tensors, about = read(path)
        if about != self._identity():
            raise ValueError(f"{path} holds a state of {about}, not of {self._identity()}")
        self.take_over(tensors)

    def take_over(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts other tensors, named as `tensors` names them, in the place of these."""
        self.n = tensors["n"].to(self.n.device)
        for index, group in enumerate(self.groups):
            for name in Group.TENSORS:
                setattr(group, name, tensors[f"{index}.{name}"].to(self.n.device))

    def _identity(self):
        group, heads = self.groups[0], torch.arange(self.kv_heads, device=self.n.device)
        return {
            "groups": "; ".join(
                f"{group.policy} with rank {group.z.shape[-1]} on KV heads {heads[group.kv_heads].tolist()}"
                for group in self.groups
            ),
            "heads": f"{self.query_heads} query heads, {self.kv_heads} KV heads of {group.k.shape[-1]}",
            "dtype": f"{group.k.dtype}, {group.H.dtype}",
        }


def need_whole(what: str, number, most: int = 2**31 - 1) -> None:
    """ValueError where it is not an integer of at least 1 and at most `most`."""
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
        raise ValueError(f"{what} must be an integer of at least 1 and at most {most:,}, not {number!r}")


def need_policy(*policies) -> None:
    """ValueError for anything that is no policy."""
    for policy in policies:
        if not isinstance(policy, Policy):
            raise ValueError(f"a policy is something like H2O(heavy=26, recent=25), its class inherits Policy: not {policy!r}")


def need_kernels(kernels, kind: type) -> None:
    """ValueError for kernels that are neither None nor of the kind."""
    if kernels is not None and not isinstance(kernels, kind):
        raise ValueError(f"kernels are {kind.__name__} (LessKernels.from_pretrained loads a folder) or None, not {kernels!r}")


def check_fit(policy, query_heads: int, kv_heads: int, head_dim: int, kernels: Features | None) -> list:
    """The policy of each KV head of a layer. ValueError where heads, policies and kernels are none or do not fit each other."""
    for what, size in {"query heads": query_heads, "KV heads": kv_heads, "head_dim": head_dim}.items():
        need_whole(what, size)
    policies = list(policy) if isinstance(policy, Sequence) else [policy] * kv_heads
    need_policy(*policies)
    need_kernels(kernels, Features)
    if query_heads % kv_heads or len(policies) != kv_heads:
        raise ValueError(
            f"{query_heads} query heads, {kv_heads} KV heads and {len(policies)} policies do not fit: query heads must be "
            f"a multiple of KV heads, and policies one, or one for each KV head"
        )
    if kernels is not None and (kernels.query_heads, kernels.kv_heads, kernels.head_dim) != (query_heads, kv_heads, head_dim):
        raise ValueError(
            f"kernels for {kernels.query_heads} query heads and {kernels.kv_heads} KV heads of {kernels.head_dim} "
            f"do not fit a layer with {query_heads} and {kv_heads} of {head_dim}"
        )
    if any(rule.pooled for rule in policies) and len(set(policies)) > 1:
        raise ValueError(f"a policy that pools over the layer must be that of all its KV heads, not {policies}")
    if kernels is not None and policies[0].pooled and len(set(kernels.ranks)) > 1:
        raise ValueError(f"{policies[0]} pools over the layer, so its KV heads need kernels of one rank, not of {kernels.ranks}")
    return policies
