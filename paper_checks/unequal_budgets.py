"""Beyond the paper: budgets that differ over heads, against the bare policy with its own best table of the same memory."""

from less_fast.measuring.compare import compare
from less_fast.setting import POLICIES

from .check import UNMEASURED, Found, Setting, verdict

CLAIM = "Unequal budgets over heads: LESS still removes much of what the best bare table of the same memory loses"
PAPER = "not in the paper"


def check(setting: Setting) -> Found:
    known = {name: rule for name, rule in POLICIES.items() if type(rule).__name__ in setting.kernels.curves}
    if not known:
        return Found(UNMEASURED, "these kernels know no curves: measure some with `less-kv allocate`", {})
    windows, parts, lines, figures = setting.windows(64), [], [], {}
    for name, rule in known.items():
        policies = [rule.with_budget(policy.budget) for policy in setting.policies()]
        for row in compare(setting.model, windows, policies, {"ours": setting.kernels}):
            if row.budgets == "by head":
                share = "" if row.removed is None else f"{row.removed:.1%} ± {row.removed_stderr:.1%}"
                lines.append([name, row.cache, str(row.budget), f"{row.perplexity:.2f}", f"{row.recovered:.1%}", share])
                figures[f"{name}, {row.cache}, {row.budget}"] = {"recovered": row.recovered, "removed": row.removed}
                if row.cache == "less":
                    parts.append((row.removed or 0) > 0)
    removed = [found["removed"] for found in figures.values() if found["removed"] is not None]
    share = f"{min(removed):.0%} to {max(removed):.0%}"
    sentence = f"of the loss that the best bare table of the same memory still has, LESS removes {share}"
    headings = ["policy", "cache", "tokens kept on average", "perplexity", "of the uniform policy's gap", "of Baseline+'s loss"]
    return Found(verdict(parts), sentence, figures, headings, lines)
