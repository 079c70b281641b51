"""Training of kernels for a model, in stages that survive a kill:

0. what the time and the memory allow (plan.py);
1. rho, what is worth keeping, if asked for (retention.py);
2. each layer towards its own target (layers.py);
3. all layers together, under several budgets in turn (joint.py);
4. what each head costs (head_costs.py), from which budget tables are made, and all layers together once more, under these tables.
"""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
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
from .head_costs import check_policy, grid, measure
from .joint import distill
from .layers import train_layers
from .plan import JOINT_JUDGES, Plan, plan
from .recipe import Recipe
from .retention import train_rho
from .work import Work


@torch.inference_mode(False)  # with gradients, in whatever mode the caller is
def train(
    model: PreTrainedModel,
    windows: torch.Tensor,
    validation: torch.Tensor,
    policy: Policy,
    recipe: Recipe = Recipe(),
    folder: str | os.PathLike | None = None,
    start: LessKernels | None = None,
    hours: float | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> LessKernels:
    """Kernels for `model`, trained for streaming with `policy` on token windows.

    windows (N, T), validation (V, T) int64: validation judges each stage.
    folder: where unfinished work is kept; called again with the same arguments, training goes on there and ends in the same
    weights. None: nowhere. start: kernels to go on with, of the recipe's family, rank and hidden width, and with their curves.
    hours: that it may take, by a probe: then it takes as many of the windows, and of the recipe's joint steps and windows for
    curves, as fit. None: all. tell: told, line by line, what is being measured and what will be done.
    Raises LessError, before anything is trained, if the model, windows or policy cannot be trained on or with, or the time is too
    little; later if a layer's attention is not finite, training diverges, or the folder holds other work. OSError if the disk is
    full.
    """
    check_model(model)
    model.eval()
    settings = _settings(model, windows, validation, policy, recipe, hours)
    about = {"identity": identity(model), "policy": repr(policy), "window": windows.shape[1]}
    text = hashlib.sha256(torch.cat([windows.cpu(), validation.cpu()]).numpy().tobytes()).hexdigest()
    order = about | {"recipe": asdict(recipe), "text": text, "windows": len(windows), "hours": hours, "dtype": str(model.dtype)}
    kernels = _begin(model, recipe, policy, about, start)
    kernels.to(model.device, torch.promote_types(model.dtype, torch.float32))
    settings = [replace(setting, kernels=kernels) for setting in settings]
    rules = [rule for rule in _rules(policy, recipe) if recipe.curves and type(rule).__name__ not in kernels.curves]
    rules = [rule for rule in rules if not rule.pooled]  # their heads have no budgets of their own
    with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        work, started = Work(Path(place), order | {"start": start and digest(start.state_dict())}), time.perf_counter()
        if work.resumed:
            check_saved(place, work.order, model)
        budgets_of_curves = [len(grid(rule, windows.shape[1])) - 1 for rule in rules]
        several = model, windows, len(validation), settings, budgets_of_curves, recipe, hours, tell
        planned = Plan(**work.once("plan", lambda: asdict(plan(*several))))
        tell(str(planned))
        recipe = replace(recipe, round=planned.round, joint_steps=planned.joint_steps, curves=planned.curves)
        windows, validation = windows[: planned.windows], validation[: planned.validation]
        about |= {"sequences": len(windows), "recipe": asdict(recipe) | {"budgets": [*recipe.budgets]}}

        def stage(name, run, *args):
            about[name] = work.once(name, lambda: run(model, windows, *args, recipe, work), kernels)

        if recipe.rho and recipe.uses:
            stage("rho", train_rho, validation, kernels)
        if recipe.uses:
            stage("layers", train_layers, validation, settings)
        few = validation[:JOINT_JUDGES]
        if recipe.joint_steps:
            stage("joint", partial(distill, "joint"), few, settings, settings)
        for rule in rules:
            kernels.curves[type(rule).__name__] = _curves(kernels, model, windows[: recipe.curves], rule, work)
        uniform = [setting for setting in settings if recipe.curves and kernels.budgets_for(setting.policy)]
        if uniform and recipe.joint_steps:
            tables = [replace(setting, budgets=kernels.budgets_for(setting.policy)) for setting in uniform]
            turns = [*chain(*zip(tables, uniform))]
            stage("tables", partial(distill, "tables"), few, turns, tables)
        about["seconds_since_resumed" if work.resumed else "seconds"] = round(time.perf_counter() - started)
        return kernels.float().requires_grad_(False).eval()


@torch.no_grad()
def _settings(model, windows, validation, policy, recipe, hours):
    """The settings that steps take in turns, without kernels. LessError for what cannot be trained on or with."""
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
    if hours is not None:
        number("hours", hours, 0, 1e6)
    for rule in _rules(policy, recipe) if recipe.curves else ():
        if not rule.pooled:
            check_policy(rule)
            grid(rule, T)
    setting = Setting(sizes(model), tuple(less_layers(model)), policy)
    settings = [replace(setting, policy=rule) for rule in rules_in_turns(policy, recipe, T)]
    predictions(model, windows[:1, :2], lambda _, *qkv: dense(*qkv))  # refuses models whose layers attend in another way
    return settings


def rules_in_turns(policy: Policy, recipe: Recipe, length: int) -> list[Policy]:
    """The policies that steps on windows of so many tokens take in turns, each with one of the recipe's budgets.

    LessError if a budget is too small for its policy, or none evicts anything.
    """
    budgets = [budget for multiple in recipe.budgets if (budget := max(1, int(policy.budget * multiple))) <= length - 2]
    if not budgets:
        raise LessError(f"nothing is evicted within {length} tokens with the budgets {recipe.budgets}: use smaller ones")
    return [rule.with_budget(budget) for budget in budgets for rule in _rules(policy, recipe)]


def _rules(policy: Policy, recipe: Recipe) -> list[Policy]:
    """What is trained for: the policy, and with rho the learned one of the same budget beside it."""
    if policy.needs == "rho" or not recipe.rho:
        return [policy]
    return [policy, POLICIES["retention"].with_budget(policy.budget)]


def _begin(model, recipe, policy, about, start):
    """The kernels before the first step. LessError if those to begin with are of other sizes, or rho is missing."""
    served = less_layers(model)
    ranks = [recipe.rank * (index in served) for index in range(sizes(model)["layers"])]  # 0 for what LESS does not serve
    wanted: dict[str, Any] = sizes(model) | dict(
        rank=ranks if 0 in ranks else recipe.rank, hidden=recipe.hidden, family=recipe.family
    )
    theirs = start and start.sizes.get("rho")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same weights whenever it is begun
        torch.manual_seed(recipe.seed)
        kernels = LessKernels(**wanted, about=about, rho=recipe.rho or theirs)
    if start is not None:
        if not wanted.items() <= start.sizes.items() or theirs not in (None, recipe.rho or theirs):
            wanted, found = ({name: of.get(name) for name in (*wanted, "rho")} for of in (kernels.sizes, start.sizes))
            raise LessError(f"the kernels to go on with are {found}, and the recipe trains {wanted}: give it theirs")
        kernels.load_state_dict(kernels.state_dict() | start.state_dict())
        about["start"] = start.about
        kernels.curves.update(start.curves)
    if policy.needs == "rho" and "rho" not in kernels.sizes:
        raise LessError("the policy Retention needs rho: give the recipe a width of it, or go on with kernels that have it")
    return kernels


def _curves(kernels, model, windows, policy, work):
    """What each head costs, window by window."""
    kind, found = type(policy).__name__.lower(), []
    for index, window in enumerate(tqdm(windows.split(1), desc=f"curves, {kind}", unit="window")):
        found.append(work.once(f"curves-{kind}-{index}", lambda window=window: asdict(measure(model, window, policy, kernels))))
    return average([Curves(**one) for one in found])
