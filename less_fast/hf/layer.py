"""LessLayer: one layer of a LessCache, a LayerState that transformers sees as a layer of its own cache."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..layer.checks import LessError
from ..layer.context import Context
from ..layer.features import Features
from ..layer.policies import Policy
from ..layer.state import LayerState
from ..layer.step import compiled, extend
from ..layer.stream import stream
from .clock import Clock
from .seam import TaggingLayer

NO_CROP = (
    "a LessCache cannot be cropped (assisted generation, prompt lookup), because folded tokens do not return: leave out the "
    "assistant, or save the cache before what you may want to take back"
)


class LessLayer(TaggingLayer):
    """One attention layer of a LessCache. `state` is its LayerState, allocated when the first keys come; `clock` the cache's.

    together: the cache's layers that have no state yet, the same list in all of them. The first keys of one allocate them all:
    made one by one between what a prompt computes, small lasting tensors tear up memory that large passing ones need (at
    SmolLM2's size 1 GB, by head). guessed: the state is as large as another layer's keys ask, and its own have not come.
    """

    def __init__(
        self,
        policy: Policy | list[Policy],
        kernels: Features | None,
        chunk: int | None,
        compile: bool,
        by_sdpa: bool,
        clock: Clock,
        together: list["LessLayer"],
        context: Context | None = None,
        int8: bool = False,
    ):
        super().__init__(by_sdpa)
        self.together, self.guessed = together, False
        together.append(self)
        self.policy, self.kernels, self.chunk, self.context, self.int8 = policy, kernels, chunk, context, int8
        fixed = all(rule.one_leaves for rule in (policy if isinstance(policy, list) else [policy]))
        self.is_compileable = fixed and not by_sdpa and context is None
        self.compile = compile
        self.state: LayerState | None = None
        self.kinds: torch.Tensor | None = None  # (N, m), of the tokens that are about to come
        self.clock = clock

    def allocate(
        self, batch: int, query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """An empty state, and the kernels on its device."""
        if self.kernels is not None:
            self.kernels = self.kernels.on(device, torch.promote_types(dtype, torch.float32))
        self.dtype, self.device, self.is_initialized, self.guessed = dtype, device, True, False
        sizes, movable = (batch, query_heads, kv_heads, head_dim), self.context is not None
        self.state = LayerState.allocate(self.policy, *sizes, self.kernels, dtype, device, movable, self.int8)
        if not self.clock.begun:
            self.clock.begin(batch, device)
        self.pin_addresses()

    def _find_room(self, *sizes) -> None:
        """A state for the first keys; sizes as `allocate` takes them."""
        for layer in self.together:
            if layer.state is None:
                layer.allocate(*sizes)
                layer.guessed = True
        self.together.clear()
        state = self.state
        if sizes != (len(state.n), state.query_heads, state.kv_heads, state.head_dim, self.dtype, self.device):
            self.allocate(*sizes)  # not like the first
        self.guessed = False

    def pin_addresses(self) -> None:
        """CUDA graphs may only change what stays at its address."""
        if self.state is not None and self.device.type == "cuda" and self.is_compileable:
            for tensor in (*self.clock.tensors(), *self.state.tensors().values()):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def attend(self, query, key, value, valid, logits):
        (N, query_heads, m, D), kv_heads = query.shape, key.shape[1]
        if self.state is None or self.guessed:
            self._find_room(N, query_heads, kv_heads, D, key.dtype, key.device)
        step, kinds, self.kinds = extend, self.kinds, None
        if self.chunk == 1 and (m > 1 or self.compile):  # compiled, one token is laid out as those of longer pieces
            step = partial(stream, compile=self.compile)
        elif m == 1 and self.compile:
            step = compiled(self.state, query, logits)
        context = self.context
        if context is not None and self.get_seq_length() + m <= context.length:
            context = None  # nothing has moved, and nothing will
        if context is None and (m == 1 or self.chunk is None):
            out = step(self.state, query, key, value, valid, logits, kinds)  # (N, Hq, m, D)
        else:
            outs = []
            for now in self._pieces(m, valid, context):
                q, k, v = (x[:, :, now] for x in (query, key, value))
                if context is not None:
                    q, k = context.place(self.state, q, k)
                mask, kind = (None if x is None else x[:, now] for x in (valid, kinds))
                outs.append(step(self.state, q, k, v, mask, logits, kind))
            out = torch.cat(outs, 2)
        self.clock.m, self.clock.valid = m, valid
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(x.requires_grad for x in (query, key, value)):
            return _WithoutGradients.apply(out, query, key, value)
        return out

    def _pieces(self, m: int, valid: torch.Tensor | None, context: Context | None) -> Iterator[slice]:
        """The columns of m new tokens that enter together, one piece after the other. With a context each finds room; streams go
        on piece by piece as they would in one."""
        streaming = self.chunk == 1
        chunk = m if streaming else self.chunk or m
        if context is None:
            yield from (slice(start, start + chunk) for start in range(0, m, chunk))
            return
        chunk = 1 if streaming else min(chunk, context.length // 2)
        start = 0
        while start < m:
            end = min(m, start + chunk)
            new = torch.full_like(self.state.n, end - start) if valid is None else valid[:, start:end].sum(1)  # (N,)
            room = context.make_room(self.state, new)
            end = min(m, start + max(room, 1)) if streaming else end
            yield slice(start, end)
            start = end

    @property
    def batch_size(self) -> int:
        return self.state.n.shape[0] if self.state else -1

    def get_seq_length(self) -> Any:
        return self.clock.length()

    def get_mask_sizes(self, query_length):
        if self.state is None:
            return query_length, 0
        seen = self.clock.seen.view(())  # with a pointer, as the keys have: `less_mask` asks whether the mask fits the past
        seen.less_clock = self.clock
        return query_length, seen

    def reset(self) -> None:
        self.unread = self.reached = False
        if self.state is not None:
            self.state.reset()
            self.pin_addresses()

    def reorder_cache(self, beam_idx):
        if self.state is not None:
            self.state.reorder(beam_idx.to(self.device))
            self.pin_addresses()

    @classmethod
    def join(cls, layers: Sequence["LessLayer"], clock: Clock) -> "LessLayer":
        """A layer with the rows of all these, of a cache with that clock."""
        joined = copy.copy(layers[0])
        joined.unread = joined.reached = False
        joined.clock, joined.state = clock, LayerState.join([layer.state for layer in layers])
        joined.pin_addresses()
        return joined

    def crop(self, tokens_to_remove):
        raise LessError(NO_CROP)

    def offload(self, *args, **kwargs):
        raise LessError("a LessCache is not offloaded: its memory is constant; leave offloading off")

    prefetch = offload


class _WithoutGradients(torch.autograd.Function):
    """What a LessCache hands out looks as if it carried gradients; who asks for them is told that it does not."""

    @staticmethod
    def forward(ctx, out, *qkv):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *gradients):
        raise LessError(
            "a LessCache carries no gradients: train without it (leave past_key_values out), or compute what needs none under "
            "torch.no_grad()"
        )
