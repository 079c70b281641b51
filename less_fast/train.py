"""Training of the kernels as in the paper (section 3.2): each layer alone, in the parallel form.

A layer's queries, keys and values are recorded from the model with its full cache. The eviction times, and what the kept
tokens contribute, do not depend on the kernels and are computed once. The kernels then learn to add what is missing: the
mean squared error between the layer's attention output with LESS and with the full cache, after the output projection.
"""

import copy
import time
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from .hf import attention_modules, check_model, fingerprint, record_layer, sizes
from .kernels import FAMILIES, Features, LessKernels
from .parallel import eviction_times, exact_part, low_rank_part, merge

SEQUENCES_AT_ONCE = 16  # while recording; training itself takes Recipe.batch


@dataclass(frozen=True)
class Recipe:
    """The paper's recipe: Adam, the learning rate halved every 10 of 40 epochs, dropout on the first hidden layer.

    halve_every None: the learning rate rises and falls once over the whole training instead (one cycle; Smith and Topin 2017);
    clip: the largest norm of a step's gradient, None for any.
    """

    rank: int = 8
    hidden: int = 512
    epochs: int = 40
    batch: int = 2
    learning_rate: float = 1e-3
    halve_every: int | None = 10
    dropout: float = 0.3
    seed: int = 0
    family: str = "paper"
    clip: float | None = None


RECIPES = {
    "paper": Recipe(),
    "exponential": Recipe(
        family="exponential", hidden=32, epochs=10, learning_rate=1e-2, halve_every=None, dropout=0.0, clip=1.0
    ),
}
"""How each family of learned kernels is trained, unless told otherwise."""


