"""Several caches at the same time, each in a thread of its own: none notices the others, on one model or on two."""

import random
import sys
import time
from threading import Barrier, Thread

import pytest
import torch
from models import make_kernels, make_kinds, make_model, tokens
from transformers import DynamicCache

from less_fast import H2O, FastGen, LessCache
from less_fast.hf.identity import identity

ROUNDS, STEPS, PROMPT = 3, 8, 9
POLICIES = {"h2o": H2O(3, 3), "fastgen": FastGen(11, 2, 2, 0.6)}


def new_cache(model, kernels, kind, seed):
    """A cache of that kind; of FastGen with a table of kinds that depends on the seed."""
    if kind == "dense":
        return DynamicCache()
    return LessCache.for_model(model, POLICIES[kind], kernels, token_kinds=make_kinds(seed))


@torch.no_grad()
def generate(model, cache, seed, wait=lambda: None):
    """Greedy decoding, waiting before every forward pass: the tokens (2, STEPS) and every tensor that a LessCache holds."""
    ids, found = tokens(2, PROMPT, seed=seed), []
    for _ in range(STEPS):
        wait()
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        found.append(ids)
    states = [layer.state for layer in cache.layers] if isinstance(cache, LessCache) else []
    return torch.cat(found, 1), [tensor.clone() for state in states for _, tensor in state.tensors().items()]


@pytest.mark.parametrize("with_kernels", [False, True])
def test_two_threads_may_make_the_first_caches_of_a_model(with_kernels):
    """Each sets the model's attention, and a probe sets it back."""
    kernels = make_kernels(make_model())
    kernels.about = {"identity": identity(make_model())}
    own, wanted = kernels if with_kernels else None, []

    def serve(model, found, wait=lambda: None):
        wait()
        found.append(generate(model, LessCache.for_model(model, H2O(3, 3), own), 0)[0])

    serve(make_model(), wanted)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(6):
            model, found, barrier = make_model(), [], Barrier(2, timeout=30)
            threads = [Thread(target=serve, args=(model, found, barrier.wait)) for _ in range(2)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert len(found) == 2
            assert all(torch.equal(ids, wanted[0]) for ids in found)
    finally:
        sys.setswitchinterval(before)


def pause(frame, event, what):
    """A profiler: at one in four calls and returns of Python functions another thread goes on."""
    if event in ("call", "return") and random.random() < 0.25:
        time.sleep(1e-6)


@pytest.mark.parametrize("models", ["one model", "two models"])
@pytest.mark.parametrize("kinds", [("h2o", "h2o"), ("fastgen",) * 2, ("h2o", "fastgen"), ("h2o", "dense"), ("fastgen", "dense")])
def test_caches_in_threads_of_their_own_give_what_each_gives_alone(models, kinds):
    first = make_model()
    served = [first, first if models == "one model" else make_model()]
    given = [*zip(served, map(make_kernels, served), kinds, range(2))]
    alone = [generate(model, new_cache(model, *rest), rest[-1]) for model, *rest in given]
    for _ in range(ROUNDS):
        together, barrier = [None, None], Barrier(2, timeout=30)

        def work(place, together=together, barrier=barrier):
            sys.setprofile(pause)  # of this thread alone
            together[place] = generate(served[place], new_cache(*given[place]), place, barrier.wait)

        threads = [Thread(target=work, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for (ids, state), (wanted, held) in zip(together, alone):
            assert torch.equal(ids, wanted)
            assert all(torch.equal(a, b) for a, b in zip(state, held, strict=True))
