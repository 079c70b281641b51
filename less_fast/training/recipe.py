"""How kernels are trained: the paper's recipe, and that of the exponential family."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..layer.checks import LessError, integer
from ..layer.features import FAMILIES, MOST, RHO_HIDDEN, Learned
from .checks import number

LEARNED = [name for name, family in FAMILIES.items() if issubclass(family, Learned)]


class Fit(NamedTuple):
    """How a stage descends.

    rate: of learning. It rises and falls once (one cycle; Smith and Topin 2017); with `halves` it is halved after each quarter.
    decay: of weights, in each step by so many times its rate (AdamW; Loshchilov and Hutter 2019).
    clip: the largest norm of the gradient of each part for itself, None for any.
    Of layers alone: dropout, on the first hidden layer; by_gradient, towards what an error costs the model's predictions, else
    the paper's mean squared error.
    """

    rate: float
    decay: float = 0.0
    clip: float | None = 1.0
    halves: bool = False
    dropout: float = 0.0
    by_gradient: bool = True


FITS = {"paper": Fit(1e-3, clip=None, halves=True, dropout=0.3, by_gradient=False), "exponential": Fit(1e-2, decay=1.0)}
RHO, JOINT = Fit(1e-3), Fit(5e-3)  # the stages of rho and of all layers together


@dataclass(frozen=True)
class Recipe:
    """By default the paper's (section 3.2): 40 epochs towards the mean squared error of each layer at the policy's own budget.

    family: of the kernels, paper or exponential; FITS says what else depends on it.
    rank: features of each KV head.
    hidden: width of the kernels' hidden layer.
    rho: hidden width of rho, which says what is worth keeping; 0 trains none. With it all learn for the policy and Retention.
    seed: of everything random.
    batch: windows in a step.
    round: windows that are read at a time and held in memory; None for as many as fit.
    uses: steps that use each window, of rho and of the layers: epochs, if a round holds all windows. 0 leaves both stages out.
    joint_steps: of all layers together, and as many under budget tables; 0 leaves them out.
    curves: windows on which it is measured what heads cost; 0 for no budget tables.
    budgets: multiples of the policy's budget, which steps take in turns, except those with which nothing is evicted.
    rate: what all learning rates are multiplied by.
    LessError for values with which nothing can be trained.
    """

    family: str = "paper"
    rank: int = 8
    hidden: int = 512
    rho: int = 0
    seed: int = 0
    batch: int = 2
    round: int | None = None
    uses: int = 40
    joint_steps: int = 0
    curves: int = 0
    budgets: tuple[float, ...] = (1.0,)
    rate: float = 1.0

    def __post_init__(self):
        if self.family not in LEARNED:
            raise LessError(f"kernels of the family {self.family!r} are not learned: choose one of {', '.join(LEARNED)}")
        limits = dict(rank=(1, MOST), hidden=(0, MOST), rho=(0, MOST), seed=(0, 2**63 - 1), batch=(1,), round=(1,))
        for name, most in (limits | dict.fromkeys(("uses", "joint_steps", "curves"), (0,))).items():
            if name != "round" or self.round is not None:
                object.__setattr__(self, name, integer(f"{name} of a recipe", getattr(self, name), *most))
        if self.family == "paper" and not self.hidden:
            raise LessError("a hidden width of 0 is for exponential kernels: the paper's need at least 1")
        object.__setattr__(self, "rate", number("rate of a recipe", self.rate, 0, 1e6))
        if not isinstance(self.budgets, list | tuple) or not self.budgets:
            raise LessError(f"budgets of a recipe are multiples of the policy's budget, one or more, not {self.budgets!r}")
        multiples = tuple(number("budgets of a recipe", multiple, 1e-3, 1e3) for multiple in self.budgets)
        object.__setattr__(self, "budgets", multiples)

    def scaled(self, fit: Fit, head_dim: int) -> Fit:
        """The same at the recipe's rate, and less for heads of more than 64 numbers: a step moves an exponent by each of them."""
        return fit._replace(rate=self.rate * fit.rate * min(1.0, 64 / head_dim))


RECIPES = {
    "paper": Recipe(),
    "exponential": Recipe("exponential", hidden=32, rho=RHO_HIDDEN, uses=12, joint_steps=75, curves=8, budgets=(0.4, 1.0, 2.0)),
}
"""How each family of learned kernels is trained, unless told otherwise."""


def recipe_of(family: str, **changes: Any) -> Recipe:
    """How the family is trained, with other fields if they are not None. LessError for a family that is not trained, or fields
    that do not go together."""
    if family not in RECIPES:
        raise LessError(f"no family {family!r} can be trained: choose one of {', '.join(RECIPES)}")
    return replace(RECIPES[family], **{name: value for name, value in changes.items() if value is not None})
