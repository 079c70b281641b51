"""A training of a few seconds."""

from dataclasses import replace

from models import make_model, tokens

from less_fast import H2O
from less_fast.training import RECIPES, train

RECIPE = replace(RECIPES["exponential"], rank=2, hidden=3, epochs=2, windows=6, joint_steps=13, table_steps=12, joint_rate=0.02)
POLICY = H2O(3, 3)


def quick_training(folder=None, recipe=RECIPE, policy=POLICY, **more):
    return train(make_model().float(), tokens(10, 30), tokens(4, 30, seed=1), policy, recipe, folder, **more)
