"""The kernels phi and psi of one layer: the paper's learned ones (section 3), an exponential family, and two controls; and rho,
the third learned function, which says what is worth keeping."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.functional import dropout, elu, gelu

from .checks import LessError, integer

RHO_HIDDEN = 32  # the hidden width of rho, unless said otherwise
randn, zeros = (partial(make, dtype=torch.float32) for make in (torch.randn, torch.zeros))  # whatever the program's default is
MOST = 2**16  # layers, heads, features, numbers in a head: more is a mistake, or a broken file


class Features(nn.Module):
    """What every family says: phi and psi of one layer, with `rank` features for each KV head. rho: for policies that
    need it (Retention); None without."""

    LEAST_RANK = 1
    OF_HEADS: tuple[str, ...] = ("rho.",)
    """How the names of weights begin that heads have each for itself."""

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int):
        super().__init__()
        self.query_heads = integer("the number of query heads", query_heads, 1, MOST)
        self.kv_heads = integer("the number of KV heads", kv_heads, 1, MOST)
        self.head_dim = integer("head_dim", head_dim, 1, MOST)
        if self.query_heads % self.kv_heads:
            raise LessError(f"{query_heads} query heads are no multiple of {kv_heads} KV heads: give kernels numbers that are")
        self.rank = integer("the rank of kernels", rank, self.LEAST_RANK, MOST)
        self.rho: Rho | None = None
        self._copies: dict = {}  # see `_shared`

    def phi(self, q: torch.Tensor) -> torch.Tensor:
        """q (N, Hq, m, D), rotated and not scaled -> (N, Hq, m, R), in float32 or wider, none negative."""
        raise NotImplementedError

    def psi(self, k: torch.Tensor) -> torch.Tensor:
        """k (N, Hkv, m, D), rotated -> (N, Hkv, m, R), in float32 or wider, none negative."""
        raise NotImplementedError

    def begin(self, lse: torch.Tensor, mass: torch.Tensor) -> None:
        """Told before the first step what weighs what: held tokens, by the log-sum-exp of their logits, and folded ones by these
        kernels, phi.z; both (N, Hq, L)."""

    def select_heads(self, kv_heads: Sequence[int]) -> "Features":
        """The kernels of these KV heads and of the query heads that read them: themselves for all heads, else a copy of the
        weights that all who ask share."""
        heads = tuple(kv_heads)
        return self if heads == tuple(range(self.kv_heads)) else self._shared(heads, lambda: self._of_heads(heads))

    def _of_heads(self, heads):
        part, G = copy.deepcopy(self), self.query_heads // self.kv_heads
        query_heads = [head * G + a for head in heads for a in range(G)]
        part.query_heads, part.kv_heads = len(query_heads), len(heads)
        for name, weight in part.named_parameters():
            if name.startswith(self.OF_HEADS):
                weight.data = weight.data[query_heads if name.startswith("q") else list(heads)]
        return part.requires_grad_(False).eval()

    def without_state(self) -> "Features":
        """Rho alone: for the bare policy, where what is evicted is forgotten."""
        alone = NoState(self.query_heads, self.kv_heads, self.head_dim)
        alone.rho = self.rho
        return alone

    def on(self, device: torch.device, dtype: torch.dtype) -> "Features":
        """Themselves if their weights are there in that dtype, else a copy that all who ask share."""
        if all((weight.device, weight.dtype) == (device, dtype) for weight in self.state_dict().values()):
            return self
        return self._shared((device, dtype), lambda: copy.deepcopy(self).to(device, dtype))

    def memory(self) -> int:
        """Bytes of the weights, and of the copies of them that caches share."""
        own = sum(weight.nbytes for weight in self.state_dict().values())
        return own + sum(part.memory() for *_, part in self._copies.values())

    def _shared(self, key, make: Callable[[], "Features"]) -> "Features":
        """What `make` makes of the weights; made once for a key, and anew after the weights have changed. The weights that it was
        made of are held with it, so that no others come to lie where they lay and look like them."""
        weights = list(self.state_dict().values())
        version = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if key not in self._copies or self._copies[key][0] != version:
            with torch.inference_mode(False):
                self._copies[key] = version, weights, make()
        return self._copies[key][-1]

    def __getstate__(self):
        return self.__dict__ | {"_copies": {}}  # of pickles and deep copies


class Learned(Features):
    """Kernels with weights: those whose names begin with q are of the query heads, those with k of the KV heads."""

    OF_HEADS = ("q", "k", "rho.")

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int, hidden: int, least: int):
        super().__init__(query_heads, kv_heads, head_dim, rank)
        self.hidden = integer("the hidden width of kernels", hidden, least, MOST)
        self.dropout = 0.0  # on the hidden layer, in train mode

    def _hidden_layer(self, x, weight):
        """x (H, N m, D) -> (H, N m, h): one matrix product for each head, weights never expanded."""
        hidden = gelu(torch.bmm(x, weight))
        return dropout(hidden, self.dropout) if self.training and self.dropout else hidden


class PaperKernels(Learned):
    """The paper's: two-layer networks with weights per query head (phi) and per KV head (psi), non-negative.

        phi(q) = | gelu(gelu(q Q1) Q2) |        psi(k) = | gelu(gelu(k K1) K2) K3 |        exact GELU

    K3 starts at 1e-4 times the identity, so that training starts from the bare policy.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int = 512):
        super().__init__(query_heads, kv_heads, head_dim, rank, hidden, least=1)
        R = self.rank
        self.q1 = nn.Parameter(randn(query_heads, head_dim, hidden) * head_dim**-0.5)  # (Hq, D, h)
        self.q2 = nn.Parameter(randn(query_heads, hidden, R) * hidden**-0.5)  # (Hq, h, R)
        self.k1 = nn.Parameter(randn(kv_heads, head_dim, hidden) * head_dim**-0.5)  # (Hkv, D, h)
        self.k2 = nn.Parameter(randn(kv_heads, hidden, R) * hidden**-0.5)  # (Hkv, h, R)
        self.k3 = nn.Parameter(torch.eye(R, dtype=torch.float32).repeat(kv_heads, 1, 1) * 1e-4)  # (Hkv, R, R)

    def phi(self, q):
        return _by_row(self._two_layers(_by_head(q), self.q1, self.q2).abs(), q)

    def psi(self, k):
        return _by_row((self._two_layers(_by_head(k), self.k1, self.k2) @ self.k3).abs(), k)

    def _two_layers(self, x, first, second):
        """x (H, N m, D) -> (H, N m, R)."""
        return gelu(self._hidden_layer(x.to(first.dtype), first) @ second)


