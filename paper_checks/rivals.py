"""Rivals of the low-rank state and of the policies, as controls: what else could the same bytes hold, and what is there to gain?

    python -m paper_checks.rivals                 # the embedded model, 64 held-out windows, uniform budgets
    python -m paper_checks.rivals --model smollm2 --text wiki.test.raw --windows 16

Every token of a window enters each layer alone, in float32, in a loop that says plainly what is done: it takes a slot, its query
attends to all slots and to the memory of what was evicted, scores are updated, and what ranks lowest goes into the memory. What
a memory says of a query are virtual tokens beside the slots, each a logit and a value:

LESS        one, of mass phi(q) z, with the value phi(q) H / phi(q) z
centroids   each evicted token joins the nearest mean key once all means are taken; a mean counts as often as it has tokens (the
            memory of IndexMem, arXiv 2605.25475, without its learned parts)
moments     the mean key and value of all, and how values go with keys: n e^(q m) (v + C q) (MomentKV, arXiv 2606.01563, without
            its rule for what to evict)

All hold as many bytes as LESS with its slots, means in 16 bits: what a memory leaves of them holds slots. int8: slots in eight
bits (less_fast/layer/slots.py). oracle: a policy that keeps what any later query attends to most, which only a control can know.
Writes perplexities and shares of bare H2O's gap to results/rivals_MODEL.json.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from transformers.cache_utils import Cache

from less_fast import LessError
from less_fast.hf.architecture import calls_sdpa
from less_fast.hf.seam import FunctionLayer, layers_with, use_less_attention
from less_fast.layer.parallel import dense
from less_fast.layer.policies import Policy
from less_fast.layer.slots import packed, unpacked, width
from less_fast.loading import load_kernels, load_model, load_texts
from less_fast.measuring.compare import Contender as Measured
from less_fast.measuring.compare import share_recovered, window_losses
from less_fast.setting import POLICIES, policy_named
from less_fast.text import windows as cut_windows

from . import script

SCORES = {"h2o": 4, "retention": 24, "oracle": 0}  # bytes of a slot's score; an oracle's is no cache's
POSITION, NUMBER = 4, 2  # bytes: slots are counted in bfloat16


class LowRank:
    """LESS's own state."""

    def __init__(self, kernels, shape):
        N, H, D = shape
        self.kernels, R = kernels, kernels.rank
        self.H, self.z = torch.zeros(N, H, R, D), torch.zeros(N, H, R)

    def absorb(self, k, v):
        """k, v (N, H, D): what is evicted."""
        psi = self.kernels.psi(k[:, :, None])[:, :, 0]  # (N, H, R)
        self.H += psi[..., None] * v[:, :, None]
        self.z += psi

    def virtual(self, q, scale):
        """q (N, H, G, D) -> logits (N, H, G, M) and values (N, H, G, M, D) of M virtual tokens."""
        phi = self.kernels.phi(q.flatten(1, 2)[:, :, None])[:, :, 0].view(*q.shape[:3], -1)  # (N, H, G, R)
        mass = (phi * self.z[:, :, None]).sum(-1)  # (N, H, G)
        value = phi @ self.H / mass.masked_fill(mass == 0, 1)[..., None]  # (N, H, G, D)
        return mass.log()[..., None], value[..., None, :]

    @staticmethod
    def bytes(kernels, head_dim):
        return kernels.rank * (NUMBER * head_dim + 4)


class Centroids:
    """Means of evicted keys and values; each counts as often as it has tokens."""

    def __init__(self, count, shape):
        N, H, D = shape
        self.k, self.v, self.n = torch.zeros(N, H, count, D), torch.zeros(N, H, count, D), torch.zeros(N, H, count)

    def absorb(self, k, v):
        near = -(self.k - k[:, :, None]).square().sum(-1)  # (N, H, M)
        near[self.n == 0] = torch.inf  # an empty one takes the token
        at = near.argmax(-1, keepdim=True)  # (N, H, 1)
        self.n.scatter_add_(2, at, torch.ones_like(at, dtype=self.n.dtype))
        rows = at[..., None].expand(-1, -1, -1, k.shape[-1])  # (N, H, 1, D)
        for mean, new in (self.k, k), (self.v, v):
            old = mean.gather(2, rows)
            mean.scatter_(2, rows, old + (new[:, :, None] - old) / self.n.gather(2, at)[..., None])

    def virtual(self, q, scale):
        return scale * q @ self.k.mT + self.n.log()[:, :, None], self.v[:, :, None].expand(-1, -1, q.shape[2], -1, -1)

    @staticmethod
    def bytes(count, head_dim):
        return count * (2 * head_dim * NUMBER + 4)


