"""Larger R helps, with diminishing returns (fig. 7): what kernels of several sizes recover, beside the bytes that they take."""

from itertools import pairwise

from less_fast.measuring.compare import share_recovered

from .check import SMALL, Finding, Subject, verdict

CLAIM = "A larger rank helps, with diminishing returns; R = 8 suffices"
PAPER = "R = 8 suffices (fig. 7)"
RANKS = (1, 2, 4, 8, 16, 32)  # with the recipe's hidden width
WIDTHS = (0, 8, 128, 512)  # with R = 8
SUFFICES = 0.9  # of what the best rank recovers


def check(subject: Subject) -> Finding:
    """Trains kernels of each size by one small recipe; returns diminish where each further rank gains less than those before."""
    windows, policy = subject.windows(32), subject.policies()[-2 if not subject.quick else 0]
    sizes = [(rank, SMALL.hidden) for rank in RANKS] + [(SMALL.rank, width) for width in WIDTHS]
    if subject.quick:
        sizes = [(1, SMALL.hidden), (SMALL.rank, SMALL.hidden), (SMALL.rank, 0)]
    full, bare, rows, figures, measured = subject.losses(windows), subject.losses(windows, policy), [], {}, {}
    for rank, hidden in sizes:
        kernels = subject.train(policy, rank=rank, hidden=hidden)
        recovered, stderr = share_recovered(full, bare, subject.losses(windows, policy, kernels))
        (shares,) = kernels.about["layers"]["left"]
        left = sum(shares) / len(shares)
        measured[rank, hidden] = kernels.memory(), recovered, stderr
        figures[f"R {rank}, hidden {hidden}"] = {"bytes": kernels.memory(), "recovered": (recovered, stderr), "error_left": left}
        rows.append([str(rank), str(hidden), f"{kernels.memory():,}", f"{left:.3f}", f"{recovered:.1%} ± {stderr:.1%}"])
    by_rank = {rank: share for (rank, hidden), (_, share, _) in measured.items() if hidden == SMALL.hidden}
    gains = [(by_rank[more] - by_rank[rank]) / (more - rank) for rank, more in pairwise(by_rank)]  # of each further rank
    enough = by_rank[SMALL.rank] / max(by_rank.values())
    parts = [all(gain > 0 for gain in gains), all(a > b for a, b in pairwise(gains)), enough >= SUFFICES]

    def draw(axes):
        lines = {f"R varies, hidden {SMALL.hidden}": 1, f"hidden varies, R = {SMALL.rank}": 0}
        for label, fixed in lines.items():
            size = (SMALL.rank, SMALL.hidden)[fixed]
            line = sorted(point for key, point in measured.items() if key[fixed] == size)
            axes.errorbar(*zip(*line), marker="o", capsize=3, label=label)
        axes.set(xlabel="bytes of the kernels", ylabel="gap recovered", xscale="log", title=f"{policy}, uniform budgets")
        axes.legend()

    text = ", ".join(f"{share:.1%} at R = {rank}" for rank, share in by_rank.items())
    sentence = (
        f"of the gap of {policy}, kernels that a small recipe trained recover {text}; "
        f"at R = {SMALL.rank} {enough:.0%} of the best"
    )
    headings = ["R", "hidden", "kernel bytes", "cost left in each layer", "gap recovered"]
    return Finding(verdict(parts), sentence, figures, headings, rows, {"kernel_size": draw})
