"""Training of kernels for a model, in stages that survive a kill.

1. Each layer alone, as in the paper (section 3.2): the mean squared error between the layer's attention output with LESS and
   with the full cache, after the output projection, in the parallel form. What does not depend on the kernels is recorded.
2. All layers together, a departure: the KL divergence from the full cache's predictions to those with LESS, through the whole
   model, under several budgets in turn (joint distillation).
3. Curves, from which budget tables are made, and all layers together once more, under these tables.
"""

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed
from tqdm import tqdm

from ..budgets import Curves, average
from ..files import aside
from ..hf.architecture import attention_modules, check_model, fingerprint, output_weight, sizes
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.features import FAMILIES, Features
from ..layer.parallel import low_rank_part, merge
from .head_costs import divergence, measure
from .recording import SHARD, Recorded, Recording, bytes_on_disk

CURVE_WINDOWS = 8  # windows on which damage is measured
JOINT_VALIDATION = 4  # windows on which the stages of all layers are judged
CHECKPOINT = 10  # steps of all layers between two checkpoints


@dataclass(frozen=True)
class Recipe:
    """The paper's recipe: Adam, the learning rate halved every 10 of 40 epochs, dropout on the first hidden layer.

    windows: how many each layer alone is trained on, None for all.
    halve_every None: the learning rate rises and falls once over the whole training instead (one cycle; Smith and Topin 2017);
    clip: the largest norm of a step's gradient, None for any.
    joint_steps, joint_rate: of the joint stage, of `batch` windows each, the rate again in one cycle; 0 leaves it out. It takes
    the multiples `joint_budgets` of the policy's budget in turn.
    table_steps: the same under the tables for these budgets, every other step under uniform ones.
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
    windows: int | None = None
    joint_steps: int = 0
    table_steps: int = 0
    joint_rate: float = 5e-3
    joint_budgets: tuple[float, ...] = (0.4, 1.0, 2.0)


RECIPES = {
    "paper": Recipe(),
    "exponential": Recipe(
        family="exponential",
        hidden=32,
        epochs=10,
        learning_rate=1e-2,
        halve_every=None,
        dropout=0.0,
        clip=1.0,
        windows=256,
        joint_steps=150,
        table_steps=100,
    ),
}
"""How each family of learned kernels is trained, unless told otherwise."""


class Work:
    """The folder of an unfinished training: what is done is in it, each file complete, and the order that it carries out.

    Raises LessError where the folder holds the work on another order.
    """

    def __init__(self, folder: Path, order: dict):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        order, file = json.loads(json.dumps(order)), folder / "order.json"
        self.resumed = file.exists()
        known = json.loads(file.read_text()) if file.exists() else order
        other = sorted(name for name in order | known if order.get(name) != known.get(name))
        if other:
            raise LessError(
                f"{folder} holds an unfinished training with another {', '.join(other)}: go on with the options it was begun "
                f"with, or delete that folder"
            )
        if process() == 0:
            with aside(file) as temporary:
                temporary.write_text(json.dumps(order, indent=2) + "\n")

    def load(self, name: str) -> dict | None:
        file = self.folder / name
        return torch.load(file, weights_only=True) if file.exists() else None

    def save(self, name: str, value: dict) -> None:
        with aside(self.folder / name) as temporary:
            torch.save(value, temporary)


def process() -> int:
    """Which of the processes of torchrun this is; 0 without torchrun."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all():
    if distributed.is_initialized():
        distributed.barrier()


