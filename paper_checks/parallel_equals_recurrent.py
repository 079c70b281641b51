"""Training in the parallel form equals recurrent inference (section 3.2)."""

import copy

import torch
from torch.nn.functional import kl_div
from transformers import DynamicCache

from less_fast import LessCache
from less_fast.hf.architecture import less_layers, sizes
from less_fast.setting import Setting
from less_fast.training.joint import divergence

from .check import Finding, Subject, verdict

CLAIM = "The parallel form, in which kernels are trained, equals recurrent inference"
PAPER = "equal"


@torch.inference_mode()
def check(subject: Subject) -> Finding:
    """The divergence from the full cache's predictions, in float64: what training minimises, and what a cache gives."""
    model = copy.deepcopy(subject.model).double()
    ids = subject.windows(2, subject.length // 4).to(model.device)
    full = model(ids, past_key_values=DynamicCache(config=model.config)).logits.log_softmax(-1)
    rows, worst = [], 0.0
    for policy in subject.policies():
        for name, kernels in (("LESS", subject.kernels), ("the paper's kernels", subject.paper_kernels)):
            if kernels is None:
                continue
            kernels = copy.deepcopy(kernels).double()
            cache = LessCache.for_model(model, policy, kernels, "uniform", chunk=1)
            ours = model(ids, past_key_values=cache).logits.log_softmax(-1)
            recurrent = kl_div(ours, full, log_target=True, reduction="sum").item() / ids.numel()
            uniform = Setting.of(sizes(model), less_layers(model), policy, kernels, "uniform")
            parallel = divergence(model, ids, uniform).item()
            worst = max(worst, abs(recurrent - parallel) / recurrent)
            rows.append([name, str(policy.budget), f"{recurrent:.10f}", f"{parallel:.10f}"])
    sentence = f"divergences from the full cache, token by token and in parallel, differ by at most {worst:.0e} of them (float64)"
    headings = ["kernels", "tokens kept", "token by token", "in parallel"]
    return Finding(verdict([worst < 1e-9]), sentence, {"largest_relative_difference": worst}, headings, rows)
