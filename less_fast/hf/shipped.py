"""The kernels that come with this package, found for a model by its sizes and by what it computes."""

import json
import weakref
from pathlib import Path

from transformers import PreTrainedModel

from ..kernels import LessKernels
from ..layer.checks import LessError
from .architecture import check_model, sizes
from .identity import difference_from, identity, less_layers

PACKAGE = Path(__file__).parent.parent
_FOUND: weakref.WeakKeyDictionary[PreTrainedModel, dict] = weakref.WeakKeyDictionary()  # by folder and device, shared by caches


def folders(wanted: dict[str, int]) -> list[Path]:
    """The folders of kernels for models of these sizes (layers, query_heads, kv_heads, head_dim)."""
    configs = [*sorted(PACKAGE.glob("shipped/*/config.json")), *PACKAGE.glob("demo/kernels/config.json")]
    stored = {config.parent: json.loads(config.read_text(encoding="utf-8")) for config in configs}
    return [folder for folder, said in stored.items() if wanted.items() <= said.items()]


def kernels_for(model: PreTrainedModel) -> LessKernels | None:
    """The kernels that come with this package for this very model, on its device, always the same; None if there are none.

    LessError for a model that LESS cannot serve.
    """
    check_model(model)
    try:
        fitting = folders(sizes(model))
    except LessError:  # its layers differ in their heads
        return None
    here = identity(model) if fitting else {}
    for folder in fitting:
        known, key = _FOUND.setdefault(model, {}), (folder, model.device)
        kernels = known.get(key) or LessKernels.from_pretrained(folder).to(model.device)
        if difference_from(kernels, here, less_layers(model)) is None:
            return known.setdefault(key, kernels)
    return None
