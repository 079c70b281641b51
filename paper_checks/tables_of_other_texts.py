"""Beyond the paper: budget tables whose curves were measured on one kind of text, used on another."""

from pydoc_data.topics import topics

from less_fast.budgets import table
from less_fast.measuring.compare import share_recovered, spell_share
from less_fast.text import windows as cut_windows
from less_fast.training.head_costs import measure

from .check import UNMEASURED, Finding, Subject, verdict

CLAIM = "A budget table of one kind of text serves another: better than uniform budgets, not as well as the text's own"
PAPER = "not in the paper"
CURVES = 2  # windows on which curves are measured


def check(subject: Subject) -> Finding:
    """Code is the standard library's training and held-out text; prose is Python's own manual, which lies in no split."""
    if subject.texts is not None:
        return Finding(UNMEASURED, "it is about code and prose of the standard library, and other text was given", {})
    model, kernels, policy = subject.model, subject.kernels, subject.policies()[-2 if not subject.quick else 0]
    code, count = subject.windows(32), 1 if subject.quick else CURVES
    prose = cut_windows(subject.tokenizer, topics.values(), subject.length, count + len(code), subject.seed)
    curves_on = {"code": subject.windows(count, split="train")[:count], "prose": prose[:count]}
    total = policy.budget * kernels.sizes["layers"] * kernels.sizes["kv_heads"]
    budgets = [4, 32, subject.length - 1] if subject.quick else None
    curves = {kind: measure(model, part, policy, kernels, budgets) for kind, part in curves_on.items()}
    tables = {kind: table(curve, total, less=True) for kind, curve in curves.items()}
    rows, figures, parts, of_own = [], {"tables": tables}, [], []
    for kind, windows in {"code": code, "prose": prose[count:]}.items():
        full, bare = subject.losses(windows), subject.losses(windows, policy)
        spreads = {"uniform": "uniform", **tables}
        less = {name: subject.losses(windows, policy, kernels, spread) for name, spread in spreads.items()}
        shares = {name: share_recovered(full, bare, loss) for name, loss in less.items()}
        own, other = (less[name] for name in (("code", "prose") if kind == "code" else ("prose", "code")))
        part, error = share_recovered(own, less["uniform"], other)  # of what the text's own table gains
        parts += [other.mean() < less["uniform"].mean(), own.mean() < other.mean()]
        figures[kind] = shares | {"of own": (part, error)}
        rows.append([kind, *(spell_share(*pair) for pair in shares.values()), spell_share(part, error)])
        of_own.append(f"on {kind} {part:.0%} ± {error:.0%}")
    text = ", ".join(of_own)
    sentence = f"of what a text's own table gains over uniform budgets of {policy}, a table of the other text gains {text}"
    headings = ["text", "uniform", "table of code", "table of prose", "the other's gain, of its own's"]
    return Finding(verdict(parts), sentence, figures, headings, rows)
