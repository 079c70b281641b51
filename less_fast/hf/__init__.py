"""The seam with Hugging Face transformers.

architecture: which models are served. seam: how their attention reaches LESS. identity: which model it is, by what it computes.
positions: how it turns queries and keys, for streams beyond its context.
clock, layer, watch and cache: a LessCache, one layer of it, and what it checks in every forward pass. saving: its file.
shipped: the kernels that come with the package.
constant_memory: a folder as the hub holds them, which gives `generate` a LessCache.
"""

from pathlib import Path

from .cache import LessCache
from .shipped import kernels_for

CUSTOM_GENERATE = str(Path(__file__).parent / "constant_memory")
"""The folder for `model.generate(**inputs, custom_generate=CUSTOM_GENERATE, trust_remote_code=True, policy="h2o", budget=64)`."""

__all__ = ["CUSTOM_GENERATE", "LessCache", "kernels_for"]
