"""LESS, exactly: the readable float64 specification.

LESS (Dong, Yang, Zhang, Wang, Chi, Chen, "Get More with LESS", ICML 2024, arXiv 2402.09398) pairs an eviction policy for
the key-value cache with a small recurrent state that absorbs what the policy evicts, so that every past token can still be
queried. This is one attention layer and one sequence, in numpy with explicit loops; `less_fast` is tested against it. LESS
itself ends with `parallel`; below that are other policies, other kernels, other logits, broken tokens, and the training loss.

    Hq, Hkv, G    query heads, KV heads, query heads per KV head (G = Hq / Hkv); query head a reads KV head a // G
    D, R, h       head dimension, rank of the low-rank state, hidden width of the kernels (paper: R = 8, h = 512)
    q, k, v       after positional encoding; q is not scaled (scale enters with the logit)
    phi, psi      the learned kernels of queries and keys; non-negative vectors of length R (paper, section 3)
    H, z          the low-rank state of a KV head: (R, D) and (R,)  (paper, section 3 and figure 4)
    B, n          budget, how many entries a KV head holds between steps; tokens seen so far (positions count from 0)

Three tokens by hand: one head, D = 1, scale 1, budget 1. All queries are 1, the keys log 3, 0, 0, the values 4, 8, 2. So e^logit
is 3, 1, 1. Of the kernels `Elu`, phi(1) = 2 and psi(0) = 1. The policy keeps the token with the most attention so far.

    token  attend                                  scores of token 0 and the new one   evict     fold
    0      4                                       1
    1      (3*4 + 1*8) / (3 + 1) = 5               1 + 3/4 = 1.75    1/4 = 0.25        token 1   H = 1*8 = 8       z = 1
    2      (2*8 + 3*4 + 1*2) / (2*1 + 3 + 1) = 5   1.75 + 3/4 = 2.5  1/4 = 0.25        token 2   H = 8 + 1*2 = 10  z = 1 + 1 = 2

Query 2 cannot see token 1: it reads phi H = 2*8 and phi.z = 2*1. The full cache would give 4.4, the bare policy 3.5.

    >>> q, k, v = np.array([[1, 1, 1], [math.log(3), 0, 0], [4, 8, 2]]).reshape(3, 1, 3, 1)
    >>> trace = run(q, k, v, H2O(heavy=1, recent=0), Elu(1), scale=1)
    >>> trace.out.flatten().round(9).tolist(), trace.kept[2][0].tolist(), trace.H[2][0].tolist(), trace.z[2][0].tolist()
    ([4.0, 5.0, 5.0], [0], [[10.0]], [2.0])
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

erf = np.frompyfunc(math.erf, 1, 1)


def gelu(x):
    """Exact (erf) GELU, elementwise."""
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)).astype(float))


@dataclass(frozen=True)
class Kernels:
    """The learned kernels of one layer (paper, section 3): phi has weights for each query head, psi for each KV head."""

    q1: np.ndarray  # (Hq, D, h)
    q2: np.ndarray  # (Hq, h, R)
    k1: np.ndarray  # (Hkv, D, h)
    k2: np.ndarray  # (Hkv, h, R)
    k3: np.ndarray  # (Hkv, R, R)
    ranks: tuple | None = None  # how many of the R features each KV head has, the first ones; None: all

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


class Policy:
    """What a KV head keeps: a `budget`, and two functions over its E entries.

    born(q (G, m, D), k (m, D), v (m, D), kv_head) -> (m, *score_shape)    the scores with which new tokens enter, 0 unless said
    update(score, p (m, G, E), visible (m, E)) -> score    p: what each query gave each entry, softmax over the visible
    rank(position (E,), score, n) -> (E,)                  the `budget` highest are kept; ties keep the lower position, and
                                                           -inf goes even if there is room

    An entry's score is a number, or an array of `score_shape`. `rank` is called once, at the end of a chunk, and
    may note in the score, in place, what it decides. A policy that is `pooled` is given p of all Hq query heads of the layer.
    """

    score_shape, pooled = (), False

    def born(self, q, k, v, kv_head):
        return np.zeros((len(k), *self.score_shape))

    def update(self, score, p, visible):
        return score


@dataclass(frozen=True)
class H2O(Policy):
    """Keeps the last `recent` tokens and the `heavy` ones with the most accumulated attention (Zhang et al. 2023)."""

    heavy: int
    recent: int
    budget = property(lambda self: self.heavy + self.recent)

    def update(self, score, p, visible):
        return score + p.sum((0, 1))

    def rank(self, position, score, n):
        return np.where(position >= n - self.recent, np.inf, score)


@dataclass(frozen=True)
class Head:
    """What one KV head holds between steps: E <= B entries, in any order, and the low-rank state."""

    position: np.ndarray  # (E,) true token positions
    k: np.ndarray  # (E, D)
    v: np.ndarray  # (E, D)
    score: np.ndarray  # (E,) or (E, *score_shape)
    H: np.ndarray  # (R, D)
    z: np.ndarray  # (R,)


@dataclass(frozen=True)
class State:
    """One layer: its KV heads and the number of tokens seen; `moved` is for streams (see `Context`)."""

    heads: tuple
    n: int = 0
    moved: int = 0


def empty_state(kv_heads, head_dim, kernels=None):
    """The state before the first token. kernels None: the bare policy, whose low-rank state has no features."""
    none, ranks = np.zeros((0, head_dim)), [kernels.rank(g) if kernels else 0 for g in range(kv_heads)]
    return State(tuple(Head(np.zeros(0, int), none, none, np.zeros(0), np.zeros((R, head_dim)), np.zeros(R)) for R in ranks))


def attend_literal(logits, v, phi, H, z):
    """The paper's equation 3 as it is written: out = (phi H + sum_j e^logit_j v_j) / (phi.z + sum_j e^logit_j).
    logits (E,), v (E, D), phi (R,), H (R, D), z (R,) -> (D,). It overflows if a logit is beyond 700."""
    return (phi @ H + np.exp(logits) @ v) / (phi @ z + np.exp(logits).sum())


def attend(logits, v, phi, H, z, sink=-math.inf):
    """The same, stably: attention over the E visible tokens plus one virtual token, whose logit is log(phi.z) and whose value is
    phi H / (phi.z). If phi.z is not positive there is none."""
    mass = phi @ z
    if mass > 0:
        logits, v = np.append(logits, math.log(mass)), np.vstack([v, phi @ H / mass])
    return softmax(logits, sink) @ v


def softmax(logits, sink=-math.inf):
    """(E,) -> (E,). A sink, the logit of nothing, takes its share (see `Logits`)."""
    largest = max(logits.max(), sink)
    weight = np.exp(logits - largest)
    return weight / (weight.sum() + math.exp(sink - largest))


def extend(state, q, k, v, policy, kernels=None, logits=None):
    """The one verb of LESS: m >= 1 new tokens enter; attend, score, evict, fold. Returns (out (m, Hq, D), new state).

    q (Hq, m, D); k, v (Hkv, m, D); policy: one, or a list with one for each KV head; kernels None: the bare policy;
    logits: a `Logits`, if they are not q.k / sqrt(D). All numbers must be finite: `extend_past_broken_tokens` takes any.
    """
    (Hq, m, D), Hkv = q.shape, len(k)
    G, n, logits = Hq // Hkv, state.n + m, logits or Logits()
    policies = policy if isinstance(policy, (list, tuple)) else [policy] * Hkv
    if Hq % Hkv or len(policies) != Hkv or v.shape != k.shape or k.shape[1:] != (m, D):
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}, {len(policies)} policies")
    if any(rule.pooled for rule in policies) and len(set(policies)) > 1:
        raise ValueError(f"a policy that pools over the layer must be that of all its KV heads: {policies}")
    arrived, entries = np.arange(state.n, n), []  # of each KV head: what is held, then the chunk
    for g, (head, rule) in enumerate(zip(state.heads, policies)):
        born = rule.born(q[g * G : (g + 1) * G], k[g], v[g], g)
        score = np.concatenate([head.score.reshape(-1, *rule.score_shape), born])
        slots = np.append(head.position, arrived), np.vstack([head.k, k[g]]), np.vstack([head.v, v[g]]), score
        entries.append(Head(*slots, head.H, head.z))
    # 1. attend: query i sees the held entries, chunk tokens up to itself, and the low-rank state before the chunk.
    out = np.zeros((m, Hq, D))
    visible = [head.position <= arrived[:, None] for head in entries]  # [g] -> (m, E)
    p = [np.zeros((m, G, len(head.position))) for head in entries]  # [g] -> (m, G, E)
    for a in range(Hq):
        g, head = a // G, entries[a // G]
        phi = kernels.phi(q[a], a) if kernels else np.zeros((m, 0))  # (m, R)
        for i, seen in enumerate(visible[g]):
            logit, sink = logits.of(q[a, i], head.k[seen], a)  # scale q.k; -inf unless the model has sinks
            out[i, a] = attend(logit, head.v[seen], phi[i], head.H, head.z, sink)
            p[g][i, a % G, seen] = softmax(logit, sink)  # the low-rank mass is left out of the scores
    heads = []
    for g, rule in enumerate(policies):
        score = rule.update(entries[g].score, np.concatenate(p, 1) if rule.pooled else p[g], visible[g])  # 2. score
        scored = replace(entries[g], score=score)
        kept = choose(scored, rule, n)  # 3. evict
        heads.append(fold(scored, kept, kernels, g))  # 4. fold
    return out, State(tuple(heads), n, state.moved)


def choose(entries, policy, n):
    """Which entries stay, (E,) bool: the `budget` that the policy ranks highest; ties keep the lower position."""
    rank = policy.rank(entries.position, entries.score, n)
    order = np.lexsort((entries.position, -rank))  # by rank, descending; then by position, ascending
    return (np.argsort(order) < policy.budget) & (rank > -np.inf)


def fold(entries, kept, kernels, kv_head):
    """What stays, with every dropped entry folded in exactly once: H += psi(k)^T v, z += psi(k)  (paper, section 3)."""
    H, z = entries.H.copy(), entries.z.copy()
    for j in np.flatnonzero(~kept) if kernels else []:
        psi = kernels.psi(entries.k[j], kv_head)
        H += np.outer(psi, entries.v[j])
        z += psi
    return Head(entries.position[kept], entries.k[kept], entries.v[kept], entries.score[kept], H, z)


@dataclass
class Trace:
    """What a run did: all outputs, and after every chunk c what KV head g held, by position."""

    out: np.ndarray  # (T, Hq, D)
    kept: list = field(default_factory=list)  # [c][g] -> (E,) positions, ascending
    score: list = field(default_factory=list)  # [c][g] -> (E,) or (E, *score_shape)
    H: list = field(default_factory=list)  # [c][g] -> (R, D)
    z: list = field(default_factory=list)  # [c][g] -> (R,)


def run(q, k, v, policy, kernels=None, chunks=None, scale=None, softcap=None, sinks=None, context=None):
    """`extend` over a whole sequence, chunk by chunk; broken tokens are passed over. Returns a Trace.

    q (Hq, T, D); k, v (Hkv, T, D); policy and kernels as in `extend`; scale, softcap and sinks as in `Logits`; context: a
    `Context`; chunks: lengths that sum to T, one token at a time (streaming) unless given. Others are other computations.
    """
    T, chunks = q.shape[1], [1] * q.shape[1] if chunks is None else list(chunks)
    if sum(chunks) != T or min(chunks, default=1) < 1:
        raise ValueError(f"chunks must be at least 1 each and sum to {T} tokens: {chunks}")
    state, trace = empty_state(len(k), k.shape[2], kernels), Trace(np.zeros((T, len(q), q.shape[2])))
    for end, m in zip(np.cumsum(chunks), chunks):
        now = slice(end - m, end)
        rest, step = (policy, kernels, Logits(scale, softcap, sinks)), context.extend if context else extend_past_broken_tokens
        trace.out[now], state = step(state, q[:, now], k[:, now], v[:, now], *rest)
        trace.kept.append([head.position for head in state.heads])
        trace.score.append([head.score for head in state.heads])
        trace.H.append([head.H for head in state.heads])
        trace.z.append([head.z for head in state.heads])
    return trace


def eviction_times(trace):
    """e (Hkv, T) of a streaming run: the step at whose end each token was evicted, infinity while it is kept. An evicted token
    never returns, so this one number for each token and KV head describes the whole run."""
    if len(trace.kept) != len(trace.out) or np.isnan(trace.out).any():
        raise ValueError("only a streaming run without broken tokens has eviction times: run it without chunks, on sound tokens")
    e = np.full((len(trace.kept[0]), len(trace.kept)), np.inf)  # (Hkv, T)
    for step in reversed(range(len(trace.kept))):
        for g, kept in enumerate(trace.kept[step]):
            e[g, np.setdiff1d(np.arange(step + 1), kept)] = step
    return e


def parallel(q, k, v, e, kernels=None, scale=None):
    """The streaming output (T, Hq, D) without the recurrence (paper, section 3.2): query i sees token j exactly iff j <= i <= e_j
    and through phi(q_i).psi(k_j) iff i > e_j. Shapes as in `run`; e (Hkv, T). It knows streaming alone, no longer chunks, and
    neither a softcap, nor sinks, nor broken tokens."""
    (Hq, T, D), G = q.shape, len(q) // len(k)
    scale = D**-0.5 if scale is None else scale
    out = np.zeros((T, Hq, D))
    for a, i in np.ndindex(Hq, T):
        g = a // G
        exact, folded = (np.arange(T) <= i) & (i <= e[g]), i > e[g]
        logits = scale * k[g, exact] @ q[a, i]
        low_rank = kernels.psi(k[g, folded], g) @ kernels.phi(q[a, i], a) if kernels else np.zeros(folded.sum())
        low_rank *= low_rank.sum() > 0
        largest = logits.max()
        weight = np.append(np.exp(logits - largest), low_rank * math.exp(-largest))
        out[i, a] = weight @ np.vstack([v[g, exact], v[g, folded]]) / weight.sum()
    return out


# Other policies.


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
    budget = property(lambda self: self.recent)

    def rank(self, position, score, n):
        return position


@dataclass(frozen=True)
class Lambda(Policy):
    """Keeps the first `sinks` and the last `recent` tokens (LM-Infinite, Han et al. 2023; StreamingLLM, Xiao et al. 2023)."""

    sinks: int
    recent: int
    budget = property(lambda self: self.sinks + self.recent)

    def rank(self, position, score, n):
        return np.where(position < self.sinks, np.inf, position)


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
    score_shape = property(lambda self: (self.window,))

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
    A score is the attention that the token got, the part of that which it got while local, how many queries it has seen, and
    its head's choice, 0 before.
    """

    budget: int
    frequent: int
    local: int
    recovery: float
    kinds: tuple  # of the token at each position: 0, 1 for punctuation or 2 for special
    score_shape = (4,)

    def update(self, score, p, visible):
        attention, near, age, choice = score.T
        ages = age + visible.cumsum(0)  # (m, E)
        near = near + (p.sum(1) * (ages <= self.local)).sum(0)
        return np.stack([attention + p.sum((0, 1)), near, ages[-1], choice], 1)

    def rank(self, position, score, n):
        if n > len(self.kinds):
            raise ValueError(f"FastGen has the kinds of {len(self.kinds)} tokens, but there are {n}: give it one for each")
        kind, (attention, near, _, choices) = np.array(self.kinds)[position], score.T
        choice = choices.max()  # tokens that came since have 0
        if n > self.budget and not choice:
            for choice in (1, 2, 3, 4, 5):
                member = self.members(kind, position, attention, n, choice)
                recovered = attention[member].sum() + near[~member].sum() * (choice == 4)
                if recovered >= (self.recovery - 1e-6) * attention.sum():  # equal is enough, whatever the rounding
                    break
        score[:, 3] = choice
        rank = np.where(kind == 2, np.finfo(float).max, attention)
        rank[(choice >= 4) & (position >= n - self.local)] = np.inf
        rank[~self.members(kind, position, attention, n, choice) & (choice > 0)] = -np.inf
        return rank

    def members(self, kind, position, attention, n, choice):
        member = (kind == 2) | (choice >= 2) & (kind == 1) | (choice >= 4) & (position >= n - self.local)
        if choice >= 3:
            others = np.flatnonzero(~member)
            most = np.lexsort((position[others], -attention[others]))  # of equals the lower position first
            member[others[most[: self.frequent]]] = True
        return member | (choice == 5)


