"""LESS within vLLM: its attention layers hold a constant amount for each request, in pages of vLLM's own.

asked: what `--additional-config` asks for, and what is refused. models: vLLM's decoders with LESS's attention. attention: one
layer. pages: its state for many requests, with torch alone. step: what a step of the engine holds. memory: the pages among vLLM's
caches. scheduler: nothing is preempted. identity: kernels are those of the model. Nothing else in less_fast knows of this room.
"""

PREFIX = "Less"


def register() -> None:
    """The entry point of vLLM's plugins: it runs in every process of vLLM. Afterwards "LessLlamaForCausalLM", and so on for each
    decoder of vLLM, is an architecture."""
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from .asked import OPERATOR, LessConfig, PlainConfig

    if OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATOR)  # where graphs are split
    register_backend(MambaAttentionBackendEnum.CUSTOM, f"{__name__}.step.LessBackend", is_mamba=True)
    for name in list(ModelRegistry.get_supported_archs()):
        own = PREFIX + name
        if own in MODELS_CONFIG_MAP or name.startswith(PREFIX) or not name.endswith(("ForCausalLM", "LMHeadModel")):
            continue
        ModelRegistry.register_model(own, f"{__name__}.models:{own}")
        theirs = MODELS_CONFIG_MAP.get(name)
        MODELS_CONFIG_MAP[own], MODELS_CONFIG_MAP[name] = LessConfig.behind(theirs), PlainConfig.behind(theirs)
