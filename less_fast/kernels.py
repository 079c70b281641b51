"""The learned kernels phi and psi (paper, section 3), for one layer and for a whole model, and their files."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import gelu

WEIGHTS, CONFIG = "kernels.safetensors", "config.json"


class LayerKernels(nn.Module):
    """phi and psi of one layer: two-layer networks with weights per query head (phi) and per KV head (psi).

        phi(q) = | gelu(gelu(q Q1) Q2) |        psi(k) = | gelu(gelu(k K1) K2) K3 |        exact GELU

    K3 starts at 1e-4 times the identity, so that training starts from the bare policy.
    """

    def __init__(self, query_heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int = 512):
        super().__init__()
        if min(query_heads, kv_heads, head_dim, rank, hidden) < 1 or query_heads % kv_heads:
            raise ValueError(
                f"kernels need sizes of at least 1 and query heads that are a multiple of the KV heads, "
                f"not {query_heads=}, {kv_heads=}, {head_dim=}, {rank=}, {hidden=}"
            )
        self.q1 = nn.Parameter(torch.randn(query_heads, head_dim, hidden) * head_dim**-0.5)  # (Hq, D, h)
        self.q2 = nn.Parameter(torch.randn(query_heads, hidden, rank) * hidden**-0.5)  # (Hq, h, R)
        self.k1 = nn.Parameter(torch.randn(kv_heads, head_dim, hidden) * head_dim**-0.5)  # (Hkv, D, h)
        self.k2 = nn.Parameter(torch.randn(kv_heads, hidden, rank) * hidden**-0.5)  # (Hkv, h, R)
        self.k3 = nn.Parameter(torch.eye(rank).repeat(kv_heads, 1, 1) * 1e-4)  # (Hkv, R, R)
        self.dropout = 0.0  # on the first hidden layer, in train mode

    @property
    def rank(self) -> int:
        return self.k3.shape[-1]

    def phi(self, q: torch.Tensor) -> torch.Tensor:
        """q (N, Hq, m, D), rotated and not scaled -> (N, Hq, m, R), non-negative, in the kernels' dtype."""
        return self._two_layers(q, self.q1, self.q2).abs()

    def psi(self, k: torch.Tensor) -> torch.Tensor:
        """k (N, Hkv, m, D), rotated -> (N, Hkv, m, R), non-negative, in the kernels' dtype."""
        return _per_head(self._two_layers(k, self.k1, self.k2), self.k3).abs()

    def _two_layers(self, x, first, second):
        hidden = gelu(_per_head(x.to(first.dtype), first))  # (N, H, m, h)
        if self.training and self.dropout > 0:
            hidden = hidden * _dropout_mask(hidden, self.dropout)
        return gelu(_per_head(hidden, second))

    def of_heads(self, kv_heads: list[int]) -> "LayerKernels":
        """The kernels of some KV heads and of the query heads that read them: itself for all heads, else a copy."""
        count, group = self.k1.shape[0], self.q1.shape[0] // self.k1.shape[0]
        if kv_heads == list(range(count)):
            return self
        query_heads = [head * group + a for head in kv_heads for a in range(group)]
        _, head_dim, hidden = self.q1.shape
        part = LayerKernels(len(query_heads), len(kv_heads), head_dim, self.rank, hidden).to(self.q1)
        with torch.no_grad():
            for name, weight in part.named_parameters():
                weight.copy_(getattr(self, name)[query_heads if name.startswith("q") else kv_heads])
        return part


def _per_head(x, weight):
    """x (N, H, m, i), weight (H, i, o) -> (N, H, m, o): one matrix product for each head, weights never expanded."""
    return torch.einsum("nhmi,hio->nhmo", x, weight)


def _dropout_mask(x, rate):
    """0 or 1 / (1 - rate) in the shape of x. One random byte decides each element (so the rate is a multiple of 1/256): on
    a CPU, drawing a random float for each takes a third of the whole training step."""
    dropped = round(rate * 256)
    longs = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),), device=x.device)
    keep = longs.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return keep.to(x.dtype).mul_(256 / (256 - dropped))


class LessKernels(nn.Module):
    """The kernels of all attention layers of a model: `kernels.layers[i]` is a LayerKernels.

    about: what is known of them (the model's fingerprint, how they were trained); stored in config.json beside the weights.
    """

    def __init__(
        self,
        layers: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        rank: int = 8,
        hidden: int = 512,
        about: dict | None = None,
    ):
        super().__init__()
        self.sizes = dict(
            layers=layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, rank=rank, hidden=hidden
        )
        self.about = about or {}
        self.layers = nn.ModuleList(
            LayerKernels(query_heads, kv_heads, head_dim, rank, hidden) for _ in range(layers)
        )

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
        broken = [name for name, weight in kernels.named_parameters() if not weight.isfinite().all()]
        if broken:
            raise ValueError(f"the kernels in {where} hold NaN or infinite weights ({broken[0]}): train or copy them again")
        return kernels.requires_grad_(False).eval()


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
