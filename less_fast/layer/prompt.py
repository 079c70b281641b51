"""Many tokens at once, in memory that is linear in their number: blocks of queries attend and score, then the best are kept and
the others folded."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from .attend import Logits, weigh, with_low_rank
from .policies import Policy, best_first
from .slots import Tokens
from .state import Part

QUERIES_AT_ONCE = 64  # in a block, of one head four times as many
TOKENS_AT_ONCE = 1024  # to fold


def prompt(part: Part, tokens: Tokens, n: torch.Tensor, logits: Logits, first: bool) -> torch.Tensor:
    """tokens: of the part's heads; n (N,): how many each row has seen, these included; logits: sinks (H, G); first: nothing has
    come before.

    Returns their attention (N, H, G, m, D), and changes the part in place.
    """
    slots, policy = part.slots, part.policy
    (N, H, m, _), born = tokens.k.shape, policy.born(tokens, part.kernels)
    score = slots.score.new_zeros(N, H, m, *policy.score_shape).add_(born)
    k, v, position = tokens.k, tokens.v, tokens.position[:, None].expand(N, H, m)
    if not first:
        held = zip(slots.held(), (k, v, position, score))
        k, v, position, score = (torch.cat([x.to(new.dtype), new], 2) for x, new in held)
    # k, v, position and score (N, H, E, ...) are of the kept tokens, and then of the new ones.
    if first and logits.plain and (tokens.real is None or bool(tokens.real.all())):
        out = _attend_to_all(policy, tokens.q, k, v, score, logits.scale, slots.wide)
    else:
        out = _attend(part, tokens, k, v, position, score, logits, first)
    _keep_the_best(part, k, v, position, score, policy.rank(position, score, n[:, None, None]))
    return out


def _attend(part, tokens, k, v, position, score, logits, first):
    """Attends by blocks of queries, and updates the score (N, H, E, ...) in place."""
    blocks, policy, wide = [], part.policy, part.slots.wide
    before, m = position.shape[2] - tokens.k.shape[2], tokens.k.shape[2]
    for start in range(0, m, QUERIES_AT_ONCE):
        now = slice(start, min(start + QUERIES_AT_ONCE, m))
        seen = slice(0, before + now.stop)  # later tokens are invisible to the whole block
        q, real = tokens.q[:, :, :, now], None if tokens.real is None else tokens.real[:, now]  # (N, H, G, b, D), (N, b)
        held = position[:, :, None, seen]  # (N, H, 1, E)
        hidden = (held < 0) | (held > tokens.position[:, None, now, None])  # (N, H, b, E)
        scaled = (q.to(wide) * logits.scale).flatten(2, 3)  # (N, H, G b, D)
        dots = (scaled @ k[:, :, seen].to(wide).mT).unflatten(2, q.shape[2:4])  # (N, H, G, b, E)
        p, found, every = weigh(dots, hidden, real, logits.softcap, logits.sinks)
        out = (p.flatten(2, 3) @ v[:, :, seen].to(wide)).unflatten(2, q.shape[2:4])  # (N, H, G, b, D)
        if part.z.shape[2] and not first:  # the first chunk finds the low-rank state empty
            out = with_low_rank(out, found, every, part.kernels.phi(q.flatten(1, 2)), part.mean, part.z)
        blocks.append(out)
        if policy.queries != 0:
            score[:, :, seen] = policy.update(score[:, :, seen], p, ~hidden)
    return torch.cat(blocks, 3) if len(blocks) > 1 else blocks[0]


def _attend_to_all(policy: Policy, q, k, v, score, scale: float, wide: torch.dtype):
    """The same for a first chunk without pads, under plain softmax attention.

    Queries that no score looks at are left to scaled_dot_product_attention. The others go in blocks that lie in the same memory,
    on a CPU head by head, so that they stay in its cache.
    """
    N, H, G, m, D = q.shape
    begin = 0 if policy.queries is None else max(0, m - policy.queries)  # of the queries that scores look at
    dtype = q.dtype if begin == m and k.dtype == q.dtype else wide
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out = torch.empty_like(q)
    if begin:
        some, keys, values = (x[..., :begin, :] for x in (q.flatten(1, 2), k, v))
        found = scaled_dot_product_attention(some, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        out[..., :begin, :] = found.unflatten(1, (H, G))
    heads, many = (1, 4 * QUERIES_AT_ONCE) if q.is_cpu and not policy.pooled else (H, QUERIES_AT_ONCE)  # at once
    room = q.new_empty(N * heads * G * min(many, m - begin) * m)
    for now in (slice(start, min(start + many, m)) for start in range(begin, m, many)):
        visible = torch.ones(now.stop - now.start, now.stop, dtype=torch.bool, device=q.device).tril_(now.start)  # (b, E)
        later = ~visible[:, now]  # (b, b)
        for some in (slice(head, head + heads) for head in range(0, H, heads)):
            queries = (q[:, some, :, now] * scale).reshape(N * heads, -1, D)  # (N h, G b, D)
            p = room[: queries.shape[0] * queries.shape[1] * now.stop].view(*queries.shape[:2], now.stop)  # (N h, G b, E)
            torch.bmm(queries, k[:, some, : now.stop].flatten(0, 1).mT, out=p)
            each = p.view(N, heads, G, -1, now.stop)  # (N, h, G, b, E)
            each[..., now].masked_fill_(later, -torch.inf)
            torch.softmax(p, -1, out=p)
            out[:, some, :, now] = (p @ v[:, some, : now.stop].flatten(0, 1)).view(N, heads, G, -1, D)
            updated = score[:, some, : now.stop]  # (N, h, E, ...)
            updated.copy_(policy.update(updated, each, visible.expand(N, heads, -1, -1)))
    return out


def _keep_the_best(part, k, v, position, score, rank):
    """Of each head the `budget` tokens that rank highest stay, of equals the lower position; the others are folded."""
    layout, real, E = part.slots.layout, position >= 0, position.shape[2]  # (N, H, E)
    least = -torch.inf if rank.is_floating_point() else torch.iinfo(rank.dtype).min
    rank = rank.masked_fill(~real, least)
    order = best_first(rank, position)  # (N, H, E)
    within = torch.arange(E, device=order.device) < layout.budget  # (H, E)
    real, stays = real.gather(2, order), within
    if not part.policy.one_leaves:
        stays = within & (rank.gather(2, order) > least)
    leaves, stays = real & ~stays, real & stays  # (N, H, E)
    if part.z.shape[2]:
        begin = int(stays.sum(2).min())  # all that leave come behind all that stay
        for some, leave in zip(*(x[:, :, begin:].split(TOKENS_AT_ONCE, 2) for x in (order, leaves))):
            part.fold(*(_rows(x, some).to(part.z.dtype) for x in (k, v)), leave)
    part.slots.fill(order[:, :, : layout.S - 1], stays[:, :, : layout.S - 1], k, v, position, score)


def _rows(x, chosen):
    """x (N, H, E, D), chosen (N, H, e) -> (N, H, e, D). Whole rows are copied at once so; gather copies number by number."""
    N, H, E, D = x.shape
    rows = (torch.arange(0, N * H * E, E, device=x.device)[:, None] + chosen.flatten(0, 1)).flatten()  # (N H e,)
    return x.reshape(-1, D).index_select(0, rows).view(*chosen.shape, D)
