"""A training of a few seconds."""

from dataclasses import replace

from models import make_model, tokens

from less_fast import H2O
from less_fast.hf.architecture import less_layers, sizes
from less_fast.setting import Setting
from less_fast.training import RECIPES, train

RECIPE = replace(RECIPES["exponential"], rank=2, hidden=3, rho=0, uses=4, joint_steps=12, curves=0, rate=2.0)
PAPER = replace(RECIPES["paper"], rank=2, hidden=8, uses=4)
POLICY = H2O(3, 3)


def quick_training(folder=None, recipe=RECIPE, policy=POLICY, **more):
    return train(make_model().float(), tokens(10, 30), tokens(4, 30, seed=1), policy, recipe, folder, **more)


def setting_of(model, policy, kernels=None, budgets="uniform"):
    return Setting.of(sizes(model), less_layers(model), policy, kernels, budgets)
