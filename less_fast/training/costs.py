"""What a training will take, said before it begins: a probe runs each of its stages on a few windows, once for two steps and once
for four."""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from ..hf.architecture import less_layers, sizes
from ..hf.seam import predictions
from ..kernels import LessKernels
from ..layer.parallel import dense
from ..layer.policies import Policy
from ..setting import Setting
from .head_costs import grid, measure
from .joint import distill
from .layers import train_layers
from .recipe import CURVE_WINDOWS, JOINT_VALIDATION, Recipe
from .recording import bytes_on_disk
from .retention import train_rho
from .sensitivity import SAMPLES
from .together import train_together
from .work import Work

STEPS = 2, 4  # of the probe


@dataclass(frozen=True)
class Costs:
    """seconds: of each stage, by name; disk, memory: bytes, at most at one time; memory None where no system tells (Windows)."""

    seconds: dict[str, float]
    disk: int
    memory: int | None

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {_spelled(seconds)}" for name, seconds in self.seconds.items())
        whole = _spelled(sum(self.seconds.values()))
        memory = "" if self.memory is None else f", {self.memory / 1e9:.1f} GB of memory"
        return f"about {whole} ({stages}), {self.disk / 1e9:.1f} GB on disk{memory}"


def estimate(
    model: PreTrainedModel,
    windows: torch.Tensor,
    validation: int,
    kernels: LessKernels,
    settings: Sequence[Setting],
    policy: Policy,
    recipe: Recipe,
    disk: float,
    curves: Sequence[Policy],
) -> Costs:
    """The costs of training the kernels, under the settings where all layers are trained together. Copies are trained on the way.

    windows (N, T) int64; validation: how many windows judge; curves: of which policies they are measured at the end. Each stage
    is taken to cost as much for each window that it reads, and as much for each step.
    """
    (N, T), few, one = windows.shape, windows[: recipe.batch], windows[:1]
    kernels = copy.deepcopy(kernels)
    settings = [replace(setting, kernels=kernels) for setting in settings]
    size, used = min(recipe.together_windows, N), len(windows[: recipe.windows])
    of_round = -(-size * recipe.together_uses // recipe.batch)  # steps
    seconds: dict[str, float] = {}

    def stage(name: str, run: Callable[[Recipe, int, Work], object], probed: int, read: int, steps: int) -> None:
        """run: so many steps that read `probed` windows; read, steps: of the training."""
        taken = []
        for count in STEPS:
            small = replace(recipe, epochs=count, windows=None, together_windows=len(few), together_uses=count, joint_uses=1)
            with TemporaryDirectory() as folder:
                start = time.perf_counter()
                with redirect_stderr(StringIO()):  # progress bars
                    run(small, count, Work(Path(folder), {}))
                taken.append(time.perf_counter() - start)
        step = max(0.0, taken[1] - taken[0]) / (STEPS[1] - STEPS[0])
        seconds[name] = steps * step + read * max(0.0, taken[0] - STEPS[0] * step) / probed

    def rho(small, count, work):
        train_rho(model, few, one, kernels, replace(small, rho_steps=count), work)

    def layers(small, count, work):
        train_layers(kernels, model, few, one, policy, small, work, disk)

    def together(small, count, work):
        train_together(model, few, one, settings, replace(small, together_steps=count), work)

    def joint(small, count, work):
        distill("joint", model, few, one, settings, settings, count, small, work)

    if recipe.rho_steps:
        stage("rho", rho, len(few) + 1, -(-recipe.rho_steps // of_round) * size + validation, recipe.rho_steps)
    if recipe.epochs:
        epoch = max(-(-used // recipe.batch), validation)  # each step of the probe judges one window
        stage("layers", layers, len(few) + 1, used + validation, recipe.epochs * epoch)
    if recipe.together_steps:
        read = -(-recipe.together_steps // of_round) * size + validation * len(settings)
        stage("all layers at once", together, len(few) + len(settings), read, recipe.together_steps)
    if joint_steps := recipe.joint_steps + recipe.table_steps:
        stage("joint", joint, 2 * len(settings), 2 * len(settings) * min(JOINT_VALIDATION, validation), joint_steps)
    for rule in curves:
        start = time.perf_counter()
        if recipe.together_steps:
            measure(model, one, rule, kernels, grid(rule, T)[:1], by="gradient")
            runs = len(grid(rule, T)) - 1
        else:
            with torch.no_grad():
                predictions(model, one, lambda _, *qkv: dense(*qkv))
            runs = 2 * (len(grid(rule, T)) - 1) * len(less_layers(model)) * sizes(model)["kv_heads"] + 1
        seconds["curves"] = seconds.get("curves", 0.0) + (time.perf_counter() - start) * runs * min(CURVE_WINDOWS, N)
    recorded = bytes_on_disk(model, windows[:used], policy, 1) * (used + validation) / used if recipe.epochs else 0
    more = (size - len(few)) * _bytes_of_round(model, T) * bool(recipe.rho_steps or recipe.together_steps)
    peak = _peak(model.device)
    held = None if peak is None else peak + more
    return Costs(seconds, int(max(recorded, min(disk, recorded * len(less_layers(model))))), held)


def _spelled(seconds):
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} hours" if hours >= 1.5 else f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{seconds:.0f} seconds"


def _bytes_of_round(model, T):
    """What a round holds for each of its windows: q, k, v, the output and its gradients of each layer, in float32."""
    shape = sizes(model)
    numbers = ((2 + SAMPLES) * shape["query_heads"] + 2 * shape["kv_heads"]) * T * shape["head_dim"]
    return 4 * numbers * len(less_layers(model))


def _peak(device):
    """The most bytes that were taken so far, None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
