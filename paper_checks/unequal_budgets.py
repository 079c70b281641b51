"""Beyond the paper: budgets that differ over heads, against the bare policy with its own best table of the same memory."""

from less_fast.measuring.compare import compare, spell_share
from less_fast.setting import POLICIES

from .check import UNMEASURED, Finding, Subject, verdict

CLAIM = "Unequal budgets over heads: LESS still removes much of what the best bare table of the same memory loses"
PAPER = "not in the paper"


def check(subject: Subject) -> Finding:
    known = {name: rule for name, rule in POLICIES.items() if type(rule).__name__ in subject.kernels.curves}
    if not known:
        return Finding(UNMEASURED, "these kernels know no curves: measure some with `less-kv allocate`", {})
    windows, parts, lines, figures = subject.windows(64), [], [], {}
    for name, rule in known.items():
        policies = [rule.with_budget(policy.budget) for policy in subject.policies()]
        for row in compare(subject.model, windows, policies, {"ours": subject.kernels}):
            if row.budgets == "by head":
                share = spell_share(row.removed, row.removed_stderr)
                lines.append([name, row.cache, str(row.budget), f"{row.perplexity:.2f}", f"{row.recovered:.1%}", share])
                figures[f"{name}, {row.cache}, {row.budget}"] = {"recovered": row.recovered, "removed": row.removed}
                if row.cache == "less":
                    parts.append((row.removed or 0) > 0)
    removed = [figure["removed"] for figure in figures.values() if figure["removed"] is not None]
    share = f"{min(removed):.0%} to {max(removed):.0%}"
    sentence = f"of the loss that the best bare table of the same memory still has, LESS removes {share}"
    headings = ["policy", "cache", "tokens kept on average", "perplexity", "of the uniform policy's gap", "of Baseline+'s loss"]
    return Finding(verdict(parts), sentence, figures, headings, lines)
