"""Training is cheap: layer by layer on one device (section 3.2)."""

import time
from dataclasses import replace

from less_fast.training import RECIPES, train

from .check import Finding, Subject, verdict

CLAIM = "Training is cheap: each layer alone, on one device"
PAPER = "one device, layer by layer"


def check(subject: Subject) -> Finding:
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
