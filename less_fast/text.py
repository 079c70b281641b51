"""Texts as tokens: windows for training and measuring."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from .layer.checks import LessError


def windows(tokenizer, texts: Iterable[str], length: int, count: int | None = None, seed: int = 0) -> torch.Tensor:
    """`count` non-overlapping windows of the texts in a seeded random order, all of them if None: int64 (count, length).

    The texts are joined in their order, each followed by the end-of-text token where the tokenizer has one.
    Raises LessError, with the numbers, where there are fewer than `count` windows, or none.
    """
    stream = np.concatenate(tokenized(tokenizer, texts))  # (tokens,)
    available = len(stream) // length
    count = available if count is None else count
    if available < max(count, 1):
        raise LessError(
            f"the text has {len(stream)} tokens, {available} windows of {length}, and {max(count, 1)} are wanted: "
            f"give more text, fewer windows or a shorter length"
        )
    chosen = np.random.default_rng(seed).permutation(available)[:count]  # (count,)
    return torch.from_numpy(stream[: available * length].reshape(available, length)[chosen])


def dataset_texts(name: str, characters: int) -> list[str]:
    """The first texts of a data set of the hub, or of a local folder, until they have so many characters, with `datasets`.

    name: NAME[,CONFIG[,SPLIT[,COLUMN]]]; split "train" and column "text" unless given.
    Raises LessError, with the reason, where there is no such data set, split or column, or the library is missing.
    """
    where, config, split, column, *rest = [*name.split(","), "", "", "", ""][: max(4, name.count(",") + 1)]
    if rest:
        raise LessError(f"a data set is NAME[,CONFIG[,SPLIT[,COLUMN]]], not {name!r}")
    texts, enough = [], 0
    for (text,) in dataset_columns(where, config, split, column or "text"):
        texts.append(text)
        enough += len(text)
        if enough >= characters:
            break
    return texts


def dataset_columns(where: str, config: str, split: str, *columns: str) -> Iterator[tuple[str, ...]]:
    """The columns of a data set of the hub, or of a local folder, row by row; split "train" where it is empty.

    Raises LessError, with the reason, where there is no such data set, split or column, or the library is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise LessError("a data set needs the library datasets: pip install 'less-kv[eval]'") from None
    try:
        for row in load_dataset(where, config or None, split=split or "train", streaming=True):
            found = tuple(row[column] for column in columns)
            if not all(isinstance(text, str) for text in found):
                raise TypeError(f"a row of {', '.join(columns)} holds something else than text")
            yield found
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:  # the last: an empty file
        raise LessError(f"no texts from the data set {where!r}: {type(error).__name__} {error}") from error


def tokenized(tokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    """One int64 array of tokens for each text, the end-of-text token last."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.array([*ids, *end], dtype=np.int64) for ids in encoded]
