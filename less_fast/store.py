"""Files of what a cache holds: safetensors with a version and a checksum, written aside and then renamed."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT, VERSION = "less-kv state", "1"


def write(path: str | os.PathLike, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """Writes the tensors and what is said about them (anything that JSON holds) into one file.

    OSError where that fails, of a full disk, say; a file that was there before is whole until the new one is.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.new")
    tensors, about = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, json.dumps(about)
    try:
        save_file(tensors, aside, metadata={FORMAT: VERSION, "about": about, "sha256": digest(tensors, about)})
        aside.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a file, on the CPU, and what was said about them.

    FileNotFoundError where there is none; ValueError, with the reason, where it is another file, of another version, or not as
    it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no state of a cache, or not all of it: {error}") from error
    if metadata.get(FORMAT) != VERSION:
        known = f"of version {metadata.get(FORMAT)}, and this program reads {VERSION}"
        raise ValueError(f"{path} is {known if FORMAT in metadata else 'no state of a cache'}")
    if metadata.get("sha256") != digest(tensors, metadata.get("about", "")):
        raise ValueError(f"{path} is not as it was written: its checksum differs; make it again")
    return tensors, json.loads(metadata["about"])


def digest(tensors: dict[str, torch.Tensor], about: str = "") -> str:
    """The SHA-256 of names, types, shapes and bits of the tensors, and of what is said about them."""
    sha = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
