"""LESS, exactly: one attention layer and one sequence, in readable float64 numpy. `less_fast` is tested against it.

LESS (Dong, Yang, Zhang, Wang, Chi, Chen, "Get More with LESS", ICML 2024, arXiv 2402.09398) pairs an eviction policy for the
key-value cache with a small recurrent state that absorbs what the policy evicts. So every past token can still be read.

    Hq, Hkv, G    query heads, KV heads, query heads per KV head (G = Hq / Hkv); query head a reads KV head a // G
    D, R, h       head dimension, rank of the low-rank state, hidden width of the kernels (paper: R = 8, h = 512)
    q, k, v       after positional encoding; q is not scaled (scale enters with the logit)
    phi, psi      the learned kernels of queries and keys; non-negative vectors of length R (paper, section 3)
    H, z          the low-rank state of a KV head: (R, D) and (R,)  (paper, section 3 and figure 4)
    B, n          budget, how many tokens a KV head keeps between steps; tokens seen so far (positions count from 0)

Three tokens by hand: one head, D = 1, scale 1, budget 1. All queries are 1, the keys log 3, 0, 0, the values 4, 8, 2. So e^logit
is 3, 1, 1. Of the kernels `Elu`, phi(1) = 2 and psi(0) = 1. The policy keeps the token with the most attention so far.
The last output reads token 1 from the low-rank state. The full cache would give 4.4, the bare policy 3.5.

    token  attend                                  scores of token 0 and the new one   evict     fold
    0      4                                       1
    1      (3*4 + 1*8) / (3 + 1) = 5               1 + 3/4 = 1.75    1/4 = 0.25        token 1   H = 1*8 = 8       z = 1
    2      (2*8 + 3*4 + 1*2) / (2*1 + 3 + 1) = 5   1.75 + 3/4 = 2.5  1/4 = 0.25        token 2   H = 8 + 1*2 = 10  z = 1 + 1 = 2

    >>> q, k, v = np.array([[1, 1, 1], [math.log(3), 0, 0], [4, 8, 2]]).reshape(3, 1, 3, 1)
    >>> trace = run(q, k, v, H2O(heavy=1, recent=0), Elu(1), scale=1)
    >>> trace.out.flatten().round(9).tolist(), trace.kept[2], trace.heads[2][0].H, trace.heads[2][0].z
    ([4.0, 5.0, 5.0], [array([0])], array([[10.]]), array([2.]))
"""

import math
from dataclasses import dataclass, replace

import numpy as np


def gelu(x):
    """Exact (erf) GELU, elementwise."""
    return 0.5 * x * (1.0 + np.vectorize(math.erf, [float])(x / math.sqrt(2.0)))


@dataclass(frozen=True)
class Kernels:
    """The learned kernels of one layer (paper, section 3): phi has weights for each query head, psi for each KV head."""

    q1: np.ndarray  # (Hq, D, h)
    q2: np.ndarray  # (Hq, h, R)
    k1: np.ndarray  # (Hkv, D, h)
    k2: np.ndarray  # (Hkv, h, R)
    k3: np.ndarray  # (Hkv, R, R)
    rank = property(lambda self: self.q2.shape[-1])

    def phi(self, q, query_head):
        """q (..., D) -> (..., R), non-negative."""
        return np.abs(gelu(gelu(q @ self.q1[query_head]) @ self.q2[query_head]))

    def psi(self, k, kv_head):
        """k (..., D) -> (..., R), non-negative."""
        return np.abs(gelu(gelu(k @ self.k1[kv_head]) @ self.k2[kv_head]) @ self.k3[kv_head])


class Policy:
    """Which tokens a KV head keeps: at the end of a chunk the `budget` that rank highest among E, the kept and the new ones.

    born(q (G, m, D), k (m, D), v (m, D), kv_head) -> (m, *score_shape)    the scores of the new tokens
    update(score, p (m, G, E), visible (m, E)) -> score    p: each query's attention to each token; `pooled`: of all query heads
    rank(position (E,), score, n) -> (E,)    called once; of equals the lower position is kept, -inf never; may write into score
    """

    score_shape, pooled = (), False

    def born(self, q, k, v, kv_head):
        return np.zeros((len(k), *self.score_shape))


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
    """What one KV head holds: E tokens in any order, between steps at most B, and the low-rank state."""

    position: np.ndarray  # (E,) true token positions
    k: np.ndarray  # (E, D)
    v: np.ndarray  # (E, D)
    score: np.ndarray  # (E,) or (E, *score_shape)
    H: np.ndarray  # (R, D)
    z: np.ndarray  # (R,)


