"""The states of one attention layer for many requests, each in a page of its own. Needs torch alone.

A page is one row of tensors that somebody else owns (vLLM); rows may lie any stride apart. A decoding step changes them in place:
if the rows of the requests lie side by side, in tensors without gaps, `extend` works on the very pages; otherwise it reads a copy
of them, and only what a token changes is written back, not the keys and values that stay where they are.
"""

from math import prod

import torch

from ..layer.attend import Logits
from ..layer.context import Context
from ..layer.features import Features
from ..layer.policies import Policy
from ..layer.state import LayerState
from ..layer.step import extend

ROOM = 1.25  # as much may be computed, as pads, of what is there: beyond it rows are copied, and prompts enter apart
Part = tuple[str, tuple[int, ...], torch.dtype]  # a tensor of a state: its name, the shape of one row, its dtype


class PagedLayer:
    """What one layer remembers of all requests; `bind` gives it its pages.

    rule, features: the policy, or one for each KV head, and the kernels or None. heads: query heads, KV heads and head_dim.
    movable: texts stay within `context`, which is set before the first token comes. int8, logits: as `LessCache.for_model` and
    `extend` take them.
    """

    context: Context | None = None

    def __init__(
        self,
        rule: Policy | list[Policy],
        features: Features | None,
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        logits: Logits = Logits(),
        int8: bool = False,
        movable: bool = False,
    ):
        self.rule, self.features, self.heads, self.dtype = rule, features, heads, dtype
        self.logits, self.int8, self.movable = logits, int8, movable
        tensors = [(name, tuple(x.shape[1:]), x.dtype) for name, x in self.allocate(1, "meta").tensors().items()]
        self.parts: list[Part] = [part for part in tensors if prod(part[1])]  # of a bare policy mean and z hold nothing
        self.release()

    @property
    def page_bytes(self) -> int:
        """Bytes of one request's state."""
        return sum(prod(shape) * dtype.itemsize for _, shape, dtype in self.parts)

    def allocate(self, rows: int, device: torch.device | str) -> LayerState:
        """An empty state outside the pages."""
        return LayerState.allocate(self.rule, rows, *self.heads, self.features, self.dtype, device, self.movable, self.int8)

    def release(self) -> None:
        """Holds no pages any more."""
        self.pages: dict[str, torch.Tensor] = {}
        self.spanned: tuple[tuple[int, int], LayerState] | None = None  # pages that lie side by side, as one state, and where

    def bind(self, pages: dict[str, torch.Tensor]) -> None:
        """pages: for each name in `parts` a tensor (rows, *shape). The kernels go to their device."""
        self.release()
        self.pages, device = pages, pages["n"].device
        if self.features is not None:
            self.features = self.features.on(device, torch.promote_types(self.dtype, torch.float32))
        self.template = self.allocate(1, device)
        self.side_by_side = all(page.is_contiguous() for page in pages.values())
        if self.side_by_side:  # a page between others takes part in a step before it ever held anything
            for name, page in pages.items():
                if name.endswith("free"):
                    page.zero_()

    def reset(self, rows: torch.Tensor) -> None:
        """Requests begin in these rows (int64)."""
        empty = self.template.tensors()
        for name, page in self.pages.items():
            page.index_copy_(0, rows, empty[name].expand(len(rows), *page.shape[1:]))

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """The requests of these rows go on in others (int64)."""
        for page in self.pages.values():
            page.index_copy_(0, targets, page.index_select(0, sources))

    def full(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of these rows (d,) have no room for one more token within the context: (d,) bool."""
        seen, moved = (self.pages[name].index_select(0, rows) for name in ("n", "moved"))
        return seen - moved + 1 > self.context.length

    def make_room(self, rows: torch.Tensor) -> None:
        """The rows (int64), which are full, move back."""
        state = self._read(rows)
        self.context.make_room(state, torch.ones_like(state.n))
        self._write(state, rows)

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        real: torch.Tensor | None = None,
        span: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """One token of each of d requests enters; returns what it attends to (d, Hq, D).

        q (d, Hq, D), k, v (d, Hkv, D); rows (d,) int64: no two the same, but for those of pads, and none of them full; real (d,)
        bool: False for pads, which change nothing; None if there are none. span: the first row and the one behind the last, if
        rows are sorted and lie side by side, with few between them.
        """
        q, k, v = (x[:, :, None] for x in (q, k, v))  # (d, H, 1, D)
        if span is None or not self.side_by_side:
            state = self._read(rows)
            out = self._extend(state, (q, k, v), None if real is None else real[:, None])
            self._write_step(state, rows)
            return out[:, :, 0]
        if self.spanned is None or self.spanned[0] != span:
            self.spanned = span, self._state({name: page[slice(*span)] for name, page in self.pages.items()})
        state = self.spanned[1]
        size, valid = span[1] - span[0], None
        if size > len(rows):  # the rows between are as pads, which leave no trace
            at = rows - span[0]
            valid = torch.zeros(size, 1, dtype=torch.bool, device=q.device).index_fill_(0, at, True)  # (size, 1)
            q, k, v = (x.new_zeros(size, *x.shape[1:]).index_copy_(0, at, x) for x in (q, k, v))  # (size, H, 1, D)
            return self._extend(state, (q, k, v), valid).index_select(0, at)[:, :, 0]
        return self._extend(state, (q, k, v), None)[:, :, 0]

    def prompts(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        valid: torch.Tensor | None = None,
        computed: int = 0,
    ) -> torch.Tensor:
        """A piece of m tokens of each of N prompts enters, `computed` tokens of which are there already; returns (N, Hq, m, D).

        q (N, Hq, m, D), k, v (N, Hkv, m, D); rows (N,) int64; valid (N, m) bool: False for pads behind a shorter prompt.
        """
        state = self._read(rows) if computed else self.allocate(len(rows), q.device)
        if self.context is not None and computed + q.shape[2] > self.context.length:
            new = torch.full_like(state.n, q.shape[2]) if valid is None else valid.sum(1)  # (N,)
            self.context.make_room(state, new)
        out = self._extend(state, (q, k, v), valid)
        self._write(state, rows)
        return out

    def _extend(self, state, qkv, valid):
        q, k, v = qkv
        if self.context is not None:
            q, k = self.context.place(state, q, k)
        return extend(state, q, k, v, valid, self.logits)

    def _read(self, rows):
        """A copy of the rows."""
        return self._state({name: page.index_select(0, rows) for name, page in self.pages.items()})

    def _write(self, state, rows):
        for name, tensor in state.tensors().items():
            if name in self.pages:
                self.pages[name].index_copy_(0, rows, tensor)

    def _state(self, tensors: dict[str, torch.Tensor]) -> LayerState:
        """A LayerState of these tensors themselves."""
        rows = len(tensors["n"])
        missing = {name: x for name, x in self.template.tensors().items() if name not in tensors}  # which hold nothing
        return self.template.hold(tensors | {name: x.new_empty(rows, *x.shape[1:]) for name, x in missing.items()})

    def _write_step(self, state, rows):
        """Into the pages what one token has changed: of keys and values the slots that were free before."""
        for index, slots in enumerate(part.slots for part in state.parts):
            taken = self.pages[f"{index}.free"].index_select(0, rows)  # (d, H)
            for name in ("k", "v"):
                self.pages[f"{index}.{name}"][rows[:, None], taken] = getattr(slots, name)[slots.row, taken]  # (d, H, D)
        for name, tensor in state.tensors().items():
            if name in self.pages and not name.endswith((".k", ".v")):
                self.pages[name].index_copy_(0, rows, tensor)


def span_of(rows: list[int]) -> tuple[int, int] | None:
    """The first of the sorted rows and the one behind the last, if nearly all between them are there, else None."""
    first, last = rows[0], rows[-1] + 1
    return (first, last) if last - first <= ROOM * len(rows) else None


def laid_out(parts: list[Part], pages: torch.Tensor, side_by_side: bool) -> list[torch.Tensor]:
    """Tensors (rows, *shape) for the parts, in the bytes of the pages (rows, bytes of one) uint8: each row's in its own page or,
    side by side, each tensor without gaps. Parts of larger numbers come first, so that all are aligned."""
    tensors, at, rows = [], 0, len(pages)
    for _, shape, dtype in parts:
        size = prod(shape) * dtype.itemsize
        part = pages.view(-1)[rows * at : rows * (at + size)] if side_by_side else pages[:, at : at + size]
        tensors.append(part.view(dtype).view(rows, *shape))
        at += size
    return tensors
