"""LessCache for Hugging Face decoders: a cache in constant memory, made for one model, saved, loaded and watched.

Hooks on the model's decoder watch every forward pass, and refuse a model that uses its cache in another way.
"""

import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from functools import wraps
from types import MethodType

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ..files import digest, read, write
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.features import Features
from ..layer.policies import policy_of
from ..layer.state import LayerState, need_policy
from ..layer.step import compiled, extend
from ..setting import Setting
from .architecture import (
    attention_modules,
    calls_sdpa,
    check_kernels,
    check_model,
    decoder_of,
    layers_of,
    less_layers,
    signature,
    sizes,
)
from .seam import TaggingLayer, check_version, use_less_attention


class LessLayer(TaggingLayer):
    """One attention layer of a LessCache. `state` is its LayerState, allocated when the first keys come."""

    def __init__(self, policy, kernels: Features | None, chunk: int | None, compile: bool, by_sdpa: bool):
        super().__init__(by_sdpa)
        self.policy, self.kernels, self.chunk = policy, kernels, chunk
        self.is_compileable = not by_sdpa and all(rule.one_leaves for rule in (policy if isinstance(policy, list) else [policy]))
        self.compile = compile
        self.state: LayerState | None = None
        self.kinds: torch.Tensor | None = None  # (N, m), of the tokens that are about to come
        self.seen: torch.Tensor | int = 0  # columns seen, pads included: what transformers calls the sequence length

    def allocate(self, batch: int, query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        """An empty state, and the kernels where it lies."""
        if self.kernels is not None:
            self.kernels = self.kernels.on(device, torch.promote_types(dtype, torch.float32))
        self.dtype, self.device, self.is_initialized = dtype, device, True
        self.state = LayerState.allocate(self.policy, batch, query_heads, kv_heads, head_dim, self.kernels, dtype, device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)  # as an int, compiled code would depend on it
        self.stay()

    def stay(self):
        """CUDA graphs may only change what stays where it is."""
        if self.device.type == "cuda" and self.is_compileable:
            for tensor in [self.seen, *(tensor for _, tensor in self.state.tensors())]:
                torch._dynamo.mark_static_address(tensor, guard=False)

    def attend(self, query, key, value, valid, scaling, softcap, sinks):
        (N, query_heads, m, D), kv_heads = query.shape, key.shape[1]
        if self.state is None:
            self.allocate(N, query_heads, kv_heads, D, key.dtype, key.device)
        step, chunk, kinds, self.kinds, out = extend, self.chunk or m, self.kinds, None, []
        if m == 1 and self.compile:
            step = compiled(self.state, query, softcap, sinks is not None)
        for start in range(0, m, chunk):
            now = slice(start, start + chunk)
            q, k, v = (x[:, :, now] for x in (query, key, value))
            mask, kind = (None if x is None else x[:, now] for x in (valid, kinds))
            out.append(step(self.state, q, k, v, mask, scaling, kind, softcap, sinks))
        self.seen += m
        return torch.cat(out, 2) if len(out) > 1 else out[0]

    @property
    def batch_size(self) -> int:
        return self.state.n.shape[0] if self.state else -1

    def get_seq_length(self) -> torch.Tensor | int:
        return self.seen

    def reset(self):
        self.unread = self.reached = False
        if self.state is not None:
            self.seen.zero_()
            self.state.reset()

    def reorder_cache(self, beam_idx):
        if self.state is not None:
            self.state.reorder(beam_idx.to(self.state.n.device))
            self.stay()

    def crop(self, tokens_to_remove):
        raise LessError(_NO_CROP)

    def offload(self):
        raise LessError("a LessCache is not offloaded: its memory is constant; leave offloading off")

    prefetch = offload


_NO_CROP = "a LessCache cannot be cropped (assisted generation, prompt lookup): folded tokens do not return"


class LessCache(Cache):
    """A cache in constant memory for `model.generate(..., past_key_values=cache)`. Make one with `LessCache.for_model`.

    `open`: a forward pass of its model has begun and not ended.
    """

    token_kinds: torch.Tensor | None = None
    open = False

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        policy,
        kernels: LessKernels | None = None,
        budgets: Sequence[Sequence[int]] | str | None = None,
        chunk: int | None = None,
        token_kinds: torch.Tensor | None = None,
        compile: bool = False,
    ) -> "LessCache":
        """A cache for `model`, whose attention is switched to "less" (plain dense attention without this cache).

        Layers of the model with full attention are LESS's; all others keep the layer that transformers has for them.

        policy: which tokens stay, the same for every layer and KV head unless `budgets` says otherwise.
        kernels: LessKernels made for this model, or None for the bare policy (what is evicted is forgotten). Those on the
            model's device are shared by all caches; others are copied there for each cache.
        budgets: a table (layers x KV heads) of integers, how many tokens each KV head keeps; `policy` says in what way. None:
            the table that the kernels have for this kind of policy and as many tokens in all, else, or for "uniform", as many
            for every head as `policy` says.
        chunk: a prompt enters in pieces of this many tokens, each attending to what was kept before it. None: in one
            piece, with dense attention over the prompt. 1: one token at a time (streaming), as if all of it were generated.
        token_kinds: (vocabulary,) integers, the kind of each token id, for policies that ask (FastGen): `token_kinds(tokenizer)`.
            The cache then reads the input ids of every forward pass.
        compile: decoding steps run as one compiled function for each kind of layer (torch.compile; the first step of a kind
            takes some ten seconds and, on a CPU, a C++ compiler). For long generations on a CPU, or loops of one's own. On a
            GPU `generate` compiles the whole model by itself, as with any cache of fixed shape, and this may stay False.
        Raises LessError where the model, its kernels or the budgets cannot work; nothing is changed then.
        """
        check_version()
        config = check_model(model)
        need_policy(policy)
        if not isinstance(compile, bool):
            raise LessError(f"compile is True or False, not {compile!r}")
        rank, world_size = _tensor_parallel(model)
        fits_any = kernels is None and (budgets is None or isinstance(budgets, str)) and world_size == 1
        model_sizes, served = None if fits_any else sizes(model), less_layers(model)
        if isinstance(kernels, LessKernels):
            check_kernels(model, kernels)
        setting = Setting.of(model_sizes, served, policy, kernels, budgets, chunk)
        table = isinstance(token_kinds, torch.Tensor) and token_kinds.ndim == 1 and not token_kinds.is_floating_point()
        if policy.kinds and not table:
            raise LessError(f"{policy} needs token_kinds, the kind of each token id: get them with token_kinds(tokenizer)")
        if compile and not policy.one_leaves:
            raise LessError(f"steps of {policy} cannot be compiled, because their shapes change: leave compile out")
        shards = {index: setting.shard(index, rank, world_size) for index in served}
        use_less_attention(model)
        layers, by_sdpa = layers_of(model), calls_sdpa(model)
        for index, (rule, features) in shards.items():
            layers[index] = LessLayer(rule, features, chunk, compile, by_sdpa)
        cache = cls(layers=layers)
        cache.model, cache.config, cache.setting, cache.world_size = weakref.ref(model), model.config, setting, world_size
        if policy.kinds:
            unused = max(0, config.vocab_size - len(token_kinds))  # a model may have more rows than its tokenizer has tokens
            cache.token_kinds = torch.nn.functional.pad(token_kinds, (0, unused)).to(model.device)
        _watch(model)
        return cache

    def save(self, path: str | os.PathLike) -> None:
        """Writes all that the cache holds into one file: a compressed prompt, to be loaded again as often as one likes.

        The kernels are not in it. LessError where a layer of the model keeps something that cannot be saved (recurrent layers),
        heads lie on several processes, the model is gone, or a policy of one's own has fields that JSON does not hold; OSError
        where the file cannot be written, and one that was there is there still.
        """
        strange = {type(layer).__name__ for layer in self.layers} - {"LessLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
        if strange or self.world_size > 1 or self.model() is None:
            what = ", ".join(strange) or ("its heads on several processes" if self.model() is not None else "no model any more")
            raise LessError(f"this cache cannot be saved: it has {what}")
        tensors, lengths = {}, []
        for index, layer in enumerate(self.layers):
            held = layer.state.tensors() if isinstance(layer, LessLayer) and layer.state else ()
            held = dict(held) or {name: x for name in ("keys", "values") if (x := getattr(layer, name)) is not None}
            tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
            lengths.append(int(layer.get_seq_length()) if held else 0)
        policy = self.setting.policy
        written = [type(policy).__name__, asdict(policy)]
        try:
            again = policy_of(*json.loads(json.dumps(written)))
        except TypeError:
            again = None
        if again != policy:
            raise LessError(f"this cache cannot be saved: not all fields of its policy are numbers, strings or tuples: {policy}")
        about = {
            "model": _identity(self.model()),
            "policy": written,
            "budgets": self.setting.budgets or "uniform",
            "chunk": self.setting.chunk,
            "kernels": self.setting.kernels and digest(self.setting.kernels.state_dict()),
            "heads": [layer.state and (layer.state.query_heads, layer.state.kv_heads) for layer in self.less_layers],
            "lengths": lengths,
        }
        tensors |= {} if self.token_kinds is None else {"token_kinds": self.token_kinds}
        write(path, tensors, about)

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: PreTrainedModel, kernels: LessKernels | None = None, compile: bool = False
    ) -> "LessCache":
        """A cache that `save` wrote, for the same model and the same kernels; it goes on bit for bit where that one was.

        For several continuations of one prompt load it several times, or repeat its rows (`batch_repeat_interleave`).
        Raises FileNotFoundError where there is no file, and LessError, with the reason, where it is broken, is none of `save`,
        or was saved with another model or other kernels, or under a policy that is not imported.
        """
        tensors, about = read(path)
        if "model" not in about:
            raise LessError(f"{path} holds one layer's state, not a cache: load it with LayerState.load")
        check_model(model)
        theirs, mine = about["model"], _identity(model)
        pairs = zip(theirs.pop("signature"), mine.pop("signature"))
        if theirs != mine or any(abs(a - b) > 0.01 for a, b in pairs):
            raise LessError(f"{path} was saved with another model: {theirs}, and this one is {mine}, or has other weights")
        if about["kernels"] != (kernels and digest(kernels.state_dict())):
            raise LessError(f"{path} was saved {'with other' if about['kernels'] else 'without'} kernels: load it with the same")
        policy = policy_of(*about["policy"])
        if policy is None:
            raise LessError(f"{path} was saved under the policy {about['policy'][0]}, which is not there: import it first")
        given = about["budgets"], about["chunk"], tensors.get("token_kinds"), compile
        cache = cls.for_model(model, policy, kernels, *given)
        heads, modules = iter(about["heads"]), {module.layer_idx: module for module in attention_modules(model)}
        for index, (layer, length) in enumerate(zip(cache.layers, about["lengths"])):
            mine = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith(f"{index}.")}
            device = next(modules[index].parameters()).device if index in modules else model.device
            if isinstance(layer, LessLayer) and (its := next(heads)):
                (N, *_, D), dtype = mine["0.k"].shape, mine["0.k"].dtype
                layer.allocate(N, *its, D, dtype, device)
                layer.state.take_over(mine)
                layer.stay()
                layer.seen.fill_(length)
            elif mine:
                layer.lazy_initialization(mine["keys"].to(device), mine["values"].to(device))
                layer.keys, layer.values, layer.cumulative_length = mine["keys"].to(device), mine["values"].to(device), length
        return cache

    @property
    def less_layers(self) -> list[LessLayer]:
        """The layers that are LESS's; all others are transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, LessLayer)]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.open:
            raise LessError("this model is not the one that the cache was made for: make one with LessCache.for_model")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile steps: with layers of transformers' own it does not."""
        return all(isinstance(layer, LessLayer) and layer.is_compileable for layer in self.layers)

    def reset(self) -> None:
        """Forgets everything; the number of sequences stays."""
        self.open = False
        for index, layer in enumerate(DynamicCache(config=self.config).layers):
            if isinstance(self.layers[index], LessLayer):
                self.layers[index].reset()
            else:
                self.layers[index] = layer

    def batch_select_indices(self, indices) -> None:
        """Row i becomes what row indices[i] was; indices: as one indexes a tensor."""
        if self.batch_size > 0:
            self.reorder_cache(torch.arange(self.batch_size)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        return self.less_layers[0].batch_size

    def activate_past_recording(self):
        raise LessError(_NO_CROP)

    def memory(self) -> dict[str, int]:
        """Bytes held over all layers, measured from the tensors: entries, low_rank and bookkeeping of LESS's layers, and others:
        what the layers hold that are transformers' own."""
        parts = [layer.state.memory() for layer in self.less_layers if layer.state]
        held = {kind: sum(part[kind] for part in parts) for kind in ("entries", "low_rank", "bookkeeping")}
        others = [layer for layer in self.layers if not isinstance(layer, LessLayer)]
        return held | {"others": bytes_of(others)}


def _identity(model):
    config = model.config.get_text_config(decoder=True)
    kind = {"type": config.model_type, "layers": config.num_hidden_layers, "dtype": str(model.dtype)}
    return kind | {"signature": signature(model)}


def bytes_of(layers: Sequence[CacheLayerMixin]) -> int:
    """Bytes of all tensors that layers of transformers' own hold."""
    return sum(x.untyped_storage().nbytes() for layer in layers for x in _tensors_in(vars(layer).values()))


def _tensors_in(values):
    """Every tensor among some values and the dicts among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors_in(value.values())


# What every forward pass with a LessCache is watched for.


def _watch(model) -> None:
    """Lets the model's decoder tell `_before` and `_after` of every forward pass, once."""
    decoder = decoder_of(model)
    if not any(hook is _before for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(_before, with_kwargs=True)
        decoder.register_forward_hook(_after, with_kwargs=True)
    if getattr(model.config.get_text_config(decoder=True), "original_max_position_embeddings", None):
        model.prepare_inputs_for_generation = MethodType(_keeping_the_cache(type(model)), model)


def _before(decoder, args, kwargs):
    """Refuses what would run wrong, and hands the kinds of the tokens on where the cache asks."""
    cache = _cache_among(args, kwargs)
    if cache is None:
        return
    eager = not torch.compiler.is_compiling()  # the prompt is, and the model is no other after it
    if eager and (model := cache.model()) is not None and decoder_of(model) is not decoder:
        raise LessError("this model is not the one that the cache was made for: make one with LessCache.for_model")
    if cache.open:
        raise LessError("the forward pass before was broken off, so layers have seen different tokens: reset() the cache first")
    if kwargs.get("use_cache") is False:
        raise LessError("use_cache=False with a LessCache would feed every token twice: leave it out")
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise LessError("a LessCache does not support output_attentions: most of what it attends to is no longer there")
    if decoder.training:
        raise LessError("a LessCache is for inference and carries no gradients: call model.eval() first")
    ids = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids  # (N, m) or (N, m, hidden size)
    if tokens is not None and cache.batch_size not in (-1, tokens.shape[0]):
        raise LessError(
            f"this cache holds {cache.batch_size} sequences, and {tokens.shape[0]} came: make a cache for these, or repeat or "
            f"select its rows (batch_repeat_interleave, batch_select_indices); reset() keeps their number"
        )
    if cache.token_kinds is not None:
        if ids is None:
            raise LessError("the cache's policy needs the kinds of the tokens: give the model input_ids, not embeddings")
        for layer in cache.less_layers:
            layer.kinds = cache.token_kinds[ids]
    cache.open = True


def _after(decoder, args, kwargs, output):
    """Refuses a model that left the cache out."""
    cache = _cache_among(args, kwargs)
    if cache is None:
        return
    if any(layer.unread for layer in cache.less_layers):
        raise LessError(
            "the model's attention did not take its keys from the LessCache: it changes them after the cache, or its attention "
            'is no longer "less"; this model or setting is not supported'
        )
    if not all(layer.reached for layer in cache.less_layers):
        raise LessError(f"{type(decoder).__name__} did not give its keys to the cache: it is not supported")
    for layer in cache.less_layers:
        layer.reached = False
    cache.open = False


def _cache_among(args, kwargs):
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, LessCache)), None)


def _keeping_the_cache(kind):
    """The class's prepare_inputs_for_generation, refusing to drop a LessCache (Phi-3 does, where its rotation changes)."""
    own = kind.prepare_inputs_for_generation

    @wraps(own)
    def prepare(self, *args, past_key_values=None, **kwargs):
        inputs = own(self, *args, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, LessCache) and inputs.get("past_key_values") is not past_key_values:
            raise LessError(
                f"{kind.__name__} rotates keys in another way beyond {self.config.original_max_position_embeddings} tokens and "
                f"drops its cache there, and folded keys cannot be rotated again: stay below that length"
            )
        return inputs

    return prepare


# Several devices.


def _tensor_parallel(model) -> tuple[int, int]:
    """(which part of the heads is here, how many parts there are)."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return 0, 1
    mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    return mesh.get_local_rank(), mesh.size()
