"""The text every Python has: the source of its standard library, split by file into train, validation and test.

Which split a library module belongs to depends on its dotted name alone, so a module held out on one version of Python
is held out on all of them. Test code is only ever training text, and never where it tests a module that is held out.
"""

import functools
import hashlib
import re
import sysconfig
import zlib
from pathlib import Path, PurePosixPath

SPLITS = ("train", "validation", "test")

# Folders and files that are not the library, or that are generated tables rather than code someone wrote.
SKIPPED_FOLDERS = {
    "__phello__", "__pycache__", "cjkencodings", "dist-packages", "encodings", "lib-dynload", "pydoc_data", "site-packages",
}  # fmt: skip
SKIPPED_PATHS = re.compile(
    r"config-|_sysconfigdata|lib2to3/tests/data/|html/entities\.py|re/_casefix\.py|stringprep\.py|.*/bad\w*\.py"
)
TEST_FOLDERS = {"test", "tests", "idle_test"}


def documents(split: str) -> list[tuple[str, str]]:
    """The documents of a split as (path relative to the library, text), sorted by path.

    Raises ValueError for an unknown split and FileNotFoundError if the library holds no Python source.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    texts = _library(Path(sysconfig.get_path("stdlib")))
    split_of = {path: _split_of_module(path) for path in texts if not _is_test_code(path)}
    held_out = {_subject(_module(path)[-1]) for path, chosen in split_of.items() if chosen != "train"}
    for path in texts.keys() - split_of.keys():
        names_held_out = held_out.intersection(_subject(name) for name in _module(path))
        split_of[path] = None if names_held_out else "train"
    return [(path, text) for path, text in texts.items() if split_of[path] == split]


def digest(split: str) -> str:
    """Twelve hex digits that name the text of a split: paths and contents, in order."""
    sha = hashlib.sha256()
    for path, text in documents(split):
        sha.update(f"{path}\0{text}\0".encode())
    return sha.hexdigest()[:12]


@functools.cache
def _library(root):
    """Path -> text of every file that counts, sorted by path; of files with the same text only the first."""
    texts, seen = {}, set()
    for path in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.split("/")) or SKIPPED_PATHS.match(path):
            continue
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the tests of other encodings
            continue
        content = hashlib.sha256(text.encode()).digest()
        if text.strip() and content not in seen:
            texts[path] = text
            seen.add(content)
    if not texts:
        raise FileNotFoundError(f"no Python source found in {root}")
    return texts


def _module(path):
    """The dotted name in parts: email/__init__.py -> (email,)."""
    parts = PurePosixPath(path).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _is_test_code(path):
    return not TEST_FOLDERS.isdisjoint(path.split("/"))


def _split_of_module(path):
    percentile = zlib.crc32(".".join(_module(path)).encode()) % 100
    return "test" if percentile < 10 else "validation" if percentile < 14 else "train"


def _subject(name):
    """What a file or folder is about, whether it is the module or its test: test_socket, _socket, socket_tests -> socket."""
    return re.sub(r"test(er|s)?(?![a-z])", "", name).strip("_") or name
