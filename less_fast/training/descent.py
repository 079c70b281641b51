"""Gradient steps on kernels."""

from typing import Any

import torch


class Descent:
    """Adam on kernels, with the schedule of its rate: halved every so many steps, or if None rising and falling once (one cycle).

    steps: in all; clip: the largest norm of a gradient, None for any.
    """

    def __init__(self, kernels: torch.nn.Module, rate: float, steps: int, halve_every: int | None, clip: float | None):
        self.kernels, self.clip = kernels, clip
        self.adam = torch.optim.Adam(kernels.parameters(), lr=rate)
        self.schedule = (
            torch.optim.lr_scheduler.OneCycleLR(self.adam, rate, steps)
            if halve_every is None
            else torch.optim.lr_scheduler.StepLR(self.adam, halve_every, gamma=0.5)
        )

    def step(self, loss: torch.Tensor) -> None:
        self.adam.zero_grad()
        loss.backward(inputs=list(self.kernels.parameters()))
        self.take()

    def take(self) -> None:
        """A step along gradients that are there."""
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.kernels.parameters(), self.clip)
        self.adam.step()
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, the weights included, but for random generators."""
        return {name: getattr(self, name).state_dict() for name in ("kernels", "adam", "schedule")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("kernels", "adam", "schedule"):
            getattr(self, name).load_state_dict(state[name])
