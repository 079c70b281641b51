"""A program's default device and default dtype are its own: nothing that is made on the way depends on them."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from models import make_kernels, make_kinds, make_model, tokens
from short_training import RECIPE
from transformers import AutoTokenizer

from less_fast import H2O, FastGen, LessCache, LessKernels, Retention, Scissorhands, SnapKV, token_kinds
from less_fast.demo import MODEL
from less_fast.hf.identity import identity
from less_fast.measuring.compare import contenders, token_losses
from less_fast.text import windows
from less_fast.training import train


def flattened(found):
    """All tensors, numbers and texts in it, in their order."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return [part for each in found for part in flattened(each)]
    return [found]


def caches_and_files(folder, model, kernels):
    kernels.save_pretrained(folder / "kernels")
    learned, found, table = LessKernels.from_pretrained(folder / "kernels"), [], [[3, 9], [5, 5]]
    settings = [(H2O(3, 3), table, {}), (Retention(6, 2), table, {"int8": True}), (SnapKV(6, 2, 1), None, {"context": 16})]
    settings += [(Scissorhands(6, 2, 3), None, {"chunk": 3}), (FastGen(8, 2, 2, 0.6), None, {"token_kinds": KINDS})]
    for policy, budgets, more in settings:
        cache = LessCache.for_model(model, policy, learned, budgets, **more)
        with torch.no_grad():
            found.append(model(IDS, past_key_values=cache).logits)
            cache.batch_select_indices([1, 0])
            cache.save(folder / "cache")
            cache = LessCache.load(folder / "cache", model, learned)
            found += [model(token, past_key_values=cache).logits for token in MORE]
        found.append(cache.memory())
    return found, identity(model)


def texts_and_figures(_, model, kernels):
    caches = list(contenders(model, [H2O(3, 3)], {"some": kernels}))
    losses = [token_losses(model, WINDOWS[:3], contender, rows=2) for contender in caches]
    return windows(TOKENIZER, ["def f(x):\n" * 30], 8, 3), token_kinds(TOKENIZER), losses


def a_training(folder, model, _):
    recipe = replace(RECIPE, uses=6, joint_steps=2, rho=3, curves=2, rate=0.5)
    kernels = train(model, WINDOWS[:3], WINDOWS[3:], H2O(3, 3), recipe, folder, hours=1.0)
    return kernels.state_dict(), {name: curves.less for name, curves in kernels.curves.items()}


@contextmanager
def another_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


IDS, MORE, WINDOWS, KINDS = tokens(2, 9), [tokens(2, 1, seed=seed) for seed in range(12)], tokens(5, 12, seed=1), make_kinds()
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("another", [lambda: torch.device("meta"), another_dtype], ids=["device", "dtype"])
@pytest.mark.parametrize("what", [caches_and_files, texts_and_figures, a_training], ids=lambda what: what.__name__)
def test_what_is_found_does_not_depend_on_the_defaults_of_the_program(what, another, tmp_path):
    """The device "meta" stands for one where nothing of the model is."""
    found = []
    for default in (nullcontext, another):
        model = make_model(num_hidden_layers=2).float()
        kernels = make_kernels(model, rank=[3, 2], rho=3).float()
        (folder := tmp_path / default.__name__).mkdir()
        with default():
            found.append(flattened(what(folder, model, kernels)))
    for one, other in zip(*found, strict=True):
        if isinstance(other, torch.Tensor):
            assert (one.device, one.dtype) == (other.device, other.dtype)
            assert torch.equal(one, other)
        else:
            assert one == other
