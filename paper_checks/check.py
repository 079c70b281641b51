"""What a check of a claim is: the subject that it looks at, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers.cache_utils import Cache, DynamicCache

from less_fast import H2O, LessCache, LessError, LessKernels
from less_fast.budgets import Table
from less_fast.demo import corpus
from less_fast.layer.policies import Policy
from less_fast.measuring.compare import Contender, window_losses
from less_fast.text import windows as cut_windows
from less_fast.training import RECIPES, train

HOLDS, IN_PART, FAILS, UNMEASURED = "holds", "holds in part", "does not hold", "not measured here"
SHARES = (0.02, 0.05, 0.10)  # of a window's tokens: the budgets of the paper's tables
MOST = {"train": 28, "test": 64}  # windows that a check takes
QUICK = {"train": 8, "test": 2}  # the same in a quick run
VALIDATION = 4  # of those for training
SMALL = replace(RECIPES["exponential"], rho=0, uses=8, batch=1, joint_steps=0, curves=0, budgets=(1.0,))
"""How kernels are trained within a check: each layer towards its own target, on few windows."""


@dataclass
class Subject:
    """A model, kernels for it, and text that neither was trained on."""

    model: torch.nn.Module
    tokenizer: object
    kernels: LessKernels
    paper_kernels: LessKernels | None  # of the paper's own family, if there are any
    texts: list[str] | None = None  # None: the held-out standard library
    length: int = 1024  # tokens of a window
    quick: bool = False  # a smoke run: everything, as small as can be
    seed: int = 0
    tasks: list | None = None  # of lm-evaluation-harness; None: one of the held-out text
    summaries: list[tuple[str, str]] | None = None  # articles with theirs; None: continuations of the held-out text

    def held_out(self) -> list[str]:
        """The texts; four in a quick run."""
        return self.texts or [text for _, text in corpus.documents("test")][: 4 if self.quick else None]

    def families(self) -> dict[str, LessKernels]:
        """The kernels, by what a table calls them."""
        return {"ours": self.kernels} | ({"the paper's": self.paper_kernels} if self.paper_kernels else {})

    def windows(self, count: int, length: int | None = None, split: str = "test") -> torch.Tensor:
        """Windows (count, length) of tokens, a few in a quick run: held out, or of the split "train".

        Texts that were given have no splits: a third of their windows is for training. LessError if they are too short.
        """
        count, length = min(count, QUICK[split]) if self.quick else count, length or self.length
        if self.texts is None:
            texts = self.held_out()
            if split == "train":
                texts = [text for _, text in corpus.documents(split)][::20][: 4 if self.quick else None]  # it is plenty
            return cut_windows(self.tokenizer, texts, length, count, self.seed)
        every = cut_windows(self.tokenizer, self.texts, length, seed=self.seed)
        third = len(every) // 3
        chosen = (every[:third] if split == "train" else every[third:])[:count]
        if len(chosen) < count:
            raise LessError(
                f"the text has {len(every)} windows of {length} tokens, a third of them for training, and {count} are wanted "
                f"{'for that' if split == 'train' else 'of the others'}: give more text or a shorter length"
            )
        return chosen

    def train(self, policy: Policy, **changes) -> LessKernels:
        """Kernels trained within a check for `policy`: the recipe SMALL but for these changes."""
        windows = self.windows(MOST["train"], split="train")
        recipe = replace(SMALL, seed=self.seed, **changes)
        return train(self.model, windows[VALIDATION:], windows[:VALIDATION], policy, recipe)

    def losses(
        self,
        windows: torch.Tensor,
        policy: Policy | None = None,
        kernels: LessKernels | None = None,
        budgets: Table | str = "uniform",
    ) -> torch.Tensor:
        """Mean negative log-likelihood of each window (W, T), streaming: (W,) float64. policy None: with the full cache."""

        def make(chunk):
            return LessCache.for_model(self.model, policy, kernels, budgets, chunk)

        kind = "full" if policy is None else "bare" if kernels is None else "less"
        return window_losses(self.model, windows, Contender(kind, policy, None, make))

    def caches(self, policy: Policy, spread: str | None = "uniform") -> dict[str, Cache]:
        """Empty ones for streaming: full, bare and LESS, whose budgets are uniform or, None, by head where there is a table."""
        return {
            "full": DynamicCache(config=self.model.config),
            "bare": LessCache.for_model(self.model, policy, chunk=1),
            "LESS": LessCache.for_model(self.model, policy, self.kernels, spread, chunk=1),
        }

    def policies(self) -> list[H2O]:
        """H2O at the paper's budgets."""
        return [H2O(1, 1).with_budget(max(2, int(share * self.length))) for share in (SHARES[1:2] if self.quick else SHARES)]

    @property
    def middle(self) -> H2O:
        """That of 5 %."""
        return self.policies()[len(self.policies()) // 2]


@dataclass
class Finding:
    """What a check finds: a verdict, the sentence that says why with the figures, and everything that was measured."""

    verdict: str
    sentence: str
    figures: dict  # what goes into the JSON report
    headings: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def claim(text: str, paper: str) -> Callable:
    """Says of a check what it is a claim of, and what the paper says."""

    def noted(check: Callable[[Subject], Finding]) -> Callable[[Subject], Finding]:
        check.claim, check.paper = text, paper
        return check

    return noted


def verdict(parts: list[bool]) -> str:
    """Whether all parts of a claim hold, one or more of them, or none."""
    return HOLDS if all(parts) else IN_PART if any(parts) else FAILS