@dataclass(frozen=True)
class State:
    """One layer: its KV heads, and the number of tokens seen."""

    heads: tuple
    n: int = 0


def empty_state(kv_heads, head_dim, kernels=None):
    """The state before the first token. Without kernels R is 0."""
    none, R = np.zeros((0, head_dim)), kernels.rank if kernels else 0
    return State((Head(np.zeros(0, int), none, none, np.zeros(0), np.zeros((R, head_dim)), np.zeros(R)),) * kv_heads)


def attend_literal(logits, v, phi, H, z):
    """The paper's equation 3 as it is written: out = (phi H + sum_j e^logit_j v_j) / (phi.z + sum_j e^logit_j).
    logits (E,), v (E, D), phi (R,), H (R, D), z (R,) -> (D,). It overflows if a logit is beyond 700."""
    return (phi @ H + np.exp(logits) @ v) / (phi @ z + np.exp(logits).sum())


def attend(logits, v, phi, H, z):
    """The same, stably: attention over the E visible tokens and one virtual token, whose logit is log(phi.z) and whose value is
    phi H / (phi.z). Where phi.z is 0 there is none."""
    mass = phi @ z
    if mass > 0:
        logits, v = np.append(logits, math.log(mass)), np.vstack([v, phi @ H / mass])
    return softmax(logits) @ v


def softmax(logits):  # (E,) -> (E,)
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def attention(q, k, v, phi, H, z, scale, query_head):
    """One query q (D,) over visible k, v (E, D): its output (D,), and p (E,), which leaves out the low-rank state."""
    logits = scale * k @ q
    return attend(logits, v, phi, H, z), softmax(logits)


def extend(state, q, k, v, policy, kernels=None, scale=None, attention=attention):
    """The one verb of LESS: m >= 1 new tokens enter; attend, score, evict, fold. Returns (out (m, Hq, D), new state).
    q (Hq, m, D); k, v (Hkv, m, D), all finite; policy: one, or a list with one for each KV head; kernels None: the bare policy;
    scale: 1 / sqrt(D) unless given; attention: another function may take the place of `attention`."""
    (Hq, m, D), Hkv, n = q.shape, len(k), state.n + q.shape[1]
    G, scale = Hq // Hkv, D**-0.5 if scale is None else scale
    policies = policy if isinstance(policy, (list, tuple)) else [policy] * Hkv
    if Hq % Hkv or len(policies) != Hkv or v.shape != k.shape or k.shape[1:] != (m, D):
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}, {len(policies)} policies")
    if any(rule.pooled for rule in policies) and len(set(policies)) > 1:
        raise ValueError(f"a policy that pools over the layer must be that of all its KV heads: {policies}")
    arrived, tokens = np.arange(state.n, n), []  # tokens of each KV head: the kept ones, then the new ones
    for g, (head, rule) in enumerate(zip(state.heads, policies)):
        score = np.concatenate([head.score.reshape(-1, *rule.score_shape), rule.born(q[g * G : (g + 1) * G], k[g], v[g], g)])
        slots = np.append(head.position, arrived), np.vstack([head.k, k[g]]), np.vstack([head.v, v[g]]), score
        tokens.append(Head(*slots, head.H, head.z))
    # 1. attend: query i sees the kept tokens, the new ones up to itself, and the low-rank state before the chunk.
    out, heads = np.zeros((m, Hq, D)), []
    visible = [head.position <= arrived[:, None] for head in tokens]  # [g] -> (m, E)
    p = [np.zeros((m, G, len(head.position))) for head in tokens]  # [g] -> (m, G, E)
    for a in range(Hq):
        g, head = a // G, tokens[a // G]
        phi = kernels.phi(q[a], a) if kernels else np.zeros((m, 0))  # (m, R)
        for i, seen in enumerate(visible[g]):
            out[i, a], p[g][i, a % G, seen] = attention(q[a, i], head.k[seen], head.v[seen], phi[i], head.H, head.z, scale, a)
    for g, (head, rule) in enumerate(zip(tokens, policies)):
        score = rule.update(head.score, np.concatenate(p, 1) if rule.pooled else p[g], visible[g])  # 2. score
        kept = choose(head.position, score, rule, n)  # 3. evict
        heads.append(fold(replace(head, score=score), kept, kernels, g))  # 4. fold
    return out, replace(state, heads=tuple(heads), n=n)


def choose(position, score, policy, n):
    """Which tokens stay, (E,) bool: the `budget` that the policy ranks highest; of equals the lower position."""
    rank = policy.rank(position, score, n)
    order = np.lexsort((position, -rank))  # by rank, descending; then by position, ascending
    return (np.argsort(order) < policy.budget) & (rank > -np.inf)


