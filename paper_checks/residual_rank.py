"""The residual of sparse attention is low-rank (fig. 3): what eviction loses of an attention map, beside the map itself."""

import torch

from less_fast.hf.seam import predictions
from less_fast.layer.parallel import dense, eviction_times

from .check import Finding, Subject, verdict

CLAIM = "The residual of sparse attention is low-rank: its singular values fall faster than the whole map's"
PAPER = "they fall faster (fig. 3)"
KEPT = 8  # singular values: as many as the state has features


def maps(q, k, e, scale):
    """Attention maps (N, Hq, T, T) of the full cache and of what is kept."""
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    e = e.repeat_interleave(G, 1)  # (N, Hq, T)
    i = torch.arange(T, device=q.device)
    causal = i <= i[:, None]
    logits = q * scale @ k.repeat_interleave(G, 1).mT
    kept = causal & (i[:, None] <= e[:, :, None])
    return (logits.masked_fill(~mask, -torch.inf).softmax(-1) for mask in (causal, kept))


@torch.inference_mode()
def check(subject: Subject) -> Finding:
    model, policy = subject.model, subject.policies()[-2 if not subject.quick else 0]
    ids = subject.windows(4, subject.length // 2).to(model.device)
    shares = {"map": [], "residual": []}
    spectra = {"map": [], "residual": []}

    def attention(_, q, k, v, scale):
        e = eviction_times(q, k, v, policy, scale)
        full, kept = (matrix.cpu() for matrix in maps(q.cpu(), k.cpu(), e.cpu(), scale))
        for name, matrix in (("map", full), ("residual", full - kept)):
            values = torch.linalg.svdvals(matrix)  # (N, Hq, T)
            energy = values.square() / values.square().sum(-1, keepdim=True).clamp(min=1e-30)
            shares[name].append(energy[..., :KEPT].sum(-1).mean(0))
            spectra[name].append((values / values[..., :1].clamp(min=1e-30)).mean((0, 1)))
        return dense(q, k, v, scale)

    predictions(model, ids, attention)
    full, residual = (torch.stack(shares[name]) for name in ("map", "residual"))  # (layers, Hq)
    lower = (residual > full).float().mean().item()
    figures = {"map": full.tolist(), "residual": residual.tolist(), "heads_in_which_it_is": lower, "singular_values": KEPT}

    def draw(axes):
        for name, values in spectra.items():
            axes.plot(torch.stack(values).mean(0), label=name)
        axes.set(xlabel="index", ylabel="singular value, relative to the largest", yscale="log", title=f"mean, {policy}")
        axes.legend()

    sentence = (
        f"the {KEPT} largest singular values hold {residual.mean():.0%} of the residual's energy and {full.mean():.0%} of the "
        f"map's; in {lower:.0%} of {full.numel()} heads more of the residual's"
    )
    rows = [[str(layer), f"{a.mean():.1%}", f"{b.mean():.1%}"] for layer, (a, b) in enumerate(zip(full, residual))]
    headings = ["layer", f"of the map in {KEPT}", f"of the residual in {KEPT}"]
    every = verdict([residual.mean() > full.mean(), lower == 1])
    return Finding(every, sentence, figures, headings, rows, {"residual_rank": draw})
