"""Training of kernels for a model, and of budget tables: `train` carries out the stages, each of which has a file of its own."""

from .recipe import RECIPES, Recipe, recipe_of
from .stages import train

__all__ = ["RECIPES", "Recipe", "recipe_of", "train"]
