"""python -m paper_checks [NAME ...]: runs the checks of the paper's claims and writes a report."""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import transformers

from less_fast import LessError
from less_fast.demo import PAPER_KERNELS
from less_fast.files import write_text
from less_fast.loading import load_kernels, load_model, load_texts
from less_fast.measuring import versions
from less_fast.text import dataset_columns, dataset_texts, read_text

from . import script
from .check import MOST, Finding, Subject

CHECKS = {
    "exact": ("parallel_equals_recurrent", "memory", "inplace", "near_ties"),
    "attention": ("residual_rank", "attention_maps"),
    "perplexity": ("perplexity", "unequal_budgets", "performer", "long_sequences", "retrieval"),
    "trained": ("tables_of_other_texts", "transfer", "kernel_size", "training_cost"),
    "harness": ("harness",),
    "summarization": ("summarization",),
}
"""By file, what it checks."""
NAMES = {name: file for file, names in CHECKS.items() for name in names}
SUMMARIES = 200  # rows of a data set that are read


def options(arguments):
    parser = argparse.ArgumentParser(prog="python -m paper_checks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all unless named: {', '.join(NAMES)}")
    parser.add_argument("--model", default="", help="folder or hub name; the embedded model by default")
    parser.add_argument("--kernels", default="", help="folder or hub name of kernels for the model; embedded model: its own")
    parser.add_argument(
        "--data",
        action="append",
        help="text file, or a data set as NAME[,CONFIG[,SPLIT[,COLUMN]]], may be repeated; the standard library by default",
    )
    parser.add_argument("--tasks", help="of lm-evaluation-harness, separated by commas; one made of the held-out text")
    parser.add_argument("--summaries", metavar="NAME,CONFIG,SPLIT,ARTICLE,SUMMARY", help="data set and two columns, for ROUGE")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke run at the smallest size; its verdicts say nothing")
    parser.add_argument("--out", type=Path, default=Path("paper-checks-report"), help="folder of the report")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in NAMES]
    if unknown:
        parser.error(f"no check is called {unknown[0]}; these are: {', '.join(NAMES)}")
    if chosen.model and not chosen.kernels:
        parser.error("--model needs --kernels: train some with `less-kv train`")
    for option, name in (("tasks", "harness"), ("summaries", "summarization")):
        if getattr(chosen, option) and name not in (chosen.names or NAMES):
            parser.error(f"--{option} is for the check {name}, which is not among those named")
    if chosen.summaries and chosen.summaries.count(",") != 4:
        parser.error(f"--summaries takes NAME,CONFIG,SPLIT,ARTICLE,SUMMARY, not {chosen.summaries!r}")
    return chosen


def subject(chosen) -> Subject:
    """What the options say. Raises OSError or LessError if it is not there, or does not go together."""
    model, tokenizer = load_model(chosen.model, chosen.device)
    kernels = load_kernels(model, chosen.kernels)
    if kernels is None:
        raise LessError("the checks are about kernels: say which with --kernels")
    paper_kernels = None if chosen.model else load_kernels(model, str(PAPER_KERNELS))
    length = 256 if chosen.quick else chosen.length
    texts = [text for name in chosen.data for text in texts_of(name, length)] if chosen.data else None
    tasks = summaries = None
    if chosen.tasks:
        from .harness import load_tasks  # asks for lm_eval

        tasks = load_tasks(chosen.tasks.split(","))
    if chosen.summaries:
        summaries = list(islice(dataset_columns(*chosen.summaries.split(",")), SUMMARIES))
    wanted = Subject(model, tokenizer, kernels, paper_kernels, texts, length, chosen.quick, tasks=tasks, summaries=summaries)
    if texts is not None:
        for split, most in MOST.items():
            wanted.windows(most, split=split)  # refused now if they are too short
    return wanted


def texts_of(name: str, length: int) -> list[str]:
    """The text of a file, of the held-out standard library, or the first texts of a data set: enough for all windows of `length`
    tokens."""
    if name == "library":
        return load_texts([], "", "test")[0]
    return [read_text(Path(name))] if Path(name).is_file() else dataset_texts(name, 16 * length * sum(MOST.values()))


def report(folder: Path, checks: dict[str, tuple[Callable, Finding, float]], about: dict) -> None:
    """JSON with every number, and Markdown. checks: by name, the check, what it found, and how many seconds it took."""
    record, claims, parts = {}, [], []
    for name, (check, finding, seconds) in checks.items():
        said = {"claim": check.claim, "paper": check.paper, "verdict": finding.verdict, "sentence": finding.sentence}
        record[name] = said | {"figures": finding.figures, "seconds": round(seconds, 1)}
        claims.append([check.claim, check.paper, f"**{finding.verdict}**", finding.sentence])
        parts += [f"## {name}", f"{check.claim}. **{finding.verdict}**: {finding.sentence}. ({seconds:.0f} s)"]
        parts += [script.markdown(finding.headings, finding.rows)] if finding.rows else []
    head = ["# The paper's claims, measured", ", ".join(f"{name}: {value}" for name, value in about.items())]
    head.append(script.markdown(["claim", "the paper", "verdict", "measured"], claims))
    write_text(folder / "report.json", json.dumps({"about": about, "checks": record}, indent=2) + "\n")
    write_text(folder / "report.md", "\n\n".join(head + parts) + "\n")


def check_all(chosen) -> None:
    """Runs the checks that were chosen and prints what each finds. Raises as `subject` does."""
    try:
        wanted = {name: getattr(importlib.import_module(f"paper_checks.{NAMES[name]}"), name) for name in chosen.names or NAMES}
    except ImportError as error:
        raise LessError(f"{error}: pip install 'less-kv[eval]'") from error
    here = subject(chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)  # what cannot be written should be known before the checks
    about = {
        "model": chosen.model or "embedded",
        "kernels": chosen.kernels or "embedded",
        "text": ", ".join(chosen.data or []) or "held-out standard library",
        "tasks": chosen.tasks or "held-out text",
        "summaries": chosen.summaries or "held-out text",
        "length": here.length,
        "seed": here.seed,
        "device": f"{script.hardware(chosen.device)}, {torch.get_num_threads()} threads",
        "quick": here.quick,
        "versions": ", ".join(f"{name} {release}" for name, release in versions().items()),
    }
    checks = {}
    for name, check in wanted.items():
        began = time.perf_counter()
        finding = check(here)
        checks[name] = check, finding, time.perf_counter() - began
        print(f"{name}: {finding.verdict}. {finding.sentence}", flush=True)
        report(chosen.out, checks, about)  # after each: what is done is not lost
    print(f"report in {chosen.out}")


def main(arguments=None) -> int:
    chosen = options(arguments)
    transformers.logging.disable_progress_bar()
    return script.run("paper_checks", lambda: check_all(chosen))


if __name__ == "__main__":
    sys.exit(main())
