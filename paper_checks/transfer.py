"""Kernels serve other budgets and policies than those that they were trained for, if less than matched ones (section 4)."""

from less_fast.measuring.compare import compare, share_recovered, spell_share
from less_fast.setting import POLICIES

from .check import Finding, Subject, verdict

CLAIM = "Kernels transfer to other budgets and other policies, and still beat Baseline+"
PAPER = "helps, less than matched kernels"
TO = ("window", "lambda", "tova", "scissorhands", "snapkv")
MATCHED = (("lambda", 0.05), ("tova", 0.05), ("h2o", 0.02))


def check(subject: Subject) -> Finding:
    """The subject's kernels under policies that they were not trained for, beside Baseline+; then kernels trained here, all by
    one small recipe: for H2O at 5 % (transferred), and for the very policy and budget that they serve (matched)."""
    windows, parts, lines, figures = subject.windows(32), [], [], {}

    def rule(name, share):
        return POLICIES[name].with_budget(max(8, int(share * subject.length)))

    for name in TO[:1] if subject.quick else TO:
        rows = compare(subject.model, windows, [rule(name, 0.05)], {"ours": subject.kernels})
        plus, less = ({(row.cache, row.budgets): row for row in rows}[kind, "uniform"] for kind in ("baseline+", "less"))
        parts.append(less.perplexity < plus.perplexity)
        figures[name] = {"less": less.recovered, "baseline+": plus.recovered}
        for title, row in (("Baseline+", plus), ("LESS", less)):
            lines.append([less.policy, title, spell_share(row.recovered, row.recovered_stderr), ""])
    shares = [figure["less"] for figure in figures.values()]
    full, source, of_matched = subject.losses(windows), subject.train(rule("h2o", 0.05)), []
    for name, share in MATCHED[:1] if subject.quick else MATCHED:
        policy = rule(name, share)
        choices = None, source, subject.train(policy)
        bare, transferred, matched = (subject.losses(windows, policy, kernels) for kernels in choices)
        shares_of = {"transferred": share_recovered(full, bare, transferred), "matched": share_recovered(full, bare, matched)}
        part, error = share_recovered(matched, bare, transferred)  # of what matched kernels gain
        parts += [transferred.mean() < bare.mean(), matched.mean() < transferred.mean()]
        figures[f"{policy}, trained here"] = shares_of | {"of matched": (part, error)}
        for title, (recovered, stderr) in shares_of.items():
            of = spell_share(part, error) if title == "transferred" else ""
            lines.append([repr(policy), f"LESS, trained here, {title}", spell_share(recovered, stderr), of])
        of_matched.append(f"{part:.0%} ± {error:.0%} ({name}, {share:.0%})")
    sentence = (
        f"kernels trained for {subject.kernels.about.get('policy', 'one policy')} recover {min(shares):.0%} to {max(shares):.0%} "
        f"of the gap of {len(shares)} other policies at 5 %; kernels trained here for H2O at 5 % gain {', '.join(of_matched)} of "
        f"what matched ones do"
    )
    return Finding(verdict(parts), sentence, figures, ["policy", "cache", "gap recovered", "of what matched kernels gain"], lines)
