"""LayerState: everything that one attention layer remembers, in tensors whose shapes never change.

While tokens arrive only `step.py`, `decode.py`, `prompt.py` and `context.py` change what is in them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .checks import LessError, integer
from .features import FAMILIES, Features
from .policies import Policy, kind_of, together
from .slots import Slots, layout_of

HEADS_TOGETHER = 8  # a query is multiplied with the slots of all heads of a part: with more heads it costs what it saves


@dataclass
class Part:
    """KV heads that go together: their policies differ in budgets alone, if at all. Most layers are one part."""

    policies: tuple[Policy, ...]  # of each head
    policy: Policy  # all of them in one
    kernels: Features | None  # of these heads alone
    kv_heads: torch.Tensor | None  # (H,) which of the layer's KV heads; None for all
    query_heads: torch.Tensor | None  # (H G,) which of its query heads
    slots: Slots
    mean: torch.Tensor  # (N, H, R, D), H / z: float16, up to 65,504, if the model has 16 bits; R = 0 for the bare policy
    z: torch.Tensor  # (N, H, R) float32 or wider

    @property
    def H(self) -> torch.Tensor:
        """The paper's H (N, H, R, D)."""
        return self.mean * self.z[..., None]

    def fold(self, k: torch.Tensor, v: torch.Tensor, leaves: torch.Tensor) -> None:
        """H += psi(k)^T v and z += psi(k) (paper, section 3) of those tokens that leave. k, v (N, H, e, D); leaves (N, H, e).

        H is held as the mean of v that it is, weighted by features, which are not negative: as small as v, so 16 bits do for it.
        """
        wide, narrow = self.z.dtype, self.mean.dtype
        psi, v = self.kernels.psi(k).to(wide) * leaves[..., None], v.to(wide)  # (N, H, e, R)
        new, tiny = psi.sum(2), torch.finfo(wide).tiny  # (N, H, R)
        self.z += new
        if v.shape[2] != 1:
            v = psi.mT @ v / new.clamp(min=tiny)[..., None]  # (N, H, R, D), their mean
        mean = self.mean.to(wide).lerp(v, (new / self.z.clamp(min=tiny))[..., None])
        self.mean.copy_(mean if narrow == wide else _rounded(mean, self.z))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self.slots, name) for name in Slots.NAMES} | {"mean": self.mean, "z": self.z}

    def hold(self, tensors: dict[str, torch.Tensor]) -> "Part":
        """The same heads with other tensors."""
        slots = Slots(self.slots.layout, self.slots.wide, *(tensors[name] for name in Slots.NAMES))
        return replace(self, slots=slots, mean=tensors["mean"], z=tensors["z"])


def _rounded(mean, z):
    """mean (N, H, R, D) float32 as float16 can hold it: up or down, the nearer the more often, so that small changes add up.

    The last bits of z (N, H, R) decide: they are as good as random. A number that float16 holds stays as it is.
    """
    most, lost = torch.finfo(torch.float16).max, 2**13 - 1  # the bits of float32 that float16 has not
    bits = mean.clamp_(-most, most).view(torch.int32)
    return bits.add_(z.view(torch.int32)[..., None] & lost).bitwise_and_(~lost).view(torch.float32)


