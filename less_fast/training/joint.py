"""All layers together (joint distillation), a departure from the paper: the KL divergence from the full cache's predictions to
those with LESS, through the whole model, under several settings in turn.

What is evicted depends on the kernels only through what earlier layers say, so it may be computed once for a round of windows and
used for several steps: streaming many windows takes a GPU hardly longer than streaming one.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hf.seam import predictions, read
from ..layer.checks import LessError
from ..layer.parallel import dense, eviction_times, parallel
from ..setting import Setting
from .checks import check_setting, check_windows
from .descent import Descent
from .recipe import Recipe
from .work import Work

CHECKPOINT = 10  # steps between two checkpoints; where what is evicted is used again, a round


def divergence(
    model: PreTrainedModel, ids: torch.Tensor, setting: Setting, times: Mapping[int, torch.Tensor] | None = None
) -> torch.Tensor:
    """KL(full cache || streaming under the setting), in nats per token of texts ids (N, T): a scalar, differentiable in kernels.

    times: when each layer evicts each token, (N, Hkv, T), as `times_in_stream` says; None: it is computed.
    LessError if the texts are no tokens of the model, or the setting is for another one or evicts several tokens at once.
    """
    check_windows(model, ids, "texts")
    check_setting(model, setting)
    with torch.no_grad():
        full = predictions(model, ids, lambda _, *qkv: dense(*qkv))  # (N, T, vocabulary)
    streamed = predictions(model, ids, _streamed(setting, dict(times or {})))  # (N, T, vocabulary)
    return kl_div(streamed, full, log_target=True, reduction="sum") / ids.numel()


@torch.no_grad()
def times_in_stream(model: PreTrainedModel, ids: torch.Tensor, setting: Setting) -> dict[int, torch.Tensor]:
    """When each layer evicts each token of texts ids (N, T) that the model streams under the setting: (N, Hkv, T) by layer."""
    times: dict[int, torch.Tensor] = {}
    read(model, ids, _streamed(setting, times))
    return times


def _streamed(setting: Setting, times: dict[int, torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The attention of layers under the setting, by each layer's eviction times; where there are none they are put there."""

    def attention(index, q, k, v, scale):
        policy, features = setting.layer(index)
        if index not in times:
            times[index] = eviction_times(q.detach(), k.detach(), v.detach(), policy, scale, kernels=features)
        return parallel(q, k, v, times[index], features, scale).to(q.dtype)

    return attention


class Stream:
    """The windows that the steps take, each `uses` times in a round, and what is evicted from them, computed once in a round.

    windows (N, T). With one use a round is a step, and nothing is ever stale.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, settings: Sequence[Setting], recipe: Recipe):
        self.model, self.settings, self.batch, self.seed = model, settings, recipe.batch, recipe.seed
        self.uses = recipe.joint_uses
        self.windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed), device="cpu")]
        self.size = recipe.batch if self.uses == 1 else min(recipe.together_windows, len(windows))
        self.of_round = -(-self.size * self.uses // self.batch)  # steps
        self.round = -1
        self.times: dict[int, dict[int, torch.Tensor]] = {}  # by setting, by layer

    def loss(self, step: int) -> torch.Tensor:
        """The divergence on the windows of this step, under its setting: a scalar."""
        number, within = divmod(step, self.of_round)
        if number != self.round:
            self.round, self.times = number, {}
            self.ids = self.windows[torch.arange(number * self.size, (number + 1) * self.size, device="cpu") % len(self.windows)]
        draw = torch.Generator().manual_seed(self.seed + number)
        order = torch.cat([torch.randperm(self.size, generator=draw, device="cpu") for _ in range(self.uses)])
        rows, which = order[within * self.batch : (within + 1) * self.batch], step % len(self.settings)
        if self.uses == 1:
            return divergence(self.model, self.ids[rows], self.settings[which])
        if which not in self.times:
            self.times[which] = times_in_stream(self.model, self.ids, self.settings[which])
        times = {index: e[rows.to(e.device)] for index, e in self.times[which].items()}
        return divergence(self.model, self.ids[rows], self.settings[which], times)


@torch.no_grad()
def mean_divergence(model: PreTrainedModel, windows: torch.Tensor, setting: Setting, at_once: int = 2) -> float:
    """The same over many windows (W, T), so many of them in a forward pass."""
    parts = windows.split(at_once)
    return sum(divergence(model, ids, setting).item() * len(ids) for ids in parts) / len(windows)


def distill(
    name: str,
    model: PreTrainedModel,
    windows: torch.Tensor,
    validation: torch.Tensor,
    settings: Sequence[Setting],
    judged: Sequence[Setting],
    steps: int,
    recipe: Recipe,
    work: Work,
) -> dict[str, Any]:
    """Trains the kernels that the settings share, in place, each step under the next setting.

    windows (N, T), validation (V, T) int64. Returns the budgets of the settings that are judged, and their divergences on the
    validation windows, before and after; if these have not become less on average, the weights from before are kept.
    Raises LessError if a loss is not finite. Unfinished work is saved under `name`.
    """
    kernels, saved, first = settings[0].kernels, work.load(name) if work.has(name) else None, 0
    if saved is not None and "after" in saved["figures"]:
        kernels.load_state_dict(saved["kernels"])
        return saved["figures"]
    kernels.requires_grad_().train()
    rate = recipe.rate(recipe.joint_rate, kernels.sizes["head_dim"])
    descent = Descent(kernels, rate, steps, None, recipe.clip)
    stream = Stream(model, windows, settings, recipe)
    start = copy.deepcopy(kernels.state_dict())
    if saved is None:
        figures: dict[str, Any] = {"budgets": [setting.policy.budget for setting in judged]}
        figures["before"] = [mean_divergence(model, validation, setting) for setting in judged]
    else:
        figures, first = saved["figures"], saved["step"]
        descent.load_state_dict(saved["descent"])
    with tqdm(total=steps, initial=first, desc=f"all layers, {name}", unit="step") as progress:
        progress.set_postfix_str(f"divergence {_listed(figures['before'])}")
        for step in range(first, steps):
            loss = stream.loss(step)
            if not loss.isfinite():
                raise LessError(f"the stage of all layers diverged at step {step}: lower its learning rate, or leave it out")
            descent.step(loss)
            progress.update()
            if (step + 1) % (CHECKPOINT if stream.uses == 1 else stream.of_round) == 0:
                work.save(name, {"figures": figures, "step": step + 1, "descent": descent.state_dict()})
        kernels.eval()
        figures["after"] = [mean_divergence(model, validation, setting) for setting in judged]
        progress.set_postfix_str(f"divergence {_listed(figures['before'])} -> {_listed(figures['after'])}")
    figures["kept"] = sum(figures["after"]) < sum(figures["before"])
    if not figures["kept"]:
        kernels.load_state_dict(start)
    work.save(name, {"figures": figures, "kernels": kernels.state_dict()})
    return figures


def _listed(figures: Sequence[float]) -> str:
    return " / ".join(f"{figure:.3f}" for figure in figures)
