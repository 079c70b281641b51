"""LessCache for Hugging Face decoders: a cache in constant memory, made for one model."""

import copy
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..kernels import LessKernels
from ..layer.checks import LessError, integer
from ..layer.context import Context
from ..layer.policies import Policy
from ..layer.state import need_policy
from ..setting import Setting, best_policy, need_less_kernels
from .architecture import calls_sdpa, check_model, device_of, less_layers, sizes, tensor_parallel
from .clock import Clock
from .identity import check_kernels
from .layer import NO_CROP, LessLayer
from .positions import rotaries
from .saving import load, save
from .seam import check_version, layers_with, use_less_attention
from .shipped import kernels_for
from .watch import BROKEN_OFF, WatchedCache, keepers_of_positions, watch


class LessCache(WatchedCache):
    """A cache in constant memory for `model.generate(..., past_key_values=cache)`. Make one with `LessCache.for_model`.

    `copy.deepcopy` gives a second cache that goes on from the same state by itself; both share the model and the kernels.
    """

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        policy: Policy | None = None,
        kernels: LessKernels | None = None,
        budgets: Sequence[Sequence[int]] | str | None = None,
        chunk: int | None = None,
        token_kinds: torch.Tensor | None = None,
        compile: bool = False,
        context: int | None = None,
        int8: bool = False,
        budget: int | None = None,
    ) -> "LessCache":
        """A cache for `model`, whose attention is switched to "less" (plain dense attention without this cache).

        Layers of the model with full attention are LESS's; all others keep the layer that transformers has for them.

        budget: how many tokens each KV head keeps on average. Alone it is enough: `LessCache.for_model(model, budget=64)` is the
            best there is, by the kernels that come with this package for this very model: Retention if they have rho, and their
            budgets by head. Without kernels it is SnapKV. `cache.setting` tells what it is.
        policy: which tokens stay, the same for every layer and KV head unless `budgets` says otherwise. None: see budget.
        kernels: LessKernels made for this model. None: with a policy the bare policy (what is evicted is forgotten), without one
            see budget. All caches share them, and the copies that another device, dtype or a budget table asks for.
        budgets: a table (layers x KV heads) of integers, how many tokens each KV head keeps; `policy` says in what way. None:
            the table that the kernels have for this policy and as many tokens in all, else, or for "uniform", as many
            for every head as `policy` says.
        chunk: a prompt enters in pieces of this many tokens, each attending to what was kept before it. None: in one
            piece, with dense attention over the prompt. 1: one token at a time (streaming), as if all of it were generated.
        token_kinds: (vocabulary,) integers, the kind of each token id, for policies that ask (FastGen): `token_kinds(tokenizer)`.
            The cache then reads the input ids of every forward pass.
        compile: steps of single tokens, decoding or by chunk=1, run as one compiled function for each kind of layer
            (torch.compile; the first step of a kind takes some ten seconds and, on a CPU, a C++ compiler). For long texts on a
            CPU, or loops of one's own. On a GPU `generate` compiles the whole model by itself, as with any cache of fixed shape,
            and streams are graphs, so this may stay False.
        context: for streams without end over a model with rotary positions: how many positions it and the kernels were trained
            for (config.max_position_embeddings, kernels.window). Up to there nothing changes. Where a token would stand beyond,
            what is held moves back by half of them, what moved the whole way stays at position 0, and the low-rank state begins
            anew; pieces of a text that come then are no longer than that half. The model turns keys by their true positions in
            float32: a logit errs by some 0.02 after a million tokens and by 0.4 after ten, so reset() the cache before that.
            None: positions grow with the text, and a warning says where it becomes longer than the windows of the kernels.
        int8: keys and values are rounded to eight bits when they enter, with a scale for each, so that a slot takes about half of
            the bytes that it takes in bfloat16, and a budget can be twice as large. head_dim must be a multiple of 4.
        Raises LessError if the model, its kernels or the budgets cannot work; nothing is changed then.
        """
        check_version()
        config = check_model(model)
        given = kernels
        if policy is None:
            kernels = kernels_for(model) if kernels is None else kernels
            policy = best_policy(need_less_kernels(kernels), integer("budget, how many tokens each KV head keeps,", budget))
        elif budget is not None:
            policy = need_policy(policy).with_budget(budget)
        need_policy(policy)
        if not isinstance(compile, bool):
            raise LessError(f"compile is True or False, not {compile!r}")
        rank, world_size = tensor_parallel(model)
        fits_any = kernels is None and (budgets is None or isinstance(budgets, str)) and world_size == 1
        model_sizes, served = None if fits_any else sizes(model), less_layers(model)
        if isinstance(given, LessKernels):
            check_kernels(model, given)
        setting = Setting.of(model_sizes, served, policy, kernels, budgets, chunk, context, int8)
        table = isinstance(token_kinds, torch.Tensor) and token_kinds.ndim == 1 and not token_kinds.is_floating_point()
        if policy.needs == "kinds" and not table:
            raise LessError(f"{policy} needs token_kinds, the kind of each token id: get them with token_kinds(tokenizer)")
        if compile and not policy.one_leaves:
            raise LessError(f"steps of {policy} cannot be compiled, because their shapes change: leave compile out")
        shards = {index: setting.shard(index, rank, world_size) for index in served}
        contexts = [None] * len(served) if context is None else [Context(context, rotary) for rotary in rotaries(model)]
        clock = Clock()
        together: list[LessLayer] = []
        use_less_attention(model)
        layers = {
            index: LessLayer(*shard, chunk, compile, calls_sdpa(model), clock, together, within, int8)
            for (index, shard), within in zip(shards.items(), contexts)
        }
        cache = cls(layers=layers_with(model, layers))
        cache.model, cache.config, cache.setting, cache.world_size = weakref.ref(model), model.config, setting, world_size
        cache.clock = clock
        cache.keepers = keepers_of_positions(model)
        known = None if kernels is None or kernels.sizes["family"] == "none" else kernels.window
        if known is not None and (context is None or context > known):
            cache.trained = known
        if policy.needs == "kinds" and token_kinds is not None:
            unused = max(0, config.vocab_size - len(token_kinds))  # a model may have more rows than its tokenizer has tokens
            with torch.inference_mode(False):
                cache.token_kinds = torch.nn.functional.pad(token_kinds, (0, unused)).to(device_of(model))
        watch(model)
        return cache

    def save(self, path: str | os.PathLike) -> None:
        """Writes all that the cache holds into one file: a compressed prompt, to be loaded again as often as one likes.

        The kernels are not in it. What tells the model is what it computes now: its adapters must be those with which the cache
        was fed. LessError if a layer of the model keeps something that cannot be saved (recurrent layers), the
        model keeps positions outside the cache (an image in Qwen2-VL), heads lie on several processes, the model is gone, or a
        policy of one's own has fields that JSON does not hold; OSError if the file cannot be written, and one that was there is
        there still.
        """
        save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: PreTrainedModel, kernels: LessKernels | None = None, compile: bool = False
    ) -> "LessCache":
        """A cache that `save` wrote, for the same model and the same kernels; it goes on bit for bit where that one was.

        kernels: those that it was saved with; None for none, or for those that come with the package for this model.

        For several continuations of one prompt load it several times, copy it (`copy.deepcopy`), or repeat its rows
        (`batch_repeat_interleave`).
        Raises FileNotFoundError if there is no file, and LessError, with the reason, if it is broken, is none of `save`, or was
        saved with another model or other kernels, or under a policy that is not imported.
        """
        return load(cls.for_model, path, model, kernels, compile)

    @classmethod
    def join(cls, caches: Sequence["LessCache"]) -> "LessCache":
        """A cache with the rows of all these, in their order; they stay as they are. Each row goes on as it would alone.

        So rows come and go in a loop of one's own (continuous batching); token is (N, 1), the next one of each row:

            cache = LessCache.join([cache, cache_of_a_new_prompt])
            logits = model(token, position_ids=cache.lengths[:, None], past_key_values=cache).logits  # (N, 1, vocabulary)
            cache.batch_select_indices([0, 2])  # row 1 has ended

        Rows that have seen less get pads in front: an attention mask, which `generate` and several tokens at once need, begins
        with a 0 for each column that another row has more. Compiled steps are compiled once for each number of rows.
        Raises LessError if the caches were not made alike, for one model, with the same policy, kernels and budgets; if one has
        seen nothing; or if the model has layers that are not LESS's, or keeps positions outside the cache.
        """
        if not isinstance(caches, list | tuple) or not caches or not all(isinstance(cache, cls) for cache in caches):
            raise LessError(f"caches are joined from a list of one or more LessCaches, not from {caches!r}")
        first = caches[0]
        for cache in caches:
            if cache.model() is not first.model() or cache.setting != first.setting or not _same_kinds(cache, first):
                raise LessError("only caches of one model, made with the same policy, kernels and budgets, can be joined")
            if cache.open:
                raise LessError(BROKEN_OFF)
            if cache.batch_size < 0:
                raise LessError("a cache that has seen nothing cannot be joined: feed it its prompt first")
            if len(cache.less_layers) < len(cache.layers) or any(any(row) for row in cache.positions or ()):
                raise LessError(
                    "caches of this model cannot be joined, because it has layers that are not LESS's or keeps positions outside "
                    "the cache: feed these texts as one padded batch"
                )
        joined = cls(layers=[])
        joined.__dict__.update(first.__dict__)
        joined.clock = Clock.join([cache.clock for cache in caches])
        joined.layers = [LessLayer.join(layers, joined.clock) for layers in zip(*(cache.less_layers for cache in caches))]
        if first.keepers:
            joined.positions = [row for cache in caches for row in cache.positions or ()]
        return joined

    @property
    def lengths(self) -> torch.Tensor:
        """(N,) int64: how many tokens each row has seen, pads left out, which is the position of its next one."""
        state = self.less_layers[0].state
        return torch.zeros(0, dtype=torch.int64, device="cpu") if state is None else state.n.clone()  # (N,)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile steps: it does not with layers of transformers' own, nor with a RoPE that stretches."""
        fixed = all(isinstance(layer, LessLayer) and layer.is_compileable for layer in self.layers)
        return fixed and "max_seq_len_cached" not in self.keepers.values()

    def reset(self) -> None:
        """Forgets everything; the number of sequences stays."""
        self.open, self.positions = False, None
        if self.clock.begun:
            self.clock.begin(self.batch_size, self.clock.seen.device)
        for index, layer in enumerate(DynamicCache(config=self.config).layers):
            if isinstance(self.layers[index], LessLayer):
                self.layers[index].reset()
            else:
                self.layers[index] = layer

    def reorder_cache(self, beam_idx) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.clock.begun:
            self.clock.reorder(beam_idx)
        super().reorder_cache(beam_idx)
        self._leave_inference_mode()
        if self.positions is not None:
            self.positions = [self.positions[row] for row in beam_idx.tolist()]

    def batch_select_indices(self, indices) -> None:
        """Row i becomes what row indices[i] was; indices: as one indexes a tensor."""
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size, device="cpu")[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0), device="cpu").repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise LessError(NO_CROP)  # before any layer is

    activate_past_recording = crop

    def memory(self) -> dict[str, int]:
        """Bytes held over all layers, measured from the tensors: entries, low_rank and bookkeeping of LESS's layers, and others:
        what the layers hold that are transformers' own."""
        parts = [layer.state.memory() for layer in self.less_layers if layer.state]
        held = {kind: sum(part[kind] for part in parts) for kind in ("entries", "low_rank", "bookkeeping")}
        others = [layer for layer in self.layers if not isinstance(layer, LessLayer)]
        return held | {"others": bytes_of(others)}

    def __reduce_ex__(self, protocol):
        raise TypeError("a LessCache is not pickled, because it belongs to a model: save(path) it, and LessCache.load it there")

    def __deepcopy__(self, memo: dict) -> "LessCache":
        twin = type(self)(layers=[])
        shared = [self.config, self.setting, *(layer.kernels for layer in self.less_layers)]
        states = [layer.state for layer in self.less_layers if layer.state]
        shared += [one for state in states for part in state.parts for one in (part.kernels, part.slots.layout)]
        memo |= {id(part): part for part in shared} | {id(self): twin}
        with torch.inference_mode(False):
            for layer in self.layers:  # what a pass with gradients left in layers of transformers' own has a graph behind it
                memo |= {id(tensor): tensor.detach().clone() for tensor in _tensors_in(vars(layer).values())}
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for layer in twin.less_layers:
            if layer.state is not None:
                layer.pin_addresses()
        return twin


def _same_kinds(one: LessCache, other: LessCache) -> bool:
    a, b = one.token_kinds, other.token_kinds
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def bytes_of(layers: Sequence) -> int:
    """Bytes of all tensors that layers of transformers' own hold."""
    return sum(x.untyped_storage().nbytes() for layer in layers for x in _tensors_in(vars(layer).values()))


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Every tensor among these values and the dicts among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors_in(value.values())
