"""`extend`, the one verb: attend, score, evict, fold. The only place that changes a LayerState while tokens arrive,
but for `Context`, which moves what it holds."""

from collections.abc import Callable
from functools import cache
from inspect import unwrap
from types import FunctionType
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from .attend import attend
from .checks import LessError
from .policies import best_first
from .slots import packed, unpacked
from .state import Group, LayerState

QUERIES_AT_ONCE = 64  # a chunk is attended in blocks of this many queries, of one head of four times as many: linear memory
ENTRIES_AT_ONCE = 1024  # and folded in blocks of this many entries
LARGEST = 1e12  # a token with larger numbers is broken: their products would leave float32


class Entries(NamedTuple):
    """What the new queries can see of one group: the held entries and the chunk. In ragged tensors (N, 1, S, ...)."""

    k: torch.Tensor  # (N, H, S, D), or packed
    v: torch.Tensor  # (N, H, S, D), or packed
    position: torch.Tensor  # (N, H, S), -1 if there is none
    score: torch.Tensor  # (N, H, S) or (N, H, S, C), as the policy says


@torch.no_grad()
def extend(
    state: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None = None,
    scale: float | None = None,
    kinds: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """m >= 1 new tokens enter a layer; returns their attention output (N, Hq, m, D) and changes `state` in place.

    q (N, Hq, m, D), rotated and not scaled; k, v (N, Hkv, m, D) in the state's dtype;
    valid (N, m) bool: False for pads, anywhere in the row; pads are not seen, scored, kept, folded or counted, and their
    output is zero; scale: 1/sqrt(D) unless given; kinds (N, m) integers: of the tokens, for policies that ask (FastGen);
    softcap: logits l become softcap tanh(l / softcap) (Gemma 2); sinks (Hq,): for each query head the logit of nothing, which
    takes its share of the attention and gives no value (gpt-oss).
    A token that holds NaN, infinity or a number beyond LARGEST in q, k or v leaves no trace, like a pad, but its own output is
    NaN: what is broken shows, and the state goes on as if it had not been.
    Raises LessError (a ValueError) if shapes or dtypes do not fit the state, or kinds are missing.
    """
    _check(state, q, k, v, valid, kinds, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    finite = _finite(q, k, v)  # (N, m)
    real = finite if valid is None else finite & valid
    arrived = torch.where(real, state.n[:, None] + real.cumsum(1) - 1, -1).int()  # (N, m)
    no_pads = _known_true(real)
    if not no_pads:
        nothing = ~real[:, None, :, None]
        q, k, v = (x.masked_fill(nothing, 0) for x in (q, k, v))  # it may hold NaN, and 0 * NaN is NaN
    if state.int8:
        k, v = packed(k), packed(v)  # (N, Hkv, m, 4 + D)
    first_chunk = q.shape[2] > 1 and not state.n.any()  # nothing is held: only the chunk is attended
    state.n += real.sum(1)
    outs = []
    for part in state.parts:
        groups = [part] if q.shape[2] == 1 else part.split()  # a longer chunk is attended group by group
        for group in groups:
            queries = q[:, group.query_heads].unflatten(1, (group.z.shape[1], -1))  # (N, H, G, m, D)
            entries = _enter(group, queries, k[:, group.kv_heads], v[:, group.kv_heads], arrived, kinds, first_chunk)
            slots_full = no_pads and entries.k is group.k and _known_true(state.n > group.policy.budget)
            logits = scale, softcap, None if sinks is None else sinks[group.query_heads].view(queries.shape[1:3])
            out = _attend_and_score(group, entries, queries, arrived, real, logits, no_pads, slots_full)  # (N, H, G, m, D)
            outs.append((group.query_heads, out.flatten(1, 2).to(q.dtype)))
            _evict(group, entries, real, state.n, slots_full)
        if q.shape[2] > 1:
            part.join(groups)
    out = outs[0][1] if len(outs) == 1 else torch.empty_like(q, memory_format=torch.contiguous_format)  # (N, Hq, m, D)
    for heads, some in outs if len(outs) > 1 else []:
        out[:, heads] = some
    if no_pads:
        return out
    broken = ~finite if valid is None else ~finite & valid
    return out.masked_fill_(broken[:, None, :, None], torch.nan)


def compiled(state: LayerState, like: torch.Tensor, softcap: float | None = None, sinks: bool = False) -> Callable:
    """`extend` for one token, compiled whole, for states like this one and tokens like q (N, Hq, 1, D).

    torch.compile holds few variants of one piece of code and then gives up, so each kind of state gets a copy of its own.
    What it returns raises LessError if nothing can be compiled, for want of a C++ compiler for example.
    """
    parts = ((*part.policies, type(part.kernels), tuple(part.z.shape), part.H.dtype) for part in state.parts)
    return _compiled(tuple(parts), tuple(like.shape), state.kv_heads, state.int8, like.dtype, like.device, softcap, sinks)


@cache
def _compiled(*kind_of_state) -> Callable:
    code = unwrap(extend)  # beneath no_grad
    own = FunctionType(code.__code__.replace(), code.__globals__, code.__name__, code.__defaults__)
    step = torch.no_grad()(torch.compile(own, fullgraph=True, dynamic=False))

    def run(*args):
        try:
            return step(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise LessError(f"torch cannot compile here, so leave compile out: {str(error).splitlines()[0]}") from error

    return run


def _known_true(condition):
    """Whether all of a tensor of bools is true, if asking costs nothing: on a CPU, in code that is not compiled. What
    depends on it is only work that may be left out."""
    return condition.device.type == "cpu" and not torch.compiler.is_compiling() and bool(condition.all())


def _finite(*qkv):
    """q, k, v (N, H, m, D) -> (N, m) bool: no number is NaN, infinite or beyond LARGEST."""
    wide = torch.promote_types(qkv[0].dtype, torch.float32)
    q, k, v = (x.abs().amax((1, 3)) for x in qkv)
    return q.maximum(k).maximum(v).to(wide) <= LARGEST


def _enter(group: Group, q, k, v, arrived, kinds, first_chunk) -> Entries:
    """One token goes into the scratch slot, in place; a longer chunk is laid behind the held entries (the first chunk finds
    none), and so is every chunk where several entries may go at once.

    q (N, H, G, m, D); k, v (N, H, m, D), or packed; arrived (N, m); kinds (N, m) or None.
    """
    position = arrived[:, None].expand(k.shape[:3]).clone()  # (N, H, m), in memory of its own: the full policy keeps it
    score = group.score.new_zeros(*k.shape[:3], *group.policy.score_shape)
    if group.policy.kinds:
        score[..., 0] = kinds[:, None]
    if group.policy.learned:
        score[..., :4] = group.kernels.rho(q, *(unpacked(x, score.dtype) for x in (k, v)))
    new = Entries(k, v, position, score)
    if k.shape[2] == 1 and group.policy.one_leaves:
        row = _rows(slot_of(group, group.scratch), group.k)
        for name, token in new._asdict().items():
            getattr(group, name).flatten(0, 2).index_copy_(0, row, token.flatten(0, 2))
        return Entries(group.k, group.v, group.position, group.score)
    if (
        first_chunk and group.policy.budget is not None
    ):  # the full policy keeps it, and the caller may change what is the caller's
        return Entries(k.contiguous(), v.contiguous(), position, score)
    return Entries(*(torch.cat([getattr(group, name), tokens], 2) for name, tokens in new._asdict().items()))


def _attend_and_score(group, entries, q, arrived, real, logits, no_pads, slots_full):
    """q (N, H, G, m, D), arrived and real (N, m), logits: scale, softcap and sinks (H, G) -> (N, H, G, m, D); the entries'
    scores are updated in place."""
    m, (scale, *unusual) = q.shape[3], logits
    before = entries.position.shape[2] - m  # slots before the chunk
    if before == 0 and m > 1 and unusual == [None, None] and real.all():
        return _attend_and_score_a_prompt(group.policy, entries, q, scale, group.z.dtype)
    blocks = []
    for start in range(0, m, QUERIES_AT_ONCE):
        now = slice(start, start + QUERIES_AT_ONCE)
        seen = slice(0, before + now.stop)  # later tokens of the chunk are invisible to the whole block
        position = entries.position[:, : 1 if before == 0 else None, None, seen]  # (N, H, 1, S), a chunk's is that of all heads
        if slots_full:
            visible, clear = real[:, None, None, :].expand(-1, -1, -1, position.shape[3]), position.shape[3]
        else:
            visible = (position >= 0) & (position <= arrived[:, None, now, None])  # (N, H, m, S)
            clear = start if no_pads and before == 0 else 0
        own = visible  # what a query sees: in ragged tensors its head's slots alone
        if group.ragged is not None:
            own, clear = group.ragged.owner[None, :, None], 0  # (1, H, 1, S)
            own = own if slots_full else visible & own  # (N, H, m, S)
        low_rank = None
        if group.z.shape[2] and not (before == 0 and m > 1):  # a first chunk finds the low-rank state empty
            phi = group.kernels.phi(q[:, :, :, now].flatten(1, 2)).unflatten(1, q.shape[1:3])  # (N, H, G, m, R)
            low_rank = (phi.to(group.H.dtype), group.H, group.z)
        k, v = (unpacked(x[:, :, seen], group.z.dtype) for x in (entries.k, entries.v))
        out, p = attend(q[:, :, :, now], k, v, own, clear, None if no_pads else real[:, now], scale, low_rank, *unusual)
        blocks.append(out)
        if group.policy.scored:
            _score(group, entries.score[:, :, seen], p, visible)
    return torch.cat(blocks, 3) if len(blocks) > 1 else blocks[0]


def _attend_and_score_a_prompt(policy, entries, q, scale, wide):
    """The same for a first chunk that is all tokens, under plain softmax attention.

    Queries that no score depends on are left to scaled_dot_product_attention. The others go in blocks that lie in the same
    memory, on a CPU head by head, so that they stay in its cache.
    """
    (N, H, G, m, D), last = q.shape, policy.last_queries
    dtype = q.dtype if last == 0 and entries.k.dtype == q.dtype else wide  # what is unpacked is rounded no further
    q, k, v = (unpacked(x, dtype).to(dtype) for x in (q, entries.k, entries.v))
    if last is not None:
        out = scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=True).view_as(q)
    else:
        out = torch.empty_like(q)
    first = 0 if last is None else max(0, m - last)
    heads, many = (1, 4 * QUERIES_AT_ONCE) if q.is_cpu and not policy.pooled else (H, QUERIES_AT_ONCE)  # at once
    room = q.new_empty(N * heads * G * min(many, m - first) * m)
    for now in (slice(start, min(start + many, m)) for start in range(first, m, many)):
        slots = torch.arange(now.stop, device=q.device)
        visible = slots <= slots[now, None]  # (b, S)
        later = ~visible[:, now]  # (b, b)
        for some in (slice(head, head + heads) for head in range(0, H, heads)):
            queries = (q[:, some, :, now] * scale).reshape(N * heads, -1, D)  # (N h, G b, D)
            p = room[: queries.shape[0] * queries.shape[1] * now.stop].view(*queries.shape[:2], now.stop)  # (N h, G b, S)
            torch.bmm(queries, k[:, some, : now.stop].flatten(0, 1).mT, out=p)
            each = p.view(N, heads, G, -1, now.stop)  # (N, h, G, b, S)
            each[..., now].masked_fill_(later, -torch.inf)
            torch.softmax(p, -1, out=p)
            if last is None:
                out[:, some, :, now] = (p @ v[:, some, : now.stop].flatten(0, 1)).view(N, heads, G, -1, D)
            score = entries.score[:, some, : now.stop]  # (N, h, S)
            score.copy_(policy.update(score, each, visible.expand(N, heads, -1, -1)))
    return out


def _score(group, score, p, visible):
    """The policy's update, in place. score (N, H, S), p (N, H, G, m, S), visible (N, 1 or H, m, S)."""
    if group.ragged is None:
        score.copy_(group.policy.update(score, p, visible.expand(-1, p.shape[1], -1, -1)))
        return
    p = p.sum(1, keepdim=True)[:, :, :, 0].mT  # (N, 1, S, G): the queries of all other heads gave a slot nothing
    parts = (group.ragged.split(x) for x in (score, p, visible[:, :, 0]))
    for one, score, p, visible in zip(group.ragged.groups, *parts):
        score.copy_(one.policy.update(score, p.mT[:, :, :, None], visible[:, :, None]))


def _evict(group, entries, real, n, slots_full):
    """Keeps the `budget` entries of highest rank (ties: the lower position) and folds the others. real (N, m), n (N,)."""
    if group.policy.budget is None:
        with torch.inference_mode(False):  # the state does not take over the caller's autograd mode
            group.k, group.v, group.position, group.score = (x.clone() if x.is_inference() else x for x in entries)
        return
    seen = n[:, None, None].int()  # (N, 1, 1)
    if entries.k is group.k:
        _evict_in_place(group, real[:, None], seen, slots_full)
    else:
        _keep_the_best(group, entries, group.policy.rank(entries.position, entries.score, seen))
        group.scratch.copy_(seen.clamp(max=group.policy.budget).expand(group.scratch.shape))


def _evict_in_place(group, real, n, slots_full):
    """One token came into the scratch slot: if there are more than the budget, the lowest goes, and its slot is the next
    scratch slot. real and n (N, 1, 1)."""
    ragged = group.ragged
    if ragged is None:
        budget, (position, victim) = group.policy.budget, _lowest(group.policy, group.position, group.score, n, slots_full)
    else:
        parts = zip(ragged.groups, ragged.split(group.position), ragged.split(group.score))
        lowest = zip(*(_lowest(one.policy, position, score, n, slots_full) for one, position, score in parts))
        budget, (position, victim) = ragged.budget, (torch.cat(x, 1).index_select(1, ragged.place) for x in lowest)
    goes = real & (n > budget)
    slot = slot_of(group, victim)
    _fold(group, group, slot, goes.expand(slot.shape))
    position = torch.where(goes, -1, position)
    group.position.scatter_(2, _as_they_lie(slot, group.k), _as_they_lie(position, group.k))
    group.scratch.copy_(torch.where(goes, victim, torch.where(real, n, group.scratch)))


def _lowest(policy, position, score, n, slots_full):
    """Position and slot (N, H, 1) of what ranks lowest, of those that tie the newest."""
    rank = policy.rank(position, score, n)  # (N, H, S)
    if not slots_full:
        rank = torch.where(position >= 0, rank, _highest(rank))
    return torch.where(rank == rank.amin(-1, keepdim=True), position, -1).max(-1, keepdim=True)


def slot_of(group: Group, slot: torch.Tensor) -> torch.Tensor:
    """Where in the group's tensors these slots (N, H, 1) are, each counted from its head's first."""
    return slot if group.ragged is None else slot + group.ragged.first


def _keep_the_best(group, entries, rank):
    """The entries were laid out anew: the best go back into the group's slots. rank (N, H, S)."""
    held = entries.position >= 0  # (N, H, S)
    budget = min(group.policy.budget, held.shape[2])
    order = best_first(rank.masked_fill(~held, -_highest(rank)), entries.position)  # (N, H, S)
    goes = held.gather(2, order)
    if not group.policy.one_leaves:
        goes[:, :, :budget] &= rank.gather(2, order[:, :, :budget]) == -torch.inf
        first = goes.long().argsort(dim=-1, descending=True, stable=True)[:, :, : int(goes.sum(-1).max())]
        _fold(group, entries, order.gather(2, first), goes.gather(2, first))
    else:
        goes[:, :, :budget] = False
        _fold(group, entries, order[:, :, budget:], goes[:, :, budget:])
    kept = order[:, :, :budget]
    for name, best in zip(Entries._fields, _take(entries, kept)):
        getattr(group, name)[:, :, :budget] = best
    group.position[:, :, :budget].masked_fill_(goes[:, :, :budget], -1)
    group.position[:, :, budget:] = -1


def _fold(group, entries, slots, goes):
    """H += psi(k)^T v and z += psi(k) over the slots (N, H, s) for which `goes` (N, H, s) is true."""
    if not group.z.shape[2]:
        return
    for block, leaving in zip(slots.split(ENTRIES_AT_ONCE, 2), goes.split(ENTRIES_AT_ONCE, 2)):
        k, v = (unpacked(x, group.H.dtype) for x in _take([entries.k, entries.v], block))  # (N, H, s, D)
        psi = group.kernels.psi(k).to(group.H.dtype) * leaving[..., None]  # (N, H, s, R)
        group.H.flatten(0, 1).baddbmm_(psi.flatten(0, 1).mT, v.to(group.H.dtype).flatten(0, 1))
        group.z += psi.sum(2)


def _take(tensors, slots):
    """Of each of the tensors (N, H, S, ...), or ragged ones (N, 1, S, ...), what is at the slots (N, H, s): (N, H, s, ...)."""
    rows = _rows(slots, tensors[0])
    return [x.flatten(0, 2).index_select(0, rows).view(*slots.shape, *x.shape[3:]) for x in tensors]


def _rows(slots, held):
    """slots (N, H, s) -> (N H s,): the same in tensors (N, H, S, ...), or ragged ones (N, 1, S, ...), that are flattened to
    (N H S, ...). Whole rows are copied at once that way; gather and scatter_ copy number by number."""
    N, H, S = held.shape[:3]
    return (torch.arange(0, N * H * S, S, device=slots.device)[:, None] + _as_they_lie(slots, held).flatten(0, 1)).flatten()


def _as_they_lie(slots, held):
    """Something of slots (N, H, s), in ragged tensors (N, 1, H s)."""
    return slots.reshape(*held.shape[:2], -1)


def _highest(rank):
    return torch.inf if rank.is_floating_point() else torch.iinfo(rank.dtype).max


def _check(state, q, k, v, valid, kinds, sinks):
    kept = state.parts[0].k
    N, D = kept.shape[0], state.head_dim
    m = q.shape[2] if q.ndim == 4 else 0
    wanted = {
        "q": (q.shape, (N, state.query_heads, m, D)),
        "k": (k.shape, (N, state.kv_heads, m, D)),
        "v": (v.shape, (N, state.kv_heads, m, D)),
        "valid": ((N, m) if valid is None else valid.shape, (N, m)),
        "kinds": ((N, m) if kinds is None else kinds.shape, (N, m)),
        "sinks": ((state.query_heads,) if sinks is None else sinks.shape, (state.query_heads,)),
    }
    for name, (shape, expected) in wanted.items():
        if m < 1 or tuple(shape) != expected:
            raise LessError(f"{name} has shape {tuple(shape)}; this state wants {expected}, with m >= 1 tokens")
    wide, score = torch.promote_types(q.dtype, torch.float32), state.parts[0].z.dtype
    fits = q.is_floating_point() and wide == score if state.int8 else q.dtype == kept.dtype
    if not (fits and q.dtype == k.dtype == v.dtype):
        holds = f"{kept.dtype} of what is no wider than {score}" if state.int8 else kept.dtype
        raise LessError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this state holds {holds}: bring them to one dtype, and leave "
            f"torch.autocast, which mixes them"
        )
    if valid is not None and valid.dtype != torch.bool:
        raise LessError(f"valid must be bool (True for tokens, False for pads), not {valid.dtype}")
    asks = [group.policy for group in state.parts if group.policy.kinds]
    if asks and kinds is None:
        raise LessError(f"{asks[0]} needs the kinds of the tokens: give extend kinds, or LessCache.for_model token_kinds")
