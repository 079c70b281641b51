"""All layers at once, each towards its own target, on texts that are read once and recorded nowhere: the way for large models.

A step reads a few windows with the full cache, forwards and backwards, and gives every layer's kernels one gradient step on
what their errors cost the model (sensitivity.py), relative to what the bare policy's cost. Time is linear in layers, and nothing
lies on disk. Queries and keys are those under the full cache, as in the paper's training of each layer alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..layer.checks import LessError
from ..layer.features import Features
from ..layer.parallel import exact_part, low_rank_part, merge
from ..setting import Setting
from .descent import Descent
from .recipe import Recipe
from .sensitivity import Watched, eviction_times_of, watch
from .work import Work

CHECKPOINT = 10  # steps between two checkpoints


def train_together(
    model: PreTrainedModel,
    windows: torch.Tensor,
    validation: torch.Tensor,
    settings: Sequence[Setting],
    recipe: Recipe,
    work: Work,
) -> dict[str, Any]:
    """Trains the kernels that the settings share, in place, each step under the next setting.

    windows (N, T), validation (V, T) int64. Returns what the kernels leave of the bare policy's cost on the validation windows,
    by setting and layer. Raises LessError if a loss is not finite. Unfinished work is saved.
    """
    kernels, saved, first = settings[0].kernels, work.load("together") if work.has("together") else None, 0
    if saved is not None and "left" in saved:
        kernels.load_state_dict(saved["kernels"])
        return {"left": saved["left"]}
    kernels.requires_grad_().train()
    descent = Descent(kernels, recipe.learning_rate, recipe.together_steps, None, None)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))  # (N,)
    if saved is not None:
        first = saved["step"]
        descent.load_state_dict(saved["descent"])
    with tqdm(total=recipe.together_steps, initial=first, desc="all layers at once", unit="step") as progress:
        for step in range(first, recipe.together_steps):
            rows = order[torch.arange(step * recipe.batch, (step + 1) * recipe.batch) % len(windows)]  # (batch,)
            setting = settings[step % len(settings)]
            shares = _shares_left(watch(model, windows[rows], recipe.seed + step), setting, descent)
            if not all(share < float("inf") for share in shares):
                raise LessError(f"training diverged at step {step}: lower the learning rate")
            progress.update()
            progress.set_postfix_str(f"left of the bare policy's cost: {sum(shares) / len(shares):.3f}")
            if (step + 1) % CHECKPOINT == 0:
                work.save("together", {"step": step + 1, "descent": descent.state_dict()})
    kernels.eval()
    left, parts = [], validation.split(recipe.batch)
    weights = torch.tensor([len(ids) for ids in parts]) / len(validation)  # (parts,)
    with torch.no_grad():
        for setting in settings:
            of_parts = torch.tensor([_shares_left(watch(model, ids, recipe.seed), setting) for ids in parts])  # (parts, layers)
            left.append((weights @ of_parts).tolist())
    work.save("together", {"left": left, "kernels": kernels.state_dict()})
    return {"left": left}


def _shares_left(layers: Sequence[Watched], setting: Setting, descent: Descent | None = None) -> list[float]:
    """What each layer's kernels leave of the bare policy's cost; with a descent they take a step to make that less."""
    budget = setting.policy.budget
    shares = []
    if descent is not None:
        descent.adam.zero_grad()
    for index, (layer, e) in enumerate(zip(layers, eviction_times_of(layers, setting.policy))):
        _, features = setting.layer(index)
        share = share_left(layer, e, features, budget)
        if descent is not None:
            share.backward()
            torch.nn.utils.clip_grad_norm_(features.parameters(), 1.0)  # each layer for itself
        shares.append(share.item())
    if descent is not None:
        descent.take()
    return shares


def share_left(layer: Watched, e: torch.Tensor, features: Features, budget: int) -> torch.Tensor:
    """What LESS with these features costs, over what the bare policy does: a scalar, differentiable in the features."""
    exact, lse = exact_part(layer.q, layer.k, layer.v, e, layer.scale)  # (N, Hq, T, D), (N, Hq, T)
    weighted, mass = low_rank_part(features.phi(layer.q), features.psi(layer.k), layer.v, e)
    late = slice(budget + 1, None)
    out = merge(exact[:, :, late], lse[:, :, late], weighted[:, :, late], mass[:, :, late])  # (N, Hq, L, D)
    return layer.cost(out, budget + 1).mean() / layer.cost(exact[:, :, late], budget + 1).mean()
