"""Each layer towards its own target, all in one go: rounds of windows are read with the full cache, and then every layer's
kernels take gradient steps on what their errors cost, in the parallel form. Queries and keys are those under the full cache, as
in the paper (section 3.2). Time is linear in layers.

The paper's objective is the mean squared error of a layer's output after its projection, over the queries behind the first
eviction. By the gradient (sensitivity.py) it is what errors cost the model's predictions, relative to what the bare policy's do.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hf.architecture import less_layers
from ..layer.checks import LessError
from ..layer.parallel import exact_part, low_rank_part, merge
from ..setting import Setting
from .descent import Descent, descend, rounds
from .recipe import FITS, Recipe
from .sensitivity import Watched, eviction_times_of, watch, watch_each
from .work import Work


class Bare(NamedTuple):
    """What a bare policy does to a layer reading N texts. It does not depend on the kernels, so it is computed once."""

    e: torch.Tensor  # (N, Hkv, T) int64, eviction times
    seen: torch.Tensor  # (N, Hq, T, samples or D), what costs depend on of its attention
    lse: torch.Tensor  # (N, Hq, T), what the kept tokens weigh: log-sum-exp
    cost: torch.Tensor  # (N, T), of each query's output

    def rows(self, index: torch.Tensor | slice) -> "Bare":
        """Some of the texts."""
        return Bare(*(tensor[index] for tensor in self))


Held = tuple[dict[int, Watched], list[dict[int, Bare]]]  # the layers, and the bare policies by setting


def train_layers(
    model: PreTrainedModel,
    windows: torch.Tensor,
    validation: torch.Tensor,
    settings: Sequence[Setting],
    recipe: Recipe,
    work: Work,
) -> dict[str, Any]:
    """Trains the kernels that the settings share, in place, each step under the next setting.

    windows (N, T), validation (V, T) int64. Returns the budgets of the settings, what the kernels leave of the bare policy's cost
    on the validation windows, by setting and layer, and the layers that were harmed: these keep what they began with.
    Raises LessError if a layer loses nothing under the bare policy, or a loss is not finite. Unfinished work is saved.
    """
    kernels: Any = settings[0].kernels
    fit, turns = recipe.scaled(FITS[recipe.family], kernels.sizes["head_dim"]), rounds(len(windows), recipe)
    descent = Descent(kernels.layers, fit, len(turns))

    def read(rows: torch.Tensor) -> Held:
        layers = watch_each(model, windows[rows], (recipe.seed + rows).tolist(), fit.by_gradient)
        return layers, [bare_of(layers, setting) for setting in settings]

    def loss(held: Held, rows: torch.Tensor, step: int) -> float:
        if step == 0:
            begin(held, settings[0], recipe.batch)
            if not work.has("layers-begun"):
                work.save("layers-begun", kernels.layers.state_dict())
        return step_of_layers(held, rows, settings, step % len(settings), fit.by_gradient)

    set_dropout(kernels, fit.dropout)
    descend("layers", descent, turns, read, loss, recipe.seed, work)
    set_dropout(kernels, 0.0)
    budgets, left = [setting.policy.budget for setting in settings], shares_left(model, validation, settings, recipe)
    if harmed := [index for index, of in zip(less_layers(model), zip(*left)) if not sum(of) < len(of)]:
        known = work.load("layers-begun")
        begun = {name: weight for name, weight in known.items() if int(name.split(".")[0]) in harmed}
        kernels.layers.load_state_dict(kernels.layers.state_dict() | begun)
        left = shares_left(model, validation, settings, recipe)
    return {"budgets": budgets, "left": left, "harmed": harmed}


def step_of_layers(held: Held, rows: torch.Tensor, settings: Sequence[Setting], turn: int, relative: bool) -> float:
    """Leaves the gradients of every layer's loss on some rows under one setting; returns what the layers leave of the bare
    policy's cost on average. relative: the loss is that share, not the cost."""
    layers, policies = held
    shares = []
    for index, layer in layers.items():
        rows = rows.to(layer.q.device)
        less, bare = costs(layer.rows(rows), policies[turn][index].rows(rows), settings[turn], index)
        (less / bare if relative else less).backward()
        shares.append((less / bare).detach())
    return torch.stack(shares).mean().item()


@torch.no_grad()
def bare_of(layers: dict[int, Watched], setting: Setting) -> dict[int, Bare]:
    """What the setting's bare policy does to each layer, one text after the other, which takes less memory."""
    times = eviction_times_of(layers, setting.policy, setting.kernels)
    found = {}
    for index, layer in layers.items():
        parts = []
        for row, e in enumerate(times[index].split(1)):
            one = layer.rows(slice(row, row + 1))
            out, lse = exact_part(one.q, one.k, one.v, e, one.scale)
            seen = one.seen(out)
            parts.append(Bare(e, seen, lse, one.cost(seen)))
        found[index] = Bare(*map(torch.cat, zip(*parts)))
    return found


def costs(layer: Watched, bare: Bare, setting: Setting, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What LESS under the setting costs in this layer, and what its bare policy does: scalars, means over the queries behind the
    first eviction, the first differentiable in the kernels."""
    first = setting.policy.budget + 1
    seen, lse = (part[:, :, first:] for part in (bare.seen, bare.lse))
    weighted, mass = (part[:, :, first:] for part in folded(layer, bare.e, setting, index))
    less = merge(seen, lse, layer.seen(weighted, first), mass)  # (N, Hq, L, samples or D)
    return layer.cost(less, first).mean(), bare.cost[:, first:].mean()


def folded(layer, e, setting, index):
    """What the state adds: phi H (N, Hq, T, D) and phi.z (N, Hq, T)."""
    features = setting.layer(index)[1]
    return low_rank_part(features.phi(layer.q), features.psi(layer.k), layer.v, e)


@torch.no_grad()
def begin(held: Held, setting: Setting, count: int) -> None:
    """Tells new kernels what the tokens weigh that the setting holds of so many windows. LessError for a layer without loss."""
    layers, policies = held
    for index, whole in layers.items():
        layer, bare = whole.rows(slice(count)), policies[0][index].rows(slice(count))
        if not costs(layer, bare, setting, index)[1] > 0:
            raise LessError(
                f"layer {index} loses nothing under the bare policy, so there is nothing to learn: train on other text"
            )
        late, mass = setting.policy.budget + 1, folded(layer, bare.e, setting, index)[1]
        setting.layer(index)[1].begin(bare.lse[:, :, late:], mass[:, :, late:])


@torch.no_grad()
def shares_left(model: PreTrainedModel, windows: torch.Tensor, settings: Sequence[Setting], recipe: Recipe) -> list[list[float]]:
    """What each layer's kernels leave of the bare policy's cost on windows (W, T), by setting and layer."""
    sums: Any = 0
    for number, ids in enumerate(tqdm(windows.split(1), desc="judging layers", unit="window", leave=False)):
        layers = watch(model, ids, recipe.seed + number, FITS[recipe.family].by_gradient)
        found = []  # settings x layers x (less, bare)
        for setting in settings:
            policies = bare_of(layers, setting)
            both = (costs(layer.rows(slice(None)), policies[index], setting, index) for index, layer in layers.items())
            found.append([torch.stack(pair).tolist() for pair in both])
        sums = sums + torch.tensor(found, dtype=torch.float64, device="cpu")
    return (sums[..., 0] / sums[..., 1]).tolist()


def set_dropout(kernels, share: float) -> None:
    """On the hidden layers, while they are trained."""
    for layer in kernels.layers:
        layer.dropout = share
        layer.train(share > 0)
