"""LESS in constant memory: eviction plus a low-rank state, tested against the specification in `less_ref.py`.

from less_fast import LayerState, extend          one attention layer, torch alone
from less_fast import LessCache, LessKernels      a cache for Hugging Face decoders
"""

from .files import load_state, save_state
from .kernels import LessKernels
from .layer.attend import Logits
from .layer.checks import LessError
from .layer.fastgen import FastGen, token_kinds
from .layer.features import LayerKernels
from .layer.policies import H2O, TOVA, Lambda, Policy, Retention, Scissorhands, SnapKV, Window
from .layer.state import LayerState
from .layer.step import extend

__all__ = [
    "H2O",
    "TOVA",
    "FastGen",
    "Lambda",
    "LayerKernels",
    "LayerState",
    "LessCache",
    "LessError",
    "LessKernels",
    "Logits",
    "Policy",
    "Retention",
    "Scissorhands",
    "SnapKV",
    "Window",
    "extend",
    "kernels_for",
    "load_state",
    "save_state",
    "token_kinds",
]


def __getattr__(name):  # transformers is imported only by those who use it
    if name in ("LessCache", "kernels_for"):
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
