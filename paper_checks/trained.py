"""Kernels of other sizes (fig. 7), kernels and tables in places that they were not made for, and what training takes."""

import time
from dataclasses import replace
from itertools import pairwise
from pydoc_data.topics import topics

from less_fast.budgets import table
from less_fast.measuring.compare import compare, share_recovered, spell_share
from less_fast.setting import POLICIES
from less_fast.text import windows as cut_windows
from less_fast.training import RECIPES, train
from less_fast.training.head_costs import measure

from .check import SMALL, UNMEASURED, Finding, Subject, claim, verdict

RANKS = (1, 2, 4, 8, 16, 32)  # with the recipe's hidden width
WIDTHS = (0, 8, 128, 512)  # with R = 8
SUFFICES = 0.9  # of what the best rank recovers
TO = ("window", "lambda", "tova", "scissorhands", "snapkv")
MATCHED = (("lambda", 0.05), ("tova", 0.05), ("h2o", 0.02))
CURVES = 2  # windows on which curves are measured


@claim("A larger rank helps, with diminishing returns; R = 8 suffices", "R = 8 suffices (fig. 7)")
def kernel_size(subject: Subject) -> Finding:
    """Trains kernels of each size by one small recipe; returns diminish where each further rank gains less than those before."""
    windows, policy = subject.windows(32), subject.middle
    sizes = [(rank, SMALL.hidden) for rank in RANKS] + [(SMALL.rank, width) for width in WIDTHS]
    if subject.quick:
        sizes = [(1, SMALL.hidden), (SMALL.rank, SMALL.hidden), (SMALL.rank, 0)]
    full, bare, rows, figures, by_rank = subject.losses(windows), subject.losses(windows, policy), [], {}, {}
    for rank, hidden in sizes:
        kernels = subject.train(policy, rank=rank, hidden=hidden)
        share = share_recovered(full, bare, subject.losses(windows, policy, kernels))
        (shares,) = kernels.about["layers"]["left"]
        left = sum(shares) / len(shares)
        if hidden == SMALL.hidden:
            by_rank[rank] = share[0]
        figures[f"R {rank}, hidden {hidden}"] = {"bytes": kernels.memory(), "recovered": share, "error_left": left}
        rows.append([str(rank), str(hidden), f"{kernels.memory():,}", f"{left:.3f}", spell_share(*share)])
    gains = [(by_rank[more] - by_rank[rank]) / (more - rank) for rank, more in pairwise(by_rank)]  # of each further rank
    enough = by_rank[SMALL.rank] / max(by_rank.values())
    parts = [all(gain > 0 for gain in gains), all(a > b for a, b in pairwise(gains)), enough >= SUFFICES]

    text = ", ".join(f"{share:.1%} at R = {rank}" for rank, share in by_rank.items())
    sentence = (
        f"of the gap of {policy}, kernels that a small recipe trained recover {text}; "
        f"at R = {SMALL.rank} {enough:.0%} of the best"
    )
    headings = ["R", "hidden", "kernel bytes", "cost left in each layer", "gap recovered"]
    return Finding(verdict(parts), sentence, figures, headings, rows)


@claim(
    "Kernels transfer to other budgets and other policies, and still beat Baseline+",
    "helps, less than matched kernels (section 4)",
)
def transfer(subject: Subject) -> Finding:
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
        for title, recovered in shares_of.items():
            of = spell_share(part, error) if title == "transferred" else ""
            lines.append([repr(policy), f"LESS, trained here, {title}", spell_share(*recovered), of])
        of_matched.append(f"{part:.0%} ± {error:.0%} ({name}, {share:.0%})")
    sentence = (
        f"kernels trained for {subject.kernels.about.get('policy', 'one policy')} recover {min(shares):.0%} to {max(shares):.0%} "
        f"of the gap of {len(shares)} other policies at 5 %; kernels trained here for H2O at 5 % gain {', '.join(of_matched)} of "
        f"what matched ones do"
    )
    return Finding(verdict(parts), sentence, figures, ["policy", "cache", "gap recovered", "of what matched kernels gain"], lines)


@claim(
    "A budget table of one kind of text serves another: better than uniform budgets, not as well as the text's own",
    "not in the paper",
)
def tables_of_other_texts(subject: Subject) -> Finding:
    """Code is the standard library's training and held-out text; prose is Python's own manual, which lies in no split."""
    if subject.texts is not None:
        return Finding(UNMEASURED, "it is about code and prose of the standard library, and other text was given", {})
    model, kernels, policy = subject.model, subject.kernels, subject.middle
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


@claim("Training is cheap: each layer alone, on one device", "one device, layer by layer (section 3.2)")
def training_cost(subject: Subject) -> Finding:
    """One epoch of the paper's recipe on a few windows, and what a whole training of 40 epochs on 512 would so take."""
    windows = subject.windows(24)
    count = max(1, len(windows) * 2 // 3)
    began = time.perf_counter()
    recipe = replace(RECIPES["paper"], uses=1, hidden=8 if subject.quick else 512)
    train(subject.model, windows[:count], windows[count:], subject.policies()[0], recipe)
    layers = subject.kernels.sizes["layers"]
    each = (time.perf_counter() - began) / layers / count  # reading included
    hours = each * layers * 512 * 40 / 3600
    sentence = (
        f"a layer takes {each * 1e3:.0f} ms for a window of {subject.length} tokens and epoch, reading included: at most "
        f"{hours:.1f} hours for the paper's whole recipe here"
    )
    figures = {"seconds_per_window_and_layer": each, "hours": hours}
    return Finding(verdict([hours < 24]), sentence, figures)
