"""Kernels serve other budgets and policies than those that they were trained for (section 4)."""

from less_fast.compare import compare
from less_fast.policies import POLICIES

from .check import Found, Setting, verdict

CLAIM = "Kernels transfer to other budgets and other policies, and still beat Baseline+"
PAPER = "helps, less than matched kernels"
TO = ("window", "lambda", "tova", "scissorhands", "snapkv", "decayed-h2o")


def check(setting: Setting) -> Found:
    windows, parts, lines, figures = setting.windows(32), [], [], {}
    for name in TO[:1] if setting.quick else TO:
        budget = max(8, int(0.05 * setting.length))
        rows = compare(setting.model, windows, [POLICIES[name].with_budget(budget)], {"ours": setting.kernels})
        plus, less = ({(row.cache, row.budgets): row for row in rows}[kind, "uniform"] for kind in ("baseline+", "less"))
        parts.append(less.perplexity < plus.perplexity)
        figures[name] = {"less": less.recovered, "baseline+": plus.recovered}
        lines.append([less.policy, f"{plus.recovered:.1%}", f"{less.recovered:.1%} ± {less.recovered_stderr:.1%}"])
    shares = [found["less"] for found in figures.values()]
    sentence = (
        f"kernels trained for {setting.kernels.about.get('policy', 'one policy')} recover {min(shares):.0%} to {max(shares):.0%} "
        f"of the gap of {len(shares)} other policies at 5 %; how much matched kernels gain is not measured"
    )
    return Found(verdict(parts), sentence, figures, ["policy", "Baseline+ recovered", "LESS recovered"], lines)
