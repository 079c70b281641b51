"""Attention probabilities are reconstructed: how far those of the bare policy and of LESS are from the full cache's."""

import torch

from less_fast.hf.seam import predictions
from less_fast.layer.parallel import dense, eviction_times

from .check import Finding, Subject, verdict
from .residual_rank import maps

CLAIM = "LESS reconstructs attention probabilities that the sparse policy loses (Hellinger distance, maps)"
PAPER = "qualitative"


def reconstructed(q, k, e, scale, kernels):
    """The map of LESS (N, Hq, T, T): kept tokens by their logits, folded ones by phi.psi."""
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    i, e = torch.arange(T, device=q.device), e.repeat_interleave(G, 1)
    logits = (q * scale @ k.repeat_interleave(G, 1).mT).double()
    low_rank = (kernels.phi(q) @ kernels.psi(k).repeat_interleave(G, 1).mT).double()
    kept = (i <= i[:, None]) & (i[:, None] <= e[:, :, None])
    weight = torch.where(kept, logits, torch.where(i[:, None] > e[:, :, None], low_rank.log(), -torch.inf))
    return weight.softmax(-1).float()


@torch.inference_mode()
def check(subject: Subject) -> Finding:
    model, policy = subject.model, subject.policies()[-2 if not subject.quick else 0]
    ids, distances, shown = subject.windows(2, subject.length // 2).to(model.device), {"bare": [], "LESS": []}, {}

    def attention(layer, q, k, v, scale):
        e = eviction_times(q, k, v, policy, scale)
        full, bare = maps(q, k, e, scale)
        ours = reconstructed(q, k, e, scale, subject.kernels.layers[layer])
        for name, matrix in (("bare", bare), ("LESS", ours)):
            distance = (full.sqrt() - matrix.sqrt()).square().sum(-1).div(2).sqrt()  # (N, Hq, T)
            distances[name].append(distance[:, :, policy.budget + 1 :].mean((0, 2)))
        shown.update({"full cache": full[0, 0].cpu(), f"{policy}": bare[0, 0].cpu(), "LESS": ours[0, 0].cpu()})
        return dense(q, k, v, scale)

    predictions(model, ids, attention)
    bare, less = (torch.stack(distances[name]) for name in ("bare", "LESS"))  # (layers, Hq)
    closer = (less < bare).float().mean().item()
    pictures = {
        f"attention_{index}": lambda axes, name=name: (axes.imshow(shown[name].clamp(min=1e-5).log10()), axes.set_title(name))
        for index, name in enumerate(shown)
    }
    sentence = (
        f"mean Hellinger distance from the full map {bare.mean():.3f} for the bare policy, {less.mean():.3f} for LESS; "
        f"LESS is closer in {closer:.0%} of {less.numel()} heads"
    )
    rows = [[str(layer), f"{a.mean():.3f}", f"{b.mean():.3f}"] for layer, (a, b) in enumerate(zip(bare, less))]
    figures = {"bare": bare.tolist(), "less": less.tolist(), "heads_in_which_it_is_closer": closer}
    return Finding(
        verdict([less.mean() < bare.mean(), closer > 0.5]), sentence, figures, ["layer", "bare", "LESS"], rows, pictures
    )
