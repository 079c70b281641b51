"""A training of a few seconds."""

from dataclasses import replace

import torch
from models import make_model, recorded, tokens

from less_fast import H2O
from less_fast.hf.architecture import attention_modules, less_layers
from less_fast.training import RECIPES, train
from less_fast.training.layers import loss
from less_fast.training.recording import prepare

RECIPE = replace(RECIPES["exponential"], rank=2, hidden=3, epochs=2, windows=6, joint_steps=13, table_steps=12, joint_rate=0.02)
POLICY = H2O(3, 3)


def quick_training(folder=None, recipe=RECIPE, policy=POLICY, **more):
    return train(make_model().float(), tokens(10, 30), tokens(4, 30, seed=1), policy, recipe, folder, **more)


@torch.no_grad()
def validation_errors(model, kernels, windows, policy):
    """The error of each layer that LESS serves, from what the model itself computes."""
    found = []
    for index in less_layers(model):
        q, k, v, scale = recorded(model, windows, index)
        projection = attention_modules(model)[index].o_proj.weight.T
        found.append(loss(kernels.layers[index], prepare(q, k, v, policy, scale), projection, policy.budget).item())
    return found
