"""What `--additional-config '{"less": {...}}'` asks for, as a Setting; the engine's defaults, made what LESS needs; and what an
engine was asked for and would compute wrong, refused when it starts."""

import dataclasses
import os
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from ..hf.architecture import sizes_of
from ..hf.shipped import folders
from ..kernels import LessKernels
from ..layer.checks import LessError, integer
from ..layer.policies import Policy
from ..setting import POLICIES, Setting, best_policy, policy_named, tokens_of
from . import PREFIX

logger = init_logger(__name__)
WORDS = {"policy", "budget", "kernels", "budgets", "chunk", "context", "int8"}
CHUNK, LEAST = 256, 16  # tokens of a prompt that enter together, unless the setting says otherwise, and the fewest
SCHEDULER, OPERATOR = f"{__package__}.scheduler.scheduler", "vllm::less_attention"
EXAMPLE = '--additional-config \'{"less": {"budget": 64}}\''


class LessConfig:
    """What vLLM asks of an architecture as soon as the engine's arguments are known, in the process that starts the engine."""

    theirs: Any = None  # what vLLM has there for the architecture without LESS

    @classmethod
    def behind(cls, theirs: Any) -> type:
        """The same, after what vLLM has there."""
        return type(cls.__name__, (cls,), {"theirs": theirs})

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """LessError for what cannot run right. Prompts come in pieces, whose ends may be cached; the scheduler becomes LESS's;
        and graphs are split at LESS's attention."""
        if cls.theirs is not None:
            cls.theirs.verify_and_update_config(vllm_config)
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # LESS knows the first one alone
        setting = setting_of(vllm_config)
        check(vllm_config, setting)
        compilation, scheduler, cache = vllm_config.compilation_config, vllm_config.scheduler_config, vllm_config.cache_config
        if compilation.splitting_ops and OPERATOR not in compilation.splitting_ops:
            compilation.splitting_ops.append(OPERATOR)
        scheduler.scheduler_cls, scheduler.enable_chunked_prefill = SCHEDULER, True
        least = setting.chunk + scheduler.max_num_seqs
        for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
            if (getattr(scheduler, name, None) or least) < least:
                logger.info("LESS: a step takes %d tokens: a piece of a prompt, and one of each other request", least)
                setattr(scheduler, name, least)
        if cache.enable_prefix_caching and len(setting.less_layers) < sizes_of(_text_config(vllm_config))["layers"]:
            logger.info("LESS: prompts that begin alike are read each for itself, as the model has other layers too")
            cache.enable_prefix_caching = False
        cache.mamba_cache_mode, cache.mamba_block_size = "none", None
        if cache.enable_prefix_caching:
            if cache.user_specified_block_size and cache.block_size != setting.chunk:
                raise LessError(
                    f"cached prefixes end where a piece of a prompt does, every {setting.chunk} tokens: leave --block-size out, "
                    f"and say another chunk in the setting"
                )
            cache.mamba_cache_mode, cache.block_size, cache.mamba_block_size = "align", setting.chunk, setting.chunk
            cache.user_specified_block_size = True
            if hasattr(cache, "prefix_cache_retention_interval"):
                cache.prefix_cache_retention_interval = None  # the state behind every piece
        kernels = "none" if setting.kernels is None else "of this model"
        logger.info("LESS: %s, kernels %s, prompts in pieces of %d tokens", setting.policy, kernels, setting.chunk)
        if setting.context is not None:
            logger.info("LESS: texts stay within %d positions, however long they are", setting.context)

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """What vLLM has for the architecture: it asks this of one as well."""
        if cls.theirs is not None:
            cls.theirs.verify_and_update_model_config(model_config)


