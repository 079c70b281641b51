"""Caches of small models: a policy that needs kinds, padded prompts, and ways to feed a cache and to compare two."""

import torch
from both_paths import heads_of
from closeness import assert_close
from models import make_kinds, tokens

from less_fast import FastGen

FASTGEN, KINDS = FastGen(11, 2, 2, 0.6), make_kinds(seed=3)  # heads choose differently, and some hold less than the budget


def generate(model, ids, cache=None, mask=None, new=12, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, **{"do_sample": False, **options})


def left_padded(lengths, width):
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return tokens(len(lengths), width) * mask, mask


def feed(model, ids, cache, prompt, positions=None):
    """Logits of a prompt of so many tokens and of the others, which come one at a time."""
    logits = []
    with torch.no_grad():
        for now in [slice(prompt), *(slice(i, i + 1) for i in range(prompt, ids.shape[1]))]:
            where = None if positions is None else positions[None, now].expand(len(ids), -1)
            logits.append(model(ids[:, now], position_ids=where, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def assert_same_states(cache, others, rows):
    """Row i of every layer of the cache holds what row rows[i] of cache others[i] holds."""
    for index, layer in enumerate(cache.layers):
        for row, (other, source) in enumerate(zip(others, rows, strict=True)):
            state = other.layers[index].state
            assert layer.state.n[row] == state.n[source]
            for got, wanted in zip(heads_of(layer.state, row), heads_of(state, source), strict=True):
                assert got.position.tolist() == wanted.position.tolist()
                for name in ("k", "v", "score", "H", "z"):
                    assert_close(getattr(got, name), getattr(wanted, name))
