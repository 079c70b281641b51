"""A control: how often a victim's score and the next one's are so close that rounding may decide."""

import torch

from less_fast import LessCache

from .check import FAILS, HOLDS, IN_PART, Finding, Subject

CLAIM = "Evictions are decided by scores, not by rounding"
PAPER = "not in the paper"
CLOSE = 1e-5  # relative, some hundred times the rounding of float32


@torch.inference_mode()
def check(subject: Subject) -> Finding:
    model, policy = subject.model, subject.policies()[0]
    ids = subject.windows(4).to(model.device)
    cache = LessCache.for_model(model, policy, subject.kernels, "uniform")
    start = ids.shape[1] - (8 if subject.quick else 256)
    model(ids[:, :start], past_key_values=cache, use_cache=True)
    close = count = 0
    for column in range(start, ids.shape[1]):
        model(ids[:, column : column + 1], past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            for group in layer.state.parts:
                rank = group.policy.rank(group.slots.positions(), group.slots.scores(), layer.state.n[:, None, None].int())
                rank = torch.where(group.slots.positions() >= 0, rank, torch.inf)  # the scratch slot holds nothing
                lowest = rank.sort(-1).values[..., :2]
                close += ((lowest[..., 1] - lowest[..., 0]) <= CLOSE * lowest[..., 1].abs()).sum().item()
                count += lowest[..., 0].numel()
    share = close / count
    sentence = f"of {count:,} decisions of {policy}, {share:.2%} lie between scores within {CLOSE:.0e} of each other"
    judged = HOLDS if share < 0.01 else IN_PART if share < 0.5 else FAILS
    return Finding(judged, sentence, {"decisions": count, "near_ties": close, "within": CLOSE})