def fold(head, kept, kernels, kv_head):
    """The kept tokens. Each of the others is folded once: H += psi(k)^T v, z += psi(k)  (paper, section 3)."""
    H, z = head.H, head.z
    for j in np.flatnonzero(~kept) if kernels else []:
        psi = kernels.psi(head.k[j], kv_head)
        H, z = H + np.outer(psi, head.v[j]), z + psi
    return Head(head.position[kept], head.k[kept], head.v[kept], head.score[kept], H, z)


@dataclass
class Trace:
    """What a run did: all outputs, and every KV head after every chunk."""

    out: np.ndarray  # (T, Hq, D)
    heads: list  # [c][g] -> Head of KV head g after chunk c
    kept = property(lambda self: [[head.position for head in heads] for heads in self.heads])  # [c][g] -> (E,), ascending


def run(q, k, v, policy, kernels=None, chunks=None, scale=None, step=extend):
    """A whole sequence, q (Hq, T, D), k and v (Hkv, T, D), chunk by chunk. Returns a Trace. policy, kernels, scale: see `extend`;
    chunks: lengths that sum to T, by default one token at a time (streaming); another chunking is another computation;
    step: another function may take the place of `extend`."""
    T, chunks = q.shape[1], [1] * q.shape[1] if chunks is None else list(chunks)
    if sum(chunks) != T or min(chunks, default=1) < 1:
        raise ValueError(f"chunks must be at least 1 each and sum to {T} tokens: {chunks}")
    state, trace = empty_state(len(k), k.shape[2], kernels), Trace(np.zeros((T, len(q), q.shape[2])), [])
    for end, m in zip(np.cumsum(chunks), chunks):
        now = slice(end - m, end)
        trace.out[now], state = step(state, q[:, now], k[:, now], v[:, now], policy, kernels, scale)
        trace.heads.append(state.heads)
    return trace


def eviction_times(trace):
    """e (Hkv, T) of a streaming run: the step at whose end each token was evicted, infinity while it is kept. An evicted token
    never returns, so these numbers describe the whole run."""
    T = len(trace.out)
    if len(trace.heads) != T or not np.isfinite(trace.out).all():
        raise ValueError("only a streaming run of finite numbers has eviction times: run it without chunks, on finite tokens")
    kept = np.array([[np.isin(np.arange(T), positions) for positions in heads] for heads in trace.kept])  # (T, Hkv, T)
    return np.where(kept[-1], np.inf, np.arange(T) + kept.sum(0))


def parallel(q, k, v, e, kernels=None, scale=None):
    """The streaming output (T, Hq, D) without the recurrence (paper, section 3.2): query i sees token j exactly iff j <= i <= e_j
    and through phi(q_i).psi(k_j) iff i > e_j. Shapes as in `run`; e (Hkv, T)."""
    (Hq, T, D), G = q.shape, len(q) // len(k)
    out, scale = np.zeros((T, Hq, D)), D**-0.5 if scale is None else scale
    for a, i in np.ndindex(Hq, T):
        g = a // G
        exact, folded = (np.arange(T) <= i) & (i <= e[g]), i > e[g]
        logits = scale * k[g, exact] @ q[a, i]
        low_rank = kernels.psi(k[g, folded], g) @ kernels.phi(q[a, i], a) if kernels else np.zeros(folded.sum())
        low_rank *= low_rank.sum() > 0
        weight = np.append(np.exp(logits - logits.max()), low_rank * math.exp(-logits.max()))
        out[i, a] = weight @ np.vstack([v[g, exact], v[g, folded]]) / weight.sum()
    return out


def training_loss(out, full, projection, e):
    """The objective of one layer (paper, section 3.2): the mean squared error after the output projection (Hq * D, hidden), over
    the queries after a first eviction in some head. out, full (T, Hq, D): with LESS and with the full cache; e (Hkv, T)."""
    queries = [i for i in range(len(out)) if (e < i).any()]
    if not queries:
        raise ValueError(f"nothing is evicted within {len(out)} tokens: use a longer sequence or a smaller budget")
    difference = (out[queries] - full[queries]).reshape(len(queries), -1) @ projection
    return (difference**2).mean()


# The authors' public code (hdong920/LESS) differs. When it generates, it clamps the low-rank terms at 1e-6; a tie can bring an
# evicted token back; a recent budget of 0 never evicts. Its parallel form and training add 1e-6, and score with the softmax over
# all causal keys, which no cache that evicts can compute. Each query head has a KV head of its own, and all have one budget.


