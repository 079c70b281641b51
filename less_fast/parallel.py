"""Eviction times and the parallel form (paper, section 3.2): a whole stream at once, for training and analysis.

Streaming is described by one number for each token and KV head: e, the step at whose end the token was evicted. Query i sees
token j exactly iff j <= i <= e_j, and through the low-rank state iff i > e_j.
"""

import math

import torch

from .kernels import LayerKernels
from .state import LayerState
from .step import extend

TOKENS_AT_ONCE = 128  # the low-rank part runs in blocks of this many tokens


def eviction_times(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy,
    scale: float | None = None,
    kinds: torch.Tensor | None = None,
) -> torch.Tensor:
    """e (N, Hkv, T) int64 of streaming with `policy` (one, or one for each KV head); T where a token is never evicted.

    q (N, Hq, T, D); k, v (N, Hkv, T, D); kinds (N, T) for policies that ask. It streams the bare policy through `extend`:
    kernels never change what is kept.
    """
    (N, Hq, T, D), Hkv = q.shape, k.shape[1]
    state = LayerState.allocate(policy, N, Hq, Hkv, D, dtype=q.dtype, device=q.device)
    e = torch.arange(T, device=q.device).expand(N, Hkv, T).clone()  # evicted at the end of its own step, unless ...
    last_held = torch.full((N, Hkv, T + 1), -1, device=q.device)  # column T takes the empty slots
    for step in range(T):
        now = slice(step, step + 1)
        kind = None if kinds is None else kinds[:, now]
        extend(state, q[:, :, now], k[:, :, now], v[:, :, now], scale=scale, kinds=kind)
        for group in state.groups:
            slots = group.position.long().masked_fill(group.position < 0, T)  # (N, H, S)
            held = last_held[:, group.kv_heads].scatter(2, slots, step)
            last_held[:, group.kv_heads] = held
    return torch.maximum(e, last_held[..., :T] + 1)


def parallel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    e: torch.Tensor,
    kernels: LayerKernels | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The streaming output (N, Hq, T, D), dense over T x T and differentiable in the kernels.

    q (N, Hq, T, D); k, v (N, Hkv, T, D); e (N, Hkv, T) as of `eviction_times`.
    """
    exact, lse = exact_part(q, k, v, e, scale)
    if kernels is None:
        return exact
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    folded = _per_query_head(torch.arange(T, device=q.device)[:, None] > e[:, :, None], G)  # (N, Hq, T, T)
    weight = kernels.phi(q) @ _per_query_head(kernels.psi(k), G).mT * folded  # (N, Hq, T, T)
    return merge(exact, lse, weight @ _per_query_head(v, G), weight.sum(-1))


def exact_part(q, k, v, e, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over what is held: (out (N, Hq, T, D), log-sum-exp (N, Hq, T)). It does not depend on the kernels."""
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    i = torch.arange(T, device=q.device)
    visible = (i <= i[:, None]) & (i[:, None] <= e[:, :, None])  # (N, Hkv, query, token)
    logits = (q * scale @ _per_query_head(k, G).mT).masked_fill_(~_per_query_head(visible, G), -torch.inf)
    return logits.softmax(-1) @ _per_query_head(v, G), logits.logsumexp(-1)


def low_rank_part(phi, psi, v, e, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the low-rank state adds when one token is evicted at every step from `budget` on, in linear time.

    Sorted by eviction time it is causal linear attention: query budget + 1 + u sees the first u + 1 evicted tokens.
    phi (N, Hq, T, R), psi (N, Hkv, T, R), v (N, Hkv, T, D), e (N, Hkv, T).
    Returns for the last L = T - 1 - budget queries: phi H (N, Hq, L, D) and phi.z (N, Hq, L).
    """
    G, T = phi.shape[1] // psi.shape[1], phi.shape[2]
    L = T - 1 - budget
    order = e.argsort(-1)[:, :, :L, None]  # (N, Hkv, L, 1)
    ones = torch.ones_like(v[..., :1])
    values = torch.cat([v, ones], -1)  # (N, Hkv, T, D + 1): the sums with and without v at once
    psi = _blocks(psi.gather(2, order.expand(-1, -1, -1, psi.shape[-1])))  # (N, Hkv, b, C, R)
    values = _blocks(values.gather(2, order.expand(-1, -1, -1, values.shape[-1])))  # (N, Hkv, b, C, D + 1)
    phi = _blocks(phi[:, :, budget + 1 :])  # (N, Hq, b, C, R)
    block = psi.mT @ values  # (N, Hkv, b, R, D + 1)
    before = block.cumsum(2) - block  # what whole blocks before this one have folded
    within = (phi @ _per_query_head(psi, G).mT).tril()  # (N, Hq, b, C, C)
    sums = phi @ _per_query_head(before, G) + within @ _per_query_head(values, G)
    sums = sums.flatten(2, 3)[:, :, :L]  # (N, Hq, L, D + 1)
    return sums[..., :-1], sums[..., -1]


def merge(exact, lse, weighted, mass):
    """(weighted + e^lse exact) / (mass + e^lse): the low-rank sums joined to the exact part, where their mass is positive.
    Shapes (..., D) and (...)."""
    weighted, mass = weighted * (mass > 0)[..., None], mass.clamp(min=0)
    most = math.log(torch.finfo(lse.dtype).max) / 1.5  # beyond that products overflow, and one part is all of the sum
    per_token = torch.exp(-lse.clamp(-most, most))
    return (weighted * per_token[..., None] + exact) / (mass * per_token + 1)[..., None]


def _per_query_head(x, G):
    """(N, Hkv, ...) -> (N, Hq, ...): each KV head stands before the query heads that read it."""
    return x if G == 1 else x.repeat_interleave(G, 1)


def _blocks(x):
    """(N, H, L, c) -> (N, H, blocks, TOKENS_AT_ONCE, c), with zeros behind."""
    L = x.shape[2]
    x = torch.nn.functional.pad(x, (0, 0, 0, -L % TOKENS_AT_ONCE))
    return x.unflatten(2, (-1, TOKENS_AT_ONCE))
