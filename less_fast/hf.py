"""LessCache for Hugging Face decoders, and the "less" attention that it works through.

transformers hands the attention function no cache. So `LessLayer.update` returns the new keys as a view that points back to
the layer, and the attention function finds the layer there; keys without that pointer (training, another cache) get plain
dense attention. A model that changes its keys after the cache loses the pointer, and that is detected and refused.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .kernels import Features, LessKernels
from .state import LayerState, check_fit
from .step import compiled, extend, traceable

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
_NOT_SUPPORTED_IN_ATTENTION = ("position_bias", "softcap", "s_aux", "sliding_window", "output_attentions")


class TaggingLayer(CacheLayerMixin):
    """A cache layer whose `update` returns the new keys with a pointer to itself: the attention function calls `attend`."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.unread = False  # keys were handed out, and the attention function has not come for them

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tagged = key_states.view(key_states.shape)  # never tag the model's own tensor
        tagged.less_layer = self
        self.unread = True
        return tagged, value_states

    @abstractmethod
    def attend(self, module, query, key, value, valid, scaling) -> torch.Tensor:
        """query (N, Hq, m, D), key, value (N, Hkv, m, D), valid (N, m) bool or None -> (N, Hq, m, D)."""

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.get_seq_length()


class LessLayer(TaggingLayer):
    """One attention layer of a LessCache. `state` is its LayerState, allocated when the first keys come."""

    def __init__(self, policies: list, query_heads: int, kernels: Features | None, chunk: int | None, compile: bool):
        super().__init__()
        self.policies, self.query_heads, self.kernels, self.chunk = policies, query_heads, kernels, chunk
        self.is_compileable = all(traceable(policy) for policy in policies)
        self.compile, self.step = compile, extend
        self.state: LayerState | None = None
        self.kinds: torch.Tensor | None = None  # (N, m), of the tokens that are about to come
        self.seen: torch.Tensor | int = 0  # columns seen, pads included: what transformers calls the sequence length

    def lazy_initialization(self, key_states, value_states):
        N, kv_heads, _, head_dim = key_states.shape
        if self.kernels is not None:
            wanted = key_states.device, torch.promote_types(key_states.dtype, torch.float32)
            if any((weight.device, weight.dtype) != wanted for weight in self.kernels.state_dict().values()):
                self.kernels = copy.deepcopy(self.kernels).to(*wanted)
        shape = N, self.query_heads, kv_heads, head_dim
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.state = LayerState.allocate(self.policies, *shape, self.kernels, self.dtype, self.device)
        self.seen = torch.zeros((), dtype=torch.int64, device=self.device)  # as an int, compiled code would depend on it
        if self.compile:
            ranks = self.kernels and tuple(self.kernels.ranks)
            self.step = compiled(tuple(self.policies), *shape, type(self.kernels), ranks, self.dtype, self.device)
        if self.device.type == "cuda" and self.is_compileable:  # CUDA graphs may only change what stays where it is
            for tensor in [self.seen, *(tensor for _, tensor in self.state.tensors())]:
                torch._dynamo.mark_static_address(tensor, guard=False)

    def attend(self, module, query, key, value, valid, scaling):
        m, chunk, kinds, self.kinds = query.shape[2], self.chunk or query.shape[2], self.kinds, None
        step, out = self.step if m == 1 else extend, []
        for start in range(0, m, chunk):
            now = slice(start, start + chunk)
            q, k, v = (x[:, :, now] for x in (query, key, value))
            mask, kind = (None if x is None else x[:, now] for x in (valid, kinds))
            out.append(step(self.state, q, k, v, mask, scaling, kind))
        self.seen += m
        return torch.cat(out, 2) if len(out) > 1 else out[0]

    @property
    def batch_size(self) -> int:
        return self.state.n.shape[0] if self.state else -1

    def get_seq_length(self) -> torch.Tensor | int:
        return self.seen

    def reset(self):
        self.unread = False
        if self.state is not None:
            self.seen.zero_()
            self.state.reset()

    def reorder_cache(self, beam_idx):
        if self.state is not None:
            self.state.reorder(beam_idx.to(self.state.n.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove):
        raise ValueError("a LessCache cannot be cropped (assisted generation, prompt lookup): folded tokens do not return")

    def offload(self):
        raise ValueError("a LessCache is not offloaded: its memory is constant; leave offloading off")

    prefetch = offload


class LessCache(Cache):
    """A cache in constant memory for `model.generate(..., past_key_values=cache)`. Make one with `LessCache.for_model`."""

    token_kinds: torch.Tensor | None = None

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

        policy: which tokens stay, the same for every layer and KV head unless `budgets` says otherwise.
        kernels: LessKernels made for this model, or None for the bare policy (what is evicted is forgotten). Those on the
            model's device are shared by all caches; others are copied there for each cache.
        budgets: a table (layers x KV heads) of integers, how many tokens each KV head keeps; `policy` says in what way. None:
            the table that the kernels have for this kind of policy and as many tokens in all, else, or for "uniform", as many
            for every head as `policy` says.
        chunk: a prompt enters in pieces of this many tokens, each attending to what was kept before it. None: in one
            piece, with dense attention over the prompt. 1: one token at a time (streaming), as if all of it were generated.
        token_kinds: (vocabulary,) integers, the kind of each token id, for policies that ask (FastGen): `token_kinds(tokenizer)`.
            The cache then reads the input ids of every forward pass through a hook on the model.
        compile: decoding steps run as one compiled function for each kind of layer (torch.compile; the first step of a kind
            takes some ten seconds and, on a CPU, a C++ compiler). For long generations on a CPU, or loops of one's own. On a
            GPU `generate` compiles the whole model by itself, as with any cache of fixed shape, and this may stay False.
        Raises ValueError where the model, its kernels or the budgets cannot work; nothing is changed then.
        """
        config = check_model(model)
        layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
        if kernels is not None:
            check_kernels(model, kernels)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, not {chunk}")
        policies = [[policy] * kv_heads] * layers
        if isinstance(budgets, str) and budgets != "uniform":
            raise ValueError(f'budgets are a table, None or "uniform", not {budgets!r}')
        if budgets is None and kernels is not None:
            budgets = kernels.budgets_for(policy)
        if budgets is not None and budgets != "uniform":
            if len(budgets) != layers or any(len(row) != kv_heads for row in budgets):
                raise ValueError(f"the budget table must be {layers} layers x {kv_heads} KV heads")
            policies = [[policy.with_budget(int(budget)) for budget in row] for row in budgets]
        if policy.kinds and not (isinstance(token_kinds, torch.Tensor) and token_kinds.ndim == 1):
            raise ValueError(f"{policy} needs token_kinds, the kind of each token id: get them with token_kinds(tokenizer)")
        heads = {name: size for name, size in sizes(model).items() if name != "layers"}
        of_layers = list(zip(policies, kernels.layers if kernels else [None] * layers))
        for rule, features in of_layers:
            check_fit(rule, **heads, kernels=features)
        if compile and not traceable(policy):
            raise ValueError(f"steps of {policy} cannot be compiled, because their shapes change: leave compile out")
        use_less_attention(model)
        query_heads = config.num_attention_heads
        cache = cls(layers=[LessLayer(rules, query_heads, features, chunk, compile) for rules, features in of_layers])
        if policy.kinds:
            unused = max(0, config.vocab_size - len(token_kinds))  # a model may have more rows than its tokenizer has tokens
            cache.token_kinds = torch.nn.functional.pad(token_kinds, (0, unused)).to(model.device)
            _tell_token_kinds(model.base_model)
        return cache

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if any(layer.unread for layer in self.layers):
            raise ValueError(
                "the model's attention did not take its keys from the LessCache: it changes them after the cache, or its "
                'attention is no longer "less"; this model or setting is not supported'
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def memory(self) -> dict[str, int]:
        """Bytes held over all layers, measured from the tensors: entries, low_rank, bookkeeping."""
        parts = [layer.state.memory() for layer in self.layers if layer.state]
        return {kind: sum(part[kind] for part in parts) for kind in ("entries", "low_rank", "bookkeeping")}


def _tell_token_kinds(decoder) -> None:
    """Lets every forward pass of the decoder tell its LessCache, where that asks, of what kind the input ids are."""
    if any(hook is _token_kinds_hook for hook in decoder._forward_pre_hooks.values()):
        return
    decoder.register_forward_pre_hook(_token_kinds_hook, with_kwargs=True)


def _token_kinds_hook(decoder, args, kwargs):
    cache, ids = kwargs.get("past_key_values"), args[0] if args else kwargs.get("input_ids")
    if isinstance(cache, LessCache) and cache.token_kinds is not None:
        if ids is None:
            raise ValueError("the cache's policy needs the kinds of the tokens: give the model input_ids, not embeddings")
        for layer in cache.layers:
            layer.kinds = cache.token_kinds[ids]


class FunctionLayer(TaggingLayer):
    """Attention over one whole text by a function of q (N, Hq, T, D), k, v (N, Hkv, T, D) and the scale."""

    def __init__(self, attention: Callable):
        super().__init__()
        self.attention = attention

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def attend(self, module, query, key, value, valid, scaling):
        return self.attention(query, key, value, scaling)

    def get_seq_length(self) -> int:
        return 0


def predictions(model, ids: torch.Tensor, attentions: Sequence[Callable]) -> torch.Tensor:
    """Log-probabilities (N, T, vocabulary) of texts ids (N, T) where every layer attends by a function of its own.

    attentions: for each layer a function (q (N, Hq, T, D), k, v (N, Hkv, T, D), scale) -> (N, Hq, T, D), q and k rotated.
    """
    check_model(model)
    use_less_attention(model)
    cache = Cache(layers=[FunctionLayer(attention) for attention in attentions])
    logits = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def check_model(model):
    """The model's text config. ValueError, with the reason, for a model that LESS cannot serve."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in SUPPORTED:
        raise ValueError(f"models of type {config.model_type!r} are not supported; these are: {', '.join(SUPPORTED)}")
    sliding = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if not hasattr(config, "layer_types") and getattr(config, "sliding_window", None) is not None:
        sliding = {"sliding_attention"}
    if sliding:
        raise ValueError(
            f"this model has layers of type {', '.join(sorted(sliding))}; only full attention is supported "
            f"(a sliding window has constant memory already)"
        )
    if not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} does not let its attention be replaced, so LESS cannot serve it")
    return config


