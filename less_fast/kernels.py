"""LessKernels: the kernels of all layers of a model, with what is known of them, and their folder."""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from .budgets import Curves, Table, table
from .files import aside, read_tensors, write_tensors
from .hub import CARD, CARD_BEGINS, CONFIG, WEIGHTS, card, locate, upload
from .layer.checks import LessError, integer
from .layer.features import FAMILIES, MOST, Rho
from .layer.policies import Policy
from .official import read_official


class LessKernels(nn.Module):
    """The kernels of all attention layers of a model: `kernels.layers[i]` belong to layer i.

    rank: features of each KV head, or a list with one for each layer, 0 for a layer that LESS does not serve.
    family: a name in FAMILIES. about: what is known of them (the model's identity, how they were trained); curves: what each KV
    head costs at each budget, by the name of the policy. Both are stored in config.json beside the weights. rho: the hidden width
    of rho (for Retention); None without.
    """

    def __init__(
        self,
        layers: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        rank: int | Sequence[int] = 8,
        hidden: int = 512,
        about: dict | None = None,
        family: str = "paper",
        curves: dict[str, Curves] | None = None,
        rho: int | None = None,
    ):
        super().__init__()
        sizes = dict(layers=layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
        self.sizes: dict[str, Any] = {name: integer(name, size, 1, MOST) for name, size in sizes.items()}
        several = isinstance(rank, list | tuple)
        each_layers: Any = rank if several else [rank] * layers
        ranks = [integer("the rank of kernels", each, 0, MOST) for each in each_layers]
        hidden = integer("the hidden width of kernels", hidden, 0, MOST)
        self.sizes |= dict(rank=ranks if several else ranks[0], hidden=hidden, family=family)
        self.sizes |= {} if rho is None else dict(rho=integer("the hidden width of rho", rho, 1, MOST))
        self.about, self.curves = {} if about is None else about, {} if curves is None else curves
        if not isinstance(self.about, dict) or not isinstance(self.curves, dict):
            raise LessError(f"about and curves are dicts, not {self.about!r} and {self.curves!r}")
        for name, known in self.curves.items():
            if not isinstance(known, Curves):
                raise LessError(f"the curves of {name} are no Curves, but {known!r}")
            for costs in (known.bare, known.less or known.bare):
                if len(costs) != layers or any(len(layer) not in (0, kv_heads) for layer in costs):
                    raise LessError(f"the curves of {name} do not fit {layers} layers of {kv_heads} KV heads")
        if not isinstance(family, str) or family not in FAMILIES:
            raise LessError(f"no family of kernels is called {family!r}: choose one of {', '.join(FAMILIES)}")
        if len(ranks) != layers:
            raise LessError(f"the ranks of {len(ranks)} layers do not fit {layers} layers")
        if family != "none" and not any(ranks):
            raise LessError("kernels of rank 0 in all layers are none: give those that LESS serves a rank of at least 1")
        self.layers = nn.ModuleList(
            FAMILIES[family if each else "none"](query_heads, kv_heads, head_dim, each, hidden) for each in ranks
        )
        for layer, each in zip(self.layers, ranks) if rho else ():
            layer.rho = Rho(query_heads, kv_heads, head_dim, rho) if each or family == "none" else None

    def budgets_for(self, policy: Policy, less: bool = True) -> Table | None:
        """The budget table (layers x KV heads) that gives the KV heads policy.budget tokens on average where they do most.

        less: for LESS with these kernels, or for the bare policy. None if no curves are known for this policy, or they do not
        reach the budget.
        """
        curves = next((curves for curves in self.curves.values() if curves.describe(policy)), None)
        if curves is None:
            return None
        less = less and self.sizes["family"] != "none"
        return table(curves, policy.budget * curves.heads, less)

    @property
    def window(self) -> int | None:
        """Tokens of the windows that they were trained on, None if nobody knows: queries and keys at later positions are turned
        in ways that they never saw."""
        window = self.about.get("window")
        return window if type(window) is int and window > 0 else None

    def without_state(self) -> "LessKernels":
        """Rho alone, for the bare policy: what is evicted is forgotten. It shares the weights."""
        heads = {name: self.sizes[name] for name in ("layers", "query_heads", "kv_heads", "head_dim")}
        alone = LessKernels(**heads, rank=0, hidden=0, about=self.about, family="none", curves=self.curves)
        alone.layers = nn.ModuleList(layer.without_state() for layer in self.layers)  # type: ignore[operator]
        return alone

    def memory(self) -> int:
        """Bytes of all weights, and of the copies that caches with a budget table, another device or dtype share."""
        return sum(layer.memory() for layer in self.layers)  # type: ignore[operator]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes kernels.safetensors, config.json and a model card, README.md, into `folder`: all aside first, then renamed.

        Raises OSError, and leaves the folder as it was, if they cannot be written; LessError if `about` holds what JSON or the
        card cannot.
        """
        stored = {**self.sizes, "about": self.about, "curves": {name: asdict(curves) for name, curves in self.curves.items()}}
        try:
            config, readme = json.dumps(stored, indent=2) + "\n", card(self)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise LessError(f"what is said about these kernels cannot be written: mend their `about` ({error!r})") from error
        folder = make_folder(folder)
        with ExitStack() as together:
            weights_file, config_file, card_file = (
                together.enter_context(aside(folder / name)) for name in (WEIGHTS, CONFIG, CARD)
            )
            write_tensors(weights_file, self.state_dict())
            config_file.write(config.encode())
            card_file.write(readme.encode(errors="replace"))
            for file in (weights_file, config_file, card_file):
                file.flush()  # a full disk shows here, before anything is renamed

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Uploads the kernels, their config and the model card to a repository of the hub; returns its address."""
        return upload(self, repository, private)

    @classmethod
    def from_pretrained(cls, where: str | os.PathLike) -> "LessKernels":
        """Reads kernels from a local folder, or from a repository of the Hugging Face hub.

        Raises FileNotFoundError if there are none, LessError if the files do not fit together or hold NaN.
        """
        weights, config = locate(where)
        try:
            stored = json.loads(config.read_text(encoding="utf-8"))
            curves = {name: Curves(**fields) for name, fields in stored.pop("curves", {}).items()}
            with torch.device("meta"):  # sizes that are not those of the weights shall take no memory
                kernels = cls(**stored, curves=curves)
            kernels.load_state_dict(_fitting(read_tensors(weights)[0], kernels.state_dict()), assign=True)
            card(kernels)  # what is said about them is enough to save them again
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError, ArithmeticError, SafetensorError) as error:
            raise LessError(f"the kernels in {where} are broken, or do not fit their {CONFIG}: {error}") from error
        broken = [name for name, weight in kernels.state_dict().items() if not weight.isfinite().all()]
        if broken:
            raise LessError(f"the kernels in {where} hold NaN or infinite weights ({broken[0]}): train or copy them again")
        return kernels.requires_grad_(False).eval()

    @classmethod
    def from_official(cls, folder: str | os.PathLike) -> "LessKernels":
        """Reads checkpoints of the authors' code, for Llama or for Falcon: see `official.read_official`.

        Raises FileNotFoundError if there are none, LessError if they are broken or do not fit each other.
        """
        layers, settings = read_official(folder)
        (query_heads, head_dim, hidden), (kv_heads, _, rank) = layers[0]["q1"].shape, layers[0]["k2"].shape
        about = {"origin": "the authors' checkpoint", "settings": settings}
        kernels = cls(len(layers), query_heads, kv_heads, head_dim, rank, hidden, about)
        try:
            for layer, weights in zip(kernels.layers, layers):
                layer.load_state_dict(weights)
        except RuntimeError as error:
            raise LessError(f"the layers in {folder} differ in shape: {error}") from error
        return kernels.requires_grad_(False).eval()


def make_folder(folder: str | os.PathLike) -> Path:
    """The folder, there now, for kernels. OSError if there can be none, nothing can be written there, or files of other things
    would be replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()
    if taken := [name for name in (WEIGHTS, CONFIG, CARD) if (folder / name).is_dir()]:
        raise IsADirectoryError(f"{folder / taken[0]} is a folder, and kernels have a file of that name: choose another folder")
    if (readme := folder / CARD).exists() and not readme.read_bytes().startswith(CARD_BEGINS.encode()):
        raise FileExistsError(f"{readme} is no model card of kernels, and would be replaced by one: choose another folder")
    return folder


def _fitting(loaded: dict, wanted: dict) -> dict[str, torch.Tensor]:
    """The weights loaded, in float32. LessError if they are not those wanted, by name and shape, or no floats."""
    for name in sorted(loaded.keys() | wanted.keys()):
        shape, expected = (tuple(weights[name].shape) if name in weights else None for weights in (loaded, wanted))
        if shape != expected:
            raise LessError(f"{name} has the shape {shape}, and by its config {expected}")
        if not loaded[name].is_floating_point():
            raise LessError(f"{name} holds {loaded[name].dtype}, not floats")
    return {name: weight.float() for name, weight in loaded.items()}
