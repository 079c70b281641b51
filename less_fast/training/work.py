"""The folder of an unfinished training."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import aside, write_text
from ..layer.checks import LessError

FORMAT = 4  # of the files; a change of what they hold takes the next number


class Work:
    """What is done of a training, each file complete, and the order that it carries out, as it was begun.

    Raises LessError if the folder holds the work on another order. The "identity" of the model is left to `check_saved`: sums in
    another order round to other numbers.
    """

    def __init__(self, folder: Path, order: dict[str, Any]):
        self.folder, file = folder, folder / "order.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.order, self.resumed = json.loads(json.dumps({"format": FORMAT} | order)), file.exists()
        if self.resumed:
            self.order = self._begun(file)
        else:
            write_text(file, json.dumps(self.order, indent=2) + "\n")

    def _begun(self, file: Path) -> dict[str, Any]:
        """The order in the file. LessError if it is another one, or none."""
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            begun = None
        if not isinstance(begun, dict):
            raise LessError(f"{file} is broken, so nobody knows what was begun there: delete {self.folder}")
        if begun.get("format") != FORMAT:
            raise LessError(
                f"{self.folder} holds a training that another version of LESS began: finish it with that version, or delete that "
                f"folder"
            )
        names = (self.order | begun).keys() - {"identity"}
        if other := sorted(name for name in names if self.order.get(name) != begun.get(name)):
            raise LessError(
                f"{self.folder} holds an unfinished training with another {', '.join(other)}: go on with the options it was "
                f"begun with, or delete that folder"
            )
        return begun

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def load(self, name: str) -> dict[str, Any]:
        """What was saved under this name, on the CPU. LessError if the file is broken."""
        file = self.folder / name
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise LessError(f"{file} is broken: delete it, and what it held is computed again ({error})") from error

    def save(self, name: str, value: dict[str, Any]) -> None:
        with aside(self.folder / name) as temporary:
            torch.save(value, temporary)

    def once(self, name: str, run: Callable[[], dict[str, Any]], module: torch.nn.Module | None = None) -> dict[str, Any]:
        """What `run` finds, now or before, and the weights that the module has then."""
        if not self.has(name):
            found = run()
            self.save(name, {"found": found, "weights": module and module.state_dict()})
        saved = self.load(name)
        if module is not None:
            module.load_state_dict(saved["weights"])
        return saved["found"]
