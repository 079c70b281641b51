"""LESS, exactly: the readable float64 specification.

LESS (Dong, Yang, Zhang, Wang, Chi, Chen, "Get More with LESS", ICML 2024, arXiv 2402.09398) pairs an eviction policy for
the key-value cache with a small recurrent state that absorbs whatever the policy evicts, so that every past token can
still be queried. This file says what is computed, in plain numpy with explicit loops. Read it from top to bottom. It is
slow on purpose; `less_fast` computes the same in fixed-shape tensors and is tested against it.

One attention layer, one sequence. From letter to the paper's symbol:

    Hq, Hkv, G    query heads, KV heads, query heads per KV head (G = Hq / Hkv); query head a reads KV head a // G
    D, R, h       head dimension, rank of the low-rank state, hidden width of the kernels (paper: R = 8, h = 512)
    q, k, v       after positional encoding; q is not scaled (scale enters with the logit)
    phi, psi      the learned kernels of queries and keys; non-negative vectors of length R (paper, section 3)
    H, z          the low-rank state of a KV head: (R, D) and (R,)  (paper, section 3 and figure 4)
    B             budget: how many entries a KV head holds between steps
    n             tokens seen so far; positions count from 0

Where it differs from the authors' public code (hdong920/LESS):
  - no epsilon: the authors clamp the low-rank terms at 1e-6 when generating and add 1e-6 in the parallel form;
  - scores come from the softmax over the visible tokens; the authors' parallel path and training score with the softmax
    over all causal keys, evicted ones included, which no cache that really evicts can compute;
  - evicted tokens are gone: a tie can never bring one back; a recent budget of 0 evicts;
  - KV heads may be fewer than query heads, and each may have a budget of its own.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

# Kernels (paper, section 3).


def gelu(x):
    """Exact (erf) GELU, elementwise."""
    return 0.5 * x * (1.0 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2.0)))


@dataclass(frozen=True)
class Kernels:
    """The learned kernels of one layer: phi has weights for each query head, psi for each KV head.

    q1 (Hq, D, h), q2 (Hq, h, R), k1 (Hkv, D, h), k2 (Hkv, h, R), k3 (Hkv, R, R)
    """

    q1: np.ndarray
    q2: np.ndarray
    k1: np.ndarray
    k2: np.ndarray
    k3: np.ndarray

    @property
    def rank(self):
        return self.k3.shape[-1]

    def phi(self, q, query_head):
        """q (..., D) -> (..., R), non-negative."""
        return np.abs(gelu(gelu(q @ self.q1[query_head]) @ self.q2[query_head]))

    def psi(self, k, kv_head):
        """k (..., D) -> (..., R), non-negative."""
        return np.abs(gelu(gelu(k @ self.k1[kv_head]) @ self.k2[kv_head]) @ self.k3[kv_head])


# Policies.
# A policy is a budget and two functions over the entries of one KV head:
#   update(score (E,), p (m, G, E), visible (m, E)) -> (E,)    p: what each query of the chunk gave each entry, softmax over
#                                                              the visible; a policy with `pooled` sees all Hq query heads
#   rank(position (E,), score (E,), n) -> (E,)                 the highest ranks are kept; ties keep the lower position


@dataclass(frozen=True)
class Full:
    """Keeps everything."""

    budget = math.inf

    def update(self, score, p, visible):
        return score

    def rank(self, position, score, n):
        return position


@dataclass(frozen=True)
class Window:
    """Keeps the last `recent` tokens (local attention: Child et al. 2019, Parmar et al. 2018)."""

    recent: int

    @property
    def budget(self):
        return self.recent

    def update(self, score, p, visible):
        return score

    def rank(self, position, score, n):
        return position


@dataclass(frozen=True)
class Lambda:
    """Keeps the first `sinks` and the last `recent` tokens (LM-Infinite, Han et al. 2023; StreamingLLM, Xiao et al. 2023)."""

    sinks: int
    recent: int

    @property
    def budget(self):
        return self.sinks + self.recent

    def update(self, score, p, visible):
        return score

    def rank(self, position, score, n):
        return np.where(position < self.sinks, np.inf, position)


@dataclass(frozen=True)
class H2O:
    """Keeps the last `recent` tokens and the `heavy` ones with the most accumulated attention (Zhang et al. 2023)."""

    heavy: int
    recent: int

    @property
    def budget(self):
        return self.heavy + self.recent

    def update(self, score, p, visible):
        return score + p.sum((0, 1))

    def rank(self, position, score, n):
        return np.where(position >= n - self.recent, np.inf, score)


@dataclass(frozen=True)
class DecayedH2O(H2O):
    """H2O whose scores fade by `decay` with every query, so that old attention counts less (A2SF, Jo and Shin 2024)."""

    decay: float

    def update(self, score, p, visible):
        for attention in p.sum(1):  # query by query
            score = self.decay * score + attention
        return score


@dataclass(frozen=True)
class TOVA:
    """Keeps what the last query attends to most, by the mean over all query heads of the layer (Oren et al. 2024).

    All KV heads hold the same tokens, so all of them must follow this policy.
    """

    budget: int
    pooled = True

    def update(self, score, p, visible):
        return p[-1].mean(0)

    def rank(self, position, score, n):
        return score


@dataclass(frozen=True)
class Scissorhands:
    """Keeps the last `recent` tokens and those that were seldom unimportant (Liu et al. 2023): of the last `history` queries,
    how many gave the token less than the average, 1 / (visible tokens)? Attention is the mean over the query heads.

    The score is a row of `history` bits, the newest the lowest: was the token below the average? Equal attention is not
    below, whatever the rounding. A float64 holds up to 52 bits exactly.
    """

    budget: int
    recent: int
    history: int

    def update(self, score, p, visible):
        for attention, seen in zip(p.mean(1), visible):  # query by query
            below = seen & (attention * seen.sum() < 1 - 1e-6)
            score = (2 * score + below) % 2**self.history
        return score

    def rank(self, position, score, n):
        below = np.array([bin(int(bits)).count("1") for bits in score])
        return np.where(position >= n - self.recent, np.inf, -below)


# State.


@dataclass(frozen=True)
class Head:
    """What one KV head holds between steps: E <= B entries, in any order, and the low-rank state."""

    position: np.ndarray  # (E,) true token positions
    k: np.ndarray  # (E, D)
    v: np.ndarray  # (E, D)
    score: np.ndarray  # (E,)
    H: np.ndarray  # (R, D)
    z: np.ndarray  # (R,)


@dataclass(frozen=True)
class State:
    """One layer: its KV heads and the number of tokens seen."""

    heads: tuple
    n: int = 0


def empty_state(kv_heads, head_dim, rank=0):
    """The state before the first token. rank 0: the bare policy."""
    none = np.zeros((0, head_dim))
    head = Head(np.zeros(0, int), none, none, np.zeros(0), np.zeros((rank, head_dim)), np.zeros(rank))
    return State((head,) * kv_heads)


# Attend: the paper's equation 3 as it is written, and in stable form.


def attend_literal(logits, v, phi, H, z):
    """out = (phi H + sum_j e^logit_j v_j) / (phi.z + sum_j e^logit_j), as it is written.

    logits (E,), v (E, D), phi (R,), H (R, D), z (R,) -> (D,). Overflows for logits beyond 700.
    """
    return (phi @ H + np.exp(logits) @ v) / (phi @ z + np.exp(logits).sum())


def attend(logits, v, phi, H, z):
    """The same, stably: attention over the E visible tokens plus one virtual token.

    The virtual token's logit is log(phi.z) and its value phi H / (phi.z); with phi.z = 0 there is none.
    """
    mass = phi @ z
    if mass > 0:
        logits = np.append(logits, math.log(mass))
        v = np.vstack([v, phi @ H / mass])
    return softmax(logits) @ v


def softmax(logits):
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


# Extend: attend, score, evict and fold.


def extend(state, q, k, v, policy, kernels=None, scale=None, victims=None):
    """The one verb of LESS: m >= 1 new tokens enter; attend, score, evict, fold. Returns (out (m, Hq, D), new state).

    q (Hq, m, D); k, v (Hkv, m, D); policy: one, or a list with one for each KV head; kernels None: the bare policy;
    scale: 1/sqrt(D) unless given; victims: None, or for each KV head the positions to evict instead of the policy's choice
    (a test replays another implementation's choice at a near-tie).
    """
    (Hq, m, D), Hkv = q.shape, k.shape[0]
    scale = D**-0.5 if scale is None else scale
    policies = policy if isinstance(policy, (list, tuple)) else [policy] * Hkv
    if Hq % Hkv or len(policies) != Hkv or v.shape != k.shape or k.shape[1:] != (m, D):
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}, {len(policies)} policies")
    if any(getattr(rule, "pooled", False) for rule in policies) and len(set(policies)) > 1:
        raise ValueError(f"a policy that pools over the layer must be that of all its KV heads: {policies}")
    G = Hq // Hkv
    arrived = np.arange(state.n, state.n + m)
    # The entries of each KV head: what is held, then the chunk.
    entries = [
        replace(
            head,
            position=np.append(head.position, arrived),
            k=np.vstack([head.k, k[g]]),
            v=np.vstack([head.v, v[g]]),
            score=np.append(head.score, np.zeros(m)),
        )
        for g, head in enumerate(state.heads)
    ]
    # 1. attend: query i sees the held entries, chunk tokens up to itself, and the low-rank state before the chunk.
    out = np.zeros((m, Hq, D))
    visible = [head.position <= arrived[:, None] for head in entries]  # [g] -> (m, E)
    p = [np.zeros((m, G, len(head.position))) for head in entries]  # [g] -> (m, G, E)
    for a in range(Hq):
        g = a // G
        for i in range(m):
            seen = visible[g][i]
            logits = scale * entries[g].k[seen] @ q[a, i]
            phi = kernels.phi(q[a, i], a) if kernels else np.zeros(0)
            out[i, a] = attend(logits, entries[g].v[seen], phi, entries[g].H, entries[g].z)
            p[g][i, a % G, seen] = softmax(logits)  # the low-rank mass is left out of the scores
    heads = []
    for g, rule in enumerate(policies):
        # 2. score
        attention = np.concatenate(p, 1) if getattr(rule, "pooled", False) else p[g]
        scored = replace(entries[g], score=rule.update(entries[g].score, attention, visible[g]))
        # 3. evict
        kept = choose(scored, rule, state.n + m) if victims is None else ~np.isin(scored.position, victims[g])
        # 4. fold
        heads.append(fold(scored, kept, kernels, g))
    return out, State(tuple(heads), state.n + m)


def choose(entries, policy, n):
    """Which entries stay, (E,) bool: the `budget` that the policy ranks highest; ties keep the lower position."""
    rank = policy.rank(entries.position, entries.score, n)
    order = np.lexsort((entries.position, -rank))  # by rank, descending; then by position, ascending
    kept = np.zeros(len(order), bool)
    kept[order[: min(policy.budget, len(order))]] = True
    return kept


def fold(entries, kept, kernels, kv_head):
    """What stays, with every dropped entry folded in exactly once: H += psi(k)^T v, z += psi(k)  (paper, section 3)."""
    H, z = entries.H.copy(), entries.z.copy()
    if kernels:
        for j in np.flatnonzero(~kept):
            psi = kernels.psi(entries.k[j], kv_head)
            H += np.outer(psi, entries.v[j])
            z += psi
    return Head(entries.position[kept], entries.k[kept], entries.v[kept], entries.score[kept], H, z)


# Run: whole sequences.


@dataclass
class Trace:
    """What a run did. After every chunk c: kept[c][g] sorted positions of KV head g, score[c][g] in that order, H[c], z[c]."""

    out: np.ndarray  # (T, Hq, D)
    kept: list = field(default_factory=list)  # [c][g] -> (E,)
    score: list = field(default_factory=list)  # [c][g] -> (E,)
    H: list = field(default_factory=list)  # [c] -> (Hkv, R, D)
    z: list = field(default_factory=list)  # [c] -> (Hkv, R)


def run(q, k, v, policy, kernels=None, chunks=None, scale=None):
    """Applies `extend` to a whole sequence, chunk by chunk.

    q (Hq, T, D); k, v (Hkv, T, D); policy: one, or a list with one for each KV head; kernels None: the bare policy;
    chunks: lengths that sum to T, one token at a time (streaming) unless given. Different chunkings are different
    computations. Returns a Trace.
    """
    T = q.shape[1]
    chunks = [1] * T if chunks is None else list(chunks)
    if sum(chunks) != T or min(chunks, default=1) < 1:
        raise ValueError(f"chunks must be at least 1 each and sum to {T} tokens: {chunks}")
    state = empty_state(k.shape[0], k.shape[2], kernels.rank if kernels else 0)
    trace = Trace(np.zeros((T, q.shape[0], q.shape[2])))
    start = 0
    for m in chunks:
        now = slice(start, start + m)
        trace.out[now], state = extend(state, q[:, now], k[:, now], v[:, now], policy, kernels, scale)
        start += m
        order = [np.argsort(head.position) for head in state.heads]
        trace.kept.append([head.position[o] for head, o in zip(state.heads, order)])
        trace.score.append([head.score[o] for head, o in zip(state.heads, order)])
        trace.H.append(np.stack([head.H for head in state.heads]))
        trace.z.append(np.stack([head.z for head in state.heads]))
    return trace


# Parallel form (paper, section 3.2).


def eviction_times(trace):
    """e (Hkv, T) of a streaming run: the step at whose end each token was evicted, infinity while it is kept.

    An evicted token never returns, so this one number for each token and KV head describes the whole run.
    """
    steps = len(trace.kept)
    e = np.full((len(trace.kept[0]), steps), np.inf)
    for g in range(e.shape[0]):
        for step in reversed(range(steps)):
            gone = np.setdiff1d(np.arange(step + 1), trace.kept[step][g])
            e[g, gone] = step
    return e


def parallel(q, k, v, e, kernels=None, scale=None):
    """The streaming output (T, Hq, D) without the recurrence: query i sees token j exactly iff j <= i <= e_j, and through
    phi(q_i).psi(k_j) iff i > e_j. Shapes as in `run`, e (Hkv, T). (Paper, section 3.2.)"""
    (Hq, T, D), G = q.shape, q.shape[0] // k.shape[0]
    scale = D**-0.5 if scale is None else scale
    out = np.zeros((T, Hq, D))
    for a in range(Hq):
        g = a // G
        for i in range(T):
            exact = (np.arange(T) <= i) & (i <= e[g])
            folded = i > e[g]
            logits = scale * k[g, exact] @ q[a, i]
            low_rank = kernels.psi(k[g, folded], g) @ kernels.phi(q[a, i], a) if kernels else np.zeros(folded.sum())
            largest = logits.max()
            weight = np.append(np.exp(logits - largest), low_rank * math.exp(-largest))
            out[i, a] = weight @ np.vstack([v[g, exact], v[g, folded]]) / weight.sum()
    return out


def training_loss(out, full, projection, e):
    """The objective of one layer (paper, section 3.2): the mean squared error after the output projection, over the
    queries from which something has been evicted in some head.

    out, full (T, Hq, D): the layer's attention output with LESS and with the full cache; projection (Hq * D, hidden);
    e (Hkv, T). ValueError where nothing was evicted before the last query: there is nothing to learn.
    """
    T = out.shape[0]
    queries = [i for i in range(T) if (e < i).any()]
    if not queries:
        raise ValueError(f"nothing is evicted within {T} tokens: use a longer sequence or a smaller budget")
    difference = (out[queries] - full[queries]).reshape(len(queries), -1) @ projection
    return (difference**2).mean()


# Memory.


def memory(budgets, head_dim, rank=0):
    """Numbers held by one layer and sequence, as a dict; budgets: one for each KV head.

    entries: (B + 1) * 2D keys and values (one slot is scratch); low_rank: R * (D + 1); bookkeeping: a position and a
    score for each slot. A bare policy (rank 0) has no low_rank part.
    """
    slots = sum(budget + 1 for budget in budgets)
    return {
        "entries": slots * 2 * head_dim,
        "low_rank": len(budgets) * rank * (head_dim + 1),
        "bookkeeping": slots * 2,
    }


def token_equivalents(head_dim, rank):
    """How many cached tokens the low-rank state of a KV head weighs: R (D + 1) / 2D; 4.03 at R = 8, D = 128."""
    return rank * (head_dim + 1) / (2 * head_dim)


def kernel_weights(query_heads, kv_heads, head_dim, hidden, rank):
    """Weights of one layer's kernels, shared by all sequences: Hq (D h + h R) + Hkv (D h + h R + R^2)."""
    one = head_dim * hidden + hidden * rank
    return query_heads * one + kv_heads * (one + rank * rank)
