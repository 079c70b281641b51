"""Texts as tokens: windows for training and measuring."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .layer.checks import LessError


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, count: int | None = None, seed: int = 0
) -> torch.Tensor:
    """`count` non-overlapping windows of the texts in a seeded random order, all of them if None: int64 (count, length).

    The texts are joined in their order, each followed by the end-of-text token if the tokenizer has one. If it begins texts
    with a token of its own (Llama's and Gemma's do, and such models need it), every window begins with that.
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
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, -1), of_text], 1)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[np.ndarray]:
    """One int64 array of tokens for each text, the end-of-text token last."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = list(texts)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [np.array([*ids, *end], dtype=np.int64) for ids in encoded]


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
