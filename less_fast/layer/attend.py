"""Attention over the visible tokens and one virtual token, the low-rank state: the paper's equation 3, stably."""

from typing import NamedTuple

import torch


class Logits(NamedTuple):
    """What becomes of q.k: it is scaled, by 1 / sqrt(head_dim) unless given, and two things that few models do.

    softcap: the logit l becomes softcap tanh(l / softcap) (Gemma 2). sinks (Hq,): each query sees one more token, with that logit
    and the value 0 (gpt-oss).
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def weigh(
    dots: torch.Tensor, hidden: torch.Tensor, real: torch.Tensor | None, softcap: float | None, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dots (N, H, G, m, S): scale q.k, in whose memory the logits are written; hidden (N, H, m, S) bool: what queries do not see;
    real (N, m) bool: False for queries that see nothing, None if there are none; sinks (H, G).

    Returns p (N, H, G, m, S), the softmax over the visible tokens and the sink, 0 for queries that see nothing; and for
    `with_low_rank` all logits and `every`, their softmax, the sink's behind the others.
    """
    logits = dots if softcap is None else torch.tanh(dots / softcap) * softcap
    logits = logits.masked_fill_(hidden[:, :, None], torch.finfo(logits.dtype).min)
    if sinks is not None:
        sink = sinks.to(logits.dtype)[:, :, None, None].expand(*logits.shape[:4], 1)
        logits = torch.cat([logits, sink], -1)  # (N, H, G, m, S + 1)
    every = logits.softmax(-1)
    p = every[..., : dots.shape[-1]]
    return p if real is None else p * real[:, None, None, :, None], logits, every


def with_low_rank(
    out: torch.Tensor, logits: torch.Tensor, every: torch.Tensor, phi: torch.Tensor, mean: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """The attention out (N, H, G, m, D) over tokens and over the virtual token. logits, every: see `weigh`.

    phi (N, H G, m, R) of the queries, mean (N, H, R, D), which is H / z, and z (N, H, R). Where phi.z is 0 there is no virtual
    token.
    """
    N, heads, R, D = mean.shape
    weight = phi.to(z.dtype).reshape(N * heads, -1, R) * z.view(N * heads, 1, R)
    lse = logits.amax(-1, keepdim=True) - every.amax(-1, keepdim=True).log()  # (N, H, G, m, 1), their log-sum-exp
    mass = weight.sum(-1, keepdim=True)  # phi.z
    value = torch.bmm(weight / mass, mean.view(N * heads, R, D).to(z.dtype)).view(out.shape)  # phi H / phi.z
    mass = mass.view(lse.shape)
    share = torch.sigmoid(mass.log() - lse)  # the virtual token's part of the attention
    return torch.where(mass > 0, torch.lerp(out, value, share), out)
