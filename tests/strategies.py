"""The domains of the property tests: layers, policies, kernels, chunkings, padded batches, and data without ties.

Whatever both paths need comes twice, for the reference and for the fast path. Arrays are drawn from a numpy seed: so
hypothesis shrinks sizes and not thousands of numbers, and two policy scores are never equal by accident.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

import less_fast
import less_ref
from less_fast.layer import features


@dataclass(frozen=True)
class Layer:
    kv_heads: int
    group: int  # query heads for each KV head
    head_dim: int
    rank: int
    hidden: int

    @property
    def query_heads(self):
        return self.kv_heads * self.group


@st.composite
def layers(draw):
    sizes = dict(kv_heads=3, group=3, head_dim=6, rank=4, hidden=6)
    return Layer(**{name: draw(st.integers(1, largest)) for name, largest in sizes.items()})


@dataclass(frozen=True)
class Policy:
    """One policy in both paths."""

    name: str
    fields: tuple

    def reference(self, kinds, rho):
        """kinds (T,): of the tokens by position, and rho, for policies that ask."""
        more = {"kinds": [tuple(kinds)], "rho": [rho]}.get(self.fast.needs, [])
        return getattr(less_ref, self.name)(*self.fields, *more)

    @property
    def fast(self):
        return getattr(less_fast, self.name)(*self.fields)


def policies(*names, largest=5):
    """Budgets from 1 to 2 * `largest`; every policy that evicts, unless named."""
    two = st.sampled_from([(a, b) for b in range(1, largest + 1) for a in range(largest + 1)] + [(1, 0), (largest, 0)])
    fields = {
        "H2O": two,
        "TOVA": st.tuples(st.integers(1, 2 * largest)),
        "Scissorhands": two.flatmap(lambda both: st.tuples(st.just(sum(both)), st.just(both[1]), st.sampled_from([1, 3, 7, 52]))),
        "SnapKV": two.flatmap(lambda both: st.tuples(st.just(sum(both)), st.integers(1, sum(both)), st.integers(0, 3))),
        "Retention": two.flatmap(lambda both: st.tuples(st.just(sum(both)), st.integers(0, sum(both)))),
        "FastGen": two.flatmap(
            lambda both: st.tuples(
                *(st.integers(sum(both), sum(both) + 3), *map(st.just, both), st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
            )
        ),
        "Lambda": two,
        "Window": st.tuples(st.integers(1, 2 * largest)),
    }
    return st.one_of([st.builds(Policy, st.just(name), fields[name]) for name in names or EVICTING_POLICIES])


ONE_AT_A_TIME = ("H2O", "TOVA", "Scissorhands", "SnapKV", "Retention", "Lambda", "Window")
EVICTING_POLICIES = (*ONE_AT_A_TIME, "FastGen")
ANY_POLICY = policies() | st.just(Policy("Window", (99,)))  # which keeps everything


PATTERNS = {1: ["a"], 2: ["ab", "aa"], 3: ["aba", "aab", "abb", "abc", "aaa"]}
"""Which KV heads share a policy: equal ones may lie apart."""


def policy_tables(kv_heads, of):
    """A policy for each KV head. The patterns come first, because two policies drawn freely are too often the same."""
    return st.tuples(st.sampled_from(PATTERNS[kv_heads]), of, of, of).map(
        lambda drawn: one_for_all(tuple(drawn[1 + "abc".index(which)] for which in drawn[0]))
    )


def one_for_all(table):
    """A policy that pools over the layer is that of all its KV heads."""
    pooled = [policy for policy in table if policy.fast.pooled]
    return (pooled[0],) * len(table) if pooled else table


def chunkings(length):
    """Lengths of at least 1 that sum to `length`: one chunk, streaming, a prompt and then streaming, or anything."""
    prompt = st.integers(1, length).map(lambda p: (p,) + (1,) * (length - p))
    cuts = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())
    anything = cuts.map(lambda ends: tuple(np.diff([0, *sorted(ends), length]).tolist()))
    return st.one_of(st.just((length,)), st.just((1,) * length), prompt, anything)


def slices(chunks):
    ends = np.cumsum(chunks).tolist()
    return [slice(end - m, end) for end, m in zip(ends, chunks)]


def reference_kernels(layer, seed, family=1.0):
    """Random kernels: the name of a control, or the scale of the learned kernels' third matrix; with 1 their low-rank part
    weighs about as much as the exact part."""
    rng = np.random.default_rng([seed, 1])
    Hq, Hkv, D, R, h = layer.query_heads, layer.kv_heads, layer.head_dim, layer.rank, layer.hidden
    if family == "performer":
        return less_ref.Performer(rng.normal(size=(R, D)), D**-0.5)
    if family == "elu":
        return less_ref.Elu(D)
    sizes = dict(q1=(Hq, D, h), q2=(Hq, h, R), k1=(Hkv, D, h), k2=(Hkv, h, R), k3=(Hkv, R, R))
    if family == "exponential":
        sizes |= dict(q0=(Hq, D, R), k0=(Hkv, D, R), k3=(Hkv, R))
    weights = {name: rng.normal(size=size) * size[1] ** -0.5 for name, size in sizes.items()}
    if family == "exponential":
        return less_ref.Exponential(**weights)
    return less_ref.Kernels(**weights | {"k3": weights["k3"] * family})


def reference_rho(layer, seed):
    """A random rho, whose weights float32 holds exactly."""
    rng, width = np.random.default_rng([seed, 4]), (layer.group + 2) * layer.head_dim
    sizes = dict(r0=(width, 4), r1=(width, layer.hidden), r2=(layer.hidden, 4), r3=(4,))
    weights = {name: rng.normal(size=(layer.kv_heads, *size)) * size[0] ** -0.5 for name, size in sizes.items()}
    return less_ref.Rho(**{name: weight.astype(np.float32).astype(float) for name, weight in weights.items()})


def fast_kernels(reference, layer=None, dtype=torch.float64, rho=None):
    """The same kernels for the fast path, with rho if it is given; None stays None without. The controls know no heads, so they
    need the layer."""
    if rho is not None:
        sizes = layer.query_heads, layer.kv_heads, layer.head_dim
        kernels = features.NoState(*sizes) if reference is None else fast_kernels(reference, layer, dtype)
        kernels.rho = features.Rho(*sizes, layer.hidden).to(dtype).requires_grad_(False)
        for name, weight in kernels.rho.named_parameters():
            weight.copy_(torch.from_numpy(getattr(rho, name)))
        return kernels
    if reference is None:
        return None
    if not isinstance(reference, less_ref.Kernels):
        family = getattr(features, type(reference).__name__)
        kernels = family(layer.query_heads, layer.kv_heads, layer.head_dim, reference.rank)
        if kernels.state_dict():
            kernels.w = torch.from_numpy(reference.w)
        return kernels.to(dtype)
    (Hq, D, h), Hkv = reference.q1.shape, reference.k1.shape[0]
    family = features.Exponential if isinstance(reference, less_ref.Exponential) else less_fast.LayerKernels
    kernels = family(Hq, Hkv, D, reference.rank, h).to(dtype)
    with torch.no_grad():
        for name, weight in kernels.named_parameters():
            weight.copy_(torch.from_numpy(getattr(reference, name)))
    return kernels.requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """A layer and a sequence; everything else follows from the seed."""

    layer: Layer
    chunks: tuple
    policies: tuple  # one for each KV head
    k3: float | str | None  # scale of the kernels' third matrix (0: no low-rank part), a control kernel, or the bare policy
    scale: float | None
    seed: int
    softcap: float | None = None
    sinking: bool = False  # each query head has a sink
    int8: bool = False  # slots are in eight bits

    @property
    def length(self):
        return sum(self.chunks)

    @property
    def reference(self):
        return self.reference_of(self.kinds())

    def reference_of(self, kinds):
        """The reference's policies for tokens of those kinds, by position."""
        return [policy.reference(kinds, self.rho) for policy in self.policies]

    @property
    def fast(self):
        return [policy.fast for policy in self.policies]

    @property
    def kernels(self):
        return None if self.k3 is None else reference_kernels(self.layer, self.seed, self.k3)

    @property
    def rho(self):
        """None unless a policy asks."""
        return reference_rho(self.layer, self.seed) if any(policy.fast.needs == "rho" for policy in self.policies) else None

    def qkv(self, *more):
        """q (Hq, T, D), k and v (Hkv, T, D); `more` numbers give another sequence of the same case."""
        rng = np.random.default_rng([self.seed, 2, *more])
        heads = self.layer.query_heads, self.layer.kv_heads, self.layer.kv_heads
        return tuple(rng.normal(size=(h, self.length, self.layer.head_dim)) for h in heads)

    @property
    def sinks(self):
        """(Hq,) logits of nothing, or None."""
        return np.random.default_rng([self.seed, 9]).normal(size=self.layer.query_heads) * 3 if self.sinking else None

    def kinds(self, *more):
        """(T,): the kinds of the tokens of that sequence."""
        return np.random.default_rng([self.seed, 3, *more]).choice(3, self.length, p=[0.6, 0.25, 0.15])

    @property
    def attention(self):
        """The reference's."""
        plain = self.softcap is None and not self.sinking
        return less_ref.attention if plain else less_ref.Logits(self.softcap, self.sinks)

    def run(self, step=less_ref.extend, **instead):
        """The reference on this case."""
        usual = dict(zip("qkv", self.qkv()), policy=self.reference, kernels=self.kernels, chunks=self.chunks, scale=self.scale)
        return less_ref.run(**usual | instead, step=partial(step, attention=self.attention))