LayerKernels = PaperKernels  # its public name since the first release


class Exponential(Learned):
    """A departure from the paper, learned and positive by an exponential instead of an absolute value:

        phi(q) = exp(q Q0 + gelu(q Q1) Q2)        psi(k) = exp(k K0 + gelu(k K1) K2 + b)        exact GELU

    A softmax weight is an exponential of something linear in q and in k, which a rank of 8 then has to sum up; so a narrow
    hidden layer does, or none. Exponents are cut at 40, so that products stay within float32. b starts at -10, so that training
    starts from the bare policy; `begin` moves it near: of all but a hundredth of the queries what is folded gets less than 1 / e
    of what is held does.
    """

    START = -10.0

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int = 32):
        super().__init__(query_heads, kv_heads, head_dim, rank, hidden, least=0)
        R = self.rank
        self.q0 = nn.Parameter(randn(query_heads, head_dim, R) * head_dim**-0.5)  # (Hq, D, R)
        self.q1 = nn.Parameter(randn(query_heads, head_dim, hidden) * head_dim**-0.5)  # (Hq, D, h)
        self.q2 = nn.Parameter(zeros(query_heads, hidden, R))  # (Hq, h, R)
        self.k0 = nn.Parameter(randn(kv_heads, head_dim, R) * head_dim**-0.5)  # (Hkv, D, R)
        self.k1 = nn.Parameter(randn(kv_heads, head_dim, hidden) * head_dim**-0.5)  # (Hkv, D, h)
        self.k2 = nn.Parameter(zeros(kv_heads, hidden, R))  # (Hkv, h, R)
        self.k3 = nn.Parameter(torch.full((kv_heads, R), self.START, dtype=torch.float32))  # (Hkv, R), b

    @torch.no_grad()
    def begin(self, lse, mass):
        if (self.k3 == self.START).all():
            over = lse - mass.clamp(min=torch.finfo(mass.dtype).tiny).log()  # (N, Hq, L)
            over = over.unflatten(1, (self.kv_heads, -1)).transpose(0, 1).flatten(1).sort(1).values  # (Hkv, N G L)
            self.k3 += over[:, over.shape[1] // 100, None] - 1  # the mean would leave some queries to what is folded alone

    def phi(self, q):
        return _by_row(self._exponential(_by_head(q), self.q0, self.q1, self.q2), q)

    def psi(self, k):
        return _by_row(self._exponential(_by_head(k), self.k0, self.k1, self.k2, self.k3), k)

    def _exponential(self, x, linear, first, second, bias=None):
        """x (H, N m, D) -> (H, N m, R)."""
        x = x.to(linear.dtype)
        exponent = torch.bmm(x, linear) if bias is None else torch.baddbmm(bias[:, None], x, linear)
        return torch.baddbmm(exponent, self._hidden_layer(x, first), second).clamp(max=40).exp()


class NoState(Features):
    """No kernels at all, rank 0: rho may be there."""

    LEAST_RANK = 0

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 0, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, 0)

    def phi(self, q):
        return q.new_zeros(*q.shape[:3], 0, dtype=torch.promote_types(q.dtype, torch.float32))

    def psi(self, k):
        return self.phi(k)


