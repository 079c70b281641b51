"""Files: written aside, then renamed, so that no half-written one is ever seen; and saved states, with version and checksum.

What is read is read whole: nothing stays tied to a file that others may change."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .layer.checks import LessError
from .layer.state import LayerState

FORMAT, VERSION = "less-kv state", "4"


@contextmanager
def aside(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file beside `path` to write to, of this writer alone; at the end it takes the place of `path`, or is gone after an error.

    It is as a file that is opened there would be: links are followed, and its mode is that of the file before or, for a new one,
    what the umask leaves. Among several writers of one path the last one wins, and every file is whole.
    Raises OSError if nothing can be written there.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is {'a folder' if path.is_dir() else 'no file that can be replaced'}: choose another name")
    temporary = path.with_name(f".{uuid.uuid4().hex}.less-kv")
    try:
        with temporary.open("xb") as file:
            yield file
        with suppress(OSError):  # some file systems have no modes
            temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):  # nobody knows the name of the file beside
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """The text as UTF-8 in a file, written aside. OSError if that fails."""
    with aside(path) as file:
        file.write(text.encode(errors="replace"))


def write_tensors(file: BinaryIO, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """The tensors, by name, as a safetensors file."""
    file.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata))


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU and in memory of their own, whatever happens to the file; and its metadata.

    Raises OSError if there is none, SafetensorError if it is none.
    """
    data = Path(path).read_bytes()
    with torch.inference_mode(False), torch.device("cpu"):
        tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def write(path: str | os.PathLike, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """Writes the tensors and what is said about them (anything that JSON holds) into one file.

    OSError if that fails, because the disk is full for example; a file that was there before is whole until the new one is.
    """
    said = json.dumps(about)
    with aside(path) as file:
        write_tensors(file, tensors, {FORMAT: VERSION, "about": said, "sha256": digest(tensors, said)})


def read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a file, on the CPU, and what was said about them.

    FileNotFoundError if there is none; LessError, with the reason, if it is another file, of another version, or not as it was
    written.
    """
    try:
        tensors, metadata = read_tensors(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError) as error:  # no path may hold a NUL
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


def save_state(state: LayerState, path: str | os.PathLike) -> None:
    """Writes the state of one layer as one safetensors file: written aside, then renamed. OSError if that fails."""
    write(path, state.tensors(), _identity(state))


def load_state(state: LayerState, path: str | os.PathLike) -> None:
    """Fills a state with a saved one. LessError, and nothing changed, if the file is broken, or was saved with other policies,
    kernels, sizes or another number of rows."""
    tensors, about = read(path)
    mine = _identity(state)
    if other := next((part for part in mine if about.get(part) != mine[part]), None):
        raise LessError(
            f"{path} holds a state of {about.get(other)}, not of {mine[other]}: load it into one allocated as that state was"
        )
    state.take_over(tensors)


def _identity(state):
    kernels = [digest(part.kernels.state_dict()) for part in state.parts if part.kernels]
    ranks = {part.z.shape[2] for part in state.parts}
    return {
        "policies": f"{', '.join(map(str, state.policies()))} with rank {', '.join(map(str, ranks))}",
        "heads": f"{state.query_heads} query heads, {state.kv_heads} KV heads of {state.head_dim}",
        "dtype": f"{state.parts[0].slots.k.dtype}, {state.parts[0].mean.dtype}, {state.wide}",
        "rows": f"{len(state.n)} rows",
        "moved": "slots that stay where they are" if state.moved is None else "slots that can move back",
        "kernels": f"kernels {', '.join(kernels)}" if kernels else "no kernels",
    }


def digest(tensors: dict[str, torch.Tensor], about: str = "") -> str:
    """The SHA-256 of names, types, shapes and bits of the tensors, and of what is said about them."""
    sha = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return sha.hexdigest()