class PlainConfig(LessConfig):
    """The same of vLLM's own architectures."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """LessError if the engine is asked for LESS, which its architecture would not know of."""
        if cls.theirs is not None:
            cls.theirs.verify_and_update_config(vllm_config)
        if "less" in (vllm_config.additional_config or {}):
            name = vllm_config.model_config.architecture
            raise LessError(f'vLLM\'s {name} has no LESS: add --hf-overrides \'{{"architectures": ["{PREFIX}{name}"]}}\'')


def setting_of(vllm_config: VllmConfig) -> Setting:
    """The Setting that the engine's arguments ask for. LessError if they ask for none, or for what LESS cannot be."""
    words = (vllm_config.additional_config or {}).get("less")
    if not isinstance(words, dict) or not {"policy", "budget"} & set(words):
        raise LessError(f"this architecture needs to know how LESS compresses: add {EXAMPLE}")
    config = _text_config(vllm_config)
    kernels = kernels_at(words.get("kernels", None if "policy" in words else "best"), config)
    policy = _policy(words) if "policy" in words else best_policy(kernels, tokens_of(words["budget"]))
    own = {field.name for field in dataclasses.fields(policy)} if "policy" in words else set()  # type: ignore[arg-type]
    others = set(words) - WORDS - own
    if others:
        raise LessError(f"no word of the setting is {sorted(others)[0]!r}: they are {', '.join(sorted(WORDS))}")
    sizes = sizes_of(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * sizes["layers"]
    served = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    window, longest = kernels and kernels.window, vllm_config.model_config.max_model_len
    context = words.get("context", window if window is not None and longest > window else None)
    if context is not None:
        integer("context", context, 2 * LEAST)
    chunk = words.get("chunk", CHUNK if context is None else min(CHUNK, context // 2))
    setting = Setting.of(sizes, served, policy, kernels, words.get("budgets"), chunk, context, words.get("int8", False))
    if setting.chunk is None or setting.chunk < LEAST:
        raise LessError(f"behind vLLM prompts come in pieces of {LEAST} tokens or more: leave chunk out of the setting")
    if context is not None and setting.chunk > context // 2:
        most = context // 2
        raise LessError(
            f"a piece of {setting.chunk} tokens finds no room in a context of {context}: say a chunk of {most} at most"
        )
    return setting


def _text_config(vllm_config: VllmConfig) -> Any:
    return vllm_config.model_config.hf_text_config


def _policy(words: dict[str, Any]) -> Policy:
    """{"policy": "h2o", "budget": 51}, or with the policy's own fields: {"policy": "lambda", "sinks": 4, "recent": 47}."""
    name = words["policy"]
    if name not in POLICIES:
        raise LessError(f"no policy is called {name!r}: choose one of {', '.join(POLICIES)}")
    own = {field.name for field in dataclasses.fields(POLICIES[name])} & set(words)  # type: ignore[arg-type]
    if own - {"budget"}:
        if "budget" in words and "budget" not in own:
            raise LessError(f"the budget of {name} follows from its fields ({', '.join(sorted(own))}): leave it out, or them")
        try:
            return type(POLICIES[name])(**{field: words[field] for field in own})
        except TypeError as error:
            raise LessError(f"the policy {name} takes all of its fields, or a budget alone: {error}") from error
    if "budget" not in words:
        raise LessError(f"the policy {name} needs a budget, how many tokens each KV head keeps: add it, as in {EXAMPLE}")
    return policy_named(name, words["budget"])


_LOADED: dict[Any, LessKernels] = {}


def kernels_at(where: Any, config: Any) -> LessKernels | None:
    """The kernels in a folder or a repository of the hub, or for "shipped" those of the package that have the model's sizes, for
    "best" if there are any.
    Whether they are this model's own is asked when it has its weights: see identity.py."""
    if where is None or where == "none":
        return None
    if not isinstance(where, str):
        raise LessError(f'kernels are a folder, a name on the hub, or "shipped", not {where!r}')
    if where not in ("shipped", "best"):
        return _load(where)
    if fitting := folders(sizes_of(config)):
        return _load(str(fitting[0]))
    if where == "best":
        return None
    raise LessError("no kernels for this model come with the package: train some with `less-kv train --model FOLDER`")


def _load(where: str) -> LessKernels:
    if where not in _LOADED:
        _LOADED[where] = LessKernels.from_pretrained(where)
    return _LOADED[where]


def check(vllm_config: VllmConfig, setting: Setting) -> None:
    """LessError, in one sentence that says what to do, for engines that would compute something else than a LessCache."""
    scheduler, cache, parallel = vllm_config.scheduler_config, vllm_config.cache_config, vllm_config.parallel_config
    model, policy = vllm_config.model_config, setting.policy
    dtype = str(model.dtype).removeprefix("torch.")

    def refuse(wrong: object, sentence: str) -> None:
        if wrong:
            raise LessError(sentence)

    refuse(
        policy.needs == "kinds" or not policy.one_leaves,
        f"vLLM's pages are of one size, and {policy} has none: choose another policy, h2o for example",
    )
    refuse(
        dtype not in ("float32", "bfloat16"),
        f"LESS on vLLM is for float32 and bfloat16, not for {dtype}: add --dtype bfloat16",
    )
    window = setting.kernels and setting.kernels.window
    refuse(
        window is not None and min(model.max_model_len, setting.context or model.max_model_len) > window,
        f"the kernels were trained on texts of {window} tokens and break in longer ones: add --max-model-len {window}, or leave "
        f'context out of the setting, or say "kernels": "none", for the bare policy',
    )
    known = getattr(model.hf_text_config, "max_position_embeddings", None)
    refuse(
        known is not None and min(model.max_model_len, setting.context or model.max_model_len) > known,
        f'the model was trained for {known} positions: say "context": {known} in the setting, or a shorter --max-model-len',
    )
    refuse(
        vllm_config.speculative_config is not None,
        "speculation takes tokens back, and what LESS has folded does not return: leave --speculative-config out",
    )
    refuse(
        scheduler.long_prefill_token_threshold,
        "long prompts come in pieces of the setting's chunk: leave --long-prefill-token-threshold out",
    )
    refuse(
        scheduler.policy != "fcfs",
        "requests with priority preempt others, whose text would change: leave --scheduling-policy at fcfs",
    )
    refuse(
        scheduler.scheduler_cls not in (None, SCHEDULER),
        "LESS brings a scheduler that preempts nothing: leave --scheduler-cls out",
    )
    refuse(
        cache.cache_dtype not in ("auto", dtype),
        f'keys and values are held in the model\'s dtype, or with "int8": true in the setting: leave --kv-cache-dtype '
        f"{cache.cache_dtype} out",
    )
    refuse(
        vllm_config.lora_config is not None,
        "adapters change what kernels and states were made for, request by request: leave --enable-lora out",
    )
    refuse(
        vllm_config.kv_transfer_config is not None,
        "a state is no list of tokens that could be transferred: leave --kv-transfer-config out",
    )
    others = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
    for name in others:
        refuse(
            getattr(parallel, name, 1) > 1,
            f"LESS shares out heads alone: leave --{name.replace('_', '-')} out, and use --tensor-parallel-size",
        )
    refuse(
        getattr(parallel, "enable_dbo", False),
        "LESS takes all requests of a step together: leave --enable-dbo out",
    )
    refuse(
        model.runner_type != "generate",
        f"LESS is for generating text: leave --runner {model.runner_type} out",
    )
    refuse(
        vllm_config.use_v2_model_runner,
        "LESS knows vLLM's first model runner alone: leave VLLM_USE_V2_MODEL_RUNNER out",
    )
    for rank in range(parallel.tensor_parallel_size):
        for index in setting.less_layers:
            setting.shard(index, rank, parallel.tensor_parallel_size)