class Moments:
    """How many tokens were evicted, the sums of their keys and values, and of each key's products with its value."""

    def __init__(self, shape):
        N, H, D = shape
        self.n, self.k, self.v, self.kv = 0, torch.zeros(N, H, D), torch.zeros(N, H, D), torch.zeros(N, H, D, D)

    def absorb(self, k, v):
        self.n += 1
        self.k += k
        self.v += v
        self.kv += k[..., None] * v[:, :, None]

    def virtual(self, q, scale):
        n = max(self.n, 1)
        key, value = self.k / n, self.v / n  # (N, H, D)
        covariance = self.kv / n - key[..., None] * value[:, :, None]  # (N, H, D, D)
        logits = (scale * q @ key[..., None])[..., 0] + torch.tensor(float(self.n)).log()  # (N, H, G)
        return logits[..., None], (value[:, :, None] + scale * q @ covariance)[..., None, :]

    @staticmethod
    def bytes(head_dim):
        return 4 + NUMBER * (2 * head_dim + head_dim**2)


@dataclass(frozen=True)
class Oracle(Policy):
    """Keeps what any later query will attend to most under all tokens."""

    budget: int
    scored: ClassVar[bool] = False
    future: torch.Tensor | None = None  # (N, H, T, T): what each token (last) is still to get after each query

    def rank(self, position, score, n):
        now = int(n.flatten()[0]) - 1
        return self.future[:, :, now].gather(2, position.clamp(min=0).long())


def look_ahead(q, k, scale):
    """q (N, H, G, T, D), k (N, H, T, D) -> the oracle's (N, H, T, T)."""
    T, found = k.shape[2], []
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    for queries, keys in zip(q, k):  # a row at a time: (T, T) of each head take much memory
        attention = (queries * scale @ keys[:, None].mT).masked_fill(later, -torch.inf).softmax(-1).sum(1)  # (H, T, T)
        from_here = attention.flip(1).cummax(1).values.flip(1)  # by this query or a later one
        found.append(torch.cat([from_here[:, 1:], from_here.new_zeros(len(keys), 1, T)], 1))
    return torch.stack(found)


def streamed(policy, memory, int8, kernels, q, k, v, scale=None):
    """q (N, Hq, T, D), k, v (N, Hkv, T, D) -> (N, Hq, T, D): every token enters alone."""
    (N, H, T, D), scale = k.shape, q.shape[-1] ** -0.5 if scale is None else scale
    q = q.unflatten(1, (H, -1))  # (N, H, G, T, D)
    held = memory((N, H, D)) if memory else None
    born = kernels.rho(q, k, v) if policy.needs == "rho" else None
    if isinstance(policy, Oracle):
        policy = replace(policy, future=look_ahead(q, k, scale))
    k, v = (unpacked(packed(x), x.dtype) if int8 else x for x in (k, v))
    S = policy.budget + 1
    keys, values, position = torch.zeros(N, H, S, D), torch.zeros(N, H, S, D), torch.full((N, H, S), -1)
    score, outs = torch.zeros(N, H, S, *policy.score_shape), []
    place = torch.zeros(N, H, 1, dtype=torch.long)  # the free slot
    for t in range(T):
        row = place[..., None].expand(-1, -1, -1, D)
        keys.scatter_(2, row, k[:, :, t : t + 1])
        values.scatter_(2, row, v[:, :, t : t + 1])
        position.scatter_(2, place, t)
        new = torch.zeros(N, H, 1, *policy.score_shape)
        if born is not None:
            new[..., :4] = born[:, :, t : t + 1]
        score.scatter_(2, place.view(N, H, 1, *[1] * len(policy.score_shape)).expand_as(new), new)
        there = position >= 0  # (N, H, S)
        now = q[:, :, :, t]  # (N, H, G, D)
        logits = (scale * now @ keys.mT).masked_fill(~there[:, :, None], -torch.inf)  # (N, H, G, S)
        p = logits.softmax(-1)
        out = p @ values  # (N, H, G, D)
        if held is not None and t >= S:
            extra, value = held.virtual(now, scale)
            weight = torch.cat([logits.logsumexp(-1, keepdim=True), extra], -1).softmax(-1)  # (N, H, G, 1 + M)
            out = (weight[..., None] * torch.cat([out[..., None, :], value], -2)).sum(-2)
        outs.append(out)
        if policy.queries != 0:
            score = policy.update(score, p[:, :, :, None], there[:, :, None])
        if t + 1 < S:
            place += 1
            continue
        rank = policy.rank(position, score, torch.full((N, 1, 1), t + 1))
        place = torch.where(rank == rank.amin(-1, keepdim=True), position, -1).argmax(-1, keepdim=True)  # of equals the newest
        if held is not None:
            row = place[..., None].expand(-1, -1, -1, D)
            held.absorb(keys.gather(2, row)[:, :, 0], values.gather(2, row)[:, :, 0])
        position.scatter_(2, place, -1)
    return torch.stack(outs, 3).flatten(1, 2)


