"""Attention over the visible tokens plus one virtual token, the low-rank state (SPEC section 2, step 1)."""

import torch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    real: torch.Tensor,
    scale: float,
    low_rank: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's equation 3 for a block of queries, stably, in float32 or wider.

    q (N, H, G, m, D): G query heads for each of H KV heads; k, v (N, H, S, D); visible (N, H, m, S) bool; real (N, m) bool:
    which queries see anything at all (pads do not); low_rank: None, or phi (N, H, G, m, R) of the queries with H (N, H, R, D)
    and z (N, H, R).
    Returns out (N, H, G, m, D) and p (N, H, G, m, S), the softmax over the visible tokens alone. A query that is not real gets
    zeros in both; where phi.z is not positive there is no virtual token.
    """
    N, H, G, m, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide).reshape(N, H, G * m, D), k.to(wide), v.to(wide)
    logits = (q * scale @ k.mT).view(N, H, G, m, -1)  # (N, H, G, m, S)
    logits.masked_fill_(~visible[:, :, None], torch.finfo(wide).min)
    real = real[:, None, None, :, None]  # (N, 1, 1, m, 1)
    p = logits.softmax(-1).mul_(real)  # (N, H, G, m, S)
    out = (p.view(N, H, G * m, -1) @ v).view(N, H, G, m, D)
    if low_rank is not None:
        phi, state, norm = low_rank
        lse = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()  # (N, H, G, m, 1), of the visible tokens
        mass = (phi * norm[:, :, None, None]).sum(-1, keepdim=True).clamp_(min=0)  # (N, H, G, m, 1)
        mean = (phi.flatten(2, 3) @ state).view(N, H, G, m, D) / mass.masked_fill(mass == 0, 1)
        share = torch.sigmoid(mass.log() - lse)  # the virtual token's part of the attention
        out = torch.where(real, torch.lerp(out, mean, share), 0)
    return out, p
