"""`extend`: attend, score, evict, fold (SPEC section 2). The only place that changes a LayerState."""

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from .attend import attend
from .policies import best_first
from .state import Group, LayerState

QUERIES_AT_ONCE = 128  # a chunk is attended in blocks of this many queries: memory linear in its length
ENTRIES_AT_ONCE = 1024  # and folded in blocks of this many entries
LARGEST = 1e12  # a token with larger numbers is broken: their products would leave float32


class Entries(NamedTuple):
    """What the new queries can see of one group: the held entries and the chunk."""

    k: torch.Tensor  # (N, H, S, D)
    v: torch.Tensor  # (N, H, S, D)
    position: torch.Tensor  # (N, H, S), -1 where there is none
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
) -> torch.Tensor:
    """m >= 1 new tokens enter a layer; returns their attention output (N, Hq, m, D) and changes `state` in place.

    q (N, Hq, m, D), rotated and not scaled; k, v (N, Hkv, m, D) in the state's dtype;
    valid (N, m) bool: False for pads, anywhere in the row; pads are not seen, scored, kept, folded or counted, and their
    output is zero; scale: 1/sqrt(D) unless given; kinds (N, m) integers: of the tokens, for policies that ask.
    A token that holds NaN, infinity or a number beyond LARGEST in q, k or v leaves no trace, like a pad, but its own output is
    NaN: what is broken shows where it is broken, and the state stays sound.
    Raises ValueError where shapes or dtypes do not fit the state, or kinds are missing.
    """
    _check(state, q, k, v, valid, kinds)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sound = _sound(q, k, v)  # (N, m)
    real = sound if valid is None else sound & valid
    arrived = torch.where(real, state.n[:, None] + real.cumsum(1) - 1, -1).int()  # (N, m)
    nothing = ~real[:, None, :, None]
    q, k, v = (x.masked_fill(nothing, 0) for x in (q, k, v))  # it may hold NaN, and 0 * NaN is NaN
    first = q.shape[2] > 1 and not state.n.any()  # nothing is held: only the chunk is attended
    state.n += real.sum(1)
    outs = []
    for group in state.groups:
        queries = q[:, group.query_heads].unflatten(1, (group.k.shape[1], -1))  # (N, H, G, m, D)
        entries = _enter(group, k[:, group.kv_heads], v[:, group.kv_heads], arrived, kinds, first)
        outs.append(_attend_and_score(group, entries, queries, arrived, real, scale).flatten(1, 2).to(q.dtype))
        _evict(group, entries, real, state.n)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 1).index_select(1, state.place)  # (N, Hq, m, D)
    broken = ~sound if valid is None else ~sound & valid
    return out.masked_fill_(broken[:, None, :, None], torch.nan)


def _sound(*qkv):
    """q, k, v (N, H, m, D) -> (N, m) bool: no number is NaN, infinite or beyond LARGEST."""
    wide = torch.promote_types(qkv[0].dtype, torch.float32)
    loudest = [torch.linalg.vector_norm(x, torch.inf, (1, 3), dtype=wide) for x in qkv]
    return loudest[0].maximum(loudest[1]).maximum(loudest[2]) <= LARGEST


def _enter(group: Group, k, v, arrived, kinds, first) -> Entries:
    """One token goes into the scratch slot, in place; a longer chunk is laid behind the held entries (the first chunk finds
    none), and so is every chunk where several entries may go at once.

    k, v (N, H, m, D); arrived (N, m); kinds (N, m) or None.
    """
    position = arrived[:, None].repeat(1, k.shape[1], 1)  # (N, H, m), in memory of its own: the full policy keeps it
    score = group.score.new_zeros(*k.shape[:3], *group.policy.score_shape)
    if group.policy.kinds:
        score[..., 0] = kinds[:, None]
    new = Entries(k, v, position, score)
    if k.shape[2] == 1 and group.policy.budget is not None and not group.policy.selective:
        for name, token in new._asdict().items():
            held = getattr(group, name)
            held.scatter_(2, _index(group.scratch, held), token)
        return Entries(group.k, group.v, group.position, group.score)
    if first:
        return new
    return Entries(*(torch.cat([getattr(group, name), tokens], 2) for name, tokens in new._asdict().items()))


def _attend_and_score(group, entries, q, arrived, real, scale):
    """q (N, H, G, m, D), arrived and real (N, m) -> (N, H, G, m, D); the entries' scores are updated in place."""
    m = q.shape[3]
    before = entries.position.shape[2] - m  # slots before the chunk
    if before == 0 and m > 1 and not group.policy.scored and real.all():  # a first chunk that nobody scores
        heads = q.flatten(1, 2), entries.k, entries.v
        return scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True).view_as(q)
    blocks = []
    for start in range(0, m, QUERIES_AT_ONCE):
        now = slice(start, start + QUERIES_AT_ONCE)
        seen = slice(0, before + now.stop)  # later tokens of the chunk are invisible to the whole block
        position = entries.position[:, : 1 if before == 0 else None, None, seen]  # (N, H, 1, S), a chunk's is that of all heads
        visible = (position >= 0) & (position <= arrived[:, None, now, None])  # (N, H, m, S)
        low_rank = None
        if group.kernels is not None:
            phi = group.kernels.phi(q[:, :, :, now].flatten(1, 2)).unflatten(1, q.shape[1:3])  # (N, H, G, m, R)
            low_rank = (phi.to(group.H.dtype), group.H, group.z)
        k, v = entries.k[:, :, seen], entries.v[:, :, seen]
        out, p = attend(q[:, :, :, now], k, v, visible, real[:, now], scale, low_rank)
        blocks.append(out)
        if group.policy.scored:
            visible = visible.expand(-1, q.shape[1], -1, -1)
            entries.score[:, :, seen] = group.policy.update(entries.score[:, :, seen], p, visible)
    return torch.cat(blocks, 3) if len(blocks) > 1 else blocks[0]


