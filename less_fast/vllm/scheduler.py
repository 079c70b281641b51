"""A scheduler of vLLM's that keeps every text what it is.

- It preempts nothing: a preempted request would come back with what it has generated as part of its prompt, which is another
  computation. No more requests run than have room for the longest text, so vLLM has no reason to. What would is refused.
- A prompt enters in pieces that end at multiples of the setting's chunk, one in each step.
- States are kept for other requests that begin with the same tokens at the end of these pieces alone: what was generated entered
  token by token, and leaves another state than the same text as a prompt.
"""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ..layer.checks import LessError
from .asked import setting_of

logger = init_logger(__name__)


class _KeepsTexts:
    running: list
    max_num_running_reqs: int
    max_num_active_reqs: int

    def __init__(self, vllm_config: Any, kv_cache_config: Any, **others: Any):
        super().__init__(vllm_config=vllm_config, kv_cache_config=kv_cache_config, **others)  # type: ignore[call-arg]
        self.chunk = setting_of(vllm_config).chunk
        self.need_mamba_block_aligned_split = True  # vLLM asks `_mamba_block_aligned_split` then
        coordinator = self.kv_cache_manager.coordinator  # type: ignore[attr-defined]
        self._cache_blocks, coordinator.cache_blocks = coordinator.cache_blocks, self._cache_prompt
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        pages = sum(-(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes) for spec in specs)
        if vllm_config.scheduler_config.async_scheduling and vllm_config.cache_config.mamba_cache_mode == "align":
            pages += len(specs)  # a page is freed a step later
        room = (kv_cache_config.num_blocks - 1) // pages  # vLLM keeps one page for itself
        if room < 1:
            raise LessError(
                "there is no room for one text of the longest length: give vLLM more memory or a shorter --max-model-len"
            )
        if room < self.max_num_running_reqs:
            logger.info("LESS: %d requests run at once, as many as have room to their end; more wait", room)
            self.max_num_running_reqs = self.max_num_active_reqs = room

    def add_request(self, request: Any) -> None:
        """LessError for a session whose prompts take in what was generated before."""
        if getattr(request, "resumable", False):
            raise LessError("LESS serves no sessions whose input goes on: send the whole text as a prompt")
        super().add_request(request)  # type: ignore[misc]

    def _cache_prompt(self, request: Any, num_computed_tokens: int) -> None:
        """Only what earlier steps have computed: vLLM lets all requests wait for one that begins as what this step computes."""
        self._cache_blocks(request, min(num_computed_tokens, request.num_prompt_tokens, request.num_computed_tokens))
        for manager in self.kv_cache_manager.coordinator.single_type_managers:  # type: ignore[attr-defined]
            getattr(manager, "cached_blocks_this_step", set()).clear()

    def _mamba_block_aligned_split(self, request: Any, num_new_tokens: int, *cached: int) -> int:
        """How many of these tokens enter in the next step: of a prompt the rest of a piece, or none."""
        start = request.num_computed_tokens + sum(cached)
        end = min(start - start % self.chunk + self.chunk, request.num_prompt_tokens)
        return num_new_tokens if start >= request.num_prompt_tokens else (end - start) * (start + num_new_tokens >= end)

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        """LessError if requests that run would have to begin again."""
        if reset_running_requests and self.running:
            raise LessError(f"{len(self.running)} requests run, and would become others: wait until they are done, then reset")
        return super().reset_prefix_cache(False, *args, **kwargs)  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        raise LessError(f"request {request.request_id} would be preempted, and its text change: start with less --max-num-seqs")


class _Scheduler(_KeepsTexts, Scheduler):
    pass


class _AsyncScheduler(_KeepsTexts, AsyncScheduler):
    pass


def scheduler(vllm_config: Any, **others: Any) -> Scheduler:
    """vLLM's own otherwise, for engines that schedule a step before the last one is done or after; vLLM calls it by its name."""
    return (_AsyncScheduler if vllm_config.scheduler_config.async_scheduling else _Scheduler)(vllm_config=vllm_config, **others)
