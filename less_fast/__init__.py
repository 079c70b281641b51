"""LESS in constant memory: eviction plus a low-rank state, tested against the specification in `less_ref.py`.

    from less_fast import LayerState, extend          one attention layer, torch alone
    from less_fast import LessCache, LessKernels      a cache for Hugging Face decoders
"""

from .kernels import LayerKernels, LessKernels
from .policies import H2O, TOVA, DecayedH2O, Full, Lambda, Policy, Scissorhands, Window
from .state import LayerState
from .step import extend

__all__ = [
    "H2O",
    "TOVA",
    "DecayedH2O",
    "Full",
    "Lambda",
    "LayerKernels",
    "LayerState",
    "LessCache",
    "LessKernels",
    "Policy",
    "Scissorhands",
    "Window",
    "extend",
]


def __getattr__(name):  # transformers is imported only by those who use it
    if name == "LessCache":
        from .hf import LessCache

        return LessCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
