"""`extend`: attend, score, evict, fold (SPEC section 2). The only place that changes a LayerState."""

from typing import NamedTuple

import torch

from .attend import attend
from .state import Group, LayerState

QUERIES_AT_ONCE = 128  # a chunk is attended in blocks of this many queries: memory linear in its length
ENTRIES_AT_ONCE = 1024  # and folded in blocks of this many entries


class Entries(NamedTuple):
    """What the new queries can see of one group: the held entries and the chunk."""

    k: torch.Tensor  # (N, H, S, D)
    v: torch.Tensor  # (N, H, S, D)
    position: torch.Tensor  # (N, H, S), -1 where there is none
    score: torch.Tensor  # (N, H, S)


@torch.no_grad()
def extend(
    state: LayerState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """m >= 1 new tokens enter a layer; returns their attention output (N, Hq, m, D) and changes `state` in place.

    q (N, Hq, m, D), rotated and not scaled; k, v (N, Hkv, m, D) in the state's dtype;
    valid (N, m) bool: False for pads, anywhere in the row; pads are not seen, scored, kept, folded or counted, and their
    output is zero; scale: 1/sqrt(D) unless given.
    Raises ValueError where shapes or dtypes do not fit the state.
    """
    _check(state, q, k, v, valid)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if valid is None:
        arrived = state.n[:, None] + torch.arange(q.shape[2], device=q.device)  # (N, m)
    else:
        arrived = (state.n[:, None] + valid.cumsum(1) - 1).masked_fill(~valid, -1)  # (N, m)
        pads = ~valid[:, None, :, None]
        k, v = k.masked_fill(pads, 0), v.masked_fill(pads, 0)  # a pad may hold NaN, and 0 * NaN is NaN
    state.n += q.shape[2] if valid is None else valid.sum(1)
    out = torch.empty_like(q)  # (N, Hq, m, D)
    for group in state.groups:
        queries = q[:, group.query_heads].unflatten(1, (group.k.shape[1], -1))  # (N, H, G, m, D)
        entries = _enter(group, k[:, group.kv_heads], v[:, group.kv_heads], arrived)
        out[:, group.query_heads] = _attend_and_score(group, entries, queries, arrived, scale).flatten(1, 2).to(q.dtype)
        _evict(group, entries, state.n[:, None, None])
    return out


def _enter(group: Group, k, v, arrived) -> Entries:
    """One token goes into the scratch slot, in place; a longer chunk is laid behind the held entries.

    k, v (N, H, m, D); arrived (N, m).
    """
    position = arrived[:, None].expand(k.shape[:3]).to(group.position.dtype)  # (N, H, m)
    if k.shape[2] == 1 and group.policy.budget is not None:
        scratch = group.position.argmin(-1, keepdim=True)  # (N, H, 1), an empty slot: position -1
        row = scratch[..., None].expand(-1, -1, 1, k.shape[-1])
        group.k.scatter_(2, row, k)
        group.v.scatter_(2, row, v)
        group.position.scatter_(2, scratch, position)
        group.score.scatter_(2, scratch, 0)
        return Entries(group.k, group.v, group.position, group.score)
    return Entries(
        torch.cat([group.k, k], 2),
        torch.cat([group.v, v], 2),
        torch.cat([group.position, position], 2),
        torch.cat([group.score, torch.zeros_like(position, dtype=group.score.dtype)], 2),
    )


def _attend_and_score(group, entries, q, arrived, scale):
    """q (N, H, G, m, D), arrived (N, m) -> (N, H, G, m, D); the entries' scores are updated in place."""
    m = q.shape[3]
    before = entries.position.shape[2] - m  # slots before the chunk
    blocks = []
    for start in range(0, m, QUERIES_AT_ONCE):
        now = slice(start, start + QUERIES_AT_ONCE)
        seen = slice(0, before + now.stop)  # later tokens of the chunk are invisible to the whole block
        position = entries.position[:, :, None, seen]  # (N, H, 1, S)
        visible = (position >= 0) & (position <= arrived[:, None, now, None])  # (N, H, m, S)
        low_rank = None
        if group.kernels is not None:
            phi = group.kernels.phi(q[:, :, :, now].flatten(1, 2)).unflatten(1, q.shape[1:3])  # (N, H, G, m, R)
            low_rank = (phi.to(group.H.dtype), group.H, group.z)
        out, p = attend(q[:, :, :, now], entries.k[:, :, seen], entries.v[:, :, seen], visible, scale, low_rank)
        blocks.append(out)
        if group.policy.scored:
            entries.score[:, :, seen] = group.policy.update(entries.score[:, :, seen], p, visible)
    return torch.cat(blocks, 3) if len(blocks) > 1 else blocks[0]


def _evict(group, entries, n):
    """Keeps the `budget` entries of highest rank (ties: the lower position) and folds the others. n (N, 1, 1)."""
    budget = group.policy.budget
    if budget is None:
        group.k, group.v, group.position, group.score = entries
        return
    held = entries.position >= 0  # (N, H, S)
    rank = group.policy.rank(entries.position, entries.score, n)
    if entries.k is group.k:  # one token came, in place: at most one entry goes
        lowest = rank.masked_fill(~held, _highest(rank)).amin(-1, keepdim=True)
        newest = entries.position.masked_fill((rank != lowest) | ~held, -1)
        victim = newest.argmax(-1, keepdim=True)  # (N, H, 1)
        goes = held.sum(-1, keepdim=True) > budget  # (N, H, 1)
        _fold(group, entries, victim, goes)
        group.position.scatter_(2, victim, newest.gather(2, victim).masked_fill_(goes, -1))
        return
    last = torch.iinfo(entries.position.dtype).max
    order = entries.position.masked_fill(~held, last).argsort(-1)  # by position, empty slots last; then, stably, by rank
    ranks = rank.masked_fill(~held, -_highest(rank)).gather(2, order)
    order = order.gather(2, ranks.sort(dim=-1, descending=True, stable=True).indices)
    kept, dropped = order[:, :, :budget], order[:, :, budget:]
    _fold(group, entries, dropped, held.gather(2, dropped))
    group.k[:, :, :budget] = _take(entries.k, kept)
    group.v[:, :, :budget] = _take(entries.v, kept)
    group.position[:, :, :budget] = entries.position.gather(2, kept)
    group.score[:, :, :budget] = entries.score.gather(2, kept)
    group.position[:, :, budget] = -1


def _fold(group, entries, slots, goes):
    """H += psi(k)^T v and z += psi(k) over the slots (N, H, s) for which `goes` (N, H, s) is true."""
    if group.kernels is None:
        return
    for some, real in zip(slots.split(ENTRIES_AT_ONCE, 2), goes.split(ENTRIES_AT_ONCE, 2)):
        psi = group.kernels.psi(_take(entries.k, some)).to(group.H.dtype) * real[..., None]  # (N, H, s, R)
        group.H += psi.mT @ _take(entries.v, some).to(group.H.dtype)
        group.z += psi.sum(2)


def _take(x, slots):
    """x (N, H, S, D) at slots (N, H, s) -> (N, H, s, D)."""
    return x.gather(2, slots[..., None].expand(*slots.shape, x.shape[-1]))


def _highest(rank):
    return torch.inf if rank.is_floating_point() else torch.iinfo(rank.dtype).max


def _check(state, q, k, v, valid):
    kept = state.groups[0].k
    N, D = kept.shape[0], kept.shape[-1]
    m = q.shape[2] if q.ndim == 4 else 0
    fits = {
        "q": (q.shape, (N, state.query_heads, m, D)),
        "k": (k.shape, (N, state.kv_heads, m, D)),
        "v": (v.shape, (N, state.kv_heads, m, D)),
        "valid": ((N, m) if valid is None else valid.shape, (N, m)),
    }
    for name, (shape, wanted) in fits.items():
        if m < 1 or tuple(shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(shape)}; this state wants {wanted}, with m >= 1 tokens")
    if not q.dtype == k.dtype == v.dtype == kept.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this state holds {kept.dtype}")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool (True for tokens, False for pads), not {valid.dtype}")