def train(
    model,
    windows: torch.Tensor,
    validation: torch.Tensor,
    policy,
    recipe: Recipe = Recipe(),
    folder: Path | None = None,
    disk: float = 20e9,
    curves: bool = False,
) -> LessKernels | None:
    """Kernels for `model`, trained for streaming with `policy` on token windows.

    windows (N, T), validation (V, T) int64: validation chooses the best epoch of each layer, and judges the joint stage.
    folder: where unfinished work is kept; called again with the same arguments, training goes on there and ends in the same
    weights. None: nowhere. disk: bytes that recordings may take; as many layers are recorded at a time as fit.
    curves: measure at the end what each head costs at each budget, for budget tables.
    Under torchrun the processes share out recording and layers, and process 0 does the rest; the others return None.
    Raises LessError where the model is not supported, the policy evicts nothing within T tokens, a layer's weights or
    attention are not finite, training diverges, or the folder holds other work; OSError where the disk is full.
    """
    check_model(model)
    model.eval()
    T = windows.shape[1]
    if not policy.one_leaves and policy.budget is not None:
        raise LessError(f"training needs a policy that evicts one token at a time, and {policy} does not")
    if policy.budget is None or policy.budget > T - 2:
        raise LessError(f"nothing is evicted within {T} tokens under {policy}: use longer windows or a smaller budget")
    about = {
        "fingerprint": fingerprint(model),
        "policy": repr(policy),
        "window": T,
        "sequences": len(windows),
        "recipe": asdict(recipe) | {"joint_budgets": [*recipe.joint_budgets]},
    }
    budgets = [max(1, int(policy.budget * share)) for share in recipe.joint_budgets]
    rules = [policy.with_budget(budget) for budget in budgets] if recipe.joint_steps or recipe.table_steps else []
    order = about | {"text": hashlib.sha256(torch.cat([windows, validation]).numpy().tobytes()).hexdigest(), "curves": curves}
    kernels = LessKernels(**sizes(model), rank=recipe.rank, hidden=recipe.hidden, about=about, family=recipe.family)
    kernels.to(model.device)
    with TemporaryDirectory() as temporary:
        work, started = Work(Path(folder or temporary), order), time.perf_counter()
        about["validation"] = _each_layer(kernels, model, windows[: recipe.windows], validation, policy, recipe, work, disk)
        if process() != 0:
            return None
        few = validation[:JOINT_VALIDATION]
        if recipe.joint_steps:
            given = rules, rules, recipe.joint_steps, recipe, work
            about["joint"] = {"budgets": budgets} | _distill("joint", kernels, model, windows, few, *given)
        if curves:
            kernels.curves[type(policy).__name__] = _curves(kernels, model, windows[:CURVE_WINDOWS], policy, work)
        rules = [rule for rule in rules if curves and kernels.budgets_for(rule)]
        if rules and recipe.table_steps:
            tables = [[[policy.with_budget(b) for b in row] for row in kernels.budgets_for(rule)] for rule in rules]
            given = [*chain(*zip(tables, rules))], tables, recipe.table_steps, recipe, work
            budgets = [rule.budget for rule in rules]
            about["tables"] = {"budgets": budgets} | _distill("tables", kernels, model, windows, few, *given)
        kernels.requires_grad_(False).eval()
        about["seconds_since_resumed" if work.resumed else "seconds"] = round(time.perf_counter() - started)
        return kernels


def _curves(kernels, model, windows, policy, work) -> Curves:
    """Stage 3, window by window."""
    for index, window in enumerate(tqdm(windows.split(1), desc="curves", unit="window")):
        if work.load(f"curves-{index}") is None:
            work.save(f"curves-{index}", asdict(measure(model, window, policy, kernels)))
    return average([Curves(**work.load(f"curves-{index}")) for index in range(len(windows))])