def _evict(group, entries, real, n):
    """Keeps the `budget` entries of highest rank (ties: the lower position) and folds the others. real (N, m), n (N,)."""
    if group.policy.budget is None:
        group.k, group.v, group.position, group.score = entries
        return
    seen = n[:, None, None].int()  # (N, 1, 1)
    settled = group.policy.settle(entries.position, entries.score, seen)
    if settled is not entries.score:
        entries.score.copy_(settled)
    rank = group.policy.rank(entries.position, entries.score, seen)
    if entries.k is group.k:
        _evict_in_place(group, entries, rank, real[:, None], seen)
    else:
        _keep_the_best(group, entries, rank)
        group.scratch.copy_(seen.clamp(max=group.policy.budget).expand(group.scratch.shape))


def _evict_in_place(group, entries, rank, real, n):
    """One token came into the scratch slot: if there are more than the budget, the lowest goes, and its slot is the next
    scratch slot. rank (N, H, S), real and n (N, 1, 1)."""
    rank = torch.where(entries.position >= 0, rank, _highest(rank))
    newest = torch.where(rank == rank.amin(-1, keepdim=True), entries.position, -1)
    victim = newest.argmax(-1, keepdim=True)  # (N, H, 1)
    goes = real & (n > group.policy.budget)
    _fold(group, entries, victim, goes.expand(victim.shape))
    group.position.scatter_(2, victim, torch.where(goes, -1, newest.gather(2, victim)))
    group.scratch.copy_(torch.where(goes, victim, torch.where(real, n, group.scratch)))


def _keep_the_best(group, entries, rank):
    """The entries were laid out anew: the best go back into the group's slots. rank (N, H, S)."""
    held = entries.position >= 0  # (N, H, S)
    budget = min(group.policy.budget, held.shape[2])
    order = best_first(rank.masked_fill(~held, -_highest(rank)), entries.position)  # (N, H, S)
    goes = held.gather(2, order)
    if group.policy.selective:
        goes[:, :, :budget] &= rank.gather(2, order[:, :, :budget]) == -torch.inf
        first = goes.long().argsort(dim=-1, descending=True, stable=True)[:, :, : int(goes.sum(-1).max())]
        _fold(group, entries, order.gather(2, first), goes.gather(2, first))
    else:
        goes[:, :, :budget] = False
        _fold(group, entries, order[:, :, budget:], goes[:, :, budget:])
    kept = order[:, :, :budget]
    for name in Entries._fields:
        getattr(group, name)[:, :, :budget] = _take(getattr(entries, name), kept)
    group.position[:, :, :budget].masked_fill_(goes[:, :, :budget], -1)
    group.position[:, :, budget:] = -1


def _fold(group, entries, slots, goes):
    """H += psi(k)^T v and z += psi(k) over the slots (N, H, s) for which `goes` (N, H, s) is true."""
    if group.kernels is None:
        return
    for some, real in zip(slots.split(ENTRIES_AT_ONCE, 2), goes.split(ENTRIES_AT_ONCE, 2)):
        psi = group.kernels.psi(_take(entries.k, some)).to(group.H.dtype) * real[..., None]  # (N, H, s, R)
        v = _take(entries.v, some).to(group.H.dtype)  # (N, H, s, D)
        group.H.flatten(0, 1).baddbmm_(psi.flatten(0, 1).mT, v.flatten(0, 1))
        group.z += psi.sum(2)


def _take(x, slots):
    """x (N, H, S, ...) at slots (N, H, s) -> (N, H, s, ...)."""
    return x.gather(2, _index(slots, x))


def _index(slots, x):
    """slots (N, H, s) as gather and scatter want it for x (N, H, S, ...): (N, H, s, ...)."""
    return slots.view(*slots.shape, *[1] * (x.ndim - 3)).expand(*slots.shape, *x.shape[3:])


def _highest(rank):
    return torch.inf if rank.is_floating_point() else torch.iinfo(rank.dtype).max


def _check(state, q, k, v, valid, kinds):
    kept = state.groups[0].k
    N, D = kept.shape[0], kept.shape[-1]
    m = q.shape[2] if q.ndim == 4 else 0
    fits = {
        "q": (q.shape, (N, state.query_heads, m, D)),
        "k": (k.shape, (N, state.kv_heads, m, D)),
        "v": (v.shape, (N, state.kv_heads, m, D)),
        "valid": ((N, m) if valid is None else valid.shape, (N, m)),
        "kinds": ((N, m) if kinds is None else kinds.shape, (N, m)),
    }
    for name, (shape, wanted) in fits.items():
        if m < 1 or tuple(shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(shape)}; this state wants {wanted}, with m >= 1 tokens")
    if not q.dtype == k.dtype == v.dtype == kept.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this state holds {kept.dtype}")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool (True for tokens, False for pads), not {valid.dtype}")
    asks = [group.policy for group in state.groups if group.policy.kinds]
    if asks and kinds is None:
        raise ValueError(f"{asks[0]} needs the kinds of the tokens: give extend kinds, or LessCache.for_model token_kinds")
