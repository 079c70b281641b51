"""Loading: devices, models with their tokenizers, kernels and texts by the names that users give them. What cannot be had is
refused in one sentence."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .demo import MODEL, corpus
from .gguf import CARRIED, unpacked
from .hf.architecture import check_model, decoder_of, sizes
from .hf.identity import check_kernels
from .hf.shipped import kernels_for
from .kernels import LessKernels
from .layer.checks import LessError
from .layer.features import FAMILIES, Control, Features
from .text import dataset_texts, read_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"

SHAPES: dict[str, PretrainedConfig] = {"llama-2-7b": LlamaConfig(max_position_embeddings=4096)}
"""Well-known shapes by name: costs do not depend on the values of the weights."""


def find_device(name: str) -> torch.device:
    """The device of that name. LessError if there is none here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError or ImportError
        raise LessError(f"no device {name!r} here: {first_line(error)}") from error
    return device


def dtype_named(name: str, model: str) -> torch.dtype:
    """The dtype of that name for a model's weights and its cache; auto: float32, or what the model is unpacked in."""
    if name == AUTO:
        return CARRIED[model].dtype if model in CARRIED else torch.float32
    if name not in DTYPES:
        raise LessError(f"no dtype {name!r} for a model: choose one of {', '.join((AUTO, *DTYPES))}")
    return DTYPES[name]


def load_config(model: str) -> PretrainedConfig:
    """The config of a named shape, a local folder, a repository of the hub, or of the embedded model if the name is empty."""
    if model in SHAPES:
        return SHAPES[model]
    where = unpacked(model) or MODEL
    try:
        return AutoConfig.from_pretrained(where)
    except Exception as error:  # whatever transformers says of a file that is broken
        raise LessError(f"no config of a model at {model}: {first_line(error)}") from error


def load_model(model: str, device: str = "cpu", dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model for inference and its tokenizer, from a local folder, a GGUF file, the hub, or a name in gguf.CARRIED; the
    embedded one if the name is empty. dtype: see `dtype_named`.

    Raises LessError, with the reason, if there is none, its weights are not all there or not finite, LESS cannot serve it, or
    there is no such device or dtype.
    """
    kind, place = dtype_named(dtype, model), find_device(device)
    where = unpacked(model) or str(MODEL)
    tokenizer = load_tokenizer(where)
    try:
        network, report = AutoModelForCausalLM.from_pretrained(where, dtype=kind, output_loading_info=True)
    except Exception as error:  # whatever transformers says of a file that is broken
        raise LessError(f"no usable model at {where}: {first_line(error)}") from error
    if absent := sorted(report["missing_keys"]):
        raise LessError(f"the model at {where} lacks {len(absent)} of its weights ({absent[0]}), which would be random")
    check_model(network)
    if broken := [name for name, weight in network.named_parameters() if not weight.isfinite().all()]:
        raise LessError(f"the model at {where} holds NaN or infinite weights ({broken[0]})")
    return network.to(place).eval().requires_grad_(False), tokenizer


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model by that name, as `load_model` takes it. LessError if there is none."""
    where = unpacked(model) or str(MODEL)
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # whatever transformers says of a file that is broken
        raise LessError(f"no usable model at {where}: {first_line(error)}") from error


def load_shape(model: str, device: str, dtype: str) -> PreTrainedModel:
    """A model without its tokenizer, or one of a named shape with random weights."""
    if model not in SHAPES:
        return load_model(model, device, dtype)[0]
    with find_device(device):
        network = AutoModelForCausalLM.from_config(SHAPES[model], dtype=dtype_named(dtype, model))
    return network.eval().requires_grad_(False)


def check_length(model: PreTrainedModel, length: int) -> None:
    """LessError for a text of more tokens than a model with learned positions has positions."""
    for name, module in decoder_of(model).named_modules():
        if isinstance(module, torch.nn.Embedding) and ("position" in name or name.endswith("wpe")):
            most = module.num_embeddings - getattr(module, "offset", 0)
            if length > most:
                raise LessError(f"this model has {most} positions, and {length} tokens want as many: take a shorter text")


def load_kernels(network: PreTrainedModel, kernels: str, seed: int = 0) -> LessKernels | None:
    """The kernels by that name, for the network, on its device; None for the bare policy.

    kernels: local folder or repository of the hub; "none"; the family of a control, which is drawn from the seed; or empty: those
    that come with the package for this model, or none. Raises OSError or LessError if there are none, or for another model.
    """
    if kernels == "none":
        return None
    if not kernels:
        return kernels_for(network)
    if issubclass(FAMILIES.get(kernels, Features), Control) and not Path(kernels).exists():
        torch.manual_seed(seed)
        learned = LessKernels(**sizes(network), family=kernels).requires_grad_(False)
    else:
        learned = LessKernels.from_pretrained(kernels)
        check_kernels(network, learned)
    return learned.to(network.device)


def load_texts(files: Sequence[Path], dataset: str, split: str, characters: int = 0) -> tuple[list[str], str]:
    """The texts of some files, or the first of a data set until they have so many characters, or a split of the standard
    library; and what they are called."""
    if files and dataset:
        raise LessError("--text and --dataset are two sources of text: give one of them")
    if dataset:
        return dataset_texts(dataset, characters), dataset
    if files:
        return [read_text(file) for file in files], ", ".join(file.name for file in files)
    return [text for _, text in corpus.documents(split)], f"standard library, {split} ({corpus.digest(split)})"


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
