"""LESS, exactly: the readable float64 specification.

LESS (Dong, Yang, Zhang, Wang, Chi, Chen, "Get More with LESS", ICML 2024, arXiv 2402.09398) pairs an eviction policy for
the key-value cache with a small recurrent state that absorbs what the policy evicts, so that every past token can still be
queried. Here is what is computed, in numpy with explicit loops; `less_fast` computes the same and is tested against it.

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
  - KV heads may be fewer than query heads, and each may have a budget and a rank of its own.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

# Kernels: phi(x, query_head) and psi(x, kv_head) turn x (..., D) into (..., R) features; rank(kv_head) is R.

erf = np.frompyfunc(math.erf, 1, 1)


def gelu(x):
    """Exact (erf) GELU, elementwise."""
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)).astype(float))


@dataclass(frozen=True)
class Kernels:
    """The learned kernels of one layer (paper, section 3): phi has weights for each query head, psi for each KV head.

    q1 (Hq, D, h), q2 (Hq, h, R), k1 (Hkv, D, h), k2 (Hkv, h, R), k3 (Hkv, R, R); ranks: None, or how many of the R features
    each KV head has, the first ones.
    """

    q1: np.ndarray
    q2: np.ndarray
    k1: np.ndarray
    k2: np.ndarray
    k3: np.ndarray
    ranks: tuple | None = None

    def rank(self, kv_head):
        return self.ranks[kv_head] if self.ranks else self.k3.shape[-1]

    def phi(self, q, query_head):
        """q (..., D) -> (..., R), non-negative."""
        R = self.rank(query_head * len(self.k1) // len(self.q1))
        return np.abs(gelu(gelu(q @ self.q1[query_head]) @ self.q2[query_head, :, :R]))

    def psi(self, k, kv_head):
        """k (..., D) -> (..., R), non-negative."""
        R = self.rank(kv_head)
        return np.abs(gelu(gelu(k @ self.k1[kv_head]) @ self.k2[kv_head, :, :R]) @ self.k3[kv_head, :R, :R])


@dataclass(frozen=True, kw_only=True)
class Exponential(Kernels):
    """Not the paper's: learned, too, but positive by an exponential, where a narrow hidden layer does, or none (h = 0).

    q0 (Hq, D, R), k0 (Hkv, D, R), and the others as above but for k3 (Hkv, R). Exponents are cut: float32 holds e^80.
    """

    q0: np.ndarray
    k0: np.ndarray

    def phi(self, q, query_head):
        exponent = q @ self.q0[query_head] + gelu(q @ self.q1[query_head]) @ self.q2[query_head]
        return np.exp(np.minimum(exponent, 40))[..., : self.rank(query_head * len(self.k1) // len(self.q1))]

    def psi(self, k, kv_head):
        exponent = k @ self.k0[kv_head] + gelu(k @ self.k1[kv_head]) @ self.k2[kv_head] + self.k3[kv_head]
        return np.exp(np.minimum(exponent, 40))[..., : self.rank(kv_head)]


# Control kernels: nothing learned, the same for all heads. The paper compares with the first.


@dataclass(frozen=True)
class Performer:
    """Positive random features (Choromanski et al. 2020): phi(q).psi(k) is e^(scale q.k) in expectation over w (R, D)."""

    w: np.ndarray
    scale: float

    def rank(self, kv_head):
        return len(self.w)

    def phi(self, x, head):
        """x (..., D) -> (..., R), positive. An exponent, at most |w|^2 / 2, is cut at 40, too."""
        x = x * math.sqrt(self.scale)
        exponent = x @ self.w.T - (x**2).sum(-1, keepdims=True) / 2
        return np.exp(np.minimum(exponent, 40)) / math.sqrt(len(self.w))

    psi = phi


@dataclass(frozen=True)
class Fourier:
    """Random Fourier features (Peng et al. 2021): of queries and keys of unit length, phi(q).psi(k) is e^(q.k) in expectation
    over w (R / 2, D). The features are signed, so phi.z may be negative: then there is no virtual token."""

    w: np.ndarray

    def rank(self, kv_head):
        return 2 * len(self.w)

    def phi(self, x, head):
        """x (..., D) -> (..., R)."""
        angle = x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), 1e-30) @ self.w.T
        return np.concatenate([np.cos(angle), np.sin(angle)], -1) * math.sqrt(math.e / len(self.w))

    psi = phi


@dataclass(frozen=True)
class Elu:
    """phi(x) = psi(x) = elu(x) + 1 (Katharopoulos et al. 2020): as many features as head_dim."""

    head_dim: int

    def rank(self, kv_head):
        return self.head_dim

    def phi(self, x, head):
        """x (..., D) -> (..., D), positive."""
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    psi = phi


# Policies.


class Policy:
    """A budget and two functions over the E entries of one KV head; a score is a number for each, or a row of numbers.

    update(score, p (m, G, E), visible (m, E)) -> score    p: what each query of the chunk gave each entry, softmax over the
                                                           visible; a policy that is `pooled` sees all Hq query heads
    rank(position (E,), score, n) -> (E,)                  the `budget` highest are kept; ties keep the lower position, and
                                                           -inf goes even where there is room

    A few say more: settle(position, score, n) -> score, once at the end of a chunk, before the ranks; `score_shape`, the
    shape of an entry's row of numbers, all 0 at first; `kinds`, that the first of them is the token's kind.
    """

    score_shape, pooled, kinds = (), False, False

    def update(self, score, p, visible):
        return score

    def settle(self, position, score, n):
        return score


@dataclass(frozen=True)
class Full(Policy):
    """Keeps everything."""

    budget = math.inf

    def rank(self, position, score, n):
        return position


@dataclass(frozen=True)
class Window(Policy):
    """Keeps the last `recent` tokens (local attention: Child et al. 2019, Parmar et al. 2018)."""

    recent: int

    @property
    def budget(self):
        return self.recent

    def rank(self, position, score, n):
        return position


@dataclass(frozen=True)
class Lambda(Policy):
    """Keeps the first `sinks` and the last `recent` tokens (LM-Infinite, Han et al. 2023; StreamingLLM, Xiao et al. 2023)."""

    sinks: int
    recent: int

    @property
    def budget(self):
        return self.sinks + self.recent

    def rank(self, position, score, n):
        return np.where(position < self.sinks, np.inf, position)


@dataclass(frozen=True)
class H2O(Policy):
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
class TOVA(Policy):
    """Keeps what the last query attends to most, by the mean over all query heads of the layer (Oren et al. 2024): the same
    tokens in all KV heads, so all of them must follow this policy."""

    budget: int
    pooled = True

    def update(self, score, p, visible):
        return p[-1].mean(0)

    def rank(self, position, score, n):
        return score


@dataclass(frozen=True)
class Scissorhands(Policy):
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


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keeps the last `window` tokens and those to which the last `window` queries attend most, all together; a token counts as
    much as the best of its neighbours within `reach` positions (Li et al. 2024: max pooling with a kernel of 2 reach + 1).

    The paper chooses once, at the end of the prompt, and keeps all that is generated; here the window moves on. The score is
    what each of the last `window` queries gave the token.
    """

    budget: int
    window: int
    reach: int

    @property
    def score_shape(self):
        return (self.window,)

    def update(self, score, p, visible):
        return np.concatenate([score, p.sum(1).T], 1)[:, -self.window :]

    def rank(self, position, score, n):
        recent = position >= n - self.window
        votes = np.where(recent, 0, score.sum(1))
        best = [votes[abs(position - p) <= self.reach].max() for p in position]
        return np.where(recent, np.inf, best)


