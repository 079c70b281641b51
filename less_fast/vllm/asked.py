"""What `--additional-config '{"less": {...}}'` asks for, as a Setting; and what an engine would compute wrong, refused when it
starts."""

import dataclasses
from typing import Any

from vllm.config import VllmConfig

from ..hf.architecture import sizes_of
from ..hf.shipped import folders
from ..kernels import LessKernels
from ..layer.checks import LessError
from ..layer.policies import Policy
from ..setting import POLICIES, Setting, best_policy, policy_named, tokens_of
from . import PREFIX

WORDS = {"policy", "budget", "kernels", "budgets", "chunk", "int8"}
SCHEDULER = f"{__package__}.scheduler.scheduler"
EXAMPLE = '--additional-config \'{"less": {"budget": 64}}\''


class LessConfig:
    """What vLLM asks of an architecture as soon as the engine's arguments are known, in the process that starts the engine."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """LessError for what cannot run right. The scheduler becomes one that preempts nothing, and graphs are split at LESS's
        attention."""
        setting = setting_of(vllm_config)
        check(vllm_config, setting)
        compilation, vllm_config.scheduler_config.scheduler_cls = vllm_config.compilation_config, SCHEDULER
        if compilation.splitting_ops is None:
            compilation.splitting_ops = [*compilation._attention_ops, "vllm::less_attention"]

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """Nothing: vLLM asks this of an architecture as well."""


class PlainConfig(LessConfig):
    """The same of vLLM's own architectures."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """LessError if the engine is asked for LESS, which its architecture would not know of."""
        if "less" in (vllm_config.additional_config or {}):
            name = vllm_config.model_config.architecture
            raise LessError(f'vLLM\'s {name} has no LESS: add --hf-overrides \'{{"architectures": ["{PREFIX}{name}"]}}\'')


def setting_of(vllm_config: VllmConfig) -> Setting:
    """The Setting that the engine's arguments ask for. LessError if they ask for none, or for what LESS cannot be."""
    words = (vllm_config.additional_config or {}).get("less")
    if not isinstance(words, dict) or not {"policy", "budget"} & set(words):
        raise LessError(f"this architecture needs to know how LESS compresses: add {EXAMPLE}")
    config = vllm_config.model_config.hf_text_config
    kernels = kernels_at(words.get("kernels", None if "policy" in words else "best"), config)
    policy = _policy(words) if "policy" in words else best_policy(kernels, tokens_of(words["budget"]))
    own = {field.name for field in dataclasses.fields(policy)} if "policy" in words else set()  # type: ignore[arg-type]
    others = set(words) - WORDS - own
    if others:
        raise LessError(f"no word of the setting is {sorted(others)[0]!r}: they are {', '.join(sorted(WORDS))}")
    sizes = sizes_of(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * sizes["layers"]
    served = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if kernels is not None and len(served) < sizes["layers"]:
        raise LessError('behind vLLM kernels do not serve mixed models yet: say "kernels": "none", for the bare policy')
    int8 = words.get("int8", False)
    return Setting.of(sizes, served, policy, kernels, words.get("budgets"), words.get("chunk"), int8=int8)


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
        window is not None and model.max_model_len > window,
        f"the kernels were trained on texts of {window} tokens and break in longer ones, which come up to "
        f'{model.max_model_len}: add --max-model-len {window}, or say "kernels": "none", for the bare policy',
    )
    refuse(
        vllm_config.speculative_config is not None,
        "speculation takes tokens back, and what LESS has folded does not return: leave --speculative-config out",
    )
    refuse(
        scheduler.enable_chunked_prefill and setting.chunk is None,
        "vLLM would cut prompts anywhere, and LESS defines what a cut computes: add --no-enable-chunked-prefill, "
        'or "chunk" to the setting',
    )
    refuse(
        scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < (setting.chunk or 0) + scheduler.max_num_seqs,
        f"a step has no room for {setting.chunk} tokens of a prompt beside {scheduler.max_num_seqs} others: add "
        f"--max-num-batched-tokens {(setting.chunk or 0) + scheduler.max_num_seqs}",
    )
    refuse(
        cache.enable_prefix_caching,
        "cached texts would be cut anywhere, and go on from what was generated as from a prompt: add --no-enable-prefix-caching",
    )
    refuse(
        getattr(scheduler, "long_prefill_token_threshold", 0),
        "long prompts would be cut, and LESS defines what a cut computes: leave --long-prefill-token-threshold out",
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
        "LESS knows vLLM's first model runner alone: set VLLM_USE_V2_MODEL_RUNNER=0",
    )
    for rank in range(parallel.tensor_parallel_size):
        for index in setting.less_layers:
            setting.shard(index, rank, parallel.tensor_parallel_size)
