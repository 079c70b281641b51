"""Larger R helps, with diminishing returns (fig. 7): the error of each layer alone, with kernels of several sizes."""

from dataclasses import replace
from itertools import pairwise

from less_fast.plan import bytes_of
from less_fast.train import RECIPES, train

from .check import Found, Setting, verdict

CLAIM = "A larger rank helps, with diminishing returns; R = 8 suffices"
PAPER = "R = 8 suffices (fig. 7)"
RANKS = (1, 2, 4, 8, 16, 32)  # with the recipe's hidden width
WIDTHS = (0, 8, 128, 512)  # with R = 8


def check(setting: Setting) -> Found:
    """Trains on the model's own held-out text: half of the windows for training, the others for measuring."""
    windows = setting.windows(64)
    half, policy = len(windows) // 2, setting.policies()[-2 if not setting.quick else 0]
    recipe = replace(RECIPES["exponential"], joint_steps=0, table_steps=0, seed=setting.seed)
    sizes = [(rank, recipe.hidden) for rank in RANKS] + [(recipe.rank, width) for width in WIDTHS]
    if setting.quick:
        recipe, sizes = replace(recipe, epochs=1), [(8, 32), (8, 0)]
    left, rows = {}, []
    for rank, hidden in sizes:
        kernels = train(setting.model, windows[:half], windows[half:], policy, replace(recipe, rank=rank, hidden=hidden))
        errors = kernels.about["validation"]
        left[rank, hidden] = sum(layer["less"] / layer["bare"] for layer in errors) / len(errors)
        rows.append([str(rank), str(hidden), f"{bytes_of(kernels):,}", f"{left[rank, hidden]:.3f}"])
    ranks = [rank for rank, hidden in left if hidden == recipe.hidden]
    by_rank = [left[rank, recipe.hidden] for rank in ranks]
    gains = [a - b for a, b in pairwise(by_rank)]
    parts = [all(gain > 0 for gain in gains), all(a > b for a, b in pairwise(gains))]

    def draw(axes):
        axes.plot(ranks, by_rank, marker="o")
        axes.set(xlabel="R", ylabel="error left, of the bare policy's", xscale="log", title=f"mean over layers, {policy}")

    text = ", ".join(f"{error:.3f} at R = {rank}" for rank, error in zip(ranks, by_rank))
    sentence = f"of the bare policy's error each layer alone leaves, on average: {text}"
    figures = {"left": {f"R {rank}, hidden {hidden}": error for (rank, hidden), error in left.items()}}
    return Found(verdict(parts), sentence, figures, ["R", "hidden", "kernel bytes", "error left"], rows, {"kernel_size": draw})