@dataclass
class Recorded:
    """What one layer's training needs, for N sequences and the L = T - 1 - budget queries behind the first eviction."""

    q: torch.Tensor  # (N, Hq, T, D)
    k: torch.Tensor  # (N, Hkv, T, D)
    v: torch.Tensor  # (N, Hkv, T, D)
    e: torch.Tensor  # (N, Hkv, T) eviction times
    exact: torch.Tensor  # (N, Hq, L, D) attention over what is kept
    lse: torch.Tensor  # (N, Hq, L) its log-sum-exp
    full: torch.Tensor  # (N, Hq, L, D) attention over everything: the target

    def rows(self, index) -> "Recorded":
        return Recorded(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def train(model, windows: torch.Tensor, validation: torch.Tensor, policy, recipe: Recipe = Recipe()) -> LessKernels:
    """Kernels for `model`, trained for streaming with `policy` on token windows.

    windows (N, T), validation (V, T) int64: validation chooses the best epoch of each layer.
    Raises ValueError where the model is not supported, the policy evicts nothing within T tokens, or a layer's weights or
    attention are not finite.
    """
    check_model(model)
    model.eval()
    T = windows.shape[1]
    if policy.selective:
        raise ValueError(f"training needs a policy that evicts one token at a time, and {policy} does not")
    if policy.budget is None or policy.budget > T - 2:
        raise ValueError(f"nothing is evicted within {T} tokens under {policy}: use longer windows or a smaller budget")
    about = {
        "fingerprint": fingerprint(model),
        "policy": repr(policy),
        "window": T,
        "sequences": len(windows),
        "recipe": asdict(recipe),
        "validation": [],
    }
    kernels = LessKernels(**sizes(model), rank=recipe.rank, hidden=recipe.hidden, about=about, family=recipe.family)
    started = time.perf_counter()
    progress = tqdm(total=recipe.epochs * len(kernels.layers), unit="epoch")
    for index, module in enumerate(attention_modules(model)):
        progress.set_postfix_str(f"layer {index}: recording")
        projection = module.o_proj.weight.detach().float().T  # (Hq * D, hidden size)
        data = [prepare(*record_layer(model, part, index), policy, module.scaling) for part in (windows, validation)]
        if not all(part.exact.isfinite().all() and part.full.isfinite().all() for part in data):
            raise ValueError(f"the attention of layer {index} is not finite: the model's weights or the text are broken")
        best, figures = train_layer(index, *data, projection, policy.budget, recipe, progress)
        kernels.layers[index].load_state_dict(best.state_dict())
        about["validation"].append(figures)
    progress.close()
    about["seconds"] = round(time.perf_counter() - started)
    return kernels.requires_grad_(False).eval()


@torch.no_grad()
def prepare(q, k, v, policy, scale) -> Recorded:
    """What does not depend on the kernels, once. q (N, Hq, T, D), k, v (N, Hkv, T, D) of any float dtype."""
    parts = []
    for some in zip(*(x.split(SEQUENCES_AT_ONCE) for x in (q, k, v))):
        queries, keys, values = (x.float() for x in some)
        e = eviction_times(queries, keys, values, policy, scale)
        exact, lse = exact_part(queries, keys, values, e, scale)
        full = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        late = slice(policy.budget + 1, None)
        parts.append((queries, keys, values, e, exact[:, :, late], lse[:, :, late], full[:, :, late]))
    return Recorded(*(torch.cat(part) for part in zip(*parts)))


def loss(kernels: Features, data: Recorded, projection: torch.Tensor, budget: int) -> torch.Tensor:
    """The paper's objective on some sequences: a scalar, differentiable in the kernels."""
    weighted, mass = low_rank_part(kernels.phi(data.q), kernels.psi(data.k), data.v, data.e, budget)
    return projected_error(merge(data.exact, data.lse, weighted, mass), data.full, projection)


def projected_error(out, full, projection):
    """Mean squared error after the output projection. out, full (N, Hq, L, D); projection (Hq * D, hidden size)."""
    return ((out - full).transpose(1, 2).flatten(2) @ projection).square().mean()


def train_layer(index, data, validation, projection, budget, recipe, progress) -> tuple[Features, dict]:
    """The kernels of the best epoch, and their figures: error on the validation windows with LESS and with the bare policy."""
    Hq, Hkv, D = data.q.shape[1], data.k.shape[1], data.q.shape[3]
    device = data.q.device
    bare = projected_error(validation.exact, validation.full, projection).item()
    best, lowest = None, float("inf")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed + index)
        kernels = FAMILIES[recipe.family](Hq, Hkv, D, recipe.rank, recipe.hidden).to(device)
        kernels.dropout = recipe.dropout
        adam = torch.optim.Adam(kernels.parameters(), lr=recipe.learning_rate)
        steps = -(-len(data.q) // recipe.batch)  # of an epoch
        if recipe.halve_every is None:
            pace = torch.optim.lr_scheduler.OneCycleLR(adam, recipe.learning_rate, recipe.epochs * steps)
        else:
            pace = torch.optim.lr_scheduler.StepLR(adam, recipe.halve_every * steps, gamma=0.5)
        for _ in range(recipe.epochs):
            kernels.train()
            for rows in torch.randperm(len(data.q)).to(device).split(recipe.batch):
                adam.zero_grad()
                loss(kernels, data.rows(rows), projection, budget).backward()
                if recipe.clip is not None:
                    torch.nn.utils.clip_grad_norm_(kernels.parameters(), recipe.clip)
                adam.step()
                pace.step()
            kernels.eval()
            with torch.no_grad():
                batches = torch.arange(len(validation.q), device=device).split(SEQUENCES_AT_ONCE)
                errors = [loss(kernels, validation.rows(rows), projection, budget) * len(rows) for rows in batches]
            error = torch.stack(errors).sum().item() / len(validation.q)
            if error < lowest:
                best, lowest = copy.deepcopy(kernels), error
            progress.update()
            progress.set_postfix_str(f"layer {index}: error {lowest / bare:.3f} of the bare policy's")
    if best is None:
        raise ValueError(f"training layer {index} diverged: its error was never finite; lower the learning rate")
    return best, {"bare": bare, "less": lowest}
