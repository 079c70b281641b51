"""What the kept positions of a run of the reference say of its history."""

import numpy as np
from strategies import slices


def history(case, trace, g):
    """What KV head g's kept positions say of every query i and token j: whether i sees j exactly, and whether j was
    folded before i's chunk began. Both (T, T) bool."""
    visible, folded = (np.zeros((case.length, case.length), bool) for _ in range(2))
    held = np.array([], int)
    for now, kept in zip(slices(case.chunks), trace.kept):
        folded[now, : now.start] = True
        folded[now, held] = False
        visible[now, held] = True
        visible[now, now] = np.tri(now.stop - now.start, dtype=bool)
        held = kept[g]
    return visible, folded
