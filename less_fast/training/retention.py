"""Rho, which says what is worth keeping (the policy Retention), learned from what tokens are still to get under the full cache.

At moments of a text the tokens seen so far compete: of each the largest attention that a later query will give it is known. The
softmax of what they are worth shall be as these are, divided by their sum: a cross-entropy, for each KV head alone. (The sum of
all attention to come is a worse guide: much of it goes to tokens that are kept anyway.) Time is linear in layers.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hf.architecture import less_layers
from ..hf.seam import read
from ..kernels import LessKernels
from ..layer.features import Rho
from ..layer.parallel import dense
from ..layer.policies import Retention
from .descent import Descent, descend, rounds
from .recipe import RHO, Recipe
from .work import Work

MOMENTS = 32  # of each text at which its tokens compete


@dataclass
class Seen:
    """One layer reading N texts with the full cache, q, k and v in the model's dtype, and what each of its tokens had got and was
    still to get at M moments."""

    q: torch.Tensor  # (N, Hkv, G, T, D)
    k: torch.Tensor  # (N, Hkv, T, D)
    v: torch.Tensor  # (N, Hkv, T, D)
    moments: torch.Tensor  # (N, M) the query that has just been
    seen: torch.Tensor  # (N, Hkv, M, T, 2) attention so far, fading as the policy's scores do
    share: torch.Tensor  # (N, Hkv, M, T) the largest attention each is to get, over the sum of these; 0 for tokens not there yet

    def rows(self, index: torch.Tensor) -> "Seen":
        """Some of the texts."""
        return Seen(*(tensor[index.to(tensor.device)] for tensor in vars(self).values()))

    @classmethod
    def join(cls, parts: Sequence["Seen"]) -> "Seen":
        """The same layer reading all texts of the parts."""
        return cls(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts))))

    def cross_entropy(self, rho: Rho) -> torch.Tensor:
        """In nats, the mean over moments and KV heads: a scalar, differentiable in rho."""
        qkv = (x.to(self.share.dtype) for x in (self.q, self.k, self.v))
        born = rho(*qkv)[:, :, None].expand(-1, -1, self.moments.shape[1], -1, -1)  # (N, Hkv, M, T, 4)
        position = torch.arange(self.k.shape[2], device=self.k.device)  # (T,)
        n = self.moments[:, None, :, None] + 1  # (N, 1, M, 1)
        there = position < n
        worth = Retention(1, 0).rank(position.minimum(n - 1), torch.cat([born, self.seen], -1), n)  # (N, Hkv, M, T)
        log_share = worth.masked_fill(~there, torch.finfo(worth.dtype).min).log_softmax(-1)
        return -(self.share * log_share).sum(-1).mean()


def watch(model: PreTrainedModel, ids: torch.Tensor, seed: int) -> list[Seen]:
    """Every layer that LESS serves reading a text ids (1, T) with T > 2. seed: of the moments."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(ids.shape[1] - 2, generator=generator, device="cpu")[None, :MOMENTS] + 1  # (1, M)
    out: list[Seen] = []

    def watcher(_, q, k, v, scale):
        parts = q.unflatten(1, (k.shape[1], -1)), k, v
        out.append(_seen(*parts, chosen.to(q.device), q.shape[-1] ** -0.5 if scale is None else scale))
        return dense(q, k, v, scale)

    with torch.no_grad():
        read(model, ids, watcher)
    return out


def _seen(q, k, v, moments, scale):
    """q (1, Hkv, G, T, D), k, v (1, Hkv, T, D), moments (1, M) -> Seen."""
    wide = torch.promote_types(q.dtype, torch.float32)
    at = torch.arange(k.shape[2], device=k.device)
    later = moments[0, :, None] - at  # (M, T): how many queries ago each was
    seen, coming = [], []
    for one, keys in zip(q[0].to(wide), k[0].to(wide)):  # (T, T) of all heads would take much memory
        logits = (one * scale @ keys.T).masked_fill(at > at[:, None], -torch.inf)  # (G, T, T)
        attention = logits.softmax(-1).sum(0)  # (T, T)
        weights = [decay ** later.clamp(min=0).to(wide) * (later >= 0) for decay in Retention.FADING]  # (M, T) each
        seen.append(torch.stack([weight @ attention for weight in weights], -1))  # (M, T, 2)
        largest = attention.flip(0).cummax(0).values.flip(0)  # (T, T), by this query or a later one
        coming.append(largest[moments[0] + 1] * (later >= 0))  # (M, T)
    share = torch.stack(coming)[None]  # (1, Hkv, M, T)
    return Seen(q, k, v, moments, torch.stack(seen)[None], share / share.sum(-1, keepdim=True))


def train_rho(
    model: PreTrainedModel, windows: torch.Tensor, validation: torch.Tensor, kernels: LessKernels, recipe: Recipe, work: Work
) -> dict[str, Any]:
    """Trains rho of all layers of the kernels, in place.

    windows (N, T), validation (V, T) int64. Returns each layer's cross-entropy on the validation windows, before and after, and
    the least there can be, the entropy of what they aim at. A layer that is no nearer to it keeps what it began with.
    Raises LessError if a loss is not finite. Unfinished work is saved.
    """
    rhos: Any = [kernels.layers[index].rho for index in less_layers(model)]
    turns = rounds(len(windows), recipe)
    descent = Descent(rhos, recipe.scaled(RHO, kernels.sizes["head_dim"]), len(turns))
    begun = copy.deepcopy(rhos)

    def read(rows: torch.Tensor) -> list[Seen]:
        each = tqdm(zip(windows[rows].split(1), rows.tolist()), total=len(rows), desc="reading", unit="window", leave=False)
        parts = [watch(model, ids, recipe.seed + row) for ids, row in each]
        return [Seen.join([part.pop(0) for part in parts]) for _ in rhos]

    descend("rho", descent, turns, read, lambda layers, rows, _: step_of_rho(layers, rows, rhos), recipe.seed, work)
    figures = judge(model, validation, begun, rhos, recipe)
    for rho, own, before, after in zip(rhos, begun, figures["before"], figures["after"]):
        if not after < before:
            rho.load_state_dict(own.state_dict())
    return figures | {"after": [*map(min, figures["before"], figures["after"])]}


@torch.no_grad()
def judge(model, validation, begun, rhos, recipe) -> dict[str, Any]:
    """Each layer's cross-entropy on windows (V, T) with rho as it began, as it is, and the least."""
    found = []  # windows x layers x (before, after, least)
    for number, ids in enumerate(tqdm(validation.split(1), desc="judging rho", unit="window", leave=False)):
        for layer, own, rho in zip(watch(model, ids, recipe.seed + number), begun, rhos):
            least = -layer.share.xlogy(layer.share).sum(-1).mean()
            found.append([layer.cross_entropy(own).item(), layer.cross_entropy(rho).item(), least.item()])
    means = torch.tensor(found, dtype=torch.float64, device="cpu").unflatten(0, (len(validation), -1)).mean(0).T  # (3, layers)
    return dict(zip(("before", "after", "least"), means.tolist()))


def step_of_rho(layers: Sequence[Seen], rows: torch.Tensor, rhos: Sequence[Rho]) -> float:
    """Leaves the gradients of every layer's cross-entropy on some rows; returns their mean."""
    losses = []
    for layer, rho in zip(layers, rhos):
        loss = layer.rows(rows).cross_entropy(rho)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()
