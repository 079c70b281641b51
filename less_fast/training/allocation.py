"""Curves of what each KV head costs, and tables refined by trial, stored with the kernels whose caches will use them."""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..budgets import Curves, table
from ..hf.architecture import less_layers, sizes
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.policies import Policy
from ..setting import Setting
from .head_costs import grid, measure
from .tables import refine


def allocate(
    model: PreTrainedModel,
    windows: torch.Tensor,
    policy: Policy,
    kernels: LessKernels,
    out: str | os.PathLike,
    by: str | None = None,
    refined: Sequence[Policy] = (),
) -> Curves:
    """The curves under the policy, stored with the kernels in the folder `out`.

    windows (W, T) int64; by: a name in MEASURES, kl by default; refined: policies whose tables, of LESS and of its Baseline+, are
    refined by trial: then curves that are there are used again. What is done is stored after each part.
    Raises LessError if these curves were measured in another way than asked for, or do not reach a budget to refine.
    """
    name = type(policy).__name__
    known = kernels.curves.get(name) if refined else None
    if by and known and by != known.by:
        raise LessError(f"the curves that are there were measured by {known.by}: leave --by out, or measure without --refine")
    reach = known.budgets if known else grid(policy, windows.shape[1])
    if beyond := [rule.budget for rule in refined if not reach[0] <= rule.budget <= reach[-1]]:
        raise LessError(
            f"curves reach from {reach[0]} to {reach[-1]} tokens, so there is no table of {beyond[0]} to refine: take another"
        )
    if known is None:
        with tqdm(desc="curves", unit="budget") as progress:

            def tell(done, of):
                progress.total = of
                progress.update(done - progress.n)

            kernels.curves[name] = measure(model, windows, policy, kernels, by=by or "kl", progress=tell)
        kernels.save_pretrained(out)
    curves = kernels.curves[name]
    for rule in tqdm(refined, desc="refining", unit="budget", disable=not refined):
        less = Setting.of(sizes(model), less_layers(model), rule, kernels, "uniform")
        plus = replace(less.without_state(), policy=less.baseline_plus(model.dtype))
        for kind, setting in (("less", less), ("bare", plus)):
            total = setting.policy.budget * curves.heads
            if budgets := table(curves, total, kind == "less"):
                better, _ = refine(model, windows, replace(setting, budgets=budgets))
                curves.refined.setdefault(kind, {})[str(total)] = better
        kernels.save_pretrained(out)
    return curves