class Rho(nn.Module):
    """rho(q, k, v) of tokens that enter: four numbers each, a, b, c and d of the policy Retention. A departure from the paper.

        rho(x) = x R0 + gelu(x R1) R2 + r3        x: the queries of all query heads of a KV head, its key and its value

    It starts where the same numbers are said of every token: the worth fades with age, and grows with attention seen.
    """

    START = (0.0, 0.5, 0.4, 0.4)

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, hidden: int = RHO_HIDDEN):
        super().__init__()
        width = (query_heads // kv_heads + 2) * head_dim
        self.r0 = nn.Parameter(zeros(kv_heads, width, 4))  # (Hkv, (G + 2) D, 4)
        self.r1 = nn.Parameter(randn(kv_heads, width, hidden) * width**-0.5)  # (Hkv, (G + 2) D, h)
        self.r2 = nn.Parameter(zeros(kv_heads, hidden, 4))  # (Hkv, h, 4)
        self.r3 = nn.Parameter(torch.tensor(self.START, dtype=torch.float32).repeat(kv_heads, 1))  # (Hkv, 4)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (N, H, G, m, D), rotated and not scaled, k, v (N, H, m, D), k rotated -> (N, H, m, 4), in float32 or wider."""
        x = torch.cat([*q.unbind(2), k, v], -1)  # (N, H, m, (G + 2) D)
        x, row = _by_head(x).to(self.r0.dtype), x  # (H, N m, (G + 2) D)
        linear = torch.baddbmm(self.r3[:, None], x, self.r0)  # (H, N m, 4)
        return _by_row(torch.baddbmm(linear, gelu(x @ self.r1), self.r2), row)

    @classmethod
    def join(cls, parts: Sequence["Rho"]) -> "Rho":
        """One for the KV heads of all parts, one part's after the other's."""
        whole = copy.deepcopy(parts[0])
        for name, weight in whole.named_parameters():
            weight.data = torch.cat([part.get_parameter(name).data for part in parts])
        return whole


class Control(Features):
    """Kernels without training, the same function for queries and keys and for all heads. To compare with."""

    def psi(self, k):
        return self.phi(k)


class Performer(Control):
    """Positive random features of the softmax (Choromanski et al. 2020): phi(q).psi(k) is e^(scale q.k) in expectation.

        phi(x) = exp(w.x' - |x'|^2 / 2) / sqrt(R),  x' = sqrt(scale) x,  scale = 1 / sqrt(head_dim)

    with R directions w, orthogonal in blocks of head_dim and as long as normal vectors. The exponent, at most |w|^2 / 2, is
    cut at 40, so that products stay within float32.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, rank)
        self.register_buffer("w", _directions(self.rank, self.head_dim))  # (R, D)

    def phi(self, q):
        x = q.to(self.w.dtype) * self.head_dim**-0.25
        exponent = x @ self.w.T - x.square().sum(-1, keepdim=True) / 2
        return exponent.clamp(max=40).exp() * self.rank**-0.5


class Elu(Control):
    """phi(x) = psi(x) = elu(x) + 1 (Katharopoulos et al. 2020): as many features as head_dim, whatever rank is asked for."""

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | None = None, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, head_dim)

    def phi(self, q):
        x = q.to(torch.promote_types(q.dtype, torch.float32))
        return elu(x) + 1


FAMILIES = {
    "paper": PaperKernels,
    "exponential": Exponential,
    "performer": Performer,
    "elu": Elu,
    "none": NoState,
}
"""Every family by the name that files and the command line use."""


def _directions(count, head_dim):
    """(count, head_dim): random directions, orthogonal in blocks of head_dim, as long as normal vectors are."""
    q, r = torch.linalg.qr(randn(-(-count // head_dim), head_dim, head_dim))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # or some directions would come more often than others
    return q.flatten(0, 1)[:count] * randn(count, head_dim).norm(dim=1, keepdim=True)


def _by_head(x):
    """(N, H, m, D) -> (H, N m, D): what a head has to multiply."""
    return x.transpose(0, 1).flatten(1, 2)


def _by_row(features, x):
    """features (H, N m, R) of x (N, H, m, D) -> (N, H, m, R)."""
    return features.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
