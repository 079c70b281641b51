"""The seam with Hugging Face transformers.

architecture: which models are served. seam: how their attention reaches LESS. identity: which model it is, by what it computes.
layer, watch and cache: a LessCache, one layer of it, and what it checks in every forward pass. saving: its file.
"""

from .cache import LessCache

__all__ = ["LessCache"]
