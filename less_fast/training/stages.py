"""Training of kernels for a model, in stages that survive a kill:

0. rho, what is worth keeping, if asked for (retention.py);
1. each layer alone, as in the paper (layers.py), or all at once, for large models (together.py);
2. all layers together, under several budgets in turn (joint.py);
3. what each head costs (head_costs.py), from which budget tables are made, and all layers together once more, under these tables.
"""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..budgets import Curves, average
from ..files import digest
from ..hf.architecture import check_model, less_layers, sizes
from ..hf.identity import check_saved, identity
from ..hf.seam import predictions
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.parallel import dense
from ..layer.policies import Policy
from ..setting import POLICIES, Setting
from .checks import check_streamed, check_windows, number
from .costs import Costs, estimate
from .head_costs import check_policy, grid, measure
from .joint import distill
from .layers import train_layers
from .recipe import CURVE_WINDOWS, JOINT_VALIDATION, Recipe
from .retention import train_rho
from .together import train_together
from .work import Work, process, processes, wait_for_all


@torch.inference_mode(False)  # with gradients, in whatever mode the caller is
def train(
    model: PreTrainedModel,
    windows: torch.Tensor,
    validation: torch.Tensor,
    policy: Policy,
    recipe: Recipe = Recipe(),
    folder: str | os.PathLike | None = None,
    disk: float = 20e9,
    curves: bool = False,
    start: LessKernels | None = None,
    tell: Callable[[Costs], object] | None = None,
) -> LessKernels | None:
    """Kernels for `model`, trained for streaming with `policy` on token windows.

    windows (N, T), validation (V, T) int64: validation chooses the best epoch of each layer, and judges the joint stage.
    folder: where unfinished work is kept; called again with the same arguments, training goes on there and ends in the same
    weights. None: nowhere. disk: bytes that recordings may take; as many layers are recorded at a time as fit, at least one.
    curves: measure at the end what each head costs at each budget, for budget tables.
    start: kernels to go on with, of the recipe's family, rank and hidden width, and with their curves; None: new ones.
    tell: told what the training will take, from a probe, before it begins; not where it goes on, or several processes share it.
    Under torchrun the processes share out recording and layers, and process 0 does the rest; the others return None.
    Raises LessError, before anything is written, if the model, windows or policy cannot be trained on or with; later if a layer's
    attention is not finite, training diverges, or the folder holds other work. OSError if the disk is full.
    """
    check_model(model)
    model.eval()
    settings = _settings(model, windows, validation, policy, recipe, disk, curves)
    if folder is None and processes() > 1:
        raise LessError("several processes train together in one folder: give a `folder` that all of them see")
    about = {
        "identity": identity(model),
        "policy": repr(policy),
        "window": windows.shape[1],
        "sequences": len(windows),
        "recipe": asdict(recipe) | {"joint_budgets": [*recipe.joint_budgets]},
    }
    text = hashlib.sha256(torch.cat([windows.cpu(), validation.cpu()]).numpy().tobytes()).hexdigest()
    order = about | {"text": text, "curves": curves, "dtype": str(model.dtype), "start": start and digest(start.state_dict())}
    kernels = _begin(model, recipe, policy, about, start)
    kernels.to(model.device, torch.promote_types(model.dtype, torch.float32))
    settings = [replace(setting, kernels=kernels) for setting in settings]
    with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        work, started = Work(Path(place), order), time.perf_counter()
        rules = [rule for rule in _rules(policy, recipe) if curves and type(rule).__name__ not in kernels.curves]
        if work.resumed:
            check_saved(place, work.order, model)
        elif tell is not None and processes() == 1:
            tell(estimate(model, windows, len(validation), kernels, settings, policy, recipe, disk, rules))
        if recipe.rho_steps:
            if process() > 0:
                wait_for_all()  # then what process 0 has saved is read: a learned policy records by it
            about["rho"] = figures = train_rho(model, windows, validation, kernels, recipe, work)
            before, after = (sum(figures[when]) / len(figures[when]) for when in ("before", "after"))
            if not after < before:
                raise LessError(
                    f"rho learned nothing: its cross-entropy was {before:.3f} and is {after:.3f}; lower rho_rate (--rho-rate)"
                )
            if process() == 0:
                wait_for_all()
        if recipe.epochs:
            about["validation"] = train_layers(kernels, model, windows[: recipe.windows], validation, policy, recipe, work, disk)
        if process() != 0:
            return None
        if recipe.together_steps:
            budgets = [setting.policy.budget for setting in settings]
            about["together"] = {"budgets": budgets} | train_together(model, windows, validation, settings, recipe, work)
        few = validation[:JOINT_VALIDATION]
        if recipe.joint_steps:
            steps = recipe.joint_steps
            about["joint"] = distill("joint", model, windows, few, settings, settings, steps, recipe, work)
        for rule in rules:
            kernels.curves[type(rule).__name__] = _curves(kernels, model, windows[:CURVE_WINDOWS], rule, recipe, work)
        uniform = [setting for setting in settings if curves and kernels.budgets_for(setting.policy)]
        if uniform and recipe.table_steps:
            tables = [replace(setting, budgets=kernels.budgets_for(setting.policy)) for setting in uniform]
            turns, steps = [*chain(*zip(tables, uniform))], recipe.table_steps
            about["tables"] = distill("tables", model, windows, few, turns, tables, steps, recipe, work)
        about["seconds_since_resumed" if work.resumed else "seconds"] = round(time.perf_counter() - started)
        return kernels.float().requires_grad_(False).eval()