class LayerState:
    """One layer's cache for a batch: `parts`; `n` (N,), the real tokens that each row has seen; and `moved` (N,), by how many
    positions it has moved back (context.py), or None if it cannot."""

    def __init__(self, parts: list[Part], n: torch.Tensor, query_heads: int, kv_heads: int, moved: torch.Tensor | None = None):
        self.parts, self.n, self.moved = parts, n, moved
        self.query_heads, self.kv_heads, self.head_dim = query_heads, kv_heads, parts[0].mean.shape[3]
        self.int8, self.wide = parts[0].slots.int8, parts[0].slots.wide

    @property
    def device(self) -> torch.device:
        return self.n.device

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
        dtype: of keys and values, and of the state's mean, which is float16 for bfloat16; scores and z are float32, or float64.
        movable: what it holds can move back, for streams within a Context.
        int8: keys and values are rounded when they enter, and kept in eight bits with a scale for each (slots.py).
        Raises LessError (a ValueError) if sizes, policies and kernels are none or do not fit each other, or there is no room.
        """
        policies = check_fit(policy, query_heads, kv_heads, head_dim, kernels)
        integer("the batch", batch)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise LessError(f"keys and values are of a floating-point dtype, not of {dtype!r}")
        try:
            torch.zeros(batch, kv_heads, head_dim, max(rule.budget for rule in policies), device="meta")
            torch.zeros(0, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise LessError(
                f"there is no room for such a state on {device!r}, so choose a smaller batch or budget, or another device: "
                f"{str(error).splitlines()[0]}"
            ) from error
        wide = torch.promote_types(dtype, torch.float32)
        narrow = torch.float16 if dtype.itemsize < wide.itemsize else wide
        R, G = kernels.rank if kernels else 0, query_heads // kv_heads

        def part(heads: list[int]) -> Part:
            own = [policies[g] for g in heads]
            one, layout = together(own, device), layout_of(tuple(rule.budget + 1 for rule in own), torch.device(device))
            index, every = torch.tensor(heads, device=device), len(heads) == kv_heads
            return Part(
                policies=tuple(own),
                policy=one,
                kernels=kernels.select_heads(heads) if kernels else None,
                kv_heads=None if every else index,
                query_heads=None if every else (index[:, None] * G + torch.arange(G, device=device)).flatten(),
                slots=Slots.empty(layout, batch, head_dim, dtype, int8, own[0].score_shape, own[0].score_dtype, device),
                mean=torch.zeros(batch, len(heads), R, head_dim, dtype=narrow, device=device),
                z=torch.zeros(batch, len(heads), R, dtype=wide, device=device),
            )

        with torch.inference_mode(False):  # the caller's autograd mode is not taken over
            n = torch.zeros(batch, dtype=torch.int64, device=device)
            parts = [part(heads) for heads in _that_go_together(policies)]
            return cls(parts, n, query_heads, kv_heads, torch.zeros_like(n) if movable else None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the state holds, by name."""
        rows = {"n": self.n} if self.moved is None else {"n": self.n, "moved": self.moved}
        return rows | {f"{i}.{name}": x for i, part in enumerate(self.parts) for name, x in part.tensors().items()}

    def hold(self, tensors: dict[str, torch.Tensor]) -> "LayerState":
        """A state with these tensors, named as `tensors` names them, in the place of its own."""
        parts = [part.hold({name: tensors[f"{i}.{name}"] for name in part.tensors()}) for i, part in enumerate(self.parts)]
        return LayerState(parts, tensors["n"], self.query_heads, self.kv_heads, tensors.get("moved"))

    @torch.inference_mode(False)
    def take_over(self, tensors: dict[str, torch.Tensor]) -> None:
        """Holds these tensors from now on, on its own device."""
        self.__dict__.update(vars(self.hold({name: x.to(self.device) for name, x in tensors.items()})))

    def memory(self) -> dict[str, int]:
        """Bytes held, measured from the tensors: entries, low_rank and bookkeeping, for the whole batch. Which slots are whose
        is known once for all layers and caches, and not counted."""
        parts = {"k": "entries", "v": "entries", "mean": "low_rank", "z": "low_rank"}
        held = {"entries": 0, "low_rank": 0, "bookkeeping": 0}
        for name, tensor in self.tensors().items():
            held[parts.get(name.split(".")[-1], "bookkeeping")] += tensor.untyped_storage().nbytes()
        return held

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self) -> None:
        """Forgets everything, in place: as allocated."""
        for name, tensor in self.tensors().items():
            tensor.fill_(-1 if name.endswith("position") else 0)
        for part in self.parts:
            part.slots.free.copy_(part.slots.layout.first)

    @torch.inference_mode(False)
    @torch.no_grad()
    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was (beam search, or another batch size: rows may be longer or shorter)."""
        self.take_over({name: x.index_select(0, rows) for name, x in self.tensors().items()})

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def join(cls, states: Sequence["LayerState"]) -> "LayerState":
        """A new state with the rows of all these, in their order. Each row goes on as it would alone.

        LessError if there are none, or they were not allocated alike but for the number of rows: with the same kernels, too.
        """
        if not states or any(state._kind() != states[0]._kind() for state in states):
            raise LessError("states are joined if they were allocated alike: with equal policies and sizes, and the same kernels")
        every = [state.tensors() for state in states]
        return states[0].hold({name: torch.cat([tensors[name] for tensors in every]) for name in every[0]})

    def _kind(self):
        shapes = [(name, x.shape[1:], x.dtype, x.device) for name, x in self.tensors().items()]
        return self.query_heads, shapes, self.policies(), [id(part.kernels) for part in self.parts]

    def policies(self) -> list[Policy]:
        """Of each KV head."""
        return [part.policies[h] for _, part, h in self._heads()]

    def head(self, row: int, kv_head: int) -> dict[str, torch.Tensor]:
        """What one KV head of a row keeps, E tokens in the order of their positions: position (E,), k and v (E, D), score
        (E, ...), and its low-rank state, H (R, D) and z (R,): copies, for tests and curiosity."""
        _, part, h = self._heads()[kv_head]
        return part.slots.of_head(row, h) | {"H": part.H[row, h].clone(), "z": part.z[row, h].clone()}

    def _heads(self) -> list[tuple[int, Part, int]]:
        """Each KV head, the part it is in, and its place there."""
        every = []
        for part in self.parts:
            heads = range(len(part.policies)) if part.kv_heads is None else part.kv_heads.tolist()
            every += [(g, part, h) for h, g in enumerate(heads)]
        return sorted(every, key=lambda head: head[0])

    def positions(self) -> Iterator[tuple[torch.Tensor | slice, torch.Tensor]]:
        """Some of the KV heads, and the positions (N, H, S) in their slots."""
        for part in self.parts:
            yield slice(None) if part.kv_heads is None else part.kv_heads, part.slots.positions()


def _that_go_together(policies: Sequence[Policy]) -> Iterator[list[int]]:
    """Which KV heads make a part: those of one kind of policy if they are few; of many those of one budget, and beside them few
    others with at most twice as much."""
    alike: dict = {}
    for g, policy in enumerate(policies):
        alike.setdefault(kind_of(policy), []).append(g)
    for heads in alike.values():
        if len(heads) <= HEADS_TOGETHER:
            yield heads
            continue
        part: list[int] = []
        for g in sorted(heads, key=lambda g: policies[g].budget):
            budgets = [policies[h].budget for h in (*part, g)]
            if len(set(budgets)) > 1 and (len(budgets) > HEADS_TOGETHER or budgets[-1] > 2 * budgets[0]):
                yield part
                part = []
            part.append(g)
        yield part


def check_fit(policy, query_heads: int, kv_heads: int, head_dim: int, kernels: Features | None) -> list[Policy]:
    """The policy of each KV head. LessError if sizes, policies and kernels are none or do not fit each other."""
    for what, size in (("query_heads", query_heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        integer(what, size)
    if kernels is not None and not isinstance(kernels, Features):
        raise LessError(f"the kernels of a layer are LayerKernels, an element of LessKernels.layers, or None: not {kernels!r}")
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
    if kernels is not None and type(kernels) not in FAMILIES.values():
        like = next(iter(kernels.state_dict().values()), torch.zeros(()))
        some = torch.linspace(-3, 3, head_dim).to(like).expand(1, query_heads, 1, head_dim)
        if any((features < 0).any() for features in (kernels.phi(some), kernels.psi(some[:, :kv_heads]))):
            raise LessError(
                f"{type(kernels).__name__} has negative features, and the state is a mean that they weigh: make them positive"
            )
    if any(rule.pooled for rule in policies) and len(set(policies)) > 1:
        raise LessError(f"a policy that pools over the layer must be that of all its KV heads, not {policies}")
    if any(rule.needs == "rho" for rule in policies) and getattr(kernels, "rho", None) is None:
        raise LessError(
            "the policy Retention asks rho of the kernels, and there is none: take kernels that were trained with it (`less-kv "
            "train`), or another policy, SnapKV for example"
        )
    return policies


def need_policy(policy) -> Policy:
    """The policy. LessError for anything that is none."""
    if not isinstance(policy, Policy):
        raise LessError(f"a policy is something like H2O(heavy=26, recent=25), its class inherits Policy: not {policy!r}")
    if type(policy).__hash__ is None:
        raise LessError(f"{policy!r} may change, and heads of equal policies lie together: make it @dataclass(frozen=True)")
    return policy
