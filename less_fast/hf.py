"""LessCache for Hugging Face decoders, and the "less" attention that it works through.

transformers hands the attention function no cache. So `LessLayer.update` returns the new keys as a view that points back to
the layer, and the attention function finds the layer there; keys without that pointer (training, another cache) get plain
dense attention. A model that calls scaled_dot_product_attention by itself meets the pointer there. Hooks on the model's
decoder watch every forward pass, and refuse a model that uses its cache in another way.
"""

import copy
import json
import os
import sys
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import wraps
from types import MethodType

import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

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
from .kernels import Features, LessKernels
from .policies import Policy
from .state import LayerState, check_fit, need_kernels, need_policy, need_whole
from .step import compiled, extend, traceable
from .store import digest, read, write

OLDEST, NEWEST = "5.5.0", "5.23.0"  # of transformers, tested (.ci/versions)


class TaggingLayer(CacheLayerMixin):
    """A cache layer whose `update` returns the new keys with a pointer to itself: the attention function calls `attend`.

    `unread`: keys were handed out, and the attention function has not come for them. `reached`: keys came in this forward pass.
    """

    is_sliding = False

    def __init__(self, by_sdpa: bool = False):
        super().__init__()
        self.by_sdpa = by_sdpa  # the model calls scaled_dot_product_attention itself
        self.unread = self.reached = False

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        tagged = key_states.as_subclass(_Keys) if self.by_sdpa else key_states.view(key_states.shape)  # never the model's own
        tagged.less_layer = self
        self.unread = self.reached = True
        return tagged, value_states

    def read(self, query, key, value, valid, scaling, softcap=None, sinks=None) -> torch.Tensor:
        """What the attention function calls, once for the keys of one update."""
        if not self.unread:
            raise ValueError("this model attends twice to the keys that it gave its cache once, and a LessCache counts once")
        if value.shape != key.shape:
            raise ValueError(
                f"this model's values, {tuple(value.shape)}, have another shape than its keys, {tuple(key.shape)} (multi-head "
                f"latent attention has): LESS serves keys and values of one head_dim"
            )
        self.unread = False
        return self.attend(query, key, value, valid, scaling, softcap, sinks)

    @abstractmethod
    def attend(self, query, key, value, valid, scaling, softcap, sinks) -> torch.Tensor:
        """query (N, Hq, m, D), key, value (N, Hkv, m, D), valid (N, m) bool or None -> (N, Hq, m, D)."""

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.get_seq_length()