# Learned retention: a third learned function says what is worth keeping. A departure from the paper.


@dataclass(frozen=True)
class Rho:
    """rho(q, k, v) of a token that enters: four numbers that stay with it, a, b, c and d of `Retention`. Weights for each KV
    head, which reads its own key and value and the queries of all its query heads."""

    r0: np.ndarray  # (Hkv, (G + 2) D, 4)
    r1: np.ndarray  # (Hkv, (G + 2) D, h)
    r2: np.ndarray  # (Hkv, h, 4)
    r3: np.ndarray  # (Hkv, 4)

    def of(self, q, k, v, kv_head):
        """q (G, m, D), k, v (m, D) -> (m, 4)."""
        x = np.concatenate([*q, k, v], 1)  # (m, (G + 2) D)
        return x @ self.r0[kv_head] + gelu(x @ self.r1[kv_head]) @ self.r2[kv_head] + self.r3[kv_head]


@dataclass(frozen=True)
class Retention(Policy):
    """Keeps the last `recent` tokens and those that are worth most by

        a - b log(1 + age) + c log(s + 1e-4) + d log(l + 1e-4)

    where rho gave a, b, c and d when the token entered; age counts the tokens that came since; s and l are the attention that it
    got, which fades by 0.9 and by 0.99 with every query: the short and the long memory of a head. The score is these six.
    """

    budget: int
    recent: int
    rho: Rho
    score_shape = (6,)

    def born(self, q, k, v, kv_head):
        return np.hstack([self.rho.of(q, k, v, kv_head), np.zeros((len(k), 2))])

    def update(self, score, p, visible):
        born, seen = score[:, :4], score[:, 4:]
        for attention in p.sum(1):  # query by query
            seen = seen * [0.9, 0.99] + attention[:, None]
        return np.hstack([born, seen])

    def rank(self, position, score, n):
        a, b, c, d, short, long = score.T
        worth = a - b * np.log(n - position) + c * np.log(short + 1e-4) + d * np.log(long + 1e-4)
        return np.where(position >= n - self.recent, np.inf, worth)


