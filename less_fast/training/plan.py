"""What a training will do in the time and the memory that there are, by a probe on one window."""

import copy
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..hf.architecture import less_layers, sizes
from ..hf.seam import read
from ..layer.checks import LessError
from ..layer.parallel import dense
from ..setting import Setting
from . import retention
from .joint import divergence, step_of_all
from .layers import bare_of, step_of_layers
from .recipe import FITS, Recipe
from .sensitivity import SAMPLES, watch

HELD = 0.5  # of the memory that is free beside the model, what a round with the reading of a window, or a joint step, may hold
ROUND = 32  # windows of a round where no system tells how much memory is free
SPENT = 0.9  # of the time: a probe is no promise
CURVES, JOINT = 0.1, 0.5  # of that, the most that curves and the stages of all layers may take
LEAST_WINDOWS, LEAST_STEPS = 8, 40  # that are worth training on, and with all layers together
JUDGES = 16  # windows to train on for each that judges
JOINT_JUDGES = 4  # windows that judge the stages of all layers
SLOW, PROBED = 4.0, 256  # a forward pass of more seconds is probed on so many tokens
FEW = 128  # tokens by which memory is probed
GROUP = Path("/sys/fs/cgroup")  # what a container may take


@dataclass(frozen=True)
class Plan:
    """How many windows a training takes, how many judge it, how many a round holds, in bytes too; steps of all layers, windows
    of curves; and the seconds of each part by a probe, {} without one."""

    windows: int
    validation: int
    round: int
    held: int
    joint_steps: int
    curves: int
    seconds: dict[str, float]

    def __str__(self) -> str:
        held = f"in rounds of {self.round} that hold {self.held / 1e9:.1f} GB"
        lines = [f"{self.windows} windows to train on, {held}, {self.validation} to judge"]
        lines += [f"{name}: about {spelled(seconds)}" for name, seconds in self.seconds.items()]
        return "\n".join([*lines, f"about {spelled(sum(self.seconds.values()))} in all"] if self.seconds else lines)


@dataclass(frozen=True)
class Costs:
    """Seconds for a window: what rho reads and what a step on it takes; what layers read, a bare policy of theirs,
    a step; and a step of all layers, None if there is not the memory."""

    rho_read: float
    rho_step: float
    read: float
    times: float
    step: float
    joint: float | None


def plan(
    model: PreTrainedModel,
    windows: torch.Tensor,
    validation: int,
    settings: Sequence[Setting],
    budgets_of_curves: Sequence[int],
    recipe: Recipe,
    hours: float | None,
    tell: Callable[[str], object],
) -> Plan:
    """The plan of a training on windows (N, T) at most, judged by so many, in at most so many hours; None: the whole recipe.

    settings: in turns; budgets_of_curves: how many budgets the curves of each policy have. tell: told what is being probed.
    LessError if that is too little time, with the least.
    """
    each, free = bytes_of_window(model, windows.shape[1], recipe, len(settings)), free_memory(model.device)
    most = recipe.round or ROUND
    if recipe.round is None and free is not None:
        room = HELD * free - (bytes_of_reading(model, windows[:1]) if FITS[recipe.family].by_gradient else 0)
        most = max(1, int(room / each))
    if hours is None:
        whole = len(windows), validation, min(most, len(windows)), min(most, len(windows)) * each
        return Plan(*whole, recipe.joint_steps, recipe.curves, {})
    costs = probe(model, windows[:1], settings, recipe, free, tell)
    found = share_out(costs, len(windows), validation, len(settings), budgets_of_curves, recipe, 3600 * hours)
    held = min(most, found.windows)
    return replace(found, round=held, held=held * each)


