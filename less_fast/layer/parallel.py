"""Eviction times and the parallel form (paper, section 3.2): a whole stream at once, for training and analysis.

Streaming is described by one number for each token and KV head: e, the step at whose end the token was evicted. Query i sees
token j exactly iff j <= i <= e_j, and through the low-rank state iff i > e_j.
"""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from .attend import Logits
from .features import Features
from .state import LayerState
from .step import extend
from .stream import can_replay, replay

TOKENS_AT_ONCE = 128  # the low-rank part runs in blocks of this many tokens


def eviction_times(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy,
    scale: float | None = None,
    kinds: torch.Tensor | None = None,
    kernels: Features | None = None,
) -> torch.Tensor:
    """e (N, Hkv, T) int64 of streaming with `policy` (one, or one for each KV head); T if a token is never evicted.

    q (N, Hq, T, D); k, v (N, Hkv, T, D); kinds (N, T) for policies that ask. It streams the bare policy through `extend`: of
    kernels only rho changes what is kept.
    """
    (N, Hq, T, D), Hkv = q.shape, k.shape[1]
    rho = None if kernels is None or kernels.rho is None else kernels.without_state()
    state = LayerState.allocate(policy, N, Hq, Hkv, D, rho, dtype=q.dtype, device=q.device)
    e = torch.arange(T, device=q.device).expand(N, Hkv, T).clone()  # evicted at the end of its own step, unless ...
    last_held = torch.full((N, Hkv, T + 1), -1, device=q.device)  # column T takes the empty slots
    at = torch.zeros(1, dtype=torch.int64, device=q.device)

    def step():
        token = (x.index_select(2, at) for x in (q, k, v))
        extend(state, *token, logits=Logits(scale), kinds=None if kinds is None else kinds.index_select(1, at))
        for heads, position in state.positions():
            slots = position.long().masked_fill(position < 0, T)  # (N, h, S)
            if isinstance(heads, slice):  # all of them: nothing is copied
                last_held.scatter_(2, slots, at.expand(slots.shape))
            else:
                last_held[:, heads] = last_held[:, heads].scatter(2, slots, at.expand(slots.shape))
        at.add_(1)

    if can_replay(state, T):
        replay(step, T, [at, last_held, *state.tensors().values()])
    else:
        for _ in range(T):
            step()
    return torch.maximum(e, last_held[..., :T] + 1)


def dense(q, k, v, scale: float | None = None) -> torch.Tensor:
    """Full causal attention, (N, Hq, T, D)."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def parallel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    e: torch.Tensor,
    kernels: Features | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The streaming output (N, Hq, T, D), in float32 or wider, differentiable in q, k, v and the kernels; the low-rank part in
    linear time. q (N, Hq, T, D); k, v (N, Hkv, T, D); e (N, Hkv, T) as of `eviction_times`: of each head at most one token goes
    at a step."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    exact, lse = exact_part(q, k, v, e, scale)
    if kernels is None or not kernels.rank:
        return exact
    return merge(exact, lse, *low_rank_part(kernels.phi(q), kernels.psi(k), v, e))


def exact_part(q, k, v, e, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over what is held: (out (N, Hq, T, D), log-sum-exp (N, Hq, T)). It does not depend on the kernels."""
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    i = torch.arange(T, device=q.device)
    visible = (i <= i[:, None]) & (i[:, None] <= e[:, :, None])  # (N, Hkv, query, token)
    logits = (q * scale @ _per_query_head(k, G).mT).masked_fill_(~_per_query_head(visible, G), -torch.inf)
    return logits.softmax(-1) @ _per_query_head(v, G), logits.logsumexp(-1)


def low_rank_part(phi, psi, v, e) -> tuple[torch.Tensor, torch.Tensor]:
    """What the low-rank state adds if at most one token of a head goes at each step, in linear time.

    Each token is moved to the first query that sees it through the state, e + 1: then it is causal linear attention.
    phi (N, Hq, T, R), psi (N, Hkv, T, R), v (N, Hkv, T, D), e (N, Hkv, T).
    Returns phi H (N, Hq, T, D) and phi.z (N, Hq, T).
    """
    G, T = phi.shape[1] // psi.shape[1], phi.shape[2]
    token = torch.full((*e.shape[:2], T + 1), T, device=e.device)  # which one goes into the state before each query; T: none
    token.scatter_(2, (e + 1).clamp(max=T), torch.arange(T, device=e.device).expand_as(e))
    token = token[:, :, :T, None]  # (N, Hkv, T, 1)
    ones = torch.ones_like(v[..., :1])
    values = torch.cat([v, ones], -1)  # (N, Hkv, T, D + 1): the sums with and without v at once
    leaves, place = token < T, token.clamp(max=T - 1)
    psi = _blocks(psi.gather(2, place.expand(-1, -1, -1, psi.shape[-1])) * leaves)  # (N, Hkv, b, C, R)
    values = _blocks(values.gather(2, place.expand(-1, -1, -1, values.shape[-1])))  # (N, Hkv, b, C, D + 1)
    phi = _blocks(phi)  # (N, Hq, b, C, R)
    block = psi.mT @ values  # (N, Hkv, b, R, D + 1)
    before = block.cumsum(2) - block  # what whole blocks before this one have folded
    within = (phi @ _per_query_head(psi, G).mT).tril()  # (N, Hq, b, C, C)
    sums = phi @ _per_query_head(before, G) + within @ _per_query_head(values, G)
    sums = sums.flatten(2, 3)[:, :, :T]  # (N, Hq, T, D + 1)
    return sums[..., :-1], sums[..., -1]


def merge(exact, lse, weighted, mass):
    """(weighted + e^lse exact) / (mass + e^lse): the low-rank sums joined to the exact part, if their mass is positive.
    Shapes (..., D) and (...)."""
    weighted, mass = weighted * (mass > 0)[..., None], mass.clamp(min=0)
    kinds = torch.finfo(lse.dtype)
    lse = lse.clamp(min=math.log(kinds.tiny) / 1.5)  # below that e^-lse may overflow
    most = torch.maximum(lse, mass.clamp(min=kinds.tiny).log()).detach()  # the larger part: relative to it nothing overflows
    low_rank, kept = (-most).exp(), (lse - most).exp()
    return (weighted * low_rank[..., None] + exact * kept[..., None]) / (mass * low_rank + kept)[..., None]


def _per_query_head(x, G):
    """(N, Hkv, ...) -> (N, Hq, ...): each KV head stands before the query heads that read it."""
    return x if G == 1 else x.repeat_interleave(G, 1)


def _blocks(x):
    """(N, H, L, c) -> (N, H, blocks, TOKENS_AT_ONCE, c), with zeros behind."""
    L = x.shape[2]
    x = torch.nn.functional.pad(x, (0, 0, 0, -L % TOKENS_AT_ONCE))
    return x.unflatten(2, (-1, TOKENS_AT_ONCE))
