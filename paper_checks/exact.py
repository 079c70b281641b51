"""What holds of every step, whatever the text: the parallel form, memory, replacement in place, and a control of near ties."""

import copy

import torch
from torch.nn.functional import kl_div
from transformers import DynamicCache

from less_fast import LessCache
from less_fast.hf.architecture import less_layers, sizes
from less_fast.setting import Setting
from less_fast.training.joint import divergence

from .check import FAILS, HOLDS, IN_PART, Finding, Subject, claim, verdict

CLOSE = 1e-5  # relative, some hundred times the rounding of float32


@claim("The parallel form, in which kernels are trained, equals recurrent inference", "equal (section 3.2)")
@torch.inference_mode()
def parallel_equals_recurrent(subject: Subject) -> Finding:
    """The divergence from the full cache's predictions, in float64: what training minimises, and what a cache gives."""
    model = copy.deepcopy(subject.model).double()
    ids = subject.windows(2, subject.length // 4).to(model.device)
    full = model(ids, past_key_values=DynamicCache(config=model.config)).logits.log_softmax(-1)
    rows, worst = [], 0.0
    for policy in subject.policies():
        for name, kernels in subject.families().items():
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


@claim("The low-rank state is of constant size and weighs about 4 tokens at R = 8", "4 tokens (R = 8, D = 128; section 3.1)")
@torch.inference_mode()
def memory(subject: Subject) -> Finding:
    model, kernels = subject.model, subject.kernels
    cache = LessCache.for_model(model, subject.policies()[0], kernels)
    held = []
    for part in subject.windows(1)[:1].to(model.device).split(subject.length // 8, 1):
        model(part, past_key_values=cache, use_cache=True)
        held.append(sum(cache.memory().values()))
    heads = kernels.sizes["layers"] * kernels.sizes["kv_heads"]
    token = 2 * kernels.sizes["head_dim"] * model.dtype.itemsize  # a key and a value
    tokens = cache.memory()["low_rank"] / heads / token
    figures = {"bytes_after_each_eighth": held, "tokens": tokens, "dtype": str(model.dtype), "rank": kernels.layers[0].rank}
    sentence = (
        f"{held[0]:,} bytes after {subject.length // 8} tokens and {held[-1]:,} after {subject.length}; the state weighs "
        f"{tokens:.2f} tokens of a KV head (R = {figures['rank']}, {model.dtype})"
    )
    return Finding(verdict([len(set(held)) == 1, tokens < 5]), sentence, figures)


@claim("A decoding step replaces one token in place and moves nothing else", "one replacement per step (section 3.2)")
@torch.inference_mode()
def inplace(subject: Subject) -> Finding:
    model, ids = subject.model, subject.windows(1)[:1].to(subject.model.device)
    cache = LessCache.for_model(model, subject.policies()[0], subject.kernels)
    steps = 4 if subject.quick else 64
    model(ids[:, :-steps], past_key_values=cache, use_cache=True)
    states = [layer.state for layer in cache.layers]
    places = [tensor.data_ptr() for state in states for tensor in state.tensors().values()]
    most = 0
    for column in range(ids.shape[1] - steps, ids.shape[1]):
        before = [(part.slots.k.clone(), part.slots.v.clone()) for state in states for part in state.parts]
        model(ids[:, column : column + 1], past_key_values=cache, use_cache=True)
        for (k, v), part in zip(before, (part for state in states for part in state.parts)):
            slots, layout = part.slots, part.slots.layout
            changed = ((slots.k != k) | (slots.v != v)).any(-1).int()  # (N, T)
            most = max(most, int(changed.new_zeros(len(k), layout.H).index_add_(1, layout.head, changed).max()))
    stayed = places == [tensor.data_ptr() for state in states for tensor in state.tensors().values()]
    sentence = (
        f"over {steps} steps the tensors {'stayed' if stayed else 'did not stay'} where they were, and a step changed at most "
        f"{most} of the slots of a KV head"
    )
    return Finding(verdict([stayed, most == 1]), sentence, {"steps": steps, "slots_changed": most, "tensors_stayed": stayed})


@claim("Evictions are decided by scores, not by rounding", "not in the paper")
@torch.inference_mode()
def near_ties(subject: Subject) -> Finding:
    """A control: how often a victim's score and the next one's are so close that rounding may decide."""
    model, policy = subject.model, subject.policies()[0]
    ids = subject.windows(4).to(model.device)
    cache = LessCache.for_model(model, policy, subject.kernels, "uniform")
    start = ids.shape[1] - (8 if subject.quick else 256)
    model(ids[:, :start], past_key_values=cache, use_cache=True)
    close = count = 0
    for column in range(start, ids.shape[1]):
        model(ids[:, column : column + 1], past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            for part in layer.state.parts:
                position = part.slots.positions()
                rank = part.policy.rank(position, part.slots.scores(), layer.state.n[:, None, None])
                rank = torch.where(position >= 0, rank, torch.inf)  # one slot is empty
                lowest = rank.sort(-1).values[..., :2]
                close += ((lowest[..., 1] - lowest[..., 0]) <= CLOSE * lowest[..., 1].abs()).sum().item()
                count += lowest[..., 0].numel()
    share = close / count
    sentence = f"of {count:,} decisions of {policy}, {share:.2%} lie between scores within {CLOSE:.0e} of each other"
    judged = HOLDS if share < 0.01 else IN_PART if share < 0.5 else FAILS
    return Finding(judged, sentence, {"decisions": count, "near_ties": close, "within": CLOSE})
