"""LESS in constant memory: eviction plus a low-rank state, tested against the specification in `less_ref.py`.

    from less_fast import LayerState, extend          one attention layer, torch alone
    from less_fast import LessCache, LessKernels      a cache for Hugging Face decoders
"""

from .kernels import LayerKernels, LessKernels
from .policies import H2O, TOVA, DecayedH2O, FastGen, Full, Lambda, Policy, Scissorhands, SnapKV, Window
from .state import LayerState
from .step import extend
from .text import token_kinds

__all__ = [
    "H2O",
    "TOVA",
    "DecayedH2O",
    "FastGen",
    "Full",
    "Lambda",
    "LayerKernels",
    "LayerState",
    "LessCache",
    "LessKernels",
    "Policy",
    "Scissorhands",
    "SnapKV",
    "Window",
    "extend",
    "token_kinds",
]


def __getattr__(name):  # transformers is imported only by those who use it
    if name == "LessCache":
        from .hf import LessCache

        return LessCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
