"""The kernels that come with this package, found for a model by its sizes and by what it computes."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from ..kernels import LessKernels
from ..layer.checks import LessError
from .architecture import sizes
from .identity import difference_from, identity, less_layers

PACKAGE = Path(__file__).parent.parent


def folders(wanted: dict[str, int]) -> list[Path]:
    """The folders of kernels for models of these sizes (layers, query_heads, kv_heads, head_dim)."""
    configs = [*sorted(PACKAGE.glob("shipped/*/config.json")), PACKAGE / "demo" / "kernels" / "config.json"]
    stored = {config.parent: json.loads(config.read_text(encoding="utf-8")) for config in configs}
    return [folder for folder, said in stored.items() if wanted.items() <= said.items()]


def kernels_for(model: PreTrainedModel) -> LessKernels | None:
    """The kernels that come with this package for this very model, on its device; None if there are none.

    LessError for a model that LESS cannot serve or that does not run.
    """
    try:
        fitting = folders(sizes(model))
    except LessError:  # its layers differ in their heads
        return None
    here = identity(model) if fitting else {}
    for folder in fitting:
        kernels = LessKernels.from_pretrained(folder)
        if difference_from(kernels, here, less_layers(model)) is None:
            return kernels.to(model.device)
    return None
