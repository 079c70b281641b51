"""What eviction does to attention maps: the residual is low-rank (fig. 3), and LESS reconstructs what is lost."""

import torch

from less_fast.hf.seam import predictions
from less_fast.layer.parallel import dense, eviction_times

from .check import Finding, Subject, claim, verdict

KEPT = 8  # singular values: as many as the state has features


def maps(q, k, e, scale, kernels=None):
    """Attention maps (N, Hq, T, T) of the full cache, of what is kept and, with kernels, of LESS: kept tokens by their logits,
    folded ones by phi.psi."""
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    e = e.repeat_interleave(G, 1)[:, :, None]  # (N, Hq, 1, T)
    i = torch.arange(T, device=q.device)
    causal = i <= i[:, None]
    kept = causal & (i[:, None] <= e)
    logits = q * scale @ k.repeat_interleave(G, 1).mT
    found = [logits.masked_fill(~mask, -torch.inf).softmax(-1) for mask in (causal, kept)]
    if kernels is not None:
        low_rank = (kernels.phi(q) @ kernels.psi(k).repeat_interleave(G, 1).mT).double().log()
        weight = torch.where(kept, logits.double(), torch.where(i[:, None] > e, low_rank, -torch.inf))
        found.append(weight.softmax(-1).float())
    return found


@claim("The residual of sparse attention is low-rank: its singular values fall faster than the whole map's", "fig. 3")
@torch.inference_mode()
def residual_rank(subject: Subject) -> Finding:
    model, policy = subject.model, subject.middle
    ids = subject.windows(4, subject.length // 2).to(model.device)
    shares = {"map": [], "residual": []}

    def attention(_, q, k, v, scale):
        full, kept = (matrix.cpu() for matrix in maps(q, k, eviction_times(q, k, v, policy, scale), scale))
        for name, matrix in (("map", full), ("residual", full - kept)):
            energy = torch.linalg.svdvals(matrix).square()  # (N, Hq, T)
            shares[name].append((energy[..., :KEPT].sum(-1) / energy.sum(-1).clamp(min=1e-30)).mean(0))
        return dense(q, k, v, scale)

    predictions(model, ids, attention)
    full, residual = (torch.stack(shares[name]) for name in ("map", "residual"))  # (layers, Hq)
    lower = (residual > full).float().mean().item()
    figures = {"map": full.tolist(), "residual": residual.tolist(), "heads_in_which_it_is": lower, "singular_values": KEPT}

    sentence = (
        f"the {KEPT} largest singular values hold {residual.mean():.0%} of the residual's energy and {full.mean():.0%} of the "
        f"map's; in {lower:.0%} of {full.numel()} heads more of the residual's"
    )
    rows = [[str(layer), f"{a.mean():.1%}", f"{b.mean():.1%}"] for layer, (a, b) in enumerate(zip(full, residual))]
    headings = ["layer", f"of the map in {KEPT}", f"of the residual in {KEPT}"]
    every = verdict([residual.mean() > full.mean(), lower == 1])
    return Finding(every, sentence, figures, headings, rows)


@claim("LESS reconstructs attention probabilities that the sparse policy loses (Hellinger distance)", "qualitative")
@torch.inference_mode()
def attention_maps(subject: Subject) -> Finding:
    model, policy = subject.model, subject.middle
    ids, distances = subject.windows(2, subject.length // 2).to(model.device), {"bare": [], "LESS": []}

    def attention(layer, q, k, v, scale):
        full, *others = maps(q, k, eviction_times(q, k, v, policy, scale), scale, subject.kernels.layers[layer])
        for found, matrix in zip(distances.values(), others):
            distance = (full.sqrt() - matrix.sqrt()).square().sum(-1).div(2).sqrt()  # (N, Hq, T)
            found.append(distance[:, :, policy.budget + 1 :].mean((0, 2)))
        return dense(q, k, v, scale)

    predictions(model, ids, attention)
    bare, less = map(torch.stack, distances.values())  # (layers, Hq)
    closer = (less < bare).float().mean().item()
    sentence = (
        f"mean Hellinger distance from the full map {bare.mean():.3f} for the bare policy, {less.mean():.3f} for LESS; "
        f"LESS is closer in {closer:.0%} of {less.numel()} heads"
    )
    rows = [[str(layer), f"{a.mean():.3f}", f"{b.mean():.3f}"] for layer, (a, b) in enumerate(zip(bare, less))]
    figures = {"bare": bare.tolist(), "less": less.tolist(), "heads_in_which_it_is_closer": closer}
    every = verdict([less.mean() < bare.mean(), closer > 0.5])
    return Finding(every, sentence, figures, ["layer", "bare", "LESS"], rows)
