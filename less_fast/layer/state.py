"""LayerState: everything that one attention layer remembers, in tensors whose shapes never change.

KV heads of equal policy (hence equal budget) are a group: with a uniform budget there is one. With a budget table
the groups of a layer lie together in one ragged tensor, and a single token goes through all of them at once: no head pays for
another's budget, neither in memory nor in time. While tokens arrive only `step.py` and `context.py` change what is in them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .checks import LessError, integer
from .features import Features
from .policies import Policy
from .slots import width

HEADS_TOGETHER = 8  # a query is multiplied with the slots of all heads that lie together: with more heads it costs what it saves


@dataclass
class Ragged:
    """Where each of H heads has its slots in a tensor that they share, S slots in all."""

    groups: list["Group"]  # for no sequences, in the order of their slots
    heads: list[list[int]]  # which of the H heads are each group's
    owner: torch.Tensor  # (H, S) bool, which slots are a head's
    first: torch.Tensor  # (H, 1) int64, its first slot
    budget: torch.Tensor  # (H, 1) int64, its slots but the scratch slot
    place: torch.Tensor  # (H,) int64, where it stands when the groups stand side by side

    @classmethod
    def of(cls, groups: list["Group"], heads: list[list[int]]) -> "Ragged":
        slots = {head: group.k.shape[2] for group, some in zip(groups, heads) for head in some}  # of each head, as they lie
        order = torch.tensor(list(slots), device="cpu")  # (H,)
        owner = (
            order.repeat_interleave(torch.tensor(list(slots.values()), device="cpu")) == order.sort().values[:, None]
        )  # (H, S)
        budget = owner.sum(1, keepdim=True) - 1  # (H, 1)
        tables = owner, owner.int().argmax(1, keepdim=True), budget, order.argsort()
        return cls(groups, heads, *(table.to(groups[0].z.device) for table in tables))

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x (N, 1, S, ...) -> for each group a view (N, h, budget + 1, ...)."""
        shapes = [group.k.shape[1:3] for group in self.groups]
        parts = x[:, 0].split([h * slots for h, slots in shapes], 1)
        return [part.view(len(x), *shape, *x.shape[3:]) for part, shape in zip(parts, shapes)]


@dataclass
class Group:
    """KV heads that share a policy. S = budget + 1 slots, one of them scratch; an empty slot has position -1.

    Or several groups in ragged tensors: k, v, position and score are (N, 1, S, ...) with S slots in all, and the policy is that
    of the largest budget.
    """

    policy: Policy
    kernels: Features | None  # of these heads alone
    kv_heads: torch.Tensor | slice  # which of the layer's KV heads
    query_heads: torch.Tensor | slice  # which of its query heads
    k: torch.Tensor  # (N, H, S, D), or (N, H, S, 4 + D) int8 (slots.py)
    v: torch.Tensor  # the same
    position: torch.Tensor  # (N, H, S) int32, the true position
    score: torch.Tensor  # (N, H, S) float32 or wider, or what the policy says, perhaps (N, H, S, C)
    H: torch.Tensor  # (N, H, R, D) float32 or wider; R = 0 for the bare policy
    z: torch.Tensor  # (N, H, R)
    scratch: torch.Tensor  # (N, H, 1) the empty slot that the next token takes, counted from the head's first
    ragged: Ragged | None = None

    SLOTS = ("k", "v", "position", "score")
    TENSORS = (*SLOTS, "H", "z", "scratch")

    @property
    def policies(self) -> list[Policy]:
        """That of each head."""
        if self.ragged is None:
            return [self.policy] * self.z.shape[1]
        of = {head: group.policy for group, heads in zip(self.ragged.groups, self.ragged.heads) for head in heads}
        return [of[head] for head in range(len(of))]

    def split(self) -> list["Group"]:
        """Of ragged tensors each group, in tensors of its own, which are copies; else the group itself."""
        if self.ragged is None:
            return [self]
        slots = zip(*(self.ragged.split(getattr(self, name)) for name in self.SLOTS))
        groups = []
        for group, heads, held in zip(self.ragged.groups, self.ragged.heads, slots):
            tensors = *(x.clone() for x in held), *(x[:, heads] for x in (self.H, self.z, self.scratch))
            groups.append(Group(group.policy, group.kernels, group.kv_heads, group.query_heads, *tensors))
        return groups

    def join(self, groups: list["Group"]) -> None:
        """Puts what `split` took apart back in its place."""
        if self.ragged is None:
            return
        for name in self.SLOTS:
            for part, group in zip(self.ragged.split(getattr(self, name)), groups):
                part.copy_(getattr(group, name))
        for group, heads in zip(groups, self.ragged.heads):
            for name in ("H", "z", "scratch"):
                getattr(self, name)[:, heads] = getattr(group, name)


