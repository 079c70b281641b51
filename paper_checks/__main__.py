"""python -m paper_checks [NAME ...]: runs the checks of the paper's claims and writes a report."""

import argparse
import importlib
import platform
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from less_fast import LessKernels
from less_fast.demo import KERNELS, MODEL, PAPER_KERNELS
from less_fast.hf.architecture import check_kernels
from less_fast.text import dataset_columns, dataset_texts

from .check import MOST, Setting

NAMES = (
    "parallel_equals_recurrent",
    "memory",
    "inplace",
    "residual_rank",
    "attention_maps",
    "perplexity",
    "unequal_budgets",
    "tables_of_other_texts",
    "performer",
    "transfer",
    "long_sequences",
    "kernel_size",
    "training_cost",
    "retrieval",
    "near_ties",
    "harness",
    "summarization",
)
SUMMARIES = 200  # rows of a data set that are read


def options(arguments):
    parser = argparse.ArgumentParser(prog="python -m paper_checks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all unless named: {', '.join(NAMES)}")
    parser.add_argument("--model", default=str(MODEL), help="folder or hub name; the embedded model unless given")
    parser.add_argument("--kernels", help="folder or hub name of kernels for the model; embedded model: its own")
    parser.add_argument("--paper-kernels", help="the same of the paper's own family, to stand beside them")
    parser.add_argument(
        "--data",
        action="append",
        help="text file, or a data set as NAME[,CONFIG[,SPLIT[,COLUMN]]], may be repeated; the standard library unless given",
    )
    parser.add_argument("--tasks", help="of lm-evaluation-harness, separated by commas; one made of the held-out text")
    parser.add_argument("--summaries", metavar="NAME,CONFIG,SPLIT,ARTICLE,SUMMARY", help="data set and two columns, for ROUGE")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run at the smallest size; its verdicts say nothing")
    parser.add_argument("--out", type=Path, default=Path("paper-checks-report"), help="folder of the report")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in NAMES]
    if unknown:
        parser.error(f"no check is called {unknown[0]}; these are: {', '.join(NAMES)}")
    embedded = chosen.model == str(MODEL)
    if not embedded and not chosen.kernels:
        parser.error("--model needs --kernels: train some with `less-kv train`")
    for option, name in (("tasks", "harness"), ("summaries", "summarization")):
        if getattr(chosen, option) and name not in (chosen.names or NAMES):
            parser.error(f"--{option} is for the check {name}, which is not among those named")
    if chosen.summaries and chosen.summaries.count(",") != 4:
        parser.error(f"--summaries takes NAME,CONFIG,SPLIT,ARTICLE,SUMMARY, not {chosen.summaries!r}")
    chosen.kernels = chosen.kernels or str(KERNELS)
    chosen.paper_kernels = chosen.paper_kernels or (str(PAPER_KERNELS) if embedded else None)
    return chosen


def setting(chosen) -> Setting:
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).to(chosen.device).eval().requires_grad_(False)
    loaded = []
    for where in (chosen.kernels, chosen.paper_kernels):
        kernels = where and LessKernels.from_pretrained(where).to(chosen.device)
        if kernels:
            check_kernels(model, kernels)
        loaded.append(kernels)
    length = 256 if chosen.quick else chosen.length
    texts = [text for name in chosen.data for text in texts_of(name, length)] if chosen.data else None
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    tasks = summaries = None
    if chosen.tasks:
        from .harness import load_tasks  # asks for lm_eval

        tasks = load_tasks(chosen.tasks.split(","))
    if chosen.summaries:
        summaries = list(islice(dataset_columns(*chosen.summaries.split(",")), SUMMARIES))
    found = Setting(model, tokenizer, *loaded, texts, length, chosen.quick, chosen.seed, tasks, summaries)
    if texts is not None:
        for split, most in MOST.items():
            found.windows(most, split=split)  # refused now where they are too short
    return found


def texts_of(name: str, length: int) -> list[str]:
    """The text of a file, or the first texts of a data set: enough for all windows of `length` tokens."""
    file = Path(name)
    return [file.read_text(encoding="utf-8")] if file.is_file() else dataset_texts(name, 16 * length * sum(MOST.values()))


def main(arguments=None):
    chosen = options(arguments)
    try:
        from .report import write  # asks for matplotlib

        modules = {name: importlib.import_module(f"paper_checks.{name}") for name in chosen.names or NAMES}
    except ImportError as error:
        print(f"paper_checks: {error}: pip install 'less-kv[eval,plot]'", file=sys.stderr)
        return 2
    try:
        here = setting(chosen)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"paper_checks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    about = {
        "model": "embedded" if chosen.model == str(MODEL) else chosen.model,
        "kernels": "embedded" if chosen.kernels == str(KERNELS) else chosen.kernels,
        "text": ", ".join(chosen.data or []) or "held-out standard library",
        "tasks": chosen.tasks or "held-out text",
        "summaries": chosen.summaries or "held-out text",
        "length": here.length,
        "seed": here.seed,
        "device": torch.cuda.get_device_name() if chosen.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads",
        "quick": here.quick,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, python {platform.python_version()}",
    }
    checks = {}
    for name, module in modules.items():
        began = time.perf_counter()
        found = module.check(here)
        checks[name] = module, found, time.perf_counter() - began
        print(f"{name}: {found.verdict}. {found.sentence}", flush=True)
        write(chosen.out, checks, about)  # after each: what is done is not lost
    print(f"report in {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