@dataclass(frozen=True)
class FastGen(Policy):
    """Each head keeps the least that recovers its attention (Ge et al. 2023): 1 special tokens, 2 and punctuation, 3 and the
    `frequent` others with the most accumulated attention, 4 and the last `local`, or 5 everything.

    It chooses when the budget is first exceeded, with a prompt at its end: the first of these sets that got at least
    `recovery` of all attention so far. (A token that was local counts with what it got while it was.) Until then nothing is
    evicted; from then on all else goes, and what does not fit the budget: the least attended, then the newest special tokens.
    A token's kind is 0, 1 for punctuation or 2 for special. Its score: the kind, the attention it got, the part of that
    which it got while local, how many queries it has seen, and its head's choice, 0 before.
    """

    budget: int
    frequent: int
    local: int
    recovery: float
    score_shape, kinds = (5,), True

    def update(self, score, p, visible):
        kind, attention, near, age, choice = score.T
        ages = age + visible.cumsum(0)  # (m, E)
        attention = attention + p.sum((0, 1))
        near = near + (p.sum(1) * (ages <= self.local)).sum(0)
        return np.stack([kind, attention, near, ages[-1], choice], 1)

    def settle(self, position, score, n):
        _, attention, near, _, choice = score.T
        chosen = choice.max()  # tokens that came since have 0
        if n > self.budget and not chosen:
            for chosen in (1, 2, 3, 4, 5):
                member = self.members(position, score, n, chosen)
                recovered = attention[member].sum() + near[~member].sum() * (chosen == 4)
                if recovered >= (self.recovery - 1e-6) * attention.sum():  # equal is enough, whatever the rounding
                    break
        return np.column_stack([score[:, :4], np.full(len(score), chosen)])

    def members(self, position, score, n, choice):
        kind, attention = score[:, 0], score[:, 1]
        member = (kind == 2) | (choice >= 2) & (kind == 1) | (choice >= 4) & (position >= n - self.local)
        if choice >= 3:
            others = np.flatnonzero(~member)
            most = np.lexsort((position[others], -attention[others]))  # of equals the lower position first
            member[others[most[: self.frequent]]] = True
        return member | (choice == 5)

    def rank(self, position, score, n):
        kind, attention, _, _, (choice, *_) = score.T
        rank = np.where(kind == 2, np.finfo(float).max, attention)
        rank[(choice >= 4) & (position >= n - self.local)] = np.inf
        rank[~self.members(position, score, n, choice) & (choice > 0)] = -np.inf
        return rank


