"""Answers that are right or wrong: programs in a process of their own, and numbers."""

import gzip
import json

import pytest

from less_fast import LessError
from paper_checks import answers

ADD = {"prompt": "import math\n\n\ndef add(a, b):\n", "entry_point": "add", "test": "def check(f):\n    assert f(1, 2) == 3\n"}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return a + b\n", True),
        ("```python\ndef add(a, b):\n    return a + b\n```", True),
        ("Here it is:\n```\ndef add(a, b):\n    return math.floor(a + b)\n```\nAnd so on.", True),  # what stood before is there
        ("```python\ndef add(a, b):\n    return a + b", True),  # cut off behind the function
        ("```Python \ndef add(a, b):\n    return a + b\n```\nThis adds them.", True),
        ("1. So:\n\n   ```python3\n   def add(a, b):\n       return a + b\n   ```", True),
        ("This adds them:\n\ndef add(a, b):\n    return a + b\n", True),
        ("```python\nadd(1, 1)\n```\nwith\n```python\ndef add(a, b):\n    return a + b\n```", True),
        ("```python\ndef add(a, b):\n    return a + b\n\nprint(add(1,", True),  # cut off behind the function
        ("```python\ndef add(a, b):\n    return a + b\n\nif __name__ == '__main__':\n    input()\n```", True),
        ("```\n    return a + b\n```", True),
        ("```python\ndef other(a, b):\n    return a + b\n```", False),
        ("    import time; time.sleep(60)\n", False),
        ("    return a - b\n", False),
        ("```python\ndef add(a, b:\n```", False),
        ("    while True: pass\n", False),
        ("    return len(bytearray(2**29)) and a + b\n", False),  # more than MEMORY
        ("    raise SystemExit(0)\n", False),  # before the tests have passed
        ("    print('x'); return a + b\n", True),
        ("", False),
    ],
)
def test_a_program_is_right_if_its_tests_pass_within_time_and_memory(answer, right, monkeypatch):
    monkeypatch.setattr(answers, "TIME", 1)
    monkeypatch.setattr(answers, "MEMORY", 2**28)
    assert answers.right("humaneval", answer, ADD) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("So 1,200 of 7. The answer is 1,234.", True),
        ("The answer is $1234.00.", True),
        ("1234 or 5", False),
        ("The answer is 1234. Note: 2 ways lead there.", True),
        ("First the answer is 7. No, the answer is 1234", True),
        ("The answer is -1234", False),
        ("It is 2234-1000, that is 2000-766, so 1234", True),
        ("2234-1234", True),  # a difference has no sign
        ("no number", False),
    ],
)
def test_a_number_is_right_if_it_stands_behind_the_last_answer_is_or_at_the_end(answer, right):
    assert answers.right("gsm8k", answer, {"number": "1234"}) is right


def test_questions_come_from_lines_of_json_zipped_or_not(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "so\n#### 1,002"}] * 2
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert answers.rows_of(tmp_path / "a.jsonl") == answers.rows_of(tmp_path / "b.jsonl.gz") == rows
    question, told = answers.asked("gsm8k", rows[0])
    assert question.startswith("1 + 1?\n")
    assert told == {"number": "1002"}
    for name, row, message in (("gsm8k", ADD, "a row of gsm8k has 'question'"), ("mine", ADD, "no questions here are called")):
        with pytest.raises(LessError, match=message):
            answers.asked(name, row)
    (tmp_path / "c.jsonl").write_text("no JSON")
    for file in ("c.jsonl", "d.jsonl"):
        with pytest.raises(LessError, match="as lines of JSON"):
            answers.rows_of(tmp_path / file)
