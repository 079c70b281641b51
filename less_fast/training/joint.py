"""All layers together (joint distillation), a departure from the paper: the KL divergence from the full cache's predictions to
those with LESS, through the whole model, under several settings in turn."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hf.seam import predictions
from ..layer.parallel import dense, eviction_times, parallel
from ..setting import Setting
from .checks import check_setting, check_windows
from .descent import Descent, descend, single_steps
from .recipe import JOINT, Recipe
from .work import Work


def divergence(model: PreTrainedModel, ids: torch.Tensor, setting: Setting) -> torch.Tensor:
    """KL(full cache || streaming under the setting), in nats per token of texts ids (N, T): a scalar, differentiable in kernels.

    LessError if the texts are no tokens of the model, or the setting is for another one or evicts several tokens at once.
    """
    check_windows(model, ids, "texts")
    check_setting(model, setting)

    def streamed(index, q, k, v, scale):
        policy, features = setting.layer(index)
        e = eviction_times(q.detach(), k.detach(), v.detach(), policy, scale, kernels=features)
        # computed again on the way back: its squares of T would take more memory than all else
        return checkpoint(parallel, q, k, v, e, features, scale, use_reentrant=False).to(q.dtype)

    with torch.no_grad():
        full = predictions(model, ids, lambda _, *qkv: dense(*qkv))  # (N, T, vocabulary)
    return kl_div(predictions(model, ids, streamed), full, log_target=True, reduction="sum") / ids.numel()


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
    recipe: Recipe,
    work: Work,
) -> dict[str, Any]:
    """Trains the kernels that the settings share, in place, each step under the next setting, for the recipe's joint_steps.

    windows (N, T), validation (V, T) int64. Returns the budgets of the settings that are judged, and their divergences on the
    validation windows, before and after; if these have not become less on average, the weights from before are kept.
    Raises LessError if a loss is not finite. Unfinished work is saved under `name`.
    """
    kernels: Any = settings[0].kernels
    start = copy.deepcopy(kernels.state_dict())

    def judge(when: str) -> list[float]:
        each = tqdm(judged, desc=f"judging {name} {when}", unit="setting", leave=False)
        return [mean_divergence(model, validation, setting) for setting in each]

    def loss(ids: torch.Tensor, rows: torch.Tensor, step: int) -> float:
        return step_of_all(model, ids[rows], settings[step % len(settings)])

    before = work.once(f"{name}-before", lambda: {"divergences": judge("before")})["divergences"]
    descent = Descent([kernels], recipe.scaled(JOINT, kernels.sizes["head_dim"]), recipe.joint_steps)
    turns = single_steps(len(windows), recipe.joint_steps, recipe)
    descend(name, descent, turns, lambda rows: windows[rows], loss, recipe.seed, work)
    after = judge("after")
    if not (kept := sum(after) < sum(before)):
        kernels.load_state_dict(start)
    return {"budgets": [one.policy.budget for one in judged], "before": before, "after": after, "kept": kept}


def step_of_all(model: PreTrainedModel, ids: torch.Tensor, setting: Setting) -> float:
    """Leaves the gradients of the divergence of texts ids (N, T) in the kernels; returns it. Only one text's graph is held."""
    found = 0.0
    for one in ids.split(1):
        loss = divergence(model, one, setting) / len(ids)
        loss.backward(inputs=[*setting.kernels.parameters()])
        found += loss.item()
    return found
