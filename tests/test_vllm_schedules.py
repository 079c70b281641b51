"""Whatever requests come, whenever they come, go or are aborted: each gets the text and log-probabilities of its own LessCache,
also those that begin as others did. One engine serves all of it, with kernels and budgets by head, within a context or without.
"""

import itertools
import os
import random

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm has an environment with it")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import make_kernels, make_model
from vllm_engines import Reference, close, difference, engine, generate

from less_fast.hf.identity import identity
from less_fast.kernels import LessKernels

SCHEDULES = int(os.environ.get("VLLM_SCHEDULES", "20"))
BUDGETS = [[8, 30], [19, 19], [25, 13]]
LESS = {"policy": "h2o", "budget": 19, "budgets": BUDGETS}
ENGINES = {
    "as it is": ({"chunk": 24}, dict(max_num_batched_tokens=40)),
    "within a context": ({"chunk": 24, "context": 64}, dict(max_num_batched_tokens=64)),
    "with little room": ({"chunk": 24}, dict(num_gpu_blocks_override=6)),  # for two requests
    "no prefixes, within a context": ({"chunk": 17, "context": 41}, dict(enable_prefix_caching=False)),
}
SAME = 2e-5  # float32: five times the largest difference of log-probabilities of 300 schedules; margins of ties as well
ALONE = [random.Random(seed).choices(range(1, 97), k=1 + seed * seed % 90) for seed in range(30)]
ALIKE = [ALONE[8][:24] + prompt for prompt in ALONE[9:14]] + [ALONE[11] + prompt for prompt in ALONE[14:19]]
PROMPTS = ALONE + ALIKE  # around multiples of the chunk, and beyond the contexts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and kernels for it."""
    model, where = make_model("llama", max_position_embeddings=512, head_dim=32).float(), tmp_path_factory.mktemp("vllm")
    model.save_pretrained(where / "model")
    kernels = make_kernels(model.double(), family="exponential").float()
    kernels.about = {"identity": identity(model.float())}
    kernels.save_pretrained(where / "kernels")
    return where / "model", where / "kernels"


@pytest.fixture(scope="module", params=ENGINES)
def both(folders, request):
    """An engine, and what it must say."""
    more, changes = ENGINES[request.param]
    kernels, less = LessKernels.from_pretrained(folders[1]), LESS | more | {"kernels": str(folders[1])}
    changes |= dict(max_model_len=512, max_num_seqs=6, skip_tokenizer_init=True, disable_log_stats=False)
    llm = engine(folders[0], less=less, **changes)
    yield llm, Reference(folders[0], LESS | more, kernels)
    close(llm)


@pytest.fixture(scope="module")
def llm(both):
    return both[0]


@pytest.fixture(scope="module")
def reference(both):
    return both[1]


def test_prompts_of_all_lengths_get_the_text_of_a_less_cache(llm, reference):
    answers = generate(llm, PROMPTS, [5 + 7 * i % 30 for i in range(len(PROMPTS))])
    assert difference(reference, PROMPTS, answers, SAME) < SAME


def hits(llm):
    """Tokens of prompts that were not computed again, by vLLM's own count."""
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")


def test_a_prompt_goes_on_from_one_that_began_alike_but_never_from_what_was_generated(both):
    llm, reference = both
    prompt, chunk = random.Random(99).choices(range(1, 97), k=60), reference.asked["chunk"]
    said, _ = generate(llm, [prompt], [70])[0]
    longer = [prompt[:30] + [7] * 50, prompt + said + [5]]
    assert difference(reference, [prompt], generate(llm, [prompt], [70]), SAME) < SAME
    before = hits(llm)
    for text in longer:
        assert difference(reference, [text], generate(llm, [text], [30]), SAME) < SAME
    cache, most = llm.llm_engine.vllm_config.cache_config, (30 // chunk + 60 // chunk) * chunk
    least = most * (cache.enable_prefix_caching and cache.num_gpu_blocks > 6)  # few pages give way to what is computed
    assert least <= hits(llm) - before <= most


def test_the_kernels_matter(folders, reference):
    bare = Reference(folders[0], LESS)
    assert bare.generate(PROMPTS[9], 30)[0] != reference.generate(PROMPTS[9], 30)[0]


REQUESTS = st.tuples(st.integers(0, 12), st.sampled_from(PROMPTS), st.integers(1, 30), st.none() | st.integers(1, 25))
"""The step at which it arrives, its prompt, how many tokens it wants, and after how many steps its client goes away."""
numbers = itertools.count()


@settings(max_examples=SCHEDULES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(REQUESTS, min_size=1, max_size=10))
def test_any_schedule_gives_each_request_the_text_of_its_own_less_cache(llm, reference, schedule):
    from vllm import SamplingParams

    core, step, asked, done = llm.llm_engine, 0, {}, {}
    waiting = sorted(enumerate(schedule), key=lambda item: item[1][0])
    try:
        while waiting or core.has_unfinished_requests():
            while waiting and waiting[0][1][0] <= step:
                _, (_, prompt, length, patience) = waiting.pop(0)
                name = str(next(numbers))
                params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0)
                core.add_request(name, {"prompt_token_ids": prompt}, params)
                asked[name] = prompt, None if patience is None else step + patience
            for out in core.step():
                done[out.request_id] = out
            step += 1
            core.abort_request([name for name, (_, until) in asked.items() if until == step and not _finished(done, name)])
    finally:
        core.abort_request([name for name in asked if not _finished(done, name)])
    prompts, answers = [], []
    for name, (prompt, until) in asked.items():
        assert until is not None or _finished(done, name)
        if name in done:
            out = done[name].outputs[0]
            said = list(out.token_ids)
            prompts.append(prompt)
            answers.append((said, [chances[token].logprob for chances, token in zip(out.logprobs, said)]))
    assert difference(reference, prompts, answers, SAME) < SAME


def _finished(done, name):
    return name in done and done[name].finished


def test_nothing_is_preempted(llm):
    """A request that runs would begin again with what it has said as part of its prompt."""
    from vllm import SamplingParams

    core, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    core.add_request("running", {"prompt_token_ids": PROMPTS[5]}, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    core.step()
    with pytest.raises(ValueError, match="would become others"):
        scheduler.reset_prefix_cache(reset_running_requests=True)
    with pytest.raises(ValueError, match="would be preempted"):
        scheduler._preempt_request(scheduler.running[0], 0.0)
    core.abort_request(["running"])


def test_a_step_of_single_tokens_reads_buffers_that_stay(llm):
    """As CUDA graphs want them."""
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    builder = runner.attn_groups[0][0].get_metadata_builder()
    before = builder.rows.data_ptr(), builder.real.data_ptr()
    generate(llm, PROMPTS[:4], [4] * 4)
    assert (builder.rows.data_ptr(), builder.real.data_ptr()) == before
    assert torch.unique(builder.rows).numel() > 1