@torch.no_grad()
def _settings(model, windows, validation, policy, recipe, disk, curves):
    """The settings of the joint stage, without kernels. LessError for what cannot be trained on or with."""
    if not isinstance(recipe, Recipe):
        raise LessError(f"a recipe is a Recipe, RECIPES['exponential'] for example, not {recipe!r}")
    if any(weight.is_inference() for weight in model.parameters()):
        raise LessError("no gradient goes through a model that was made under torch.inference_mode: load it outside of that")
    for what, part in (("windows", windows), ("validation", validation)):
        check_windows(model, part, what)
    T = windows.shape[1]
    if validation.shape[1] != T:
        raise LessError(f"windows have {T} tokens and validation {validation.shape[1]}: cut both to one length")
    check_streamed(policy)
    if policy.budget > T - 2:
        raise LessError(f"nothing is evicted within {T} tokens under {policy}: use longer windows or a smaller budget")
    number("disk, in bytes,", disk, 1, 1e18)
    if curves:
        check_policy(policy)
        grid(policy, T)
    setting = Setting(sizes(model), tuple(less_layers(model)), policy)
    settings = [replace(setting, policy=rule) for rule in joint_rules(policy, recipe, T)]
    predictions(model, windows[:1, :2], lambda _, *qkv: dense(*qkv))  # refuses models whose layers attend in another way
    return settings


def joint_rules(policy: Policy, recipe: Recipe, length: int) -> list[Policy]:
    """The policies under which all layers learn together from windows of so many tokens, each with one of the recipe's budgets.

    LessError if a budget is too small for its policy, or none evicts anything.
    """
    several = recipe.together_steps or recipe.joint_steps or recipe.table_steps
    multiples = recipe.joint_budgets if several else ()
    budgets = [budget for multiple in multiples if (budget := max(1, int(policy.budget * multiple))) <= length - 2]
    if multiples and not budgets:
        raise LessError(f"nothing is evicted within {length} tokens with the joint_budgets {multiples}: use smaller ones")
    return [rule.with_budget(budget) for budget in budgets for rule in _rules(policy, recipe)]


def need_rho(policy: Policy, known: bool) -> None:
    """LessError if the policy is a learned one, and the kernels neither know rho nor learn it."""
    if policy.needs == "rho" and not known:
        raise LessError(
            "the policy Retention needs rho: give the recipe rho_steps (--rho-steps), or go on with kernels that have it"
        )


def _rules(policy: Policy, recipe: Recipe) -> list[Policy]:
    """What is trained for: the policy, and with rho the learned one of the same budget beside it."""
    if policy.needs == "rho" or not recipe.rho_steps:
        return [policy]
    return [policy, POLICIES["retention"].with_budget(policy.budget)]


def _begin(model, recipe, policy, about, start):
    """The kernels before the first step. LessError if those to begin with are of other sizes, or rho is missing."""
    wanted: dict[str, Any] = sizes(model) | dict(rank=_ranks(model, recipe), hidden=recipe.hidden, family=recipe.family)
    hidden = recipe.rho_hidden if recipe.rho_steps else start and start.sizes.get("rho")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same weights whenever it is begun
        torch.manual_seed(recipe.seed)
        kernels = LessKernels(**wanted, about=about, rho=hidden)
    if start is not None:
        if recipe.epochs:
            raise LessError("epochs train each layer anew: to go on with kernels give the recipe epochs=0 (leave --epochs out)")
        if not wanted.items() <= start.sizes.items():
            theirs = {name: start.sizes[name] for name in wanted}
            raise LessError(f"the kernels to go on with are {theirs}, and the recipe trains {wanted}: give it theirs")
        known = {name: weight for name, weight in start.state_dict().items() if not (recipe.rho_steps and ".rho." in name)}
        kernels.load_state_dict(kernels.state_dict() | known)  # rho_steps train rho anew
        about["start"] = start.about
        kernels.curves.update(start.curves)
    need_rho(policy, "rho" in kernels.sizes)
    return kernels


def _ranks(model, recipe):
    """The recipe's rank or, if LESS does not serve all layers, a list of it, with 0 for the others."""
    layers, served = sizes(model)["layers"], less_layers(model)
    return recipe.rank if len(served) == layers else [recipe.rank * (index in served) for index in range(layers)]


def _curves(kernels, model, windows, policy, recipe, work):
    """What each head costs, window by window."""
    kind = type(policy).__name__.lower()
    for index, window in enumerate(tqdm(windows.split(1), desc=f"curves, {kind}", unit="window")):
        if not work.has(f"curves-{kind}-{index}"):
            by = "gradient" if recipe.together_steps else "kl"
            work.save(f"curves-{kind}-{index}", asdict(measure(model, window, policy, kernels, by=by)))
    return average([Curves(**work.load(f"curves-{kind}-{index}")) for index in range(len(windows))])