def use_less_attention(model) -> None:
    """Registers "less" with transformers, once, and switches the model to it."""
    AttentionInterface.register("less", less_attention)
    AttentionMaskInterface.register("less", less_mask)
    model.set_attn_implementation("less")
    if model.config.get_text_config(decoder=True)._attn_implementation != "less":
        raise ValueError(f"{type(model).__name__} did not accept the attention implementation 'less'")


def attention_modules(model) -> list[torch.nn.Module]:
    """The model's attention modules in the order of their layers."""
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]
    return sorted(found, key=lambda module: module.layer_idx)


def fingerprint(model) -> list[float]:
    """What tells this model from another of the same shape: for each layer, the norm of its key projection."""
    return [round(module.k_proj.weight.detach().float().norm().item(), 4) for module in attention_modules(model)]


def sizes(model) -> dict[str, int]:
    """The sizes that kernels for this model must have."""
    return sizes_of(model.config)


def sizes_of(config) -> dict[str, int]:
    """The same from a model's config."""
    config = config.get_text_config(decoder=True)
    return dict(
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


def check_kernels(model, kernels: LessKernels) -> None:
    """ValueError, with the reason, where the kernels were made for another model."""
    for name, wanted in sizes(model).items():
        if kernels.sizes[name] != wanted:
            raise ValueError(
                f"these kernels are for another model: {name} is {kernels.sizes[name]} in the kernels and {wanted} in the model"
            )
    known = kernels.about.get("fingerprint")
    if known and any(abs(a - b) > 0.01 * b for a, b in zip(known, fingerprint(model))):
        raise ValueError(
            "these kernels are for another model of the same shape (its key projections differ): train kernels for this one "
            "with `less-kv train`"
        )


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
    """The attention function: LESS for keys that come from a LessLayer, dense attention for all others."""
    layer = getattr(key, "less_layer", None)
    if layer is None:
        if _of_padding(attention_mask, query):
            attention_mask = sdpa_mask(
                *(query.shape[0], query.shape[2], key.shape[2]), attention_mask=attention_mask[:, 0, :, 0], device=query.device
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    layer.unread = False
    valid = attention_mask[:, 0, :, 0] if _of_padding(attention_mask, query) else None
    if valid is None and attention_mask is not None:
        raise ValueError("a LessCache takes a 2D attention mask (1 for tokens, 0 for pads); this model or call made another")
    refused = [name for name in _NOT_SUPPORTED_IN_ATTENTION if kwargs.get(name)]
    if refused:
        raise ValueError(f"a LessCache does not support {', '.join(refused)}")
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False with a LessCache would feed every token twice: leave it out")
    if module.training:
        raise ValueError("a LessCache is for inference and carries no gradients: call model.eval() first")
    out = layer.attend(module, query, key, value, valid, scaling)
    return out.transpose(1, 2).contiguous(), None


def _of_padding(mask, query):
    """Whether it is a mask of `less_mask`'s own, (N, 1, m, 1)."""
    return mask is not None and mask.dtype == torch.bool and mask.shape == (query.shape[0], 1, query.shape[2], 1)