def share_out(
    costs: Costs, most: int, judges: int, settings: int, budgets_of_curves: Sequence[int], recipe: Recipe, seconds: float
) -> Plan:
    """The plan, rounds left open, that fits into so many seconds: at most so many windows, and so many that judge."""
    time_left, uses, stages = SPENT * seconds, recipe.uses, 2 if recipe.curves else 1
    rho = (costs.rho_read + uses * costs.rho_step, costs.rho_read + 2 * costs.rho_step)  # of a window, and of one that judges
    layers = costs.read + settings * costs.times + uses * costs.step, costs.read + settings * (costs.times + costs.step)
    curve = sum(costs.read + count * (costs.times + costs.step) for count in budgets_of_curves)
    joint_step, judging = recipe.batch * (costs.joint or 0), settings * min(JOINT_JUDGES, judges) * (costs.joint or 0) / 2
    of_window = sum(train + judge / JUDGES for train, judge in (rho, layers)) * bool(uses)
    few = min(LEAST_WINDOWS, most)
    judged = bool(uses) * min(2, judges) * (rho[1] + layers[1])  # by two windows at least
    least = (few * of_window + judged + curve) / SPENT
    if least > seconds:
        hours = math.ceil(least / 36) / 100
        raise LessError(f"that is too little time for this model: give it {hours} hours at least (--hours)")
    curves = min(recipe.curves, max(1, int(CURVES * time_left / curve))) if curve else recipe.curves
    joint_steps = 0
    if joint_step:
        joint_steps = min(recipe.joint_steps, int((JOINT * time_left / stages - judging) / joint_step))
        joint_steps *= joint_steps >= min(LEAST_STEPS, recipe.joint_steps)
    joint = bool(joint_steps) * stages * (joint_steps * joint_step + judging)
    rest = time_left - curves * curve - joint - judged
    windows = most if not of_window else max(few, min(most, int(rest / of_window)))
    count = min(judges, max(2, windows // JUDGES))
    parts = {
        "rho": bool(uses) * (windows * rho[0] + count * rho[1]),
        "layers": bool(uses) * (windows * layers[0] + count * layers[1]),
        f"all layers together, {joint_steps} steps" + ", and as many under tables" * (stages > 1): joint,
        f"curves, {curves} windows": curves * curve,
    }
    return Plan(windows, count, 0, 0, joint_steps, curves, {name: taken for name, taken in parts.items() if taken})


def probe(
    model: PreTrainedModel,
    window: torch.Tensor,
    settings: Sequence[Setting],
    recipe: Recipe,
    free: int | None,
    tell: Callable[[str], object],
) -> Costs:
    """What a window (1, T) costs. Of slow models fewer tokens are probed: what goes through the model grows with them, and the
    rest with their power of 1.5, because parts of it are linear and parts square."""
    kernels: Any = copy.deepcopy(settings[0].kernels)
    kernels.requires_grad_()
    settings = [replace(setting, kernels=kernels) for setting in settings]
    T, largest = window.shape[1], max(settings, key=lambda one: one.policy.budget)
    one, by_gradient = torch.zeros(1, dtype=torch.int64, device="cpu"), FITS[recipe.family].by_gradient
    some = window[:, :FEW]

    def timed(what: str, run: Callable[[], Any], passes: int) -> tuple[Any, float]:
        """What it returns, and its seconds for a whole window. passes: forward passes of the model, a backward one for one."""
        tell(f"measuring {what}, {some.shape[1]} tokens ...")
        start = time.perf_counter()
        found = run()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds, longer = time.perf_counter() - start, T / some.shape[1]
        linear = min(seconds, passes * forward)
        return found, linear * longer + (seconds - linear) * longer**1.5

    def one_pass():
        with torch.no_grad():
            read(model, some, lambda _, *qkv: dense(*qkv))

    forward = float("inf")
    timed("a forward pass", one_pass, 1)
    _, whole = timed("a forward pass again", one_pass, 1)
    some = window if whole < SLOW else window[:, : min(T, max(PROBED, 2 * largest.policy.budget))]
    forward = timed("a forward pass", one_pass, 1)[1] * some.shape[1] / T
    rho_read = rho_step = joint = 0.0
    if recipe.rho:
        rhos = [kernels.layers[index].rho for index in less_layers(model)]
        seen, rho_read = timed("what rho reads", lambda: retention.watch(model, some, 0), 1)
        _, rho_step = timed("a step of rho", lambda: retention.step_of_rho(seen, one, rhos), 0)
    layers, reading = timed("what layers read", lambda: watch(model, some, 0, by_gradient), 3 if by_gradient else 1)
    bare, evicting = timed("what is evicted", lambda: bare_of(layers, largest), 0)
    _, step = timed("a step of the layers", lambda: step_of_layers((layers, [bare]), one, [largest], 0, by_gradient), 0)
    if recipe.joint_steps:
        need = bytes_of_joint(model, window, largest)
        if free is not None and need > HELD * free:
            tell(f"all layers together would hold {need / 1e9:.0f} GB, more than there is: that is left out")
            return Costs(rho_read, rho_step, reading, evicting, step, None)
        _, joint = timed("a step of all layers together", lambda: step_of_all(model, some, largest), 3)
    return Costs(rho_read, rho_step, reading, evicting, step, joint)


def bytes_of_window(model: PreTrainedModel, T: int, recipe: Recipe, settings: int) -> int:
    """What a round holds for each of its windows: q, k, v, the output and its gradients, with the bare policies of so many
    settings, or what rho is trained towards."""
    shape, count = sizes(model), len(less_layers(model))
    numbers, tokens, samples = model.dtype.itemsize * shape["head_dim"], T * count, SAMPLES * FITS[recipe.family].by_gradient
    layers = numbers * ((2 + samples) * shape["query_heads"] + 2 * shape["kv_heads"])
    layers += settings * (4 * (1 + (samples or shape["head_dim"])) * shape["query_heads"] + 8 * shape["kv_heads"] + 4)
    rho = (shape["query_heads"] + 2 * shape["kv_heads"]) * numbers + 12 * retention.MOMENTS * shape["kv_heads"]
    return tokens * max(layers, rho * bool(recipe.rho))


def bytes_of_reading(model: PreTrainedModel, window: torch.Tensor) -> int:
    """What reading a window (1, T) holds on the way, gradients of its predictions too."""
    predictions = 4 * model.get_output_embeddings().weight.shape[0] * window.shape[1]
    return bytes_of_graph(model, window, lambda ids: watch(model, ids, 0)) + 3 * predictions


def bytes_of_joint(model: PreTrainedModel, window: torch.Tensor, setting: Setting) -> int:
    """What the backward pass of a joint step on one window (1, T) holds."""
    return bytes_of_graph(model, window, lambda ids: divergence(model, ids, setting))


def bytes_of_graph(model: PreTrainedModel, window: torch.Tensor, run: Callable[[torch.Tensor], object]) -> int:
    """What the backward pass of a run on a window (1, T) holds, from what it does on a few and on twice as few tokens: parts are
    linear in tokens, the others square."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def held(tokens: int) -> int:
        kept: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in weights)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            alive = run(window[:, :tokens])  # as long as it is, no storage is used twice
        del alive
        return sum(kept.values())

    T = window.shape[1]
    if T <= 2 * FEW:
        return held(T)
    one, two = held(FEW), held(2 * FEW)
    return int((4 * one - two) * T / (2 * FEW) + (two - 2 * one) * T**2 / (2 * FEW**2))


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free there, None where no system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found: list[int] = []
    with suppress(OSError, TypeError):
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]))
    with suppress(OSError, TypeError, ValueError):  # a container's own limit, if there is one
        used = re.search(r"(?m)^anon (\d+)", (GROUP / "memory.stat").read_text())[1]
        found.append(int((GROUP / "memory.max").read_text()) - int(used))
    with suppress(OSError, AttributeError, ValueError):
        if not found:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(found, default=None)


def spelled(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} hours" if hours >= 1.5 else f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{seconds:.0f} seconds"
