"""The clock of a cache: what all of its layers have seen, told once in each pass. Of the past nothing is kept but hashes: they
tell a mask or a text that contradicts it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..layer.checks import LessError

MULTIPLIER = 6364136223846793005  # of the hashes: odd, so that no column is ever multiplied away
OTHER_ROWS = (
    "this cache holds {} sequences, and {} came: make a cache for these, or repeat or select its rows (batch_repeat_interleave, "
    "batch_select_indices); reset() keeps their number"
)
OTHER_MASK = (
    "the attention mask contradicts an earlier one about the past, in rows {}: what came as a token cannot be masked later "
    "(tokens of rows that ended early in `generate`, for example), nor a pad unmasked (by no mask at all, for example). Pass the "
    "earlier mask with columns for the new tokens behind it, or reset() the cache and feed the whole text with this mask"
)
OTHER_TOKENS = (
    "the text does not begin with the {} tokens that this cache was fed, in rows {}: give the tokens that were fed with new ones "
    "behind them (the tokenizer may write the end of a text in another way once more follows it), or reset() the cache before "
    "another text"
)


class Clock:
    """seen: columns that came, pads included: what transformers calls the sequence length; a tensor () as soon as there is a
    state, for compiled code would depend on an int. counted: the same as an int, or None after compiled steps, which change the
    tensor alone.
    masks, tokens: (N,) int64, hashes of what these columns were: 1 for a token and 0 for a pad; the token's id. None if nobody
    knows: a file did not tell, or embeddings came.
    m, ids, valid: how many columns the pass under way has, and what they are, (N, m) each; None: no ids came, no pads are there.
    """

    def __init__(self) -> None:
        self.seen: Any = 0
        self.counted: int | None = 0
        self.masks: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self.ids: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.m = 0

    @property
    def begun(self) -> bool:
        return isinstance(self.seen, torch.Tensor)

    @torch.inference_mode(False)  # nothing here takes over the caller's autograd mode
    def begin(self, batch: int, device: torch.device) -> None:
        """So many rows have seen nothing. Tensors that are there stay where they are: graphs know them by their place."""
        zeros = partial(torch.zeros, dtype=torch.int64, device=device)
        self.seen = self.seen.zero_() if self.begun else zeros(())
        self.masks, self.tokens = (zeros(batch) if x is None else x.zero_() for x in (self.masks, self.tokens))
        self.counted = 0

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.seen, self.masks, self.tokens) if isinstance(x, torch.Tensor)]

    def length(self) -> Any:
        """An int; a tensor for code that is being compiled, which would depend on it."""
        if torch.compiler.is_compiling():
            return self.seen
        if self.counted is None:
            self.counted = int(self.seen)
        return self.counted

    def advance(self) -> None:
        """The m columns of a pass have been seen."""
        m = self.m
        self.seen += m
        self.counted = None if torch.compiler.is_compiling() or self.counted is None else self.counted + m
        if self.masks is not None:
            valid = self.masks.new_ones(1, m) if self.valid is None else self.valid.to(self.masks.device)  # (N, m)
            self.masks.copy_(_hash(valid, self.masks))
        if self.ids is None or self.masks is None:
            self.tokens = None
        elif self.tokens is not None:
            self.tokens.copy_(_hash(_told(self.ids.to(self.tokens.device), valid), self.tokens))
        self.ids = self.valid = None

    def check(self, columns: torch.Tensor | None, ids: torch.Tensor | None = None) -> None:
        """LessError if this is not what was seen: a mask's columns (N, seen), None for columns without pads; and, unless it is
        None, the tokens ids (N, seen)."""
        if self.masks is None or not (seen := self.length()):
            return
        for rows in (len(x) for x in (columns, ids) if x is not None):
            if rows != len(self.masks):
                raise LessError(OTHER_ROWS.format(len(self.masks), rows))
        columns = self.masks.new_ones(1, seen) if columns is None else columns.to(self.masks.device).bool()
        if rows := _differ(columns, self.masks):
            raise LessError(OTHER_MASK.format(rows))
        if ids is None or self.tokens is None:
            return
        if rows := _differ(_told(ids.to(columns.device), columns), self.tokens):
            raise LessError(OTHER_TOKENS.format(seen, rows))

    @torch.inference_mode(False)
    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        self.masks, self.tokens = (x if x is None else x.index_select(0, rows.to(x.device)) for x in (self.masks, self.tokens))

    @classmethod
    @torch.inference_mode(False)
    def join(cls, clocks: Sequence["Clock"]) -> "Clock":
        """That of all their rows. Rows that have seen less get pads in front, which change no hash."""
        joined = cls()
        joined.seen, joined.counted = torch.stack([clock.seen for clock in clocks]).amax(), None
        joined.masks, joined.tokens = (_joined(hashes) for hashes in zip(*((clock.masks, clock.tokens) for clock in clocks)))
        return joined


def _joined(hashes):
    return None if any(x is None for x in hashes) else torch.cat(hashes)  # (N,)


def _told(ids, valid):
    """What the hash of tokens is of: ids, and 0 for pads. ids (N, m); valid (N, m) or (1, m), bool or 1 and 0."""
    return (ids + 1) * valid


def _differ(columns, hashes):
    """The rows whose columns have another hash."""
    return (_hash(columns, torch.zeros_like(hashes)) != hashes).nonzero().flatten().tolist()


def _hash(columns: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The hash (N,) of m >= 1 columns (N, m) that came after those whose hash is `before` (N,): each column is added, then all is
    multiplied (Horner's rule, modulo 2^64), so columns that come one by one give what they give together."""
    if columns.shape[1] == 1:
        return (before + columns[:, 0]) * MULTIPLIER
    powers = before.new_full((columns.shape[1],), MULTIPLIER).cumprod(0)  # (m,)
    return before * powers[-1] + (columns * powers.flip(0)).sum(1)