def losses(model, windows, attentions) -> torch.Tensor:
    """Mean nats of each window (W, T), its layers attending by these functions: (W,) float64."""
    use_less_attention(model)

    def make(chunk):
        layers = {index: FunctionLayer(attention, calls_sdpa(model)) for index, attention in enumerate(attentions)}
        return Cache(layers=layers_with(model, layers))

    return window_losses(model, windows, Measured("rival", None, None, make))


@dataclass(frozen=True)
class Contender:
    """memory: None, or what makes one from a layer's kernels and a shape (N, H, D)."""

    name: str
    policy: Policy
    memory: Callable | None = None
    int8: bool = False

    def attention(self, kernels) -> Callable:
        return partial(streamed, self.policy, self.memory and partial(self.memory, kernels), self.int8, kernels)


def contenders(layer, budget: int, rule: str) -> Iterator[Contender]:
    """What is measured under a policy; all hold as many bytes as LESS with `budget` slots."""
    D, of_score = layer.head_dim, POSITION + SCORES[rule]
    one, small = 2 * D * NUMBER + of_score, 2 * width(D) + of_score  # bytes of a slot
    state = LowRank.bytes(layer, D)
    room = budget * one + state

    def contender(name, budget, *rest):
        policy = Oracle(budget) if rule == "oracle" else POLICIES[rule].with_budget(budget)
        return Contender(name, policy, *rest)

    yield contender("bare", budget)
    yield contender("Baseline+", room // one)
    yield contender("LESS", budget, LowRank)
    if rule == "oracle":
        return
    for count in (1, 8):
        left = (room - Centroids.bytes(count, D)) // one
        yield contender(f"{count} centroid{'s' * (count > 1)}", left, lambda _, shape, count=count: Centroids(count, shape))
    if (left := (room - Moments.bytes(D)) // one) >= 2:
        yield contender("moments", left, lambda _, shape: Moments(shape))
    yield contender("moments (bytes not counted)", budget, lambda _, shape: Moments(shape))
    yield contender("int8", room // small, None, True)
    yield contender("int8 with LESS", (room - state) // small, LowRank, True)


def measure(chosen, write: Callable[[list[dict]], None]) -> None:
    """A row for each policy, budget and contender; printed and written as they come."""
    model, tokenizer = load_model(chosen.model)
    kernels = load_kernels(model, "")
    if kernels is None:
        raise LessError("this is about kernels, and none are shipped for this model: choose another")
    if {layer.rank for layer in kernels.layers} != {kernels.layers[0].rank}:
        raise LessError("equal bytes are counted for kernels of one rank, and these have several: choose another model")
    script.known("policy", chosen.policies.split(","), SCORES)
    named = {*chosen.caches.split(",")} - {""}
    script.known("cache", named, [one.name for one in contenders(kernels.layers[0], chosen.length, "h2o")])
    texts, _ = load_texts(chosen.text, "", "test")
    windows = cut_windows(tokenizer, texts, chosen.length, chosen.windows, 0)
    rows: list[dict] = []
    full = losses(model, windows, [dense] * len(kernels.layers))
    print(f"full: perplexity {full.mean().exp():.3f}", flush=True)
    for share in chosen.budgets.split(","):
        budget, bare = policy_named("h2o", share, chosen.length).budget, None
        for rule in chosen.policies.split(","):
            for contender in contenders(kernels.layers[0], budget, rule):
                if named and contender.name not in named:
                    continue
                start = time.perf_counter()
                nats = losses(model, windows, [contender.attention(layer) for layer in kernels.layers])
                bare = nats if bare is None else bare
                recovered, error = share_recovered(full, bare, nats)
                row = {"policy": rule, "share": share, "cache": contender.name, "budget": contender.policy.budget}
                row |= {"perplexity": nats.mean().exp().item(), "recovered": recovered, "stderr": error}
                print(
                    f"{share} {rule}, {contender.name}: {contender.policy.budget} kept, perplexity {row['perplexity']:.3f}, "
                    f"recovered {recovered:.1%} ± {error:.1%}; {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
                rows.append(row | {"nats": nats.tolist()})
                write(rows)


def main(arguments=None) -> int:
    parser = script.parser(__doc__)
    script.add_model(parser)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--budgets", default="2%,5%,10%", help="slots that LESS has, separated by commas")
    parser.add_argument("--policies", default="h2o,retention,oracle", help="some of these")
    parser.add_argument("--caches", default="", help="some of the contenders, by name; gaps are of the first; all by default")
    parser.add_argument("--out", type=script.Path, help="results/rivals_MODEL.json by default")
    chosen = parser.parse_args(arguments)
    out = chosen.out or script.results_of("rivals", chosen.model)
    about = {name: getattr(chosen, name) for name in ("model", "windows", "length", "budgets", "policies", "caches")}
    return script.run("rivals", lambda: measure(chosen, lambda rows: script.write(out, about, rows)))


if __name__ == "__main__":
    sys.exit(main())