# State.


@dataclass(frozen=True)
class Head:
    """What one KV head holds between steps: E <= B entries, in any order, and the low-rank state."""

    position: np.ndarray  # (E,) true token positions
    k: np.ndarray  # (E, D)
    v: np.ndarray  # (E, D)
    score: np.ndarray  # (E,) or (E, ...), whatever the policy keeps
    H: np.ndarray  # (R, D)
    z: np.ndarray  # (R,)


@dataclass(frozen=True)
class State:
    """One layer: its KV heads and the number of tokens seen."""

    heads: tuple
    n: int = 0


def empty_state(kv_heads, head_dim, kernels=None):
    """The state before the first token. kernels None: the bare policy, whose low-rank state has no features."""
    none, ranks = np.zeros((0, head_dim)), [kernels.rank(g) if kernels else 0 for g in range(kv_heads)]
    return State(tuple(Head(np.zeros(0, int), none, none, np.zeros(0), np.zeros((R, head_dim)), np.zeros(R)) for R in ranks))


# Attend: the paper's equation 3 as it is written, and in stable form.


def attend_literal(logits, v, phi, H, z):
    """out = (phi H + sum_j e^logit_j v_j) / (phi.z + sum_j e^logit_j): it overflows for logits beyond 700.
    logits (E,), v (E, D), phi (R,), H (R, D), z (R,) -> (D,)."""
    return (phi @ H + np.exp(logits) @ v) / (phi @ z + np.exp(logits).sum())


def attend(logits, v, phi, H, z, sink=-math.inf):
    """The same, stably: attention over the E visible tokens plus one virtual token, whose logit is log(phi.z) and whose value is
    phi H / (phi.z); where phi.z is not positive there is none."""
    mass = phi @ z
    if mass > 0:
        logits = np.append(logits, math.log(mass))
        v = np.vstack([v, phi @ H / mass])
    return softmax(logits, sink) @ v


def softmax(logits, sink=-math.inf):
    """`sink`: the logit of nothing, which takes its share and gives no value (gpt-oss has one for each query head)."""
    largest = max(logits.max(), sink)
    weight = np.exp(logits - largest)
    return weight / (weight.sum() + math.exp(sink - largest))


# Extend: attend, score, evict and fold.

LARGEST = 1e12  # a token with larger numbers is broken