LENGTHS = st.one_of(st.integers(12, 40), st.integers(1, 40))  # mostly long enough that something is evicted
KERNELS = st.sampled_from([1.0, 1.0, 1.0, 0.0, None, "exponential", "performer", "elu"])
PLAIN = st.just((None, False))
ANY_ATTENTION = st.sampled_from([(None, False), (None, False), (1.5, False), (None, True), (0.7, True)])
"""A softcap, and whether there are sinks."""
ANY_SLOTS = st.sampled_from([False, False, True])
"""Whether they are in eight bits."""


@st.composite
def cases(draw, length=LENGTHS, chunks=chunkings, policy=policies(), k3=KERNELS, attention=PLAIN, int8=st.just(False)):
    """`chunks`: a function from the length to a strategy; `policy`: a strategy for single policies."""
    layer, int8 = draw(layers()), draw(int8)
    if int8:
        layer = replace(layer, head_dim=4 * draw(st.integers(1, 2)))
    table = draw(policy_tables(layer.kv_heads, policy))
    softcap, sinking = draw(attention)
    return Case(
        layer=layer,
        chunks=draw(chunks(draw(length))),
        policies=table,
        k3=draw(k3),
        scale=draw(st.sampled_from([None, None, 0.3, 1.7])),
        seed=draw(st.integers(0, 2**16)),
        softcap=softcap,
        sinking=sinking,
        int8=int8,
    )


