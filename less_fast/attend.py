"""Attention over the visible tokens plus one virtual token, the low-rank state (SPEC section 2, step 1)."""

import torch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    low_rank: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's equation 3 for a block of queries, stably, in float32 or wider.

    q (N, H, G, m, D): G query heads for each of H KV heads; k, v (N, H, S, D); visible (N, H, m, S) bool;
    low_rank: None, or phi (N, H, G, m, R) of the queries with H (N, H, R, D) and z (N, H, R).
    Returns out (N, H, G, m, D) and p (N, H, G, m, S), the softmax over the visible tokens alone.
    A query that sees no token (a pad) gets zeros in both; where phi.z is not positive there is no virtual token.
    """
    N, H, G, m, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide).reshape(N, H, G * m, D), k.to(wide), v.to(wide)
    logits = (q * scale @ k.mT).view(N, H, G, m, -1).masked_fill_(~visible[:, :, None], -torch.inf)  # (N, H, G, m, S)
    largest = logits.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weight = logits.sub_(largest).exp_()  # (N, H, G, m, S)
    total = weight.sum(-1, keepdim=True)  # (N, H, G, m, 1)
    sees = total > 0
    p = weight / total.masked_fill(~sees, 1)
    out = (p.view(N, H, G * m, -1) @ v).view(N, H, G, m, D)
    if low_rank is not None:
        phi, state, norm = low_rank
        mass = torch.einsum("nhgmr,nhr->nhgm", phi, norm)[..., None].clamp_(min=0)  # (N, H, G, m, 1)
        mean = torch.einsum("nhgmr,nhrd->nhgmd", phi, state) / mass.masked_fill(mass == 0, 1)
        share = torch.sigmoid(mass.log() - largest - total.log())  # the virtual token's part of the attention
        out = torch.lerp(out, mean, share).masked_fill(~sees, 0)
    return out, p
