"""Learned kernels are needed (section 4): LESS with random features in the place of learned ones."""

import torch

from less_fast import LessKernels
from less_fast.measuring.compare import compare

from .check import Finding, Subject, verdict

CLAIM = "Learned kernels are needed: H2O with Performer's features is worse than LESS"
PAPER = "worse than LESS"
CONTROLS = ("performer", "fourier", "elu")


def check(subject: Subject) -> Finding:
    torch.manual_seed(subject.seed)
    shape = {name: subject.kernels.sizes[name] for name in ("layers", "query_heads", "kv_heads", "head_dim")}
    controls = {family: LessKernels(**shape, family=family).requires_grad_(False).to(subject.model.device) for family in CONTROLS}
    learned = subject.paper_kernels or subject.kernels
    rows = compare(subject.model, subject.windows(32), subject.policies(), {"learned": learned, **controls})
    less = [row for row in rows if row.cache == "less" and row.budgets == "uniform"]
    best = {row.budget: row.perplexity for row in less if row.kernels == "learned"}
    parts = [row.perplexity > best[row.budget] if row.kernels != "learned" else row.recovered > 0 for row in less]
    lines = [[row.kernels, str(row.budget), f"{row.perplexity:.2f}", f"{row.recovered:.1%}"] for row in less]
    recovered = {name: [f"{row.recovered:.1%}" for row in less if row.kernels == name] for name in ("learned", "performer")}
    ours, theirs = (", ".join(recovered[name]) for name in ("learned", "performer"))
    sentence = f"of the gap, learned kernels recover {ours}, Performer's {theirs}"
    figures = {"recovered": {f"{row.kernels}, {row.budget}": row.recovered for row in less}}
    return Finding(verdict(parts), sentence, figures, ["kernels", "tokens kept", "perplexity", "gap recovered"], lines)