class LessLayer(TaggingLayer):
    """One attention layer of a LessCache. `state` is its LayerState, allocated when the first keys come."""

    def __init__(self, policy, kernels: Features | None, chunk: int | None, compile: bool, by_sdpa: bool):
        super().__init__(by_sdpa)
        self.policy, self.kernels, self.chunk = policy, kernels, chunk
        self.is_compileable = not by_sdpa and all(map(traceable, policy if isinstance(policy, list) else [policy]))
        self.compile = compile
        self.state: LayerState | None = None
        self.kinds: torch.Tensor | None = None  # (N, m), of the tokens that are about to come
        self.seen: torch.Tensor | int = 0  # columns seen, pads included: what transformers calls the sequence length

    def allocate(self, batch: int, query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        """An empty state, and the kernels where it lies."""
        if self.kernels is not None:
            wanted = device, torch.promote_types(dtype, torch.float32)
            if any((weight.device, weight.dtype) != wanted for weight in self.kernels.state_dict().values()):
                self.kernels = copy.deepcopy(self.kernels).to(*wanted)
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
            rules = tuple(self.policy) if isinstance(self.policy, list) else self.policy
            features = type(self.kernels), self.kernels and tuple(self.kernels.ranks)
            step = compiled(rules, query.shape, key.shape, *features, key.dtype, key.device, softcap, sinks is None)
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
        raise ValueError(_NO_CROP)

    def offload(self):
        raise ValueError("a LessCache is not offloaded: its memory is constant; leave offloading off")

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
        Raises ValueError where the model, its kernels or the budgets cannot work; nothing is changed then.
        """
        _check_version()
        config = check_model(model)
        need_policy(policy)
        need_kernels(kernels, LessKernels)
        if chunk is not None:
            need_whole("chunk", chunk)
        if not isinstance(compile, bool):
            raise ValueError(f"compile is True or False, not {compile!r}")
        layers, (place, places) = config.num_hidden_layers, _tensor_parallel(model)
        if kernels is not None:
            check_kernels(model, kernels)
        if not (budgets is None or isinstance(budgets, list | tuple) or (isinstance(budgets, str) and budgets == "uniform")):
            raise ValueError(f'budgets are a table, None or "uniform", not {budgets!r}')
        if budgets is None and kernels is not None:
            budgets = kernels.budgets_for(policy)
        policies, features = [policy] * layers, kernels.layers if kernels else [None] * layers
        uniform = budgets is None or budgets == "uniform"
        if kernels or places > 1 or not uniform:
            heads = sizes(model)
            kv_heads = heads["kv_heads"]
            del heads["layers"]
        if not uniform:
            rows = [list(row) if isinstance(row, list | tuple) else [] for row in budgets]
            if [len(row) for row in rows] != [kv_heads] * layers:
                raise ValueError(f"the budget table must be {layers} layers x {kv_heads} KV heads")
            budgets = rows
            policies = [[policy.with_budget(budget) for budget in row] for row in budgets]
        table = isinstance(token_kinds, torch.Tensor) and token_kinds.ndim == 1 and not token_kinds.is_floating_point()
        if policy.kinds and not table:
            raise ValueError(f"{policy} needs token_kinds, the kind of each token id: get them with token_kinds(tokenizer)")
        if kernels or not uniform:
            for rule, some in zip(policies, features):
                check_fit(rule, **heads, kernels=some)
        if compile and not traceable(policy):
            raise ValueError(f"steps of {policy} cannot be compiled, because their shapes change: leave compile out")
        if places > 1:
            policies, features = _of_place(policies, features, kv_heads, place, places)
        use_less_attention(model)
        own, by_sdpa = layers_of(model), calls_sdpa(model)
        for index in less_layers(model):
            own[index] = LessLayer(policies[index], features[index], chunk, compile, by_sdpa)
        cache = cls(layers=own)
        cache.model, cache.config = weakref.ref(model), model.config
        if policy.kinds:
            unused = max(0, config.vocab_size - len(token_kinds))  # a model may have more rows than its tokenizer has tokens
            cache.token_kinds = torch.nn.functional.pad(token_kinds, (0, unused)).to(model.device)
        cache.kernels, cache.made = kernels, {"policy": policy, "budgets": budgets or "uniform", "chunk": chunk, "places": places}
        _watch(model)
        return cache

    def save(self, path: str | os.PathLike) -> None:
        """Writes all that the cache holds into one file: a compressed prompt, to be loaded again as often as one likes.

        The kernels are not in it. ValueError where a layer of the model keeps something that cannot be saved (recurrent layers),
        heads lie on several processes, the model is gone, or a policy of one's own has fields that JSON does not hold; OSError
        where the file cannot be written, and one that was there is there still.
        """
        strange = {type(layer).__name__ for layer in self.layers} - {"LessLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
        if strange or self.made["places"] > 1 or self.model() is None:
            what = ", ".join(strange) or ("its heads on several processes" if self.model() is not None else "no model any more")
            raise ValueError(f"this cache cannot be saved: it has {what}")
        tensors, lengths = {}, []
        for index, layer in enumerate(self.layers):
            held = layer.state.tensors() if isinstance(layer, LessLayer) and layer.state else ()
            held = dict(held) or {name: x for name in ("keys", "values") if (x := getattr(layer, name)) is not None}
            tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
            lengths.append(int(layer.get_seq_length()) if held else 0)
        policy = self.made["policy"]
        written = [type(policy).__name__, asdict(policy)]
        try:
            again = _policy(json.loads(json.dumps(written)))
        except TypeError:
            again = None
        if again != policy:
            raise ValueError(f"this cache cannot be saved: not all fields of its policy are numbers, strings or tuples: {policy}")
        about = {
            "model": _identity(self.model()),
            "policy": written,
            "budgets": self.made["budgets"],
            "chunk": self.made["chunk"],
            "kernels": self.kernels and digest(self.kernels.state_dict()),
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
        Raises FileNotFoundError where there is no file, and ValueError, with the reason, where it is broken, is none of `save`,
        or was saved with another model or other kernels, or under a policy that is not imported.
        """
        tensors, about = read(path)
        if "model" not in about:
            raise ValueError(f"{path} holds one layer's state, not a cache: load it with LayerState.load")
        check_model(model)
        need_kernels(kernels, LessKernels)
        theirs, mine = about["model"], _identity(model)
        pairs = zip(theirs.pop("signature"), mine.pop("signature"))
        if theirs != mine or any(abs(a - b) > 0.01 for a, b in pairs):
            raise ValueError(f"{path} was saved with another model: {theirs}, and this one is {mine}, or has other weights")
        if about["kernels"] != (kernels and digest(kernels.state_dict())):
            raise ValueError(f"{path} was saved {'with other' if about['kernels'] else 'without'} kernels: load it with the same")
        policy = _policy(about["policy"])
        if policy is None:
            raise ValueError(f"{path} was saved under the policy {about['policy'][0]}, which is not there: import it first")
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
            raise ValueError("this model is not the one that the cache was made for: make one with LessCache.for_model")
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
        raise ValueError(_NO_CROP)

    def memory(self) -> dict[str, int]:
        """Bytes held over all layers, measured from the tensors: entries, low_rank and bookkeeping of LESS's layers, and others:
        what the layers hold that are transformers' own."""
        parts = [layer.state.memory() for layer in self.less_layers if layer.state]
        held = {kind: sum(part[kind] for part in parts) for kind in ("entries", "low_rank", "bookkeeping")}
        others = [layer for layer in self.layers if not isinstance(layer, LessLayer)]
        return held | {"others": sum(x.untyped_storage().nbytes() for layer in others for x in tensors_in(vars(layer).values()))}


def _identity(model):
    config = model.config.get_text_config(decoder=True)
    kind = {"type": config.model_type, "layers": config.num_hidden_layers, "dtype": str(model.dtype)}
    return kind | {"signature": signature(model)}


def _policy(written) -> Policy | None:
    """The policy of a name and fields, as JSON gives them back; None where no such class is known."""
    name, fields = written
    kind = {kind.__name__: kind for kind in _subclasses(Policy)}.get(name)
    return kind and kind(**{field: tuple(x) if isinstance(x, list) else x for field, x in fields.items()})


def _subclasses(kind):
    for some in kind.__subclasses__():
        yield some
        yield from _subclasses(some)


def tensors_in(values):
    """Every tensor among some values and the dicts among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


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
        raise ValueError("this model is not the one that the cache was made for: make one with LessCache.for_model")
    if cache.open:
        raise ValueError("the forward pass before was broken off, so layers have seen different tokens: reset() the cache first")
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False with a LessCache would feed every token twice: leave it out")
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise ValueError("a LessCache does not support output_attentions: most of what it attends to is no longer there")
    if decoder.training:
        raise ValueError("a LessCache is for inference and carries no gradients: call model.eval() first")
    ids = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids  # (N, m) or (N, m, hidden size)
    if tokens is not None and cache.batch_size not in (-1, tokens.shape[0]):
        raise ValueError(
            f"this cache holds {cache.batch_size} sequences, and {tokens.shape[0]} came: make a cache for these, or repeat or "
            f"select its rows (batch_repeat_interleave, batch_select_indices); reset() keeps their number"
        )
    if cache.token_kinds is not None:
        if ids is None:
            raise ValueError("the cache's policy needs the kinds of the tokens: give the model input_ids, not embeddings")
        for layer in cache.less_layers:
            layer.kinds = cache.token_kinds[ids]
    cache.open = True


def _after(decoder, args, kwargs, output):
    """Refuses a model that left the cache out."""
    cache = _cache_among(args, kwargs)
    if cache is None:
        return
    if any(layer.unread for layer in cache.less_layers):
        raise ValueError(
            "the model's attention did not take its keys from the LessCache: it changes them after the cache, or its attention "
            'is no longer "less"; this model or setting is not supported'
        )
    if not all(layer.reached for layer in cache.less_layers):
        raise ValueError(f"{type(decoder).__name__} did not give its keys to the cache: it is not supported")
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
            raise ValueError(
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


def _of_place(policies, features, kv_heads, place, places):
    """The policies and kernels of the heads that are here."""
    if kv_heads % places:
        raise ValueError(f"{kv_heads} KV heads cannot be shared out among {places} processes")
    if any(rule.pooled for rule in policies if not isinstance(rule, list)):
        raise ValueError(f"{policies[0]} pools over all heads of a layer, and tensor parallelism takes them apart")
    heads = list(range(kv_heads))[place * kv_heads // places : (place + 1) * kv_heads // places]
    mine = [[rule[head] for head in heads] if isinstance(rule, list) else rule for rule in policies]
    return mine, [some and some.of_heads(heads) for some in features]


# Attention, with the cache and without.


class FunctionLayer(TaggingLayer):
    """Attention over one whole text by a function of q (N, Hq, T, D), k, v (N, Hkv, T, D) and the scale."""

    def __init__(self, attention: Callable, by_sdpa: bool):
        super().__init__(by_sdpa)
        self.attention = attention

    def attend(self, query, key, value, valid, scaling, softcap, sinks):
        if softcap is not None or sinks is not None:
            raise ValueError("kernels and budget tables are made for plain softmax attention, not yet with a softcap or sinks")
        return self.attention(query, key, value, scaling)

    def get_seq_length(self) -> int:
        return 0


def predictions(model, ids: torch.Tensor, attentions: Sequence[Callable]) -> torch.Tensor:
    """Log-probabilities (N, T, vocabulary) of texts ids (N, T) where every layer attends by a function of its own.

    attentions: for each layer a function (q (N, Hq, T, D), k, v (N, Hkv, T, D), scale) -> (N, Hq, T, D), q and k rotated.
    Raises ValueError for a model that has other layers than those with full attention.
    """
    check_model(model)
    by_sdpa = calls_sdpa(model)
    if len(less_layers(model)) < len(attentions):
        raise ValueError(
            f"kernels and budget tables are made for models whose layers all have full attention, and {type(model).__name__} "
            f"has others: use it with the bare policy"
        )
    use_less_attention(model)
    cache = Cache(layers=[FunctionLayer(attention, by_sdpa) for attention in attentions])
    logits = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def use_less_attention(model) -> None:
    """Registers "less" with transformers, once, and switches the model to it, unless it calls torch's attention itself."""
    AttentionInterface.register("less", less_attention)
    AttentionMaskInterface.register("less", less_mask)
    if calls_sdpa(model):
        return
    model.set_attn_implementation("less")
    if model.config.get_text_config(decoder=True)._attn_implementation != "less":
        raise ValueError(f"{type(model).__name__} did not accept the attention implementation 'less'")


def _check_version():
    """ImportError for a transformers that is too old; a warning for one that is newer than all that were tested."""
    found = Version(transformers.__version__)
    if found < Version(OLDEST):
        raise ImportError(f"LessCache needs transformers {OLDEST} or newer, and this is {found}: pip install -U transformers")
    if found.release[:2] > Version(NEWEST).release[:2]:
        warnings.warn(f"LessCache was tested with transformers up to {NEWEST}, and {found} is newer", stacklevel=3)


def less_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function, attention_mask=None, **kwargs
):
    """The padding alone (N, 1, q_length, 1) where the mask is causal over just the new tokens, else transformers' own 4D mask.

    A LessLayer asks for a mask over the new tokens only: what it holds has no pads. Masks with four dimensions pass through a
    model unchanged, so one that was made before a compiled forward pass arrives.
    """
    if mask_function is not causal_mask_function or kv_length != q_length:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
        )
    if attention_mask is None and q_length > 1:
        return None
    if attention_mask is None:  # compiled decoding steps shall see a mask with and without padding
        return torch.ones(batch_size, 1, 1, 1, dtype=torch.bool, device=kwargs["device"])
    if attention_mask.shape[-1] < int(kv_offset) + kv_length:
        raise ValueError(
            f"the attention mask covers {attention_mask.shape[-1]} tokens, but {int(kv_offset)} were seen before these "
            f"{kv_length}: pass a mask over all of them"
        )
    return attention_mask[:, None, int(kv_offset) : int(kv_offset) + kv_length, None].bool().contiguous()


