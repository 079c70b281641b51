"""Texts to train kernels of a model that chats and writes code, three files of about as many tokens each:

    python -m paper_checks.texts --model qwen2.5-coder-1.5b --prose a.txt --prose b.txt --out texts
    less-kv train --model qwen2.5-coder-1.5b --text texts/code.txt --text texts/prose.txt --text texts/chats.txt

code.txt: modules of the standard library's training split. prose.txt: pieces of the files that are given. chats.txt: questions
made from both under the model's chat template, with the model's own answers.
"""

import ast
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from less_fast import LessError
from less_fast.demo import corpus
from less_fast.files import write_text
from less_fast.loading import AUTO, load_model
from less_fast.text import read_text

from . import script

LETTERS_OF_A_TOKEN, LETTERS_OF_A_SNIPPET = 4, 1200  # about
AT_ONCE = 16  # answers
ABOUT_CODE = (
    "Explain what this code does.",
    "Write a docstring for each function here.",
    "Write unit tests for this code.",
    "What could go wrong when this code runs?",
)
ABOUT_PROSE = ("Summarize this text in three sentences.", "What is this text about, and what happens in it?")


def pieces(texts: list[str], letters: int, draw: random.Random) -> str:
    """Whole texts in a random order until they have so many letters. LessError if there are not so many."""
    chosen: list[str] = []
    for text in draw.sample(texts, len(texts)):
        chosen.append(text)
        if sum(map(len, chosen)) >= letters:
            return "\n\n".join(chosen)[:letters]
    raise LessError(f"the texts have {sum(map(len, texts)):,} letters, and {letters:,} are wanted: give more, or say --windows")


def snippet(text: str, draw: random.Random) -> str:
    """Some lines of a text from a random place, the first one whole."""
    start = draw.randrange(max(1, len(text) - LETTERS_OF_A_SNIPPET))
    return text[start : start + LETTERS_OF_A_SNIPPET].partition("\n")[2].strip("\n")


def tasks(text: str) -> Iterator[str]:
    """ "Write this function", for each function of a module that says what it does."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
            yield f"Write a Python function `{node.name}({ast.unparse(node.args)})`.\n\n{said}"


def questions(code: list[str], prose: list[str], count: int, draw: random.Random) -> list[str]:
    """A third each: about code, tasks, about prose."""
    found = []
    for which in range(count):
        if which % 3 == 0:
            found.append(f"{draw.choice(ABOUT_CODE)}\n\n```python\n{snippet(draw.choice(code), draw)}\n```")
        elif which % 3 == 1:
            of_module: list[str] = []
            while not of_module:
                of_module = [*tasks(draw.choice(code))]
            found.append(draw.choice(of_module)[:LETTERS_OF_A_SNIPPET])
        else:
            found.append(f"{draw.choice(ABOUT_PROSE)}\n\n{snippet(draw.choice(prose), draw)}")
    return found


@torch.inference_mode()
def chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[str], new: int) -> str:
    """Conversations of one question each, as the template writes them, with the model's answers of at most so many tokens."""
    found: list[str] = []
    tokenizer.padding_side = "left"
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        written = [script.answer_to(tokenizer, question) for question in some]
        inputs = tokenizer(written, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        out = model.generate(**inputs, max_new_tokens=new, do_sample=True, temperature=0.7, top_p=0.95)
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, answer in zip(some, answers):
            whole = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            found.append(tokenizer.apply_chat_template(whole, tokenize=False))
        print(f"{len(found)} of {len(asked)} questions are answered", file=sys.stderr)
    return "".join(found)


def make(model: str, prose: list[Path], out: Path, windows: int, count: int, new: int, seed: int) -> None:
    draw, letters = random.Random(seed), windows * 1024 * LETTERS_OF_A_TOKEN
    code, books = [text for _, text in corpus.documents("train")], [read_text(file) for file in prose]
    if not books:
        raise LessError("questions are asked about prose, too: give some with --prose")
    network, tokenizer = load_model(model, dtype=AUTO)
    if tokenizer.chat_template is None:
        raise LessError("this model has no chat template, so it does not answer questions: take one that does")
    out.mkdir(parents=True, exist_ok=True)
    of_books = [book[start : start + 20_000] for book in books for start in range(0, len(book), 20_000)]
    write_text(out / "code.txt", pieces(code, letters, draw))
    write_text(out / "prose.txt", pieces(of_books, letters, draw))
    torch.manual_seed(seed)
    write_text(out / "chats.txt", chats(network, tokenizer, questions(code, books, count, draw), new))


def main(arguments: list[str] | None = None) -> int:
    options = script.parser(__doc__)
    options.add_argument("--model", required=True, help="one that has a chat template")
    options.add_argument("--prose", type=Path, action="append", default=[], help="a text file, may be repeated")
    options.add_argument("--out", type=Path, required=True, help="folder for the three files")
    options.add_argument("--windows", type=int, default=60, help="windows of 1,024 tokens of code, and of prose")
    options.add_argument("--questions", type=int, default=96)
    options.add_argument("--new", type=int, default=256, help="tokens of an answer, at most")
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args(arguments)
    return script.run(
        "texts",
        lambda: make(asked.model, asked.prose, asked.out, asked.windows, asked.questions, asked.new, asked.seed),
    )


if __name__ == "__main__":
    sys.exit(main())
