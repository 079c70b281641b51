"""The kernels phi and psi, for one layer and for a whole model, and their files: the paper's learned ones (section 3), and
three untrained families that it, or the field, compares with."""

import json
import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import elu, gelu

WEIGHTS, CONFIG = "kernels.safetensors", "config.json"


class Features(nn.Module):
    """What every family of kernels says: phi and psi of one layer, and the rank of each of its KV heads.

    ranks: how many features each KV head has. Where they differ, the features of the others are padded with exact zeros up to
    `rank`, the largest, until `of_heads` takes heads of equal rank apart.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | Sequence[int]):
        super().__init__()
        self.query_heads, self.kv_heads, self.head_dim = query_heads, kv_heads, head_dim
        self.ranks = [rank] * kv_heads if isinstance(rank, int) else list(rank)
        if min(query_heads, kv_heads, head_dim) < 1 or query_heads % kv_heads:
            raise ValueError(
                f"kernels need sizes of at least 1 and query heads that are a multiple of the KV heads, "
                f"not {query_heads=}, {kv_heads=}, {head_dim=}"
            )
        if len(self.ranks) != kv_heads or min(self.ranks) < 1:
            raise ValueError(f"kernels need a rank of at least 1, or one for each of {kv_heads} KV heads, not {rank}")

    @property
    def rank(self) -> int:
        return max(self.ranks)

    def phi(self, q: torch.Tensor) -> torch.Tensor:
        """q (N, Hq, m, D), rotated and not scaled -> (N, Hq, m, R), in float32 or wider."""
        raise NotImplementedError

    def psi(self, k: torch.Tensor) -> torch.Tensor:
        """k (N, Hkv, m, D), rotated -> (N, Hkv, m, R), in float32 or wider."""
        raise NotImplementedError

    def of_heads(self, kv_heads: list[int]) -> "Features":
        """The kernels of some KV heads of equal rank, and of the query heads that read them."""
        raise NotImplementedError


class Learned(Features):
    """Kernels with weights: those whose names begin with q are of the query heads, those with k of the KV heads."""

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | Sequence[int], hidden: int, least: int):
        super().__init__(query_heads, kv_heads, head_dim, rank)
        if hidden < least:
            raise ValueError(f"kernels need a hidden width of at least {least}, not {hidden}")
        self.hidden = hidden
        self.dropout = 0.0  # on the hidden layer, in train mode

    @property
    def _group(self):
        return self.query_heads // self.kv_heads

    def _hidden_layer(self, x, weight):
        """x (H, N m, D) -> (H, N m, h): one matrix product for each head, weights never expanded."""
        hidden = gelu(x @ weight)
        if self.training and self.dropout > 0:
            hidden = hidden * _dropout_mask(hidden, self.dropout)
        return hidden

    def of_heads(self, kv_heads):
        """Itself for all heads of one rank, else a copy of their weights."""
        ranks = [self.ranks[head] for head in kv_heads]
        if kv_heads == list(range(self.kv_heads)) and min(ranks) == self.rank:
            return self
        query_heads = [head * self._group + a for head in kv_heads for a in range(self._group)]
        with torch.device("meta"):  # where nothing random is drawn
            part = type(self)(len(query_heads), len(kv_heads), self.head_dim, ranks, self.hidden)
        part = part.to_empty(device=self.q1.device).to(self.q1.dtype)
        with torch.no_grad():
            for name, weight in part.named_parameters():
                theirs = getattr(self, name)[query_heads if name.startswith("q") else kv_heads]
                weight.copy_(theirs[tuple(slice(size) for size in weight.shape)])
        return part


class LayerKernels(Learned):
    """The paper's: two-layer networks with weights per query head (phi) and per KV head (psi), non-negative.

        phi(q) = | gelu(gelu(q Q1) Q2) |        psi(k) = | gelu(gelu(k K1) K2) K3 |        exact GELU

    K3 starts at 1e-4 times the identity, so that training starts from the bare policy.
    """

    def __init__(
        self, query_heads: int, kv_heads: int, head_dim: int, rank: int | Sequence[int] = 8, hidden: int = 512
    ):
        super().__init__(query_heads, kv_heads, head_dim, rank, hidden, least=1)
        R = self.rank
        self.q1 = nn.Parameter(torch.randn(query_heads, head_dim, hidden) * head_dim**-0.5)  # (Hq, D, h)
        self.q2 = nn.Parameter(torch.randn(query_heads, hidden, R) * hidden**-0.5)  # (Hq, h, R)
        self.k1 = nn.Parameter(torch.randn(kv_heads, head_dim, hidden) * head_dim**-0.5)  # (Hkv, D, h)
        self.k2 = nn.Parameter(torch.randn(kv_heads, hidden, R) * hidden**-0.5)  # (Hkv, h, R)
        self.k3 = nn.Parameter(torch.eye(R).repeat(kv_heads, 1, 1) * 1e-4)  # (Hkv, R, R)
        with torch.no_grad():  # a feature that starts at zero stays there, because its gradient is zero too
            for head, rank in enumerate(self.ranks):
                self.q2[head * self._group : (head + 1) * self._group, :, rank:] = 0
                self.k2[head, :, rank:] = 0

    def phi(self, q):
        return _of_rows(self._two_layers(_of_heads(q), self.q1, self.q2).abs(), q)

    def psi(self, k):
        return _of_rows((self._two_layers(_of_heads(k), self.k1, self.k2) @ self.k3).abs(), k)

    def _two_layers(self, x, first, second):
        """x (H, N m, D) -> (H, N m, R)."""
        return gelu(self._hidden_layer(x.to(first.dtype), first) @ second)


class Exponential(Learned):
    """A departure from the paper, learned and positive by an exponential instead of an absolute value:

        phi(q) = exp(q Q0 + gelu(q Q1) Q2)        psi(k) = exp(k K0 + gelu(k K1) K2 + b)        exact GELU

    A softmax weight is an exponential of something linear in q and in k, which a rank of 8 then has to sum up; so a narrow
    hidden layer does, or none. Exponents are cut at 40, so that products stay within float32. b starts at -10, so that training
    starts from the bare policy.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | Sequence[int] = 8, hidden: int = 32):
        super().__init__(query_heads, kv_heads, head_dim, rank, hidden, least=0)
        R = self.rank
        self.q0 = nn.Parameter(torch.randn(query_heads, head_dim, R) * head_dim**-0.5)  # (Hq, D, R)
        self.q1 = nn.Parameter(torch.randn(query_heads, head_dim, hidden) * head_dim**-0.5)  # (Hq, D, h)
        self.q2 = nn.Parameter(torch.zeros(query_heads, hidden, R))  # (Hq, h, R)
        self.k0 = nn.Parameter(torch.randn(kv_heads, head_dim, R) * head_dim**-0.5)  # (Hkv, D, R)
        self.k1 = nn.Parameter(torch.randn(kv_heads, head_dim, hidden) * head_dim**-0.5)  # (Hkv, D, h)
        self.k2 = nn.Parameter(torch.zeros(kv_heads, hidden, R))  # (Hkv, h, R)
        self.k3 = nn.Parameter(torch.full((kv_heads, R), -10.0))  # (Hkv, R), b

    def phi(self, q):
        return self._padded(_of_rows(self._exponential(_of_heads(q), self.q0, self.q1, self.q2), q))

    def psi(self, k):
        return self._padded(_of_rows(self._exponential(_of_heads(k), self.k0, self.k1, self.k2, self.k3), k))

    def _exponential(self, x, linear, first, second, bias=None):
        """x (H, N m, D) -> (H, N m, R)."""
        x = x.to(linear.dtype)
        exponent = x @ linear + self._hidden_layer(x, first) @ second
        if bias is not None:
            exponent = exponent + bias[:, None]
        return exponent.clamp(max=40).exp()

    def _padded(self, features):
        """features (N, H, m, R), with zeros beyond the rank of each head."""
        if min(self.ranks) == self.rank:
            return features
        ranks = torch.tensor(self.ranks, device=features.device).repeat_interleave(features.shape[1] // self.kv_heads)  # (H,)
        return features * (torch.arange(self.rank, device=features.device) < ranks[:, None])[:, None]


class Control(Features):
    """Kernels without training, the same function for queries and keys and for all heads. To compare with."""

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int, hidden: int | None = None):
        if not isinstance(rank, int):
            raise ValueError(f"{type(self).__name__} has one rank for all heads, not {rank}")
        super().__init__(query_heads, kv_heads, head_dim, rank)

    def psi(self, k):
        return self.phi(k)

    def of_heads(self, kv_heads):
        return self


