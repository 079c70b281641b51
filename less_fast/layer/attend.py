"""Attention over the visible tokens plus one virtual token, the low-rank state."""

import torch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    clear: int,
    real: torch.Tensor | None,
    scale: float,
    low_rank: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's equation 3 for a block of queries, stably, in float32 or wider.

    q (N, H, G, m, D): G query heads for each of H KV heads; k, v (N, H, S, D), or (N, 1, S, D) if the heads lie in one ragged
    tensor; visible (N, H, m, S) bool, true throughout the first `clear` slots; real (N, m) bool: which queries see anything at
    all (pads do not), None for all; low_rank: None, or phi (N, H, G, m, R) of the queries with H (N, H, R, D) and z (N, H, R);
    softcap: logits l become softcap tanh(l / softcap); sinks (H, G): the logit of nothing, which takes its share of each query's
    attention and gives no value.
    Returns out (N, H, G, m, D) and p (N, H, G, m, S), the softmax over the visible tokens alone. A query that is not real gets
    zeros in both; if phi.z is not positive there is no virtual token.
    """
    N, H, G, m, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide).reshape(N, k.shape[1], -1, D), k.to(wide), v.to(wide)
    logits = (q * scale @ k.mT).view(N, H, G, m, -1)  # (N, H, G, m, S)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if clear < k.shape[2]:
        logits[..., clear:].masked_fill_(~visible[:, :, None, :, clear:], torch.finfo(wide).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(wide)[:, :, None, None].expand(N, -1, -1, m, 1)], -1)  # (N, H, G, m, S + 1)
    weight = logits.softmax(-1)
    if real is not None:
        real = real[:, None, None, :, None]  # (N, 1, 1, m, 1)
        weight.mul_(real)
    p = weight[..., : k.shape[2]]  # (N, H, G, m, S)
    out = (p.reshape(N, k.shape[1], -1, k.shape[2]) @ v).view(N, H, G, m, D)
    if low_rank is not None:
        phi, state, norm = low_rank
        lse = logits.amax(-1, keepdim=True) - weight.amax(-1, keepdim=True).log()  # (N, H, G, m, 1)
        mass = (phi * norm[:, :, None, None]).sum(-1, keepdim=True).clamp_(min=0)  # (N, H, G, m, 1)
        mean = (phi.flatten(2, 3) @ state).view(N, H, G, m, D) / mass.masked_fill(mass == 0, 1)
        share = torch.sigmoid(mass.log() - lse)  # the virtual token's part of the attention
        out = torch.lerp(out, mean, share)
        if real is not None:
            out = torch.where(real, out, 0)
    return out, p
