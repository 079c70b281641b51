"""Gains persist at long sequences: the loss by position, up to the model's whole context."""

import torch
from transformers import DynamicCache

from less_fast import LessCache

from .check import Finding, Subject, verdict

CLAIM = "Gains persist at long sequences"
PAPER = "gains hold with growing length"
PARTS = 8  # of a window


@torch.inference_mode()
def losses(model, ids, cache):
    """Mean loss in each eighth of the windows, (PARTS,)."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    nats = -logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (W, T - 1)
    return torch.stack([part.mean() for part in nats.tensor_split(PARTS, dim=1)]).double()


def check(subject: Subject) -> Finding:
    model, policy = subject.model, subject.policies()[0]
    windows, total = subject.windows(32).to(model.device), {}
    for ids in windows.split(8):
        caches = {
            "full": DynamicCache(config=model.config),
            "bare": LessCache.for_model(model, policy, chunk=1),
            "LESS": LessCache.for_model(model, policy, subject.kernels, "uniform", chunk=1),
        }
        for name, cache in caches.items():
            total[name] = total.get(name, 0) + losses(model, ids, cache) * len(ids) / len(windows)
    share = (total["bare"] - total["LESS"]) / (total["bare"] - total["full"])  # of what the bare policy loses
    later = share[PARTS // 2 :]

    def draw(axes):
        for name, loss in total.items():
            axes.plot(torch.arange(1, PARTS + 1) * windows.shape[1] / PARTS, loss, marker="o", label=name)
        axes.set(xlabel="tokens", ylabel="loss, nats per token", title=f"by position, {policy}")
        axes.legend()

    rows = [
        [f"{part + 1}/{PARTS}", *(f"{total[name][part]:.3f}" for name in ("full", "bare", "LESS")), f"{share[part]:.1%}"]
        for part in range(PARTS)
    ]
    sentence = (
        f"of the loss that {policy} adds LESS removes {share[1]:.0%} in the second eighth of {windows.shape[1]} tokens and "
        f"{share[-1]:.0%} in the last"
    )
    figures = {name: loss.tolist() for name, loss in total.items()} | {"share": share.tolist()}
    headings = ["part of the window", "full", "bare", "LESS", "removed"]
    return Finding(verdict((later > 0).tolist()), sentence, figures, headings, rows, {"long_sequences": draw})
