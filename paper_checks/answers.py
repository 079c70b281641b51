"""Answers that are right or wrong, for real_model.py: programs that pass their tests (HumanEval), and numbers (GSM8K).

Programs are run each in a process of its own, in an empty folder, within TIME and MEMORY. They are the model's: run this where
nothing can be harmed.
"""

import gzip
import json
import re
import resource
import subprocess
import sys
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

from less_fast import LessError

from . import script

TIME, MEMORY = 10, 2**30  # seconds and bytes of a program
NEW = {"humaneval": 384, "gsm8k": 320}  # tokens of an answer, at most
PROGRAM = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```"
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
    return passes(program(answer, told), told) if name == "humaneval" else last_number(answer) == float(told["number"])


def last_number(answer: str) -> float | None:
    """The last number of an answer."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return float(found[-1].replace(",", "")) if found else None


def program(answer: str, told: dict) -> str:
    """The code of an answer: its first block of code, with what the question gave before it if that is not in it."""
    block = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code = block[1] if block else answer
    whole = re.search(rf"^def {told['entry_point']}\b", code, re.MULTILINE)
    return f"{told['prompt'].rpartition('def ')[0] if whole else told['prompt']}\n{code}"


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
            command = [sys.executable, "-I", str(file)]
            try:
                subprocess.run(command, cwd=place, env={}, timeout=TIME, preexec_fn=limits, start_new_session=True, **quiet)
            except subprocess.TimeoutExpired:
                return False
            printed.seek(0)
            return printed.read().strip().endswith(end.encode())
