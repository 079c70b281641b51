"""The command `less-kv` itself: what all of its commands share. What is wrong with the input is said in one sentence, with exit
code 2; of words and ranges that an option does not take typer tells."""

import json
import os
import sys
import traceback
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from safetensors import SafetensorError
from typer.core import TyperGroup

from ..hub import CONFIG
from ..layer.checks import LessError
from ..layer.policies import Policy
from ..measuring import versions
from ..setting import policy_named


class Commands(TyperGroup):
    """All commands. Of what they refuse, or the system, one sentence is shown, or with --debug the traceback."""

    def invoke(self, ctx: Any) -> Any:
        cause: Exception
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os._exit(0)  # the reader of our output has gone
        except (LessError, OSError, SafetensorError) as error:
            sentence, cause = " ".join(str(error).split()), error
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            sentence, cause = "there is not so much memory here: take a smaller budget, batch or length", error
        if ctx.params["debug"]:
            traceback.print_exception(cause)
        print(f"less-kv: {sentence}", file=sys.stderr)
        sys.exit(2)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
errors = Console(stderr=True)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of what is refused.")] = False) -> None:
    """LESS: text generation in constant memory. Most commands take the embedded model unless told otherwise."""


def evicting(policy: str, budget: str, length: int) -> Policy:
    """The policy. LessError if it evicts nothing from windows of the length that a query could miss."""
    rule = policy_named(policy, budget, length)
    if rule.budget > length - 2:
        raise LessError(f"a budget of {rule.budget} tokens evicts nothing from windows of {length}: choose a smaller one")
    return rule


def check_free(out, overwrite):
    if (out / CONFIG).exists() and not overwrite:
        raise LessError(f"{out} holds a {CONFIG} already: choose another --out, or say --overwrite")


def report(record, as_json, table, *notes):
    """Prints the record as JSON, or the table with notes below it."""
    if as_json:
        print(json.dumps(record, indent=2))
        return
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(*notes, sep="\n")


def spelled(dtype) -> str:
    """torch.float32 as users write it."""
    return str(dtype).removeprefix("torch.")


def about(model, dtype):
    """What every record says."""
    return {"model": model or "embedded", "dtype": spelled(dtype), "versions": versions()}


def main() -> None:
    """The entry point. What is neither done nor refused is a bug: it ends in a traceback and a line that asks to report it."""
    for name in ("stdout", "stderr"):  # what a console cannot show it shows as a question mark
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  closed: nobody reads it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except Exception:
        traceback.print_exc()
        print("less-kv: this is a bug: please report it with the command and the lines above", file=sys.stderr)
        sys.exit(1)