def less_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function: LESS for keys that come from a LessLayer, the model's own dense attention for all others."""
    layer = getattr(key, "less_layer", None)
    if layer is None:
        return _dense(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    refused = [name for name in ("position_bias", "sliding_window") if kwargs.get(name) is not None]
    if refused or kwargs.get("is_causal") is False:
        raise ValueError(f"a LessCache does not support {', '.join(refused) or 'attention that is not causal'}")
    valid = _valid(attention_mask, query)
    out = layer.read(query, key, value, valid, scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
    return out.transpose(1, 2).contiguous(), None


def _dense(module, query, key, value, mask, scaling, dropout, **kwargs):
    """As without LESS: by scaled_dot_product_attention or, with a softcap or sinks, by the model's own eager function."""
    if _of_padding(mask, query):
        sizes = query.shape[0], query.shape[2], key.shape[2]
        mask = sdpa_mask(*sizes, attention_mask=mask[:, 0, :, 0], device=query.device)
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    if mask is None:
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _valid(mask, query):
    """(N, m) bool or None: which of the new tokens are no pads, from the mask that `less_mask` or transformers' own made."""
    if mask is None:
        return None
    if _of_padding(mask, query):
        return mask[:, 0, :, 0]
    raise ValueError(_WRONG_MASK)


_WRONG_MASK = "a LessCache takes a 2D attention mask (1 for tokens, 0 for pads); this model or call made another"


def _of_padding(mask, query):
    """Whether it is a mask of `less_mask`'s own, (N, 1, m, 1)."""
    return mask is not None and mask.dtype == torch.bool and mask.shape == (query.shape[0], 1, query.shape[2], 1)


class _Keys(torch.Tensor):
    """Keys that point to their LessLayer, for a model that calls scaled_dot_product_attention by itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _sdpa(*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """In the place of scaled_dot_product_attention; of a causal mask (N, 1, m, m) the diagonal tells tokens from pads."""
    m, valid = query.shape[2], None
    if attn_mask is None and m > 1 and not is_causal:
        raise ValueError("a LessCache does not support attention that is not causal")
    if attn_mask is not None:
        fits = attn_mask.dtype == torch.bool and attn_mask.shape == (query.shape[0], 1, m, m)
        valid = attn_mask[:, 0].diagonal(dim1=1, dim2=2) if fits else None  # (N, m)
        causal = fits and valid[:, None] & torch.ones(m, m, dtype=torch.bool, device=query.device).tril()  # (N, m, m)
        if not fits or not torch.equal(attn_mask[:, 0][valid], causal[valid]):
            raise ValueError(_WRONG_MASK)
    return key.less_layer.read(query, key.as_subclass(torch.Tensor), value, valid, scale)