class LayerState:
    """One layer's cache for a batch: `parts`, which are groups or several in ragged tensors; `n` (N,), the real tokens that each
    row has seen; and `moved` (N,), by how many positions it has moved back (context.py), or None if it cannot."""

    def __init__(self, parts: list[Group], n: torch.Tensor, query_heads: int, kv_heads: int, moved: torch.Tensor | None = None):
        self.parts, self.n, self.moved = parts, n, moved
        self.query_heads, self.kv_heads = query_heads, kv_heads

    @property
    def int8(self) -> bool:
        return self.parts[0].k.dtype == torch.int8

    @property
    def head_dim(self) -> int:
        return self.parts[0].H.shape[3]

    def positions(self) -> Iterator[tuple[torch.Tensor | slice, torch.Tensor]]:
        """Some of the KV heads, and the positions (N, h, S) in their slots."""
        for part in self.parts:
            groups = [(part, part.position)] if part.ragged is None else zip(part.ragged.groups, part.ragged.split(part.position))
            yield from ((group.kv_heads, position) for group, position in groups)

    @property
    def groups(self) -> list[Group]:
        """The KV heads by policy, in order of first appearance; copies of what lies in ragged tensors."""
        return _in_order([group for part in self.parts for group in part.split()])

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
        movable: bool = False,
        int8: bool = False,
    ) -> "LayerState":
        """An empty state.

        policy: one for all KV heads, or a sequence with one for each; budgets may differ.
        kernels: the layer's kernels (PaperKernels or another family), or None for the bare policy.
        dtype: of keys and values; scores and the low-rank state are float32, or float64 if dtype is.
        movable: what it holds can move back, for streams within a Context.
        int8: keys and values are rounded when they enter, and held in eight bits with a scale for each (slots.py).
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
            stored = (width(head_dim), torch.int8) if int8 else (head_dim, dtype)
            state = cls._empty(policies, batch, query_heads, kv_heads, head_dim, kernels, dtype, device, *stored)
            state.moved = torch.zeros_like(state.n) if movable else None
            return state

    @classmethod
    def _empty(cls, policies, batch, query_heads, kv_heads, head_dim, kernels, dtype, device, width, kind):
        R = kernels.rank if kernels else 0
        wide = torch.promote_types(dtype, torch.float32)

        def group(policy, heads, batch, ragged=None):
            readers = [g * (query_heads // kv_heads) + a for g in heads for a in range(query_heads // kv_heads)]
            every, H = len(heads) == kv_heads, len(heads)
            S = 0 if policy.budget is None else policy.budget + 1
            shape = (batch, H, S) if ragged is None else (batch, 1, ragged.owner.shape[1])
            return Group(
                policy=policy,
                kernels=kernels.select_heads(heads) if kernels else None,
                kv_heads=slice(None) if every else torch.tensor(heads, device=device),
                query_heads=slice(None) if every else torch.tensor(readers, device=device),
                k=torch.zeros(*shape, width, dtype=kind, device=device),
                v=torch.zeros(*shape, width, dtype=kind, device=device),
                position=torch.full(shape, -1, dtype=torch.int32, device=device),
                score=torch.zeros(*shape, *policy.score_shape, dtype=policy.score_dtype or wide, device=device),
                H=torch.zeros(batch, H, R, head_dim, dtype=wide, device=device),
                z=torch.zeros(batch, H, R, dtype=wide, device=device),
                scratch=torch.zeros(batch, H, 1, dtype=torch.int64, device=device),
                ragged=ragged,
            )

        together: dict = {}  # the heads that may lie in one tensor, by policy
        for g, policy in enumerate(policies):
            fixed = kv_heads <= HEADS_TOGETHER and policy.one_leaves  # shapes, so that all that a token needs can be done at once
            alike = type(policy), policy.score_shape, None if fixed else policy
            together.setdefault(alike, {}).setdefault(policy, []).append(g)
        parts = []
        for heads in together.values():
            largest = max(heads, key=lambda policy: policy.budget or 0)
            if len(heads) == 1:
                parts.append(group(largest, heads[largest], batch))
            else:
                every = sorted(g for some in heads.values() for g in some)
                groups = [group(policy, some, 0) for policy, some in heads.items()]
                parts.append(
                    group(largest, every, batch, Ragged.of(groups, [[every.index(g) for g in some] for some in heads.values()]))
                )
        return cls(parts, torch.zeros(batch, dtype=torch.int64, device=device), query_heads, kv_heads)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that the state holds, by name."""
        return self._named(self.parts)

    def saved(self) -> dict[str, torch.Tensor]:
        """What files hold, by name: the tensors, of ragged ones each group's."""
        return dict(self._named(self.groups))

    def _named(self, groups):
        yield "n", self.n
        if self.moved is not None:
            yield "moved", self.moved
        for index, group in enumerate(groups):
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
        for group in self.parts:
            if group.policy.budget is None:
                for name in ("k", "v", "position", "score"):
                    setattr(group, name, getattr(group, name)[:, :, :0].clone())

    @torch.inference_mode(False)
    @torch.no_grad()
    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was (beam search, or another batch size: rows may be longer or shorter)."""
        self.n = self.n.index_select(0, rows)
        self.moved = None if self.moved is None else self.moved.index_select(0, rows)
        for group in self.parts:
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
        joined = []
        for parts in zip(*(state.parts for state in states)):
            slots = max(part.k.shape[2] for part in parts)  # they differ under the policy full
            tensors = {name: [getattr(part, name) for part in parts] for name in Group.TENSORS}
            for name in ("k", "v", "position", "score"):
                tensors[name] = [_with_slots(x, slots, -1 if name == "position" else 0) for x in tensors[name]]
            joined.append(replace(parts[0], **{name: torch.cat(rows) for name, rows in tensors.items()}))
        moved = None if states[0].moved is None else torch.cat([state.moved for state in states if state.moved is not None])
        return cls(joined, torch.cat([state.n for state in states]), states[0].query_heads, states[0].kv_heads, moved)

    def _kind(self):
        heads = torch.arange(self.kv_heads, device=self.n.device)
        return (
            self.query_heads,
            self.moved is None,
            [
                (group.policy, id(group.kernels), heads[group.kv_heads].tolist(), group.k.shape[3], group.k.dtype, group.k.device)
                for group in self.groups
            ],
        )

    @torch.inference_mode(False)
    def take_over(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts other tensors, named as `saved` names them, in the place of these."""
        self.n = tensors["n"].to(self.n.device)
        self.moved = None if self.moved is None else tensors["moved"].to(self.n.device)
        apart = [part.split() for part in self.parts]
        for index, group in enumerate(_in_order([group for groups in apart for group in groups])):
            for name in Group.TENSORS:
                setattr(group, name, tensors[f"{index}.{name}"].to(self.n.device))
        for part, groups in zip(self.parts, apart):
            part.join(groups)


def _with_slots(x, slots, value):
    """x (N, H, S, ...) -> (N, H, slots, ...): the new ones, behind the others, hold the value."""
    return torch.cat([x, x.new_full((*x.shape[:2], slots - x.shape[2], *x.shape[3:]), value)], 2)


def _in_order(groups):
    """By their first KV heads."""
    return groups if len(groups) == 1 else sorted(groups, key=lambda group: int(group.kv_heads[0]))


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
    return policies


def need_policy(policy) -> Policy:
    """The policy. LessError for anything that is none."""
    if not isinstance(policy, Policy):
        raise LessError(f"a policy is something like H2O(heavy=26, recent=25), its class inherits Policy: not {policy!r}")
    if type(policy).__hash__ is None:
        raise LessError(f"{policy!r} may change, and heads of equal policies lie together: make it @dataclass(frozen=True)")
    return policy


def need_kernels(kernels) -> None:
    """LessError for anything that is neither the kernels of one layer nor None."""
    if kernels is not None and not isinstance(kernels, Features):
        raise LessError(f"the kernels of a layer are LayerKernels, an element of LessKernels.layers, or None: not {kernels!r}")
