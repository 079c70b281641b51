"""Files: written aside, then renamed, so that no half-written one is ever seen; and saved states, with version and checksum."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .layer.checks import LessError

FORMAT, VERSION = "less-kv state", "1"


@contextmanager
def aside(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to, of this writer alone; at the end it takes the place of `path`, or is gone after an error.

    Among several writers of one path the last one wins, and every file is whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:100]}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        temporary.chmod(0o644)  # some writers write for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """Writes the tensors and what is said about them (anything that JSON holds) into one file.

    OSError if that fails, because the disk is full for example; a file that was there before is whole until the new one is.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(about)
    with aside(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={FORMAT: VERSION, "about": said, "sha256": digest(tensors, said)})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a file, on the CPU, and what was said about them.

    FileNotFoundError if there is none; LessError, with the reason, if it is another file, of another version, or not as it was
    written.
    """
    try:
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise LessError(f"{path} is no state of a cache, or not all of it: {error}") from error
    if metadata.get(FORMAT) != VERSION:
        known = f"of version {metadata.get(FORMAT)}, and this program reads {VERSION}"
        raise LessError(f"{path} is {known if FORMAT in metadata else 'no state of a cache'}")
    if metadata.get("sha256") != digest(tensors, metadata.get("about", "")):
        raise LessError(f"{path} is not as it was written: its checksum differs; make it again")
    try:
        about = json.loads(metadata.get("about", ""))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise LessError(f"{path} does not say what it holds, though its checksum is right: make it again with this program")
    return tensors, about


def digest(tensors: dict[str, torch.Tensor], about: str = "") -> str:
    """The SHA-256 of names, types, shapes and bits of the tensors, and of what is said about them."""
    sha = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return sha.hexdigest()
