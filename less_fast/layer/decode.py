"""One token of each row: attend, score, evict, fold. Shapes are fixed and no branch depends on what tensors hold, so a step can
be compiled, and captured as a CUDA graph."""

import torch

from .attend import Logits, weigh, with_low_rank
from .slots import Tokens
from .state import Part


def decode(part: Part, tokens: Tokens, n: torch.Tensor, logits: Logits) -> torch.Tensor:
    """tokens: of the part's heads, m = 1; n (N,): how many each row has seen, these included; logits: sinks (H, G).

    Returns their attention (N, H, G, 1, D), and changes the part in place.
    """
    policy, slots, kernels, R = part.policy, part.slots, part.kernels, part.z.shape[2]
    slots.put(tokens, policy.born(tokens, kernels))
    position, before = slots.positions(), slots.scores()  # (N, H, S), (N, H, S, ...)
    empty = position < 0  # (N, H, S)
    hidden = empty[:, :, None]  # (N, H, 1, S)
    if tokens.real is not None:
        hidden = hidden | ~tokens.real[:, None, :, None]
    dots = slots.dot(tokens.q.to(slots.wide) * logits.scale)  # (N, H, G, 1, S)
    p, found, every = weigh(dots, hidden, tokens.real, logits.softcap, logits.sinks)
    out = slots.mix(p)  # (N, H, G, 1, D)
    if R:
        out = with_low_rank(out, found, every, kernels.phi(tokens.q.flatten(1, 2)), part.mean, part.z)
    score = before if policy.queries == 0 else policy.update(before, p, ~hidden)
    newest, slot = lowest(policy.rank(position, score, n[:, None, None]), position, empty, slots.layout)  # (N, H) each
    if score is not before or not slots.layout.even:
        slots.keep_scores(score)
    if R:
        part.fold(*slots.take(slot), newest[..., None] >= 0)
    slots.free_at(slot)
    return out


def lowest(rank, position, empty, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each head the token that ranks lowest, of equals the newest: its position (N, H), and its slot of the T. An empty slot
    ranks lower than all: where there is one, nothing has to leave, and the position is -1."""
    floating = rank.is_floating_point()
    least, most = (-torch.inf, torch.inf) if floating else (torch.iinfo(rank.dtype).min, torch.iinfo(rank.dtype).max)
    rank = rank.masked_fill(empty, least)  # (N, H, S)
    if not layout.even:
        rank = rank.masked_fill_(layout.lacking, most)
    newest, place = position.masked_fill(rank != rank.amin(-1, keepdim=True), -2).max(-1)
    return newest, place + layout.first