def streaming(length):
    return st.just((1,) * length)


def in_one_chunk(length):
    return st.just((length,))


some_kernels = st.just(1.0)


@st.composite
def padded_batches(draw, length):
    """valid (N, length) bool: rows with pads on the left, on the right, anywhere, or without any token at all."""
    rows = draw(st.integers(1, 4))
    valid = np.zeros((rows, length), bool)
    for row in range(rows):
        tokens = draw(st.integers(0, length))
        where = draw(st.sampled_from(["left", "right", "anywhere"]))
        if where == "anywhere":
            order = np.random.default_rng(draw(st.integers(0, 2**16))).permutation(length)
            valid[row, order[:tokens]] = True
        else:
            valid[row, slice(length - tokens, None) if where == "left" else slice(tokens)] = True
    return valid


def padded(draw_case):
    return draw_case.flatmap(lambda case: st.tuples(st.just(case), padded_batches(case.length)))


EVICTING = dict(length=st.integers(16, 40), policy=policies(largest=4))
APART = Case(
    Layer(3, 2, 4, 2, 3), (6, 1, 1, 4, 1), (Policy("H2O", (2, 2)), Policy("Window", (2,)), Policy("H2O", (2, 2))), 1.0, None, 0
)
"""Heads of one group with a head of another between them, and two query heads each: too rare to be left to chance."""
YOUNG = Case(Layer(1, 1, 6, 2, 3), (20, 1, 1, 10, 1), (Policy("H2O", (3, 1)),), 1.0, 1.7, 0)
"""Sharp attention to a few late tokens: what is heavy is not what is old, and changes with every chunk."""