def _each_layer(kernels, model, windows, validation, policy, recipe, work, disk) -> list[dict]:
    """Stage 1: the weights of every layer, and their errors with LESS and with the bare policy."""
    modules = attention_modules(model)
    recordings = [Recording(work.folder / name, part, policy) for name, part in (("train", windows), ("valid", validation))]
    each = bytes_on_disk(model, torch.cat([windows, validation]), policy, 1)
    at_once = max(1, int(disk // each))
    pending = [index for index in range(len(modules)) if work.load(f"layer-{index:03}") is None]
    mine = slice(process(), None, processes())
    wait_for_all()  # or some might see the others' layers done, and some not
    for first in range(0, len(pending), at_once):
        now = pending[first : first + at_once]
        shards = sum(-(-len(recording.windows) // SHARD) for recording in recordings)
        size = f"{each * len(now) / 1e9:.1f} GB"
        with tqdm(total=shards, desc=f"recording layers {now[0]} to {now[-1]}, {size}", disable=process() > 0) as progress:
            for recording in recordings:
                recording.record(model, now, mine, lambda: progress.update(processes()))
        wait_for_all()
        with tqdm(total=recipe.epochs * len(now[mine]), desc="layers", unit="epoch", disable=process() > 0) as progress:
            for index in now[mine]:
                projection = output_weight(modules[index]).detach().float().T  # (Hq * D, hidden size)
                _train_layer(kernels.layers[index], index, *recordings, projection, recipe, work, progress)
        wait_for_all()
        for index in now[mine]:
            for recording in recordings:
                recording.forget(index)
    done = [work.load(f"layer-{index:03}") for index in range(len(modules))]
    for layer, found in zip(kernels.layers, done):
        layer.load_state_dict(found["weights"])
    return [{"bare": found["bare"], "less": found["less"]} for found in done]


def loss(kernels: Features, data: Recorded, projection: torch.Tensor, budget: int) -> torch.Tensor:
    """The paper's objective on some sequences: a scalar, differentiable in the kernels."""
    weighted, mass = low_rank_part(kernels.phi(data.q), kernels.psi(data.k), data.v, data.e)
    late = slice(budget + 1, None)
    out = merge(data.exact, data.lse, weighted[:, :, late], mass[:, :, late])
    return projected_error(out, data.full, projection)


def projected_error(out, full, projection):
    """Mean squared error after the output projection. out, full (N, Hq, L, D); projection (Hq * D, hidden size)."""
    return ((out - full).transpose(1, 2).flatten(2) @ projection).square().mean()


def _train_layer(like: Features, index, recording, validation, projection, recipe, work, progress) -> None:
    """Stores the weights of the best epoch as `layer-...`, with the errors on the validation windows. like: for the sizes."""
    device, budget, count = projection.device, recording.policy.budget, len(recording.windows)
    held_out = [rows.tolist() for rows in torch.arange(len(validation.windows)).split(SHARD)]

    @torch.no_grad()
    def error(of):
        parts = ((len(rows), validation.rows(index, rows, device)) for rows in held_out)
        return sum(many * of(data).item() for many, data in parts) / len(validation.windows)

    bare = error(lambda data: projected_error(data.exact, data.full, projection))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed + index)
        sized = like.query_heads, like.kv_heads, like.head_dim, recipe.rank, recipe.hidden
        kernels = FAMILIES[recipe.family](*sized).to(device)
        kernels.dropout = recipe.dropout
        adam = torch.optim.Adam(kernels.parameters(), lr=recipe.learning_rate)
        steps = -(-count // recipe.batch)  # of an epoch
        if recipe.halve_every is None:
            pace = torch.optim.lr_scheduler.OneCycleLR(adam, recipe.learning_rate, recipe.epochs * steps)
        else:
            pace = torch.optim.lr_scheduler.StepLR(adam, recipe.halve_every * steps, gamma=0.5)
        best, lowest, first = None, float("inf"), 0
        if (before := work.load(f"layer-{index:03}-epoch")) is not None:
            best, lowest, first = before["best"], before["lowest"], before["epoch"]
            _restore(before, kernels, adam, pace)
        progress.update(first)
        for epoch in range(first, recipe.epochs):
            kernels.train()
            for rows in torch.randperm(count).split(recipe.batch):
                adam.zero_grad()
                loss(kernels, recording.rows(index, rows.tolist(), device), projection, budget).backward()
                _step(adam, pace, kernels, recipe.clip)
            kernels.eval()
            found = error(lambda data: loss(kernels, data, projection, budget))
            if found < lowest:
                best, lowest = copy.deepcopy(kernels.state_dict()), found
            work.save(
                f"layer-{index:03}-epoch",
                {"best": best, "lowest": lowest, "epoch": epoch + 1} | _snapshot(kernels, adam, pace),
            )
            progress.update()
            progress.set_postfix_str(f"layer {index}: error {lowest / bare:.3f} of the bare policy's")
    if best is None:
        raise LessError(f"training layer {index} diverged: its error was never finite; lower the learning rate")
    work.save(f"layer-{index:03}", {"weights": best, "bare": bare, "less": lowest})


def _distill(name, kernels, model, windows, validation, rules, judged, steps, recipe, work) -> dict:
    """Stage 2 or 3, in place: policies or tables of them in turn. Returns the divergences on the validation windows under those
    that are judged, before and after; where they have not become less on average, the weights from before are kept."""
    before, first = work.load(name), 0
    if before is not None and "after" in before["figures"]:
        kernels.load_state_dict(before["kernels"])
        return before["figures"]
    weights = list(kernels.requires_grad_().train().parameters())
    adam = torch.optim.Adam(weights, lr=recipe.joint_rate)
    pace = torch.optim.lr_scheduler.OneCycleLR(adam, recipe.joint_rate, steps)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))
    start = copy.deepcopy(kernels.state_dict())
    if before is None:
        figures = {"before": _divergences(model, validation, judged, kernels)}
    else:
        figures, first = before["figures"], before["step"]
        _restore(before, kernels, adam, pace)
    with tqdm(total=steps, initial=first, desc=f"all layers, {name}", unit="step") as progress:
        progress.set_postfix_str(f"divergence {_spelled(figures['before'])}")
        for step in range(first, steps):
            rows = torch.stack([order[(step * recipe.batch + row) % len(windows)] for row in range(recipe.batch)])
            adam.zero_grad()
            found = divergence(model, windows[rows], rules[step % len(rules)], kernels)
            if not found.isfinite():
                raise LessError(f"the stage of all layers diverged at step {step}: lower its learning rate, or leave it out")
            found.backward(inputs=weights)
            _step(adam, pace, kernels, recipe.clip)
            progress.update()
            if (step + 1) % CHECKPOINT == 0:
                work.save(name, {"figures": figures, "step": step + 1} | _snapshot(kernels, adam, pace))
        kernels.eval()
        figures["after"] = _divergences(model, validation, judged, kernels)
        progress.set_postfix_str(f"divergence {_spelled(figures['before'])} -> {_spelled(figures['after'])}")
    figures["kept"] = sum(figures["after"]) < sum(figures["before"])
    if not figures["kept"]:
        kernels.load_state_dict(start)
    work.save(name, {"figures": figures, "kernels": kernels.state_dict()})
    return figures


@torch.no_grad()
def _divergences(model, windows, rules: Sequence, kernels) -> list[float]:
    parts = windows.split(2)
    return [sum(divergence(model, ids, rule, kernels).item() * len(ids) for ids in parts) / len(windows) for rule in rules]


def _spelled(figures):
    return " / ".join(f"{figure:.3f}" for figure in figures)


def _step(adam, pace, kernels, clip):
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(kernels.parameters(), clip)
    adam.step()
    pace.step()


def _snapshot(kernels, adam, pace) -> dict:
    """Everything that the next step depends on."""
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    parts = {"kernels": kernels, "adam": adam, "pace": pace}
    return {name: part.state_dict() for name, part in parts.items()} | {"generators": generators}


def _restore(snapshot, kernels, adam, pace):
    for name, part in {"kernels": kernels, "adam": adam, "pace": pace}.items():
        part.load_state_dict(snapshot[name])
    torch.set_rng_state(snapshot["generators"]["cpu"])
    if "cuda" in snapshot["generators"]:
        torch.cuda.set_rng_state(snapshot["generators"]["cuda"])
