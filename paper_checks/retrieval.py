"""A control where eviction is known to fail: a list of random tokens comes twice, and the second time it has to be copied."""

import torch
from transformers import DynamicCache

from less_fast import LessCache

from .check import Finding, Subject, verdict

CLAIM = "Exact retrieval from far back: LESS keeps what the full cache can do"
PAPER = "not in the paper; known to fail under eviction"


@torch.inference_mode()
def check(subject: Subject) -> Finding:
    """The share of the second list's tokens that are predicted right, by how many tokens lie between."""
    model, policy = subject.model, subject.policies()[-1]
    rows, figures, kept = [], {}, []
    rng = torch.Generator().manual_seed(subject.seed)
    lists = 2 if subject.quick else 16
    for length in (32,) if subject.quick else (16, 64, 192, 448):
        first = torch.randint(1, subject.model.config.vocab_size, (lists, length), generator=rng)
        ids = torch.cat([first, first], 1).to(model.device)
        right = {}
        for name, cache in {
            "full": DynamicCache(config=model.config),
            "bare": LessCache.for_model(model, policy, chunk=1),
            "LESS": LessCache.for_model(model, policy, subject.kernels, chunk=1),
        }.items():
            guesses = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, length:-1].argmax(-1)
            right[name] = (guesses == ids[:, length + 1 :]).float().mean().item()
        rows.append([str(length), *(f"{right[name]:.1%}" for name in ("full", "bare", "LESS"))])
        figures[length] = right
        kept.append(right["LESS"] >= 0.9 * right["full"])
    last = figures[max(figures)]
    sentence = (
        f"of random lists of {max(figures)} tokens the full cache copies {last['full']:.0%}, {policy} {last['bare']:.0%}, LESS "
        f"{last['LESS']:.0%}"
    )
    return Finding(verdict(kept), sentence, figures, ["tokens", "full", "bare", "LESS"], rows)