# The policies of other papers.


class ByPosition(Policy):
    """Looks at positions alone: the later, the higher."""

    def update(self, score, p, visible):
        return score

    def rank(self, position, score, n):
        return position


@dataclass(frozen=True)
class Full(ByPosition):
    """Keeps everything."""

    budget = math.inf


@dataclass(frozen=True)
class Window(ByPosition):
    """Keeps the last `recent` tokens (local attention: Child et al. 2019, Parmar et al. 2018)."""

    recent: int
    budget = property(lambda self: self.recent)


@dataclass(frozen=True)
class Lambda(ByPosition):
    """Keeps the first `sinks` and the last `recent` tokens (LM-Infinite, Han et al. 2023; StreamingLLM, Xiao et al. 2023)."""

    sinks: int
    recent: int
    budget = property(lambda self: self.sinks + self.recent)

    def rank(self, position, score, n):
        return np.where(position < self.sinks, np.inf, position)


@dataclass(frozen=True)
class TOVA(Policy):
    """Keeps what the last query attends to most, by the mean over all query heads of the layer (Oren et al. 2024). All KV heads
    keep the same tokens, so all of them must follow this policy."""

    budget: int
    pooled = True

    def update(self, score, p, visible):
        return p[-1].mean(0)

    def rank(self, position, score, n):
        return score


@dataclass(frozen=True)
class Scissorhands(Policy):
    """Keeps the last `recent` tokens and those that were seldom unimportant (Liu et al. 2023): of the last `history` queries,
    how many gave the token less than the average, 1 / (visible tokens)? Attention is the mean over the query heads. The score is
    a row of `history` bits, the newest the lowest: was the token below the average? Equal attention is not below, whatever the
    rounding. A float64 holds up to 52 bits exactly."""

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
    """Keeps the last `window` tokens and those to which the last `window` queries attend most, all together. A token counts as
    much as the best of its neighbours within `reach` positions (Li et al. 2024: max pooling with a kernel of 2 reach + 1).
    The paper chooses once, at the end of the prompt, and keeps all that is generated; here the window moves on.
    The score is what each of the last `window` queries gave the token."""

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

    A head chooses when the budget is first exceeded; until then it keeps everything. It takes the first of these sets that got
    at least `recovery` of all attention so far; a token that was local counts with what it got while it was. From then on all
    else goes, and what exceeds the budget: the least attended tokens, then the newest special ones. A score is the attention
    that the token got, the part that it got while local, how many queries it has seen, and its head's choice, 0 before."""

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
        """Which tokens are in the set of that choice, (E,) bool."""
        member = (kind == 2) | (choice >= 2) & (kind == 1) | (choice >= 4) & (position >= n - self.local)
        if choice >= 3:
            others = np.flatnonzero(~member)
            most = np.lexsort((position[others], -attention[others]))  # of equals the lower position first
            member[others[most[: self.frequent]]] = True
        return member | (choice == 5)


# Control kernels: nothing is learned, and all heads have the same. The paper compares with the first.


@dataclass(frozen=True)
class Performer:
    """Positive random features (Choromanski et al. 2020): phi(q).psi(k) is e^(scale q.k) in expectation over w (R, D)."""

    w: np.ndarray
    scale: float
    rank = property(lambda self: len(self.w))

    def phi(self, x, head):
        """x (..., D) -> (..., R), positive. An exponent is at most |w|^2 / 2, and cut at 40."""
        x = x * math.sqrt(self.scale)
        exponent = x @ self.w.T - (x**2).sum(-1, keepdims=True) / 2
        return np.exp(np.minimum(exponent, 40)) / math.sqrt(len(self.w))

    psi = phi


@dataclass(frozen=True)
class Elu:
    """phi(x) = psi(x) = elu(x) + 1 (Katharopoulos et al. 2020)."""

    rank: int  # that of x: head_dim

    def phi(self, x, head):
        """x (..., D) -> (..., D), positive."""
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    psi = phi


# Not in the paper: what is ours, and what few models and broken tokens need.


@dataclass(frozen=True, kw_only=True)
class Exponential(Kernels):
    """Learned, but positive by an exponential: a narrow hidden layer is enough, or none (h = 0). Here k3 is (Hkv, R).
    Exponents are cut: float32 holds e^80."""

    q0: np.ndarray  # (Hq, D, R)
    k0: np.ndarray  # (Hkv, D, R)

    def phi(self, q, query_head):
        exponent = q @ self.q0[query_head] + gelu(q @ self.q1[query_head]) @ self.q2[query_head]
        return np.exp(np.minimum(exponent, 40))

    def psi(self, k, kv_head):
        exponent = k @ self.k0[kv_head] + gelu(k @ self.k1[kv_head]) @ self.k2[kv_head] + self.k3[kv_head]
        return np.exp(np.minimum(exponent, 40))