# Other kernels. All have rank, phi and psi.


@dataclass(frozen=True, kw_only=True)
class Exponential(Kernels):
    """Not the paper's: learned, but positive by an exponential, for which a narrow hidden layer is enough, or none (h = 0).

    q0 (Hq, D, R), k0 (Hkv, D, R), and the others as in `Kernels` but for k3 (Hkv, R). Exponents are cut: float32 holds e^80.
    """

    q0: np.ndarray
    k0: np.ndarray

    def phi(self, q, query_head):
        exponent = q @ self.q0[query_head] + gelu(q @ self.q1[query_head]) @ self.q2[query_head]
        return np.exp(np.minimum(exponent, 40))[..., : self.rank(query_head * len(self.k1) // len(self.q1))]

    def psi(self, k, kv_head):
        exponent = k @ self.k0[kv_head] + gelu(k @ self.k1[kv_head]) @ self.k2[kv_head] + self.k3[kv_head]
        return np.exp(np.minimum(exponent, 40))[..., : self.rank(kv_head)]


# Control kernels: nothing is learned, and all heads have the same. The paper compares with the first.


@dataclass(frozen=True)
class Performer:
    """Positive random features (Choromanski et al. 2020): phi(q).psi(k) is e^(scale q.k) in expectation over w (R, D)."""

    w: np.ndarray
    scale: float

    def rank(self, kv_head):
        return len(self.w)

    def phi(self, x, head):
        """x (..., D) -> (..., R), positive. An exponent is at most |w|^2 / 2, and cut at 40."""
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


# Logits that are more than q.k.


@dataclass(frozen=True)
class Logits:
    """logit = scale q.k, with 1 / sqrt(D) unless `scale` is given. Two things that few models add:

    softcap: the logit l becomes softcap tanh(l / softcap) (Gemma 2);
    sinks (Hq,): the logit of nothing, which takes its share of a query head's attention and has no value (gpt-oss).
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: np.ndarray | None = None

    def of(self, q, k, query_head):
        """q (D,), k (E, D) -> the logits (E,), and the head's sink."""
        logits = (len(q) ** -0.5 if self.scale is None else self.scale) * k @ q
        logits = logits if self.softcap is None else self.softcap * np.tanh(logits / self.softcap)
        return logits, -math.inf if self.sinks is None else self.sinks[query_head]


# Slots in eight bits. A departure from the paper.


def in_eight_bits(x):
    """Keys or values x (..., D) as int8 slots store them: the largest number of each becomes 127 by a scale of its own, all are
    rounded to whole ones. A cache with such slots does with these what it does with k and v. In float32, which decides halves."""
    x = np.float32(x)
    scale = abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.round(x / np.where(scale > 0, scale, np.float32(1))).astype(float) * scale


# Broken tokens.

LARGEST = 1e12  # a token with NaN, infinity or a larger number in q, k or v is broken


def extend_past_broken_tokens(state, q, k, v, *rest):
    """`extend`, but a broken token leaves no trace: it is not seen, scored, kept, folded or counted, and its own output is NaN.
    Arguments and results are those of `extend`."""
    sound_parts = [(abs(x) <= LARGEST).all((0, 2)) for x in (q, k, v)]  # (m,) each
    if all(part.all() for part in sound_parts):
        return extend(state, q, k, v, *rest)
    sound, out = np.all(sound_parts, 0), np.full((q.shape[1], len(q), q.shape[2]), np.nan)
    if sound.any():
        out[sound], state = extend(state, q[:, sound], k[:, sound], v[:, sound], *rest)
    return out, state


# Streams beyond the context that a model was trained for. A departure from the paper.


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): one position later, pair f of the numbers of a query or key is turned by frequencies[f].
    The pairs are (f, f + F), or, interleaved, (2f, 2f + 1); numbers beyond 2F are not turned."""

    frequencies: np.ndarray  # (F,)
    interleaved: bool = False

    def turn(self, x, by):
        """x (..., E, D) as if it stood `by` (E,) positions later."""
        F, out, angle = len(self.frequencies), x.copy(), np.outer(by, self.frequencies)  # angle (E, F)
        one, other = (slice(0, 2 * F, 2), slice(1, 2 * F, 2)) if self.interleaved else (slice(F), slice(F, 2 * F))
        out[..., one] = x[..., one] * np.cos(angle) - x[..., other] * np.sin(angle)
        out[..., other] = x[..., other] * np.cos(angle) + x[..., one] * np.sin(angle)
        return out


@dataclass(frozen=True)
class Context:
    """A stream without end looks as if it never left the first `length` positions: a token stands `moved` positions before its
    true one, but not below 0. Where a chunk finds no room, all that is held moves back by half the length, and the low-rank
    state begins anew: what is in it cannot be moved. Policies know true positions."""

    length: int
    rotary: Rotary
    int8: bool = False  # slots are `in_eight_bits`

    def extend(self, state, q, k, v, *rest):
        """`extend_past_broken_tokens` within the context. ValueError for a chunk that cannot find room."""
        m, by = q.shape[1], self.length // 2
        if state.n - state.moved + m > self.length:
            if m > by:
                raise ValueError(f"{m} tokens at once find no room in a context of {self.length}: give at most {by}")
            moved, heads = state.moved + by, []
            for head in state.heads:
                before, after = (np.maximum(head.position - moved, 0) for moved in (state.moved, state.moved + by))
                turned = self.rotary.turn(head.k, after - before)
                turned = in_eight_bits(turned) if self.int8 else turned  # what stays where it is stays as it is
                heads.append(replace(head, k=turned, H=0 * head.H, z=0 * head.z))
            state = State(tuple(heads), state.n, moved)
        q, k = (self.rotary.turn(x, np.full(m, -state.moved)) for x in (q, k))
        k, v = (in_eight_bits(x) if self.int8 else x for x in (k, v))
        return extend_past_broken_tokens(state, q, k, v, *rest)


# Training.


def training_loss(out, full, projection, e):
    """The objective of one layer (paper, section 3.2): the mean squared error after the output projection, over the
    queries from which something has been evicted in some head.

    out, full (T, Hq, D): the layer's attention output with LESS and with the full cache; projection (Hq * D, hidden);
    e (Hkv, T). ValueError if nothing is evicted before the last query: there is nothing to learn.
    """
    T = out.shape[0]
    queries = [i for i in range(T) if (e < i).any()]
    if not queries:
        raise ValueError(f"nothing is evicted within {T} tokens: use a longer sequence or a smaller budget")
    difference = (out[queries] - full[queries]).reshape(len(queries), -1) @ projection
    return (difference**2).mean()


# Where all this differs from the authors' public code (hdong920/LESS):
#   - no epsilon: the authors clamp the low-rank terms at 1e-6 when generating and add 1e-6 in the parallel form;
#   - scores come from the softmax over the visible tokens; the authors' parallel path and training score with the softmax
#     over all causal keys, evicted ones included, which no cache that really evicts can compute;
#   - evicted tokens are gone: a tie can never bring one back; a recent budget of 0 evicts;
#   - KV heads may be fewer than query heads, and each may have a budget and a rank of its own.
