"""What a change of a layer's attention costs the model's predictions, without running the model again: linear in layers.

A change δ of the attention outputs moves the predictions by a KL divergence of ½ E[(g·δ)²] to second order, where g is the
gradient of log p(y) for labels y that are drawn from the predictions themselves (the Fisher information). One backward pass
gives g at every layer. The product is taken at each query for itself: sums over queries would need many more samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..hf.architecture import less_layers, sizes
from ..hf.seam import predictions
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.features import NoState, Rho
from ..layer.parallel import dense, eviction_times
from ..layer.policies import Policy

SAMPLES = 2  # labels drawn for each token


@dataclass
class Watched:
    """One layer reading N texts with the full cache."""

    q: torch.Tensor  # (N, Hq, T, D)
    k: torch.Tensor  # (N, Hkv, T, D)
    v: torch.Tensor  # (N, Hkv, T, D)
    scale: float
    full: torch.Tensor  # (N, Hq, T, D) its attention output
    g: torch.Tensor  # (samples, N, Hq, T, D)

    def rows(self, index: torch.Tensor) -> "Watched":
        """Some of the texts."""
        return Watched(self.q[index], self.k[index], self.v[index], self.scale, self.full[index], self.g[:, index])

    @classmethod
    def join(cls, parts: Sequence["Watched"]) -> "Watched":
        """The same layer reading all texts of the parts."""
        texts = (torch.cat([getattr(part, name) for part in parts]) for name in ("q", "k", "v", "full"))
        q, k, v, full = texts
        return cls(q, k, v, parts[0].scale, full, torch.cat([part.g for part in parts], 1))

    def cost(self, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """What it costs if the layer's output is `out` (N, Hq, L, D) from query `first` on: nats for each query, (N, L)."""
        change = out - self.full[:, :, first:]
        return (self.g[:, :, :, first:] * change).sum((2, 4)).square().mean(0) / 2

    def cost_of_heads(self, out: torch.Tensor) -> torch.Tensor:
        """What it costs if one KV head after the other has its outputs from `out` (N, Hq, T, D): nats, (N, Hkv, T)."""
        products = (self.g * (out - self.full)).sum(-1)  # (samples, N, Hq, T)
        return products.unflatten(2, (self.k.shape[1], -1)).sum(3).square().mean(0) / 2


def watch(model: PreTrainedModel, ids: torch.Tensor, seed: int) -> dict[int, Watched]:
    """Every layer that LESS serves reading texts ids (N, T), in float32 or wider. seed: of the labels that are drawn.

    LessError if the model's predictions are not finite.
    """
    shape, (N, T) = sizes(model), ids.shape
    changes = {
        index: torch.zeros(
            N, shape["query_heads"], T, shape["head_dim"], device=model.device, dtype=model.dtype, requires_grad=True
        )
        for index in less_layers(model)
    }
    seen: dict[int, tuple] = {}
    wide = torch.promote_types(model.dtype, torch.float32)

    def watcher(index, q, k, v, scale):
        seen[index] = q.detach(), k.detach(), v.detach(), scale
        return dense(q, k, v, scale) + changes[index]

    with torch.inference_mode(False):  # with gradients, in whatever mode the caller is
        logits = predictions(model, ids.clone(), watcher)  # (N, T, vocabulary)
        if not logits.isfinite().all():
            raise LessError("the model's predictions are not finite: its weights or the text are broken")
        generator = torch.Generator(logits.device).manual_seed(seed)
        labels = torch.multinomial(logits.detach().exp().flatten(0, 1), SAMPLES, True, generator=generator).view(N, T, SAMPLES)
        gradients = [
            torch.autograd.grad(logits.gather(2, labels[..., i, None]).sum(), [*changes.values()], retain_graph=i < SAMPLES - 1)
            for i in range(SAMPLES)
        ]
    with torch.no_grad():
        return {
            index: Watched(q.to(wide), k.to(wide), v.to(wide), scale, dense(q, k, v, scale).to(wide), torch.stack(g).to(wide))
            for (index, (q, k, v, scale)), g in zip(seen.items(), zip(*gradients))
        }


@torch.no_grad()
def eviction_times_of(layers: dict[int, Watched], policy: Policy, kernels: LessKernels | None) -> dict[int, torch.Tensor]:
    """e (N, Hkv, T) of each layer, all layers at once: they are rows of one batch or, if the policy is learned, heads of one
    layer, because each layer has a rho of its own."""
    first = next(iter(layers.values()))
    along = 1 if policy.needs == "rho" else 0
    q, k, v = (torch.cat([getattr(layer, name) for layer in layers.values()], along) for name in "qkv")
    rhos = None
    if policy.needs == "rho":
        rhos = NoState(q.shape[1], k.shape[1], k.shape[3])
        rhos.rho = Rho.join([kernels.layers[index].rho for index in layers])  # type: ignore[misc]
    times = eviction_times(q, k, v, policy, first.scale, kernels=rhos)
    return dict(zip(layers, times.split(first.k.shape[along], along)))
