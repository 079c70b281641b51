"""Beyond the paper: budget tables whose curves were measured on one kind of text, used on another."""

from pydoc_data.topics import topics

from less_fast.budgets import table
from less_fast.measuring.compare import share_recovered
from less_fast.text import windows as cut_windows
from less_fast.training.head_costs import measure

from .check import UNMEASURED, Found, Setting, verdict

CLAIM = "A budget table of one kind of text serves another: better than uniform budgets, not as well as the text's own"
PAPER = "not in the paper"
CURVES = 2  # windows on which curves are measured


def check(setting: Setting) -> Found:
    """Code is the standard library's training and held-out text; prose is Python's own manual, which lies in no split."""
    if setting.texts is not None:
        return Found(UNMEASURED, "it is about code and prose of the standard library, and other text was given", {})
    model, kernels, policy = setting.model, setting.kernels, setting.policies()[-2 if not setting.quick else 0]
    code, count = setting.windows(32), 1 if setting.quick else CURVES
    prose = cut_windows(setting.tokenizer, topics.values(), setting.length, count + len(code), setting.seed)
    curves_on = {"code": setting.windows(count, split="train")[:count], "prose": prose[:count]}
    total = policy.budget * kernels.sizes["layers"] * kernels.sizes["kv_heads"]
    budgets = [4, 32, setting.length - 1] if setting.quick else None
    curves = {kind: measure(model, some, policy, kernels, budgets) for kind, some in curves_on.items()}
    tables = {kind: table(some, total, less=True) for kind, some in curves.items()}
    rows, figures, parts, of_own = [], {"tables": tables}, [], []
    for kind, windows in {"code": code, "prose": prose[count:]}.items():
        full, bare = setting.losses(windows), setting.losses(windows, policy)
        less = {name: setting.losses(windows, policy, kernels, some) for name, some in {"uniform": "uniform", **tables}.items()}
        shares = {name: share_recovered(full, bare, loss) for name, loss in less.items()}
        own, other = (less[name] for name in (("code", "prose") if kind == "code" else ("prose", "code")))
        part, error = share_recovered(own, less["uniform"], other)  # of what the text's own table gains
        parts += [other.mean() < less["uniform"].mean(), own.mean() < other.mean()]
        figures[kind] = shares | {"of own": (part, error)}
        rows.append([kind, *(f"{share:.1%} ± {stderr:.1%}" for share, stderr in shares.values()), f"{part:.1%} ± {error:.1%}"])
        of_own.append(f"on {kind} {part:.0%} ± {error:.0%}")
    text = ", ".join(of_own)
    sentence = f"of what a text's own table gains over uniform budgets of {policy}, a table of the other text gains {text}"
    headings = ["text", "uniform", "table of code", "table of prose", "the other's gain, of its own's"]
    return Found(verdict(parts), sentence, figures, headings, rows)