def extend(state, q, k, v, policy, kernels=None, scale=None, victims=None, kinds=None, softcap=None, sinks=None):
    """The one verb of LESS: m >= 1 new tokens enter; attend, score, evict, fold. Returns (out (m, Hq, D), new state).

    q (Hq, m, D); k, v (Hkv, m, D); policy: one, or a list with one for each KV head; kernels None: the bare policy;
    scale: 1/sqrt(D) unless given; victims: None, or for each KV head the positions to evict instead of the policy's choice
    (a test replays another implementation's choice at a near-tie); kinds (m,): of the tokens, for policies that ask;
    softcap: logits l become softcap tanh(l / softcap) (Gemma 2); sinks (Hq,): a logit of nothing for each query head.

    A token that holds NaN, infinity or a number beyond LARGEST in q, k or v leaves no trace: it is not seen, scored, kept,
    folded or counted, and its own output is NaN.
    """
    (Hq, m, D), Hkv = q.shape, k.shape[0]
    scale = D**-0.5 if scale is None else scale
    policies = policy if isinstance(policy, (list, tuple)) else [policy] * Hkv
    if Hq % Hkv or len(policies) != Hkv or v.shape != k.shape or k.shape[1:] != (m, D):
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}, {len(policies)} policies")
    if any(rule.pooled for rule in policies) and len(set(policies)) > 1:
        raise ValueError(f"a policy that pools over the layer must be that of all its KV heads: {policies}")
    if any(rule.kinds for rule in policies) and np.shape(kinds) != (m,):
        raise ValueError(f"{policies} need the kinds of the {m} tokens")
    sound = np.all([(abs(x) <= LARGEST).all((0, 2)) for x in (q, k, v)], 0)  # (m,)
    if not sound.all():
        out = np.full((m, Hq, D), np.nan)
        if sound.any():
            rest = (policy, kernels, scale, victims, None if kinds is None else kinds[sound], softcap, sinks)
            out[sound], state = extend(state, q[:, sound], k[:, sound], v[:, sound], *rest)
        return out, state
    G = Hq // Hkv
    arrived = np.arange(state.n, state.n + m)
    entries = []  # of each KV head: what is held, then the chunk
    for g, (head, rule) in enumerate(zip(state.heads, policies)):
        score = np.concatenate([head.score.reshape(-1, *rule.score_shape), np.zeros((m, *rule.score_shape))])
        if rule.kinds:
            score[-m:, 0] = kinds
        slots = np.append(head.position, arrived), np.vstack([head.k, k[g]]), np.vstack([head.v, v[g]]), score
        entries.append(Head(*slots, head.H, head.z))
    # 1. attend: query i sees the held entries, chunk tokens up to itself, and the low-rank state before the chunk.
    out = np.zeros((m, Hq, D))
    visible = [head.position <= arrived[:, None] for head in entries]  # [g] -> (m, E)
    p = [np.zeros((m, G, len(head.position))) for head in entries]  # [g] -> (m, G, E)
    for a in range(Hq):
        g = a // G
        phi = kernels.phi(q[a], a) if kernels else np.zeros((m, 0))  # (m, R)
        for i in range(m):
            seen = visible[g][i]
            logits = scale * entries[g].k[seen] @ q[a, i]
            logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
            sink = -math.inf if sinks is None else sinks[a]
            out[i, a] = attend(logits, entries[g].v[seen], phi[i], entries[g].H, entries[g].z, sink)
            p[g][i, a % G, seen] = softmax(logits, sink)  # the low-rank mass is left out of the scores
    heads = []
    for g, rule in enumerate(policies):
        # 2. score
        score = rule.update(entries[g].score, np.concatenate(p, 1) if rule.pooled else p[g], visible[g])
        scored = replace(entries[g], score=rule.settle(entries[g].position, score, state.n + m))
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
    return kept & (rank > -np.inf)


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
    score: list = field(default_factory=list)  # [c][g] -> (E,) or (E, ...)
    H: list = field(default_factory=list)  # [c][g] -> (R, D)
    z: list = field(default_factory=list)  # [c][g] -> (R,)


def run(q, k, v, policy, kernels=None, chunks=None, scale=None, kinds=None, softcap=None, sinks=None):
    """Applies `extend` to a whole sequence, chunk by chunk.

    q (Hq, T, D); k, v (Hkv, T, D); policy: one, or a list with one for each KV head; kernels None: the bare policy;
    chunks: lengths that sum to T, one token at a time (streaming) unless given, and different chunkings are different
    computations; kinds (T,): of the tokens, for policies that ask; softcap and sinks as in `extend`. Returns a Trace.
    """
    T = q.shape[1]
    chunks = [1] * T if chunks is None else list(chunks)
    if sum(chunks) != T or min(chunks, default=1) < 1:
        raise ValueError(f"chunks must be at least 1 each and sum to {T} tokens: {chunks}")
    state = empty_state(k.shape[0], k.shape[2], kernels)
    trace = Trace(np.zeros((T, q.shape[0], q.shape[2])))
    start = 0
    for m in chunks:
        now = slice(start, start + m)
        rest = (None, None if kinds is None else kinds[now], softcap, sinks)
        trace.out[now], state = extend(state, q[:, now], k[:, now], v[:, now], policy, kernels, scale, *rest)
        start += m
        order = [np.argsort(head.position) for head in state.heads]
        trace.kept.append([head.position[o] for head, o in zip(state.heads, order)])
        trace.score.append([head.score[o] for head, o in zip(state.heads, order)])
        trace.H.append([head.H for head in state.heads])
        trace.z.append([head.z for head in state.heads])
    return trace


# Parallel form (paper, section 3.2).


def eviction_times(trace):
    """e (Hkv, T) of a streaming run: the step at whose end each token was evicted, infinity while it is kept. An evicted token
    never returns, so this one number for each token and KV head describes the whole run."""
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
            low_rank *= low_rank.sum() > 0
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


def memory(policies, head_dim, kernels=None):
    """Numbers held by one layer and sequence, as a dict; policies: one for each KV head. entries: (B + 1) * 2D keys and values
    (one slot is scratch); low_rank: R * (D + 1), about 4 tokens of 2D at R = 8; bookkeeping: a position and a score a slot."""
    return {
        "entries": sum((rule.budget + 1) * 2 * head_dim for rule in policies),
        "low_rank": sum(kernels.rank(g) * (head_dim + 1) for g in range(len(policies))) if kernels else 0,
        "bookkeeping": sum((rule.budget + 1) * (1 + math.prod(rule.score_shape)) for rule in policies),
    }