@dataclass(frozen=True)
class Rho:
    """Learned retention: rho(q, k, v) says what a new token is worth by four numbers, a, b, c and d of `Retention`. Each KV head
    has weights of its own, and reads its own key and value and the queries of all its query heads."""

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
    """Keeps the last `recent` tokens and those with the highest a - b log(1 + age) + c log(s + 1e-4) + d log(l + 1e-4).
    rho gives a, b, c and d when the token enters; age: how many tokens came since; s and l: the attention that the token got,
    which fades by 0.9 and by 0.99 with every query, the short and the long memory of a head. The score is these six numbers."""

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


def in_eight_bits(x):
    """Keys or values x (..., D) as int8 slots store them. The largest number of each becomes 127 by a scale of its own, and all
    are rounded to whole numbers. A cache with such slots uses these in the place of k and v. In float32, which decides halves."""
    x = np.float32(x)
    scale = abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.round(x / np.where(scale > 0, scale, np.float32(1))).astype(float) * scale


@dataclass(frozen=True)
class Logits:
    """`run(..., step=partial(extend, attention=Logits(...)))`: two things that few models add to scale q.k.
    softcap: the logit l becomes softcap tanh(l / softcap) (Gemma 2);
    sinks (Hq,): each query sees one more token, with that logit and the value 0; p leaves it out (gpt-oss)."""

    softcap: float | None = None
    sinks: np.ndarray | None = None

    def __call__(self, q, k, v, phi, H, z, scale, query_head):
        logits = scale * k @ q
        logits = logits if self.softcap is None else self.softcap * np.tanh(logits / self.softcap)
        if self.sinks is None:
            return attend(logits, v, phi, H, z), softmax(logits)
        logits, v = np.append(logits, self.sinks[query_head]), np.vstack([v, np.zeros(v.shape[1])])
        return attend(logits, v, phi, H, z), softmax(logits)[:-1]


def extend_past_broken_tokens(state, q, k, v, *rest, **more):
    """`extend`, but a broken token, with NaN, infinity or a number beyond 1e12 in q, k or v, leaves no trace: it is not seen,
    scored, kept, folded or counted. Its own output is NaN."""
    sound = np.all([(abs(x) <= 1e12).all((0, 2)) for x in (q, k, v)], 0)  # (m,)
    if sound.all():
        return extend(state, q, k, v, *rest, **more)
    out = np.full((q.shape[1], len(q), q.shape[2]), np.nan)  # (m, Hq, D)
    if sound.any():
        out[sound], state = extend(state, q[:, sound], k[:, sound], v[:, sound], *rest, **more)
    return out, state


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
class Stream(State):
    """A State whose tokens stand `moved` positions before their true ones, but not below 0."""

    moved: int = 0


@dataclass(frozen=True)
class Context:
    """`run(..., step=Context(...).extend)`: a stream without end looks as if it never left the first `length` positions. Where a
    chunk finds no room, all kept tokens move back by half the length, and the low-rank state begins anew, because what is in it
    cannot be moved. Policies know true positions."""

    length: int
    rotary: Rotary
    int8: bool = False  # slots are `in_eight_bits`

    def extend(self, state, q, k, v, *rest, **more):
        """`extend_past_broken_tokens` within the context. Gives a Stream. ValueError for a chunk that cannot find room."""
        state = state if isinstance(state, Stream) else Stream(state.heads, state.n)
        m, by = q.shape[1], self.length // 2
        if state.n - state.moved + m > self.length:
            if m > by:
                raise ValueError(f"{m} tokens at once find no room in a context of {self.length}: give at most {by}")
            moved, heads = state.moved + by, []
            for head in state.heads:
                before, after = (np.maximum(head.position - moved, 0) for moved in (state.moved, state.moved + by))
                turned = self.rotary.turn(head.k, after - before)  # what stays where it is stays as it is
                heads.append(replace(head, k=in_eight_bits(turned) if self.int8 else turned, H=0 * head.H, z=0 * head.z))
            state = Stream(tuple(heads), state.n, moved)
        q, k = (self.rotary.turn(x, np.full(m, -state.moved)) for x in (q, k))
        k, v = (in_eight_bits(x) if self.int8 else x for x in (k, v))
        return extend_past_broken_tokens(state, q, k, v, *rest, **more)
