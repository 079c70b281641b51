"""Replacement in place moves no data (section 3.2): a new token goes where the evicted one lay."""

import torch

from less_fast import LessCache

from .check import Finding, Subject, verdict

CLAIM = "A decoding step replaces one token in place and moves nothing else"
PAPER = "one replacement per step"


@torch.inference_mode()
def check(subject: Subject) -> Finding:
    model, ids = subject.model, subject.windows(1)[:1].to(subject.model.device)
    cache = LessCache.for_model(model, subject.policies()[0], subject.kernels)
    steps = 4 if subject.quick else 64
    model(ids[:, :-steps], past_key_values=cache, use_cache=True)
    states = [layer.state for layer in cache.layers]
    places = [tensor.data_ptr() for state in states for _, tensor in state.tensors().items()]
    most = 0
    for column in range(ids.shape[1] - steps, ids.shape[1]):
        before = [(group.slots.k.clone(), group.slots.v.clone()) for state in states for group in state.parts]
        model(ids[:, column : column + 1], past_key_values=cache, use_cache=True)
        groups = [group for state in states for group in state.parts]
        for (k, v), group in zip(before, groups):
            changed = ((group.slots.k != k) | (group.slots.v != v)).any(-1)  # (N, H, S)
            most = max(most, int(changed.sum(-1).max()))
    stayed = places == [tensor.data_ptr() for state in states for _, tensor in state.tensors().items()]
    sentence = (
        f"over {steps} steps the tensors {'stayed' if stayed else 'did not stay'} where they were, and a step changed at most "
        f"{most} of the slots of a KV head"
    )
    return Finding(verdict([stayed, most == 1]), sentence, {"steps": steps, "slots_changed": most, "tensors_stayed": stayed})
