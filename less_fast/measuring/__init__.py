"""Measuring: full caches, bare policies, Baseline+ and LESS side by side, and what a cache will cost."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers


def versions() -> dict[str, str]:
    """What a figure was measured with."""
    try:
        ours = version("less-kv")
    except PackageNotFoundError:  # run from a checkout: python -m less_fast
        ours = "not installed"
    libraries = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    return {"less-kv": ours, **libraries}
