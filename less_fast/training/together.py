"""All layers at once, each towards its own target, on texts that are read once and recorded nowhere: the way for large models.

Rounds of a few windows: the model reads them with the full cache, forwards and backwards, and then every layer's kernels take
gradient steps on what their errors cost the model (sensitivity.py), relative to what the bare policy's cost. Time is linear in
layers, and nothing lies on disk. Queries and keys are those under the full cache, as in the paper's training of each layer alone.
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
    rate = recipe.rate(recipe.learning_rate, kernels.sizes["head_dim"])
    descent = Descent(kernels, rate, recipe.together_steps, None, None)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed), device="cpu")  # (N,)
    of_round = -(-min(recipe.together_windows, len(windows)) * recipe.together_uses // recipe.batch)  # steps
    if saved is not None:
        first = saved["step"]
        descent.load_state_dict(saved["descent"])
    round_now = None
    with tqdm(total=recipe.together_steps, initial=first, desc="all layers at once", unit="step") as progress:
        for step in range(first, recipe.together_steps):
            number, within = divmod(step, of_round)
            if round_now is None or round_now.number != number:
                round_now = None  # its memory is needed
                round_now = Round(model, windows[order], settings, recipe, number)
            if step == 0:
                round_now.begin(recipe.batch)
            shares = round_now.step(within, step % len(settings), recipe.batch, descent)
            if not all(share < float("inf") for share in shares):
                raise LessError(f"training diverged at step {step}: lower the learning rate")
            progress.update()
            progress.set_postfix_str(f"left of the bare policy's cost: {sum(shares) / len(shares):.3f}")
            if (step + 1) % CHECKPOINT == 0:
                work.save("together", {"step": step + 1, "descent": descent.state_dict()})
    kernels.eval()
    with torch.no_grad():
        left = [shares_left(model, validation, setting, recipe) for setting in settings]
    work.save("together", {"left": left, "kernels": kernels.state_dict()})
    return {"left": left}


class Round:
    """Some windows, read, and the order in which steps take them: each `together_uses` times."""

    def __init__(self, model, windows, settings, recipe, number):
        size = min(recipe.together_windows, len(windows))
        rows = torch.arange(number * size, (number + 1) * size, device="cpu") % len(windows)
        batches = rows.split(recipe.batch)
        parts = [watch(model, windows[batch], recipe.seed + int(batch[0])) for batch in batches]
        self.layers = {index: Watched.join([part[index] for part in parts]) for index in parts[0]}
        self.number, self.settings = number, settings
        self.clip = recipe.clip
        self.e = [eviction_times_of(self.layers, setting.policy, setting.kernels) for setting in settings]
        draw = torch.Generator().manual_seed(recipe.seed + number)
        self.order = torch.cat([torch.randperm(size, generator=draw, device="cpu") for _ in range(recipe.together_uses)])

    @torch.no_grad()
    def begin(self, batch: int) -> None:
        """Tells new kernels what the tokens weigh that the first setting holds of so many windows."""
        for index, layer in self.layers.items():
            policy, features = self.settings[0].layer(index)
            q, k, v, e = (rows[:batch] for rows in (layer.q, layer.k, layer.v, self.e[0][index]))
            weights = exact_part(q, k, v, e, layer.scale)[1], low_rank_part(features.phi(q), features.psi(k), v, e)[1]
            features.begin(*(weight[:, :, policy.budget + 1 :] for weight in weights))

    def step(self, within: int, setting: int, batch: int, descent: Descent) -> list[float]:
        """One step of every layer on the next windows; returns what each layer's kernels left of the bare policy's cost."""
        rows, policy, shares = self.order[within * batch : (within + 1) * batch], self.settings[setting].policy, []
        descent.adam.zero_grad()
        for index, layer in self.layers.items():
            _, features = self.settings[setting].layer(index)
            e = self.e[setting][index]
            rows = rows.to(e.device)
            share = share_left(layer.rows(rows), e[rows], features, policy.budget)
            share.backward()
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(features.parameters(), self.clip)  # each layer for itself
            shares.append(share.detach())
        descent.take()
        return torch.stack(shares).tolist()


def shares_left(model: PreTrainedModel, windows: torch.Tensor, setting: Setting, recipe: Recipe) -> list[float]:
    """What each layer's kernels leave of the bare policy's cost, the mean over windows (W, T)."""
    parts = []
    for ids in windows.split(recipe.batch):
        layers = watch(model, ids, recipe.seed)
        times = eviction_times_of(layers, setting.policy, setting.kernels)
        shares = [
            share_left(layer, times[index], setting.layer(index)[1], setting.policy.budget) for index, layer in layers.items()
        ]
        parts.append(torch.stack(shares) * len(ids) / len(windows))
    return torch.stack(parts).sum(0).tolist()


def share_left(layer: Watched, e: torch.Tensor, features: Features, budget: int) -> torch.Tensor:
    """What LESS with these features costs, over what the bare policy does: a scalar, differentiable in the features."""
    exact, lse = exact_part(layer.q, layer.k, layer.v, e, layer.scale)  # (N, Hq, T, D), (N, Hq, T)
    weighted, mass = low_rank_part(features.phi(layer.q), features.psi(layer.k), layer.v, e)
    late = slice(budget + 1, None)
    out = merge(exact[:, :, late], lse[:, :, late], weighted[:, :, late], mass[:, :, late])  # (N, Hq, L, D)
    return layer.cost(out, budget + 1).mean() / layer.cost(exact[:, :, late], budget + 1).mean()
