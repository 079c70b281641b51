"""Perplexity at 2, 5 and 10 % (table 2): LESS against the bare policy and against Baseline+, which holds as many bytes."""

from dataclasses import asdict

from less_fast.measuring.compare import cache_name, compare, spell_share

from .check import Finding, Subject, verdict

CLAIM = "LESS beats the bare policy, and Baseline+ of the same memory"
PAPER = "WikiText, Llama 2 7B, H2O at 2 %: 13.33 bare, 10.75 LESS"


def check(subject: Subject) -> Finding:
    rows = compare(subject.model, subject.windows(64), subject.policies(), subject.families())
    equal, parts = {}, []
    for row in rows:
        if row.cache in ("bare", "baseline+"):
            equal[row.cache, row.budgets] = row.perplexity
        if row.cache == "less":
            parts += [row.perplexity < equal["bare", "uniform"], row.perplexity < equal["baseline+", row.budgets]]
    lines = [
        [
            cache_name(row),
            "all" if row.budget is None else str(row.budget),
            row.budgets or "",
            f"{row.perplexity:.2f} ± {row.stderr:.2f}",
            spell_share(row.recovered, row.recovered_stderr),
            f"{row.bytes:,}",
        ]
        for row in rows
    ]
    headings = ["cache", "tokens kept", "budgets", "perplexity", "gap recovered", "bytes/sequence"]
    sentence = f"in {sum(parts)} of {len(parts)} comparisons LESS has the lower perplexity; full cache {rows[0].perplexity:.2f}"
    figures = {"rows": [asdict(row) for row in rows]}
    return Finding(verdict(parts), sentence, figures, headings, lines)
