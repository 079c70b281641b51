"""What the scripts of this folder share: one sentence for what they refuse, and where and how they write what they found."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from less_fast import LessError
from less_fast.files import write_text
from less_fast.measuring import versions

RESULTS = Path(__file__).parent / "results"


def parser(doc: str) -> argparse.ArgumentParser:
    """For the options of a script, whose --help shows its docstring as it is."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model(options: argparse.ArgumentParser) -> None:
    """The options --model and --text of a script that streams text through a model."""
    options.add_argument("--model", default="", help="folder, hub name or smollm2; the embedded model by default")
    options.add_argument("--text", type=Path, action="append", default=[], help="files; held-out standard library by default")


def results_of(script: str, model: str) -> Path:
    """Where a script writes what it found for a model if nothing else is said."""
    return RESULTS / f"{script}_{Path(model).name or 'embedded'}.json"


def known(what: str, asked: Iterable[str], names: Iterable[str]) -> None:
    """LessError for what is asked for, but is none of the names."""
    names = list(names)
    if strange := sorted({*asked} - {*names}):
        raise LessError(f"no {what} here is called {', '.join(strange)}: choose of {', '.join(names)}")


def write(out: Path, about: dict, rows: object) -> None:
    """The rows as JSON, with what they are about, but for `out`, and the versions that made them."""
    about = {name: said for name, said in about.items() if name != "out"} | {"versions": versions()}
    write_text(out, json.dumps({"about": about, "rows": rows}, indent=1, default=str) + "\n")


def hardware(device: str = "cpu") -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{os.cpu_count()} cores, {platform.machine()}"


def answer_to(tokenizer, request: str) -> str:
    """A text that an answer to the request goes on with: by the chat template of the tokenizer if it has one."""
    if not tokenizer.chat_template:
        return f"{request}\n\n"
    return tokenizer.apply_chat_template([{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True)


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    headings = list(headings)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *rows])


def mean(values: torch.Tensor) -> tuple[float, float]:
    """The mean of values (n,) and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def run(name: str, act: Callable[[], object]) -> int:
    """The exit code. What is refused, or not there, is said in one sentence."""
    try:
        act()
    except (OSError, LessError, json.JSONDecodeError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