class Performer(Control):
    """Positive random features of the softmax (Choromanski et al. 2020): phi(q).psi(k) is e^(scale q.k) in expectation.

        phi(x) = exp(w.x' - |x'|^2 / 2) / sqrt(R),  x' = sqrt(scale) x,  scale = 1 / sqrt(head_dim)

    with R directions w, orthogonal in blocks of head_dim and as long as normal vectors. The exponent, at most |w|^2 / 2, is
    cut at 40, so that products stay within float32.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, rank)
        self.register_buffer("w", _directions(rank, head_dim))  # (R, D)

    def phi(self, q):
        x = q.to(self.w.dtype) * self.head_dim**-0.25
        exponent = x @ self.w.T - x.square().sum(-1, keepdim=True) / 2
        return exponent.clamp(max=40).exp() * self.rank**-0.5


class Fourier(Control):
    """Random Fourier features (Peng et al. 2021): of q and k of unit length, phi(q).psi(k) is e^(q.k) in expectation.

        phi(x) = sqrt(2 e / R) [cos(w.x / |x|), sin(w.x / |x|)]    with R / 2 directions w

    The features are signed, so phi.z may turn out negative: such a query does without its low-rank part.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, rank)
        if rank % 2:
            raise ValueError(f"random Fourier features come in pairs: the rank must be even, not {rank}")
        self.register_buffer("w", _directions(rank // 2, head_dim))  # (R / 2, D)

    def phi(self, q):
        x = q.to(self.w.dtype)
        angle = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30) @ self.w.T
        return torch.cat([angle.cos(), angle.sin()], -1) * math.sqrt(2 * math.e / self.rank)


class Elu(Control):
    """phi(x) = psi(x) = elu(x) + 1 (Katharopoulos et al. 2020): as many features as head_dim, whatever rank is asked for."""

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int | None = None, hidden: int | None = None):
        super().__init__(query_heads, kv_heads, head_dim, head_dim)

    def phi(self, q):
        x = q.to(torch.promote_types(q.dtype, torch.float32))
        return elu(x) + 1


