"""What a model's layers do while it reads with the full cache, and what a change of a layer's output costs: by the paper's
objective, the squared error after the output projection, or by the gradient, without running the model again.

A change δ of the attention outputs moves the predictions by a KL divergence of ½ E[(g·δ)²] to second order, where g is the
gradient of log p(y) for labels y that are drawn from the predictions themselves (the Fisher information). One backward pass
gives g at every layer. The product is taken at each query for itself: sums over queries would need many more samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hf.architecture import attention_modules, less_layers, output_weight, sizes
from ..hf.seam import predictions, read
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.features import NoState, Rho
from ..layer.parallel import dense, eviction_times
from ..layer.policies import Policy

SAMPLES = 2  # labels drawn for each token
AT_ONCE = 2**26  # numbers of queries for which eviction times are computed together


@dataclass
class Watched:
    """One layer reading N texts with the full cache, in the model's dtype. It has g, or else the output projection."""

    q: torch.Tensor  # (N, Hq, T, D)
    k: torch.Tensor  # (N, Hkv, T, D)
    v: torch.Tensor  # (N, Hkv, T, D)
    scale: float
    full: torch.Tensor  # (N, Hq, T, D) its attention output
    g: torch.Tensor | None  # (N, samples, Hq, T, D)
    projection: torch.Tensor | None = None  # (Hq * D, hidden size)

    def rows(self, index: torch.Tensor | slice) -> "Watched":
        """Some of the texts, in float32 or wider."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        q, k, v, full = (tensor[index].to(wide) for tensor in (self.q, self.k, self.v, self.full))
        g = None if self.g is None else self.g[index].to(wide)
        projection = None if self.projection is None else self.projection.to(wide)
        return Watched(q, k, v, self.scale, full, g, projection)

    @classmethod
    def join(cls, parts: Sequence["Watched"]) -> "Watched":
        """The same layer reading all texts of the parts."""
        q, k, v, full = (torch.cat([getattr(part, name) for part in parts]) for name in ("q", "k", "v", "full"))
        g = None if parts[0].g is None else torch.cat([part.g for part in parts])
        return cls(q, k, v, parts[0].scale, full, g, parts[0].projection)

    def seen(self, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """What costs depend on of outputs (N, Hq, L, D) from query `first` on: their products with g (N, Hq, L, samples), or
        all of them."""
        return out if self.g is None else torch.einsum("nshld,nhld->nhls", self.g[..., first:, :], out)

    def cost(self, seen: torch.Tensor, first: int = 0) -> torch.Tensor:
        """What it costs if this is seen of the layer's output from query `first` on, (N, L): nats for each query by the
        gradient, else the mean squared error after the output projection."""
        change = seen - self.seen(self.full[:, :, first:], first)
        if self.g is None:
            return (change.transpose(1, 2).flatten(2) @ self.projection).square().mean(-1)
        return change.sum(1).square().mean(-1) / 2

    def cost_of_heads(self, seen: torch.Tensor) -> torch.Tensor:
        """What it costs if this is seen of one KV head after the other's outputs (N, Hq, T, samples): nats, (N, Hkv, T)."""
        change = seen - self.seen(self.full)
        return change.unflatten(1, (self.k.shape[1], -1)).sum(2).square().mean(-1) / 2


def watch(model: PreTrainedModel, ids: torch.Tensor, seed: int, by_gradient: bool = True) -> dict[int, Watched]:
    """Every layer that LESS serves reading texts ids (N, T). seed: of the labels that are drawn, if costs are by the gradient.

    LessError if the attention of a layer or the model's predictions are not finite.
    """
    shape, (N, T) = sizes(model), ids.shape
    served, modules = less_layers(model), attention_modules(model)
    make = dict(device=model.device, dtype=model.dtype, requires_grad=True)
    changes = {index: torch.zeros(N, shape["query_heads"], T, shape["head_dim"], **make) for index in served if by_gradient}
    layers: dict[int, Watched] = {}

    def watcher(index, q, k, v, scale):
        out = dense(q, k, v, scale)
        if not out.isfinite().all():
            raise LessError(f"the attention of layer {index} is not finite: the model's weights or the text are broken")
        projection = None if by_gradient else output_weight(modules[index]).detach().T
        layers[index] = Watched(q.detach(), k.detach(), v.detach(), scale, out.detach(), None, projection)
        return out + changes[index] if by_gradient else out

    if not by_gradient:
        with torch.no_grad():
            read(model, ids, watcher)
        return layers
    with torch.inference_mode(False), torch.enable_grad():  # in whatever mode the caller is
        logits = predictions(model, ids.clone(), watcher)  # (N, T, vocabulary)
        if not logits.isfinite().all():
            raise LessError("the model's predictions are not finite: its weights or the text are broken")
        generator = torch.Generator(logits.device).manual_seed(seed)
        labels = torch.multinomial(logits.detach().exp().flatten(0, 1), SAMPLES, True, generator=generator).view(N, T, SAMPLES)
        gradients = [
            torch.autograd.grad(logits.gather(2, labels[..., i, None]).sum(), [*changes.values()], retain_graph=i < SAMPLES - 1)
            for i in range(SAMPLES)
        ]
    for layer, g in zip(layers.values(), zip(*gradients)):
        layer.g = torch.stack(g, 1)
    return layers


def watch_each(model: PreTrainedModel, windows: torch.Tensor, seeds: Sequence[int], by_gradient: bool) -> dict[int, Watched]:
    """The same of one text after the other, which takes less memory on the way. seeds: one for each."""
    each = tqdm(zip(windows.split(1), seeds), total=len(windows), desc="reading", unit="window", leave=False)
    parts = [watch(model, ids, seed, by_gradient) for ids, seed in each]
    return {index: Watched.join([part.pop(index) for part in parts]) for index in [*parts[0]]}  # never all of it twice


@torch.no_grad()
def eviction_times_of(layers: dict[int, Watched], policy: Policy, kernels: LessKernels | None) -> dict[int, torch.Tensor]:
    """e (N, Hkv, T) of each layer, all layers at once: they are rows of one batch or, if the policy is learned, heads of one
    layer, because each layer has a rho of its own."""
    first, learned, rhos = next(iter(layers.values())), policy.needs == "rho", None
    along = int(learned)
    if learned:
        rhos = NoState(len(layers) * first.q.shape[1], len(layers) * first.k.shape[1], first.q.shape[3])
        rhos.rho = Rho.join([kernels.layers[index].rho for index in layers])  # type: ignore[misc]
    found = []
    for rows in torch.arange(len(first.q), device=first.q.device).split(max(1, AT_ONCE // (len(layers) * first.q[0].numel()))):
        some = [layer.rows(rows) for layer in layers.values()]
        q, k, v = (torch.cat([getattr(layer, name) for layer in some], along) for name in "qkv")
        times = eviction_times(q, k, v, policy, first.scale, kernels=rhos)
        found.append(times.split(first.k.shape[1] if learned else len(rows), along))
    return {index: torch.cat(parts) for index, parts in zip(layers, zip(*found))}
