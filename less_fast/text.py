"""Texts as tokens, windows of them for training and measuring, and tokens as text."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .layer.checks import LessError

LETTERS_AT_ONCE = 2**20  # that are tokenized together: a tokenizer takes some 150 bytes for each
LETTERS_BEFORE = 64  # a cut, which say what a tokenizer makes of the beginning of a piece
CUTS = re.compile(r"\n|\S(?=\s)")  # where a text may be cut: behind a line or a word
TOKENS_BEFORE = 8  # new ones, which say how the text of these is spelled


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, count: int | None = None, seed: int = 0
) -> torch.Tensor:
    """`count` non-overlapping windows of the texts in a seeded random order, all of them if None: int64 (count, length).

    The texts are joined in their order, each followed by the end-of-text token if the tokenizer has one. If it begins texts
    with tokens of its own (Llama's, Gemma's and GLM's do, and such models need them), every window begins with these.
    Raises LessError, with the numbers, if there are fewer than `count` windows, or none.
    """
    stream = np.concatenate([np.empty(0, np.int64), *tokenized(tokenizer, texts)])  # (tokens,)
    begin = beginning(tokenizer)
    room = length - len(begin)
    available = len(stream) // room if room > 0 else 0
    count = available if count is None else count
    if available < max(count, 1):
        raise LessError(
            f"the text has {len(stream)} tokens, {available} windows of {length}, and {max(count, 1)} are wanted: "
            f"give more text, fewer windows or a shorter length"
        )
    chosen = np.random.default_rng(seed).permutation(available)[:count]  # (count,)
    of_text = torch.from_numpy(stream[: available * room].reshape(available, room)[chosen])
    return torch.cat([torch.tensor(begin, dtype=torch.int64, device="cpu").expand(count, -1), of_text], 1)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text, whatever it calls them."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return next(whole[:at] for at in range(len(whole) + 1) if whole[at : at + len(text)] == text or at == len(whole))


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[np.ndarray]:
    """One int64 array of tokens for each text, the end-of-text token last."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [np.concatenate([*_in_pieces(tokenizer, text), np.array(end, np.int64)]) for text in texts]


def _in_pieces(tokenizer, text: str) -> Iterator[np.ndarray]:
    """The tokens of a text, of some letters at a time: a long text is cut where that changes no token."""

    def encoded(start, end):
        return tokenizer(text[max(0, start) : end], add_special_tokens=False, verbose=False)["input_ids"]

    def is_between_tokens(end):
        before = encoded(end - LETTERS_BEFORE, end)
        return encoded(end - LETTERS_BEFORE, end + LETTERS_BEFORE)[: len(before)] == before

    end = 0
    while end < len(text):
        start, ends = end, (found.end() for found in CUTS.finditer(text, end + LETTERS_AT_ONCE))
        end = next(filter(is_between_tokens, ends), len(text))
        before = encoded(start - LETTERS_BEFORE, start)
        yield np.array(encoded(start - LETTERS_BEFORE, end)[len(before) :], dtype=np.int64)


def ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model's generation config, the tokenizer's own, and <|endoftext|> if there is one:
    models that were trained to chat write it too, and files of weights may name one end alone."""
    own, added = model.generation_config.eos_token_id, tokenizer.get_added_vocab()
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, added.get("<|endoftext|>")} - {None})


def text_behind(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], new: Sequence[int]) -> str:
    """What the text becomes longer by if the tokens `new` stand behind those before: alone they may be spelled in another way
    (Llama 2's tokenizer takes the first space off). Special tokens are left out."""
    special = set(tokenizer.all_special_ids)
    before = list(islice((token for token in reversed(before) if token not in special), TOKENS_BEFORE))[::-1]
    shown, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in (before, [*before, *new])
    )
    return whole[len(shown) :]


class Printer(BaseStreamer):
    """A streamer for `generate` that prints what is new, each character as soon as all of its tokens are there.

    before: the tokens that stand before, in whose text the new one is spelled; without them it is spelled alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()):
        self.tokenizer, self.before, self.prompt = tokenizer, list(before), True
        self.new: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """ValueError for several texts at once."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"one text is printed at a time, and {len(value)} come (num_beams, num_return_sequences)")
        if self.prompt:  # it comes first
            self.prompt = False
            return
        self.new += value.flatten().tolist()
        if not text_behind(self.tokenizer, self.before, self.new).endswith("\ufffd"):
            self._print()

    def end(self) -> None:
        self._print("\n")
        self.prompt = True

    def _print(self, end=""):
        print(text_behind(self.tokenizer, self.before, self.new), end=end, flush=True)
        self.before, self.new = [*self.before, *self.new][-TOKENS_BEFORE:], []


def read_text(file: Path) -> str:
    """The text of a file. LessError if there is none, or it is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LessError(f"no such file: {file}") from error
    except (OSError, ValueError) as error:  # a path may hold what no path holds, and a file what no text holds
        raise LessError(f"cannot read {file} as UTF-8 text: {error}") from error


def dataset_texts(name: str, characters: int) -> list[str]:
    """The first texts of a data set of the hub, or of a local folder, until they have so many characters, with `datasets`.

    name: NAME[,CONFIG[,SPLIT[,COLUMN]]]; split "train" and column "text" unless it says otherwise.
    Raises LessError, with the reason, if there is no such data set, split or column, or the library is missing.
    """
    where, config, split, column, *more = [*name.split(","), "", "", "", ""][: max(4, name.count(",") + 1)]
    if more:
        raise LessError(f"a data set is NAME[,CONFIG[,SPLIT[,COLUMN]]], not {name!r}")
    texts, total = [], 0
    for (text,) in dataset_columns(where, config, split, column or "text"):
        texts.append(text)
        total += len(text)
        if total >= characters:
            break
    return texts


def dataset_columns(where: str, config: str, split: str, *columns: str) -> Iterator[tuple[str, ...]]:
    """The columns of a data set of the hub, or of a local folder, row by row; split "train" if it is empty.

    Raises LessError, with the reason, if there is no such data set, split or column, or the library is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LessError("a data set needs the library datasets: pip install 'less-kv[eval]'") from error
    try:
        for row in load_dataset(where, config or None, split=split or "train", streaming=True):
            fields = tuple(row[column] for column in columns)
            if not all(isinstance(text, str) for text in fields):
                raise TypeError(f"a row of {', '.join(columns)} holds something else than text")
            yield fields
    except Exception as error:  # whatever datasets says of what is not there, or is broken
        raise LessError(f"no texts from the data set {where!r}: {type(error).__name__} {error}") from error
