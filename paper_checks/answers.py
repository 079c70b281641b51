"""Answers that are right or wrong, for real_model.py: programs that pass their tests (HumanEval), and numbers (GSM8K).

Programs are run each in a process of its own, in an empty folder, within TIME and MEMORY. They are the model's: run this where
nothing can be harmed.
"""

import ast
import gzip
import json
import re
import resource
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

from less_fast import LessError

from . import script

TIME, MEMORY = 10, 2**30  # seconds and bytes of a program
NEW = {"humaneval": 512, "gsm8k": 384}  # tokens of an answer, at most
PROGRAM = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```"
BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)  # of code, closed or cut off
NUMBER = "{}\n\nReason step by step, then end with: The answer is NUMBER."


def rows_of(file: Path) -> list[dict]:
    """The rows of a .jsonl file, zipped or not. LessError if it is none."""
    try:
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode()
        return [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError) as error:
        raise LessError(f"cannot read {file} as lines of JSON: {error}") from error


def asked(name: str, row: dict) -> tuple[str, dict]:
    """A question as it is put to the model, and what its answer is judged by. LessError for a row of another data set."""
    try:
        if name == "humaneval":
            return PROGRAM.format(row["prompt"].strip()), {part: row[part] for part in ("prompt", "test", "entry_point")}
        if name == "gsm8k":
            return NUMBER.format(row["question"]), {"number": row["answer"].rpartition("#### ")[2].replace(",", "")}
    except KeyError as error:
        raise LessError(f"a row of {name} has {error}, and this one has {', '.join(row)}") from error
    raise LessError(f"no questions here are called {name!r}: choose of {', '.join(NEW)}")


def prompts(tokenizer, questions: list[str]) -> list[list[int]]:
    """Tokens of each question under the model's chat template."""
    return [tokenizer(script.answer_to(tokenizer, question), add_special_tokens=False)["input_ids"] for question in questions]


def right(name: str, answer: str, told: dict) -> bool:
    """Whether an answer is."""
    return passes(program(answer, told), told) if name == "humaneval" else number_said(answer) == float(told["number"])


def number_said(answer: str) -> float | None:
    """The first number behind the last "answer is", or else the last number of all."""
    before, said, behind = answer.rpartition("answer is")
    found = re.findall(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?", behind if said else before + behind)
    return float(found[0 if said else -1].replace(",", "")) if found else None


def program(answer: str, told: dict) -> str:
    """The code of an answer, as far as it is Python: the first block of code that defines the function, or else the first; with
    what the question gave before it if the function is not in it."""
    named = re.compile(rf"^def {told['entry_point']}\b", re.MULTILINE)
    blocks = BLOCK.findall(answer)
    if not blocks:  # what is said before the code is none
        begun = re.search(r"^(?:from |import |def |class |@)", answer, re.MULTILINE) if named.search(answer) else None
        blocks = [answer[begun.start() if begun else 0 :]]
    whole = next((code for code in map(textwrap.dedent, blocks) if named.search(code)), None)
    before, code = (told["prompt"], blocks[0]) if whole is None else (told["prompt"].rpartition("def ")[0], whole)
    lines = f"{before}\n{code}".split("\n")
    return next((text for end in range(len(lines), 0, -1) if parses(text := "\n".join(lines[:end]))), "\n".join(lines))


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def passes(code: str, told: dict) -> bool:
    """Whether the tests of a problem pass, in a process of its own."""

    def limits():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (TIME, TIME))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    with TemporaryDirectory() as place:
        file = Path(place, "answer.py")
        end = uuid.uuid4().hex  # printed behind the tests: a program that leaves before them has not passed
        whole = f"{code}\n\n{told['test']}\n\ncheck({told['entry_point']})\nprint('{end}')\n"
        file.write_text(whole, encoding="utf-8", errors="replace")
        with Path(place, "printed").open("w+b") as printed:
            quiet = dict(stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.DEVNULL)
            start = "import runpy; runpy.run_path('answer.py', run_name='answer')"  # what runs under __main__ alone does not
            shared = dict(cwd=place, env={"PYTHONHASHSEED": "0"}, preexec_fn=limits, start_new_session=True, **quiet)
            try:
                subprocess.run([sys.executable, "-s", "-c", start], timeout=6 * TIME, **shared)  # of the clock: machines are busy
            except subprocess.TimeoutExpired:
                return False
            printed.seek(0)
            return printed.read().strip().endswith(end.encode())
