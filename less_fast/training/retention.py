"""Rho, which says what is worth keeping (the policy Retention), learned from what tokens are still to get under the full cache.

At moments of a text the tokens seen so far compete: of each the largest attention that a later query will give it is known. The
softmax of what they are worth shall be as these are, divided by their sum: a cross-entropy, for each KV head alone. (The sum of
all attention to come is a worse guide: much of it goes to tokens that are kept anyway.) Time is linear in layers, and nothing
lies on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hf.architecture import less_layers
from ..hf.seam import read
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.features import Rho
from ..layer.parallel import dense
from ..layer.policies import Retention
from .descent import Descent
from .recipe import Recipe
from .work import Work

CHECKPOINT = 10  # steps between two checkpoints
MOMENTS = 32  # of each text at which its tokens compete


@dataclass
class Seen:
    """One layer reading N texts with the full cache, and what each of its tokens had got and was still to get at M moments."""

    q: torch.Tensor  # (N, Hkv, G, T, D)
    k: torch.Tensor  # (N, Hkv, T, D)
    v: torch.Tensor  # (N, Hkv, T, D)
    moments: torch.Tensor  # (N, M) the query that has just been
    seen: torch.Tensor  # (N, Hkv, M, T, 2) attention so far, fading as the policy's scores do
    share: torch.Tensor  # (N, Hkv, M, T) the largest attention each is to get, over the sum of these; 0 for tokens not there yet

    def rows(self, index: torch.Tensor) -> "Seen":
        """Some of the texts."""
        return Seen(*(tensor[index.to(tensor.device)] for tensor in vars(self).values()))

    def cross_entropy(self, rho: Rho) -> torch.Tensor:
        """In nats, the mean over moments and KV heads: a scalar, differentiable in rho."""
        born = rho(self.q, self.k, self.v)[:, :, None].expand(-1, -1, self.moments.shape[1], -1, -1)  # (N, Hkv, M, T, 4)
        position = torch.arange(self.k.shape[2], device=self.k.device)  # (T,)
        n = self.moments[:, None, :, None] + 1  # (N, 1, M, 1)
        there = position < n
        worth = Retention(1, 0).rank(position.minimum(n - 1), torch.cat([born, self.seen], -1), n)  # (N, Hkv, M, T)
        log_share = worth.masked_fill(~there, torch.finfo(worth.dtype).min).log_softmax(-1)
        return -(self.share * log_share).sum(-1).mean()


def watch(model: PreTrainedModel, ids: torch.Tensor, seed: int) -> list[Seen]:
    """Every layer that LESS serves reading texts ids (N, T) with T > 2, in float32 or wider. seed: of the moments."""
    N, T = ids.shape
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(T - 2, generator=generator)[:MOMENTS] + 1 for _ in range(N)])  # (N, M)
    out: list[Seen] = []

    def watcher(_, q, k, v, scale):
        wide = torch.promote_types(q.dtype, torch.float32)
        parts = (row.to(wide) for row in (q.unflatten(1, (k.shape[1], -1)), k, v))
        out.append(_seen(*parts, chosen.to(q.device), q.shape[-1] ** -0.5 if scale is None else scale))
        return dense(q, k, v, scale)

    with torch.no_grad():
        read(model, ids, watcher)
    return out


def _seen(q, k, v, moments, scale):
    """q (N, Hkv, G, T, D), k, v (N, Hkv, T, D), moments (N, M) -> Seen."""
    at = torch.arange(k.shape[2], device=k.device)
    later = moments[..., None] - at  # (N, M, T): how many queries ago each was
    weights = [decay ** later.clamp(min=0) * (later >= 0) for decay in Retention.FADING]  # (N, M, T) each
    seen, coming = [], []
    for row in range(len(k)):  # (T, T) of each head take much memory
        logits = (q[row] * scale @ k[row, :, None].mT).masked_fill(at > at[:, None], -torch.inf)  # (Hkv, G, T, T)
        attention = logits.softmax(-1).sum(1)  # (Hkv, T, T)
        seen.append(torch.stack([weight[row].to(k.dtype) @ attention for weight in weights], -1))  # (Hkv, M, T, 2)
        largest = attention.flip(1).cummax(1).values.flip(1)  # (Hkv, T, T), by this query or a later one
        coming.append(largest[:, moments[row] + 1] * (later[row] >= 0))  # (Hkv, M, T)
    share = torch.stack(coming)  # (N, Hkv, M, T)
    return Seen(q, k, v, moments, torch.stack(seen), share / share.sum(-1, keepdim=True))


def train_rho(
    model: PreTrainedModel, windows: torch.Tensor, validation: torch.Tensor, kernels: LessKernels, recipe: Recipe, work: Work
) -> dict[str, Any]:
    """Trains rho of all layers of the kernels, in place.

    windows (N, T), validation (V, T) int64. Returns each layer's cross-entropy on the validation windows, before and after, and
    the least there can be, the entropy of what they aim at. Raises LessError if a loss is not finite. Unfinished work is saved.
    """
    saved, first = work.load("rho") if work.has("rho") else None, 0
    layers: Any = None
    rhos: Any = torch.nn.ModuleList(kernels.layers[index].rho for index in less_layers(model))  # type: ignore[misc]
    if saved is not None and "figures" in saved:
        rhos.load_state_dict(saved["rho"])
        return saved["figures"]
    rhos.requires_grad_()
    rate = recipe.rate(recipe.rho_rate, kernels.sizes["head_dim"])
    descent = Descent(rhos, rate, recipe.rho_steps, None, None)
    if saved is not None:
        first = saved["step"]
        descent.load_state_dict(saved["descent"])
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))  # (N,)
    size = min(recipe.together_windows, len(windows))
    of_round, number = -(-size * recipe.together_uses // recipe.batch), None  # steps
    with tqdm(total=recipe.rho_steps, initial=first, desc="what is worth keeping", unit="step") as progress:
        for step in range(first, recipe.rho_steps):
            if number != step // of_round:
                number, layers = step // of_round, None  # its memory is needed
                ids = windows[order[torch.arange(number * size, (number + 1) * size) % len(windows)]]
                layers = _watch_all(model, ids, recipe, recipe.seed + number)
                draw = torch.Generator().manual_seed(recipe.seed + number)
                turns = torch.cat([torch.randperm(size, generator=draw) for _ in range(recipe.together_uses)])
            within = step % of_round * recipe.batch
            descent.adam.zero_grad()
            losses = []
            for layer, rho in zip(layers, rhos):
                loss = layer.rows(turns[within : within + recipe.batch]).cross_entropy(rho)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(rho.parameters(), 1.0)  # each layer for itself
                losses.append(loss.detach())
            if not torch.stack(losses).isfinite().all():
                raise LessError(f"the training of rho diverged at step {step}: lower its rate")
            descent.take()
            progress.update()
            progress.set_postfix_str(f"cross-entropy {torch.stack(losses).mean():.3f}")
            if (step + 1) % CHECKPOINT == 0:
                work.save("rho", {"step": step + 1, "descent": descent.state_dict()})
    rhos.requires_grad_(False)
    held_out = _watch_all(model, validation, recipe, recipe.seed)
    with torch.random.fork_rng(devices=[]):  # new weights are drawn, and the caller's generator stays where it is
        start = Rho(*(kernels.sizes[name] for name in ("query_heads", "kv_heads", "head_dim", "rho"))).to(held_out[0].k)
    with torch.no_grad():
        figures = {
            "before": [layer.cross_entropy(start).item() for layer in held_out],
            "after": [layer.cross_entropy(rho).item() for layer, rho in zip(held_out, rhos)],
            "least": [-(layer.share.xlogy(layer.share)).sum(-1).mean().item() for layer in held_out],
        }
    work.save("rho", {"figures": figures, "rho": rhos.state_dict()})
    return figures


def _watch_all(model, ids, recipe, seed) -> Sequence[Seen]:
    """Every layer reading texts ids (N, T), a batch at a time."""
    parts = [watch(model, batch, seed + index) for index, batch in enumerate(ids.split(recipe.batch))]
    return [
        Seen(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in of_layer)))) for of_layer in zip(*parts)
    ]
