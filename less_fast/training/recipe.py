"""How kernels are trained: the paper's recipe, and that of the exponential family."""

from dataclasses import dataclass, replace
from typing import Any

from ..layer.checks import LessError, integer
from ..layer.features import FAMILIES, MOST, RHO_HIDDEN, Learned
from .checks import number

CURVE_WINDOWS = 8  # windows on which it is measured what heads cost
JOINT_VALIDATION = 4  # windows on which the stages of all layers are judged
STEPS = ("rho_steps", "together_steps", "joint_steps", "table_steps")
ROUNDS = ("together_windows", "together_uses", "joint_uses")
LEARNED = [name for name, family in FAMILIES.items() if issubclass(family, Learned)]


@dataclass(frozen=True)
class Recipe:
    """The paper's recipe (section 3.2): Adam, the learning rate halved every 10 of 40 epochs, dropout on the first hidden layer.

    epochs: of each layer alone; 0 leaves that stage out. windows: how many it is trained on, None for all.
    together_steps: of all layers at once, `batch` windows in each, `learning_rate` in one cycle, no dropout; 0 leaves it out.
    A round reads `together_windows` and uses each `together_uses` times.
    halve_every: epochs. None: the learning rate rises and falls once over the whole training (one cycle; Smith and Topin 2017).
    clip: the largest norm of a step's gradient, None for any.
    rho_steps, rho_rate, rho_hidden: of rho, which says what is worth keeping, in one cycle, in rounds like those of
    `together_steps`; 0 steps leave it out. With rho the later stages train for the policy and for Retention in turns.
    joint_steps, joint_rate: of the joint stage, in one cycle, with `batch` windows in each step; 0 steps leave it out. It takes
    the multiples `joint_budgets` of the policy's budget in turn, except those with which nothing is evicted.
    joint_uses: how many steps of a round of `together_windows` use what was evicted from a window once; 1: each step computes it.
    table_steps: the same under the budget tables for these budgets, if curves are measured; every other step under uniform ones.
    Rates are for heads of up to 64 numbers, and less in proportion for wider ones.
    LessError for values with which nothing can be trained.
    """

    rank: int = 8
    hidden: int = 512
    epochs: int = 40
    batch: int = 2
    learning_rate: float = 1e-3
    halve_every: int | None = 10
    dropout: float = 0.3
    seed: int = 0
    family: str = "paper"
    clip: float | None = None
    windows: int | None = None
    rho_steps: int = 0
    rho_rate: float = 1e-2
    rho_hidden: int = RHO_HIDDEN
    together_steps: int = 0
    together_windows: int = 32
    together_uses: int = 8
    joint_steps: int = 0
    table_steps: int = 0
    joint_rate: float = 5e-3
    joint_uses: int = 1
    joint_budgets: tuple[float, ...] = (0.4, 1.0, 2.0)

    def __post_init__(self):
        if self.family not in LEARNED:
            raise LessError(f"kernels of the family {self.family!r} are not learned: choose one of {', '.join(LEARNED)}")
        zero = dict.fromkeys(("epochs", *STEPS), (0,))  # allowed for these
        limits = dict(rank=(1, MOST), hidden=(0, MOST), seed=(0, 2**63 - 1)) | zero
        for name in ("rank", "hidden", "epochs", "batch", "halve_every", "seed", "windows", "rho_hidden", *STEPS, *ROUNDS):
            self._set(name, integer, *limits.get(name, (1,)))
        rates = [(name, 0, 1e6) for name in ("learning_rate", "joint_rate", "rho_rate")]
        for name, least, most in (*rates, ("dropout", 0, 0.99), ("clip", 1e-9, 1e9)):
            self._set(name, number, least, most)
        steps = sum(getattr(self, name) for name in STEPS)
        if not self.epochs + steps - self.table_steps:
            raise LessError("a recipe without epochs, together_steps and joint_steps trains nothing: give it some of one of them")
        if not isinstance(self.joint_budgets, list | tuple) or (not self.joint_budgets and steps):
            raise LessError(
                f"joint_budgets of a recipe are multiples of the policy's budget, one or more, not {self.joint_budgets!r}"
            )
        multiples = tuple(number("joint_budgets of a recipe", multiple, 1e-3, 1e3) for multiple in self.joint_budgets)
        object.__setattr__(self, "joint_budgets", multiples)

    @staticmethod
    def rate(rate: float, head_dim: int) -> float:
        """A rate of the recipe for heads of so many numbers: a step moves an exponent by each of them."""
        return rate * min(1.0, 64 / head_dim)

    def _set(self, name, check, *limits):
        value = getattr(self, name)
        if value is not None or name not in ("halve_every", "windows", "clip"):
            object.__setattr__(self, name, check(f"{name} of a recipe", value, *limits))


RECIPES = {
    "paper": Recipe(),
    "exponential": Recipe(
        family="exponential",
        hidden=32,
        epochs=10,
        learning_rate=1e-2,
        halve_every=None,
        dropout=0.0,
        clip=1.0,
        windows=256,
        joint_steps=150,
        table_steps=100,
    ),
}
"""How each family of learned kernels is trained, unless told otherwise."""


def recipe_of(family: str, **changes: Any) -> Recipe:
    """How the family is trained, with other fields if they are not None. LessError for fields that do not go together."""
    recipe, changes = RECIPES[family], {name: value for name, value in changes.items() if value is not None}
    if changes.get("hidden") == 0 and recipe.family == "paper":
        raise LessError("a hidden width of 0 is for exponential kernels: the paper's need at least 1")
    if recipe.halve_every and changes.get("epochs"):
        changes["halve_every"] = max(1, changes["epochs"] // 4)
    return replace(recipe, **changes)
