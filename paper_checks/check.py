"""What a check of a claim is: the setting that it runs in, and what it found."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from less_fast import H2O, LessKernels
from less_fast.demo import corpus
from less_fast.text import windows as cut_windows

HOLDS, IN_PART, FAILS, UNMEASURED = "holds", "holds in part", "does not hold", "not measured here"
SHARES = (0.02, 0.05, 0.10)  # of a window's tokens: the budgets of the paper's tables


@dataclass
class Setting:
    """A model, kernels for it, and text that neither was trained on."""

    model: torch.nn.Module
    tokenizer: object
    kernels: LessKernels
    paper_kernels: LessKernels | None  # of the paper's own family, where there are some
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

    def windows(self, count: int, length: int | None = None) -> torch.Tensor:
        """Held-out windows (count, length) of tokens; two in a quick run."""
        return cut_windows(self.tokenizer, self.held_out(), length or self.length, 2 if self.quick else count, self.seed)

    def policies(self) -> list[H2O]:
        """H2O at the paper's budgets."""
        return [H2O(1, 1).with_budget(max(2, int(share * self.length))) for share in (SHARES[1:2] if self.quick else SHARES)]


@dataclass
class Found:
    """What a check found: a verdict, the sentence that says why with the figures, and everything that was measured."""

    verdict: str
    sentence: str
    figures: dict  # what goes into the JSON report
    headings: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    pictures: dict[str, Callable] = field(default_factory=dict)  # name -> a function that draws on matplotlib axes


def verdict(parts: list[bool]) -> str:
    """holds where all parts of a claim do, holds in part where some do."""
    return HOLDS if all(parts) else IN_PART if any(parts) else FAILS
