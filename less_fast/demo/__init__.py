"""The embedded model: a small Llama trained on the source of CPython's standard library, and its LESS kernels.

`corpus` finds and splits the text, paper_checks/build_model.py trained the tokenizer and the model on it; this file only says
where they lie.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
KERNELS = Path(__file__).parent / "kernels"  # exponential
PAPER_KERNELS = Path(__file__).parent / "kernels-paper"
