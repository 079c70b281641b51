"""Pictures of measurements, with matplotlib: what can be refused is refused before anything is measured."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import aside
from ..layer.checks import LessError


def check_picture(path: Path | None) -> None:
    """LessError if a picture is wanted and could not be drawn, or written there."""
    if path is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LessError("a picture needs matplotlib: pip install 'less-kv[plot]'") from error
    folder = path.absolute().parent
    if path.suffix.lower() != ".png" or path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise LessError(f"a picture is a .png file in a folder that can be written: {path} is none")


@contextmanager
def picture(path: Path, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure of so many inches and its axes to draw on; at the end a file, written aside, then renamed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=size, layout="constrained")
    try:
        yield figure, axes
        with aside(path) as file:
            figure.savefig(file, dpi=150, format="png")
    finally:
        plt.close(figure)
