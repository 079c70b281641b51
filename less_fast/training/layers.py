"""Each layer alone, as in the paper (section 3.2): the mean squared error between the layer's attention output with LESS and with
the full cache, after the output projection, in the parallel form. What does not depend on the kernels is recorded once."""

import copy
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..hf.architecture import attention_modules, less_layers, output_weight
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.features import FAMILIES, Features
from ..layer.parallel import low_rank_part, merge
from ..layer.policies import Policy
from .descent import Descent
from .recipe import Recipe
from .recording import SHARD, Recorded, Recording, bytes_on_disk
from .work import Work, process, processes, wait_for_all


def train_layers(
    kernels: LessKernels,
    model: PreTrainedModel,
    windows: torch.Tensor,
    validation: torch.Tensor,
    policy: Policy,
    recipe: Recipe,
    work: Work,
    disk: float,
) -> list[dict[str, float]]:
    """Trains every layer that LESS serves, in place. Returns the errors of each on the validation windows: bare policy, LESS.

    windows (N, T), validation (V, T) int64. disk: bytes that recordings may take, but one layer is always recorded.
    Under torchrun the processes share out the recording and the layers.
    """
    modules = attention_modules(model)
    recordings = [Recording(work.folder / name, part, policy) for name, part in (("train", windows), ("valid", validation))]
    each = bytes_on_disk(model, torch.cat([windows, validation]), policy, 1)
    at_once = max(1, int(disk // each))
    served = less_layers(model)
    pending = [index for index in served if not work.has(f"layer-{index:03}")]
    mine = slice(process(), None, processes())
    wait_for_all()  # or some might see the others' layers done, and some not
    for index in set(served).difference(pending):  # a kill may have left their recordings
        for recording in recordings:
            recording.forget(index)
    for first in range(0, len(pending), at_once):
        now = pending[first : first + at_once]
        shards = sum(-(-len(recording.windows) // SHARD) for recording in recordings)
        size = f"{each * len(now) / 1e9:.1f} GB"
        with tqdm(total=shards, desc=f"recording layers {now[0]} to {now[-1]}, {size}", disable=process() > 0) as progress:
            for recording in recordings:
                recording.record(model, kernels, now, mine, lambda: progress.update(processes()))
        wait_for_all()
        with tqdm(total=recipe.epochs * len(now[mine]), desc="layers", unit="epoch", disable=process() > 0) as progress:
            for index in now[mine]:
                projection = output_weight(modules[index]).detach().float().T  # (Hq * D, hidden size)
                _train_layer(kernels.sizes | {"rank": recipe.rank}, index, recordings, projection, recipe, work, progress)
        wait_for_all()
        for index in now[mine]:
            for recording in recordings:
                recording.forget(index)
    trained = {index: work.load(f"layer-{index:03}") for index in served}
    for index, saved in trained.items():
        layer = kernels.layers[index]
        layer.load_state_dict(layer.state_dict() | saved["weights"])
    return [{"bare": saved["bare"], "less": saved["less"]} for saved in trained.values()]


def loss(kernels: Features, data: Recorded, projection: torch.Tensor, budget: int) -> torch.Tensor:
    """The paper's objective on some sequences: a scalar, differentiable in the kernels. projection (Hq * D, hidden size)."""
    weighted, mass = low_rank_part(kernels.phi(data.q), kernels.psi(data.k), data.v, data.e)
    late = slice(budget + 1, None)
    out = merge(data.exact, data.lse, weighted[:, :, late], mass[:, :, late])  # (N, Hq, L, D)
    return projected_error(out, data.full, projection)


def projected_error(out: torch.Tensor, full: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Mean squared error after the output projection. out, full (N, Hq, L, D); projection (Hq * D, hidden size)."""
    return ((out - full).transpose(1, 2).flatten(2) @ projection).square().mean()


def _train_layer(sizes, index, recordings, projection, recipe, work, progress):
    """Saves the weights of the best epoch, or those from before the first, as `layer-...`, with the errors on the validation
    windows. sizes: of the kernels."""
    recording, validation = recordings
    device, budget, count = projection.device, recording.policy.budget, len(recording.windows)
    held_out = [rows.tolist() for rows in torch.arange(len(validation.windows), device="cpu").split(SHARD)]

    @torch.no_grad()
    def mean(error: Callable[[Recorded], torch.Tensor]) -> float:
        parts = ((len(rows), validation.rows(index, rows, device)) for rows in held_out)
        return sum(size * error(data).item() for size, data in parts) / len(validation.windows)

    bare = mean(lambda data: projected_error(data.exact, data.full, projection))
    if not bare > 0:
        raise LessError(f"layer {index} loses nothing under the bare policy, so there is nothing to learn: train on other text")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed + index)
        shape = (sizes[name] for name in ("query_heads", "kv_heads", "head_dim", "rank", "hidden"))
        with torch.device("cpu"):
            kernels = FAMILIES[recipe.family](*shape)
        kernels.to(device)
        kernels.dropout = recipe.dropout
        some = recording.rows(index, range(min(SHARD, count)), device)
        kernels.begin(some.lse, low_rank_part(kernels.phi(some.q), kernels.psi(some.k), some.v, some.e)[1][:, :, budget + 1 :])
        steps = -(-count // recipe.batch)  # of an epoch
        halve_every = recipe.halve_every and recipe.halve_every * steps
        descent = Descent(
            kernels, recipe.rate(recipe.learning_rate, kernels.head_dim), recipe.epochs * steps, halve_every, recipe.clip
        )
        start, begun = copy.deepcopy(kernels.state_dict()), mean(lambda data: loss(kernels.eval(), data, projection, budget))
        best, lowest, first = None, float("inf"), 0
        if work.has(f"layer-{index:03}-epoch"):
            saved = work.load(f"layer-{index:03}-epoch")
            best, lowest, first = saved["best"], saved["lowest"], saved["epoch"]
            descent.load_state_dict(saved["descent"])
            set_generators(saved["generators"], device)
        progress.update(first)
        for epoch in range(first, recipe.epochs):
            kernels.train()
            for rows in torch.randperm(count, device="cpu").split(recipe.batch):
                descent.step(loss(kernels, recording.rows(index, rows.tolist(), device), projection, budget))
            kernels.eval()
            error = mean(lambda data: loss(kernels, data, projection, budget))
            if error < lowest:
                best, lowest = copy.deepcopy(kernels.state_dict()), error
            checkpoint = {"best": best, "lowest": lowest, "epoch": epoch + 1, "descent": descent.state_dict()}
            work.save(f"layer-{index:03}-epoch", checkpoint | {"generators": generators(device)})
            progress.update()
            progress.set_postfix_str(f"layer {index}: error {lowest / bare:.3f} of the bare policy's")
    if best is None:
        raise LessError(f"training layer {index} diverged: its error was never finite; lower the learning rate")
    if not lowest < begun:
        best, lowest = start, begun
    work.save(f"layer-{index:03}", {"weights": best, "bare": bare, "less": lowest})


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the random generators that training on this device draws from: the order of windows, and dropout."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":  # of this device: the current one may be another
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
