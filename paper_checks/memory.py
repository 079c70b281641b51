"""A constant, nearly free memory: the low-rank state weighs about four tokens (section 3.1), and nothing grows with the text."""

import torch

from less_fast import LessCache

from .check import Finding, Subject, verdict

CLAIM = "The low-rank state is of constant size and weighs about 4 tokens at R = 8"
PAPER = "4 tokens (R = 8, D = 128)"


@torch.inference_mode()
def check(subject: Subject) -> Finding:
    model, kernels = subject.model, subject.kernels
    cache = LessCache.for_model(model, subject.policies()[0], kernels)
    held = []
    for part in subject.windows(1)[:1].to(model.device).split(subject.length // 8, 1):
        model(part, past_key_values=cache, use_cache=True)
        held.append(sum(cache.memory().values()))
    heads = kernels.sizes["layers"] * kernels.sizes["kv_heads"]
    token = 2 * kernels.sizes["head_dim"] * model.dtype.itemsize  # a key and a value
    tokens = cache.memory()["low_rank"] / heads / token
    figures = {"bytes_after_each_eighth": held, "tokens": tokens, "dtype": str(model.dtype), "rank": kernels.layers[0].rank}
    sentence = (
        f"{held[0]:,} bytes after {subject.length // 8} tokens and {held[-1]:,} after {subject.length}; the state weighs "
        f"{tokens:.2f} tokens of a KV head (R = {figures['rank']}, {model.dtype}; the state is float32)"
    )
    return Finding(verdict([len(set(held)) == 1, tokens < 5]), sentence, figures)