FAMILIES = {"paper": LayerKernels, "exponential": Exponential, "performer": Performer, "fourier": Fourier, "elu": Elu}
"""Every family by the name that files and the command line use."""


def _directions(count, head_dim):
    """(count, head_dim): random directions, orthogonal in blocks of head_dim, as long as normal vectors are."""
    q, r = torch.linalg.qr(torch.randn(-(-count // head_dim), head_dim, head_dim))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # or some directions would come more often than others
    return q.flatten(0, 1)[:count] * torch.randn(count, head_dim).norm(dim=1, keepdim=True)


def _of_heads(x):
    """(N, H, m, D) -> (H, N m, D): what a head has to multiply."""
    return x.transpose(0, 1).flatten(1, 2)


def _of_rows(features, x):
    """features (H, N m, R) of x (N, H, m, D) -> (N, H, m, R)."""
    return features.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def _dropout_mask(x, rate):
    """0 or 1 / (1 - rate) in the shape of x. One random byte decides each element (so the rate is a multiple of 1/256): on
    a CPU, drawing a random float for each takes a third of the whole training step."""
    dropped = round(rate * 256)
    longs = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),), device=x.device)
    keep = longs.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return keep.to(x.dtype).mul_(256 / (256 - dropped))


class LessKernels(nn.Module):
    """The kernels of all attention layers of a model: `kernels.layers[i]` belong to layer i.

    rank: features of each KV head, or a table (layers x KV heads) of them; family: a name in FAMILIES; about: what is known of
    them (the model's fingerprint, how they were trained), stored in config.json beside the weights.
    """

    def __init__(
        self,
        layers: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        rank: int | Sequence[Sequence[int]] = 8,
        hidden: int = 512,
        about: dict | None = None,
        family: str = "paper",
    ):
        super().__init__()
        rank = _integers(rank)
        self.sizes = dict(layers=layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
        self.sizes |= dict(rank=rank, hidden=hidden, family=family)
        self.about = about or {}
        if family not in FAMILIES:
            raise ValueError(f"no family of kernels is called {family!r}: choose one of {', '.join(FAMILIES)}")
        table = [rank] * layers if isinstance(rank, int) else rank
        if len(table) != layers:
            raise ValueError(f"the ranks of {len(table)} layers do not fit {layers} layers")
        self.layers = nn.ModuleList(FAMILIES[family](query_heads, kv_heads, head_dim, some, hidden) for some in table)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes kernels.safetensors and config.json into `folder`; each is written aside and then renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = folder / f".{WEIGHTS}.new", folder / f".{CONFIG}.new"
        save_file({name: weight.contiguous() for name, weight in self.state_dict().items()}, weights)
        config.write_text(json.dumps({**self.sizes, "about": self.about}, indent=2) + "\n")
        weights.rename(folder / WEIGHTS)
        config.rename(folder / CONFIG)

    @classmethod
    def from_pretrained(cls, where: str | os.PathLike) -> "LessKernels":
        """Reads kernels from a local folder, or from a repository of the Hugging Face hub.

        Raises FileNotFoundError where there are none, ValueError where the files do not fit together or hold NaN.
        """
        weights, config = _locate(where)
        try:
            stored = json.loads(config.read_text())
            about = stored.pop("about", {})
            kernels = cls(**stored, about=about)
            kernels.load_state_dict(load_file(weights))
        except (RuntimeError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise ValueError(f"the kernels in {where} are broken, or do not fit their {CONFIG}: {error}") from error
        broken = [name for name, weight in kernels.state_dict().items() if not weight.isfinite().all()]
        if broken:
            raise ValueError(f"the kernels in {where} hold NaN or infinite weights ({broken[0]}): train or copy them again")
        return kernels.requires_grad_(False).eval()


def _integers(rank):
    """A rank, or a table of them, in int and list."""
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        return [_integers(row) for row in rank]
    try:
        return operator.index(rank)
    except TypeError:
        raise ValueError(f"a rank is an integer, or a table (layers x KV heads) of them, not {rank!r}") from None


def _locate(where) -> tuple[Path, Path]:
    folder = Path(where)
    if folder.is_dir():
        missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"the folder {where} holds no kernels: {missing[0]} is missing")
        return folder / WEIGHTS, folder / CONFIG
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(where), WEIGHTS)), Path(hf_hub_download(str(where), CONFIG))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"no kernels at {where}: neither a folder nor a repository of the hub") from error
