"""Gradient steps on kernels, in rounds of windows that are read once and held in memory, recorded nowhere."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..layer.checks import LessError
from .recipe import Fit, Recipe
from .work import Work

CHECKPOINT = 10  # steps between two checkpoints

Turn = tuple[torch.Tensor, torch.Tensor]  # the windows of a round, and which of these a step takes


class Descent:
    """AdamW on parts of the kernels, with the schedule of its rate over so many steps: see Fit."""

    def __init__(self, parts: Sequence[torch.nn.Module], fit: Fit, steps: int):
        self.kernels, self.clip = torch.nn.ModuleList(parts), fit.clip
        self.kernels.requires_grad_()
        self.adam = torch.optim.AdamW(self.kernels.parameters(), lr=fit.rate, weight_decay=fit.decay)
        schedules = torch.optim.lr_scheduler
        self.schedule: Any = (
            schedules.StepLR(self.adam, max(1, steps // 4), gamma=0.5)
            if fit.halves
            else schedules.OneCycleLR(self.adam, fit.rate, max(1, steps))
        )

    def take(self) -> None:
        """A step along gradients that are there."""
        for part in self.kernels if self.clip is not None else ():
            torch.nn.utils.clip_grad_norm_(part.parameters(), self.clip)
        self.adam.step()
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, the weights included."""
        return {name: getattr(self, name).state_dict() for name in ("kernels", "adam", "schedule")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("kernels", "adam", "schedule"):
            getattr(self, name).load_state_dict(state[name])


def rounds(count: int, recipe: Recipe) -> list[Turn]:
    """The turns of all steps on so many windows: each window lies in one round, and `uses` steps of this round take it."""
    turns: list[Turn] = []
    for number, windows in enumerate(_shuffled(count, recipe.seed).tensor_split(-(-count // (recipe.round or count)))):
        draw = torch.Generator().manual_seed(recipe.seed + number)
        rows = [torch.randperm(len(windows), generator=draw, device="cpu") for _ in range(recipe.uses)]
        turns += [(windows, part) for part in torch.cat(rows).split(recipe.batch)]
    return turns


def single_steps(count: int, steps: int, recipe: Recipe) -> list[Turn]:
    """The turns of so many steps, each with windows of its own: of them all before one comes again."""
    order, batch = _shuffled(count, recipe.seed), min(recipe.batch, count)
    every = torch.arange(batch, device="cpu")
    return [(order[(every + step * batch) % count], every) for step in range(steps)]


def _shuffled(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")


def descend(
    name: str,
    descent: Descent,
    turns: Sequence[Turn],
    read: Callable[[torch.Tensor], Any],
    loss: Callable[[Any, torch.Tensor, int], float],
    seed: int,
    work: Work,
) -> None:
    """Takes a step for each turn. Unfinished work is saved: after a kill it goes on at the last checkpoint.

    read: what is held of windows (n,) for a round. loss: of what is held, some rows of it (m,) and the number of the step; it
    leaves gradients. Nothing random depends on the program's own generators: each step has a seed.
    LessError if a loss is not finite.
    """
    first, file = 0, f"{name}-steps"
    if work.has(file):
        saved = work.load(file)
        first = saved["step"]
        descent.load_state_dict(saved["descent"])
    held, of_round = None, None
    device = next(descent.kernels.parameters()).device
    with tqdm(total=len(turns), initial=first, desc=name, unit="step") as progress:
        for step in range(first, len(turns)):
            windows, rows = turns[step]
            if windows is not of_round:
                held = None  # its memory is needed
                held, of_round = read(windows), windows
            descent.adam.zero_grad()
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed + step)
                found = loss(held, rows, step)
            if not abs(found) < float("inf"):
                raise LessError(f"the training of {name} diverged at step {step}: lower the rate of the recipe")
            descent.take()
            progress.update()
            progress.set_postfix_str(f"{found:.3f}")
            if (step + 1) % CHECKPOINT == 0:
                work.save(file, {"step": step + 1, "descent": descent.state_dict()})
