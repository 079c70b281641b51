"""All layers together (joint distillation), a departure from the paper: the KL divergence from the full cache's predictions to
those with LESS, through the whole model, under several settings in turn."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hf.architecture import sizes
from ..hf.seam import predictions
from ..layer.checks import LessError
from ..layer.parallel import dense, eviction_times, linear_parallel
from ..setting import Setting
from .checks import check_setting, check_windows
from .descent import Descent
from .recipe import Recipe
from .work import Work

CHECKPOINT = 10  # steps between two checkpoints


def divergence(model: PreTrainedModel, ids: torch.Tensor, setting: Setting) -> torch.Tensor:
    """KL(full cache || streaming under the setting), in nats per token of texts ids (N, T): a scalar, differentiable in kernels.

    LessError if the texts are no tokens of the model, or the setting is for another one or evicts several tokens at once.
    """
    check_windows(model, ids, "texts")
    check_setting(model, setting)
    count = sizes(model)["layers"]
    with torch.no_grad():
        full = predictions(model, ids, [dense] * count)  # (N, T, vocabulary)
    streamed = predictions(model, ids, [_streamed(setting, index) for index in range(count)])  # (N, T, vocabulary)
    return kl_div(streamed, full, log_target=True, reduction="sum") / ids.numel()


def _streamed(setting: Setting, index: int) -> Callable[..., torch.Tensor]:
    """The attention of a layer under the setting."""
    policy, features = setting.layer(index)

    def attention(q, k, v, scale):
        e = eviction_times(q.detach(), k.detach(), v.detach(), policy, scale)
        return linear_parallel(q, k, v, e, features, scale).to(q.dtype)

    return attention


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
    descent = Descent(kernels, recipe.joint_rate, steps, None, recipe.clip)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))  # (N,)
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
            rows = order[torch.arange(step * recipe.batch, (step + 1) * recipe.batch) % len(windows)]  # (batch,)
            loss = divergence(model, windows[rows], settings[step % len(settings)])
            if not loss.isfinite():
                raise LessError(f"the stage of all layers diverged at step {step}: lower its learning rate, or leave it out")
            descent.step(loss)
            progress.update()
            if (step + 1) % CHECKPOINT == 0:
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
