"""What an engine of vLLM would compute wrong is refused when it starts, in a sentence. No engine is started here."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm has an environment with it")

from vllm_engines import engine_config, refusal

from less_fast import LessKernels
from less_fast.demo import KERNELS

H2O = {"policy": "h2o", "budget": 51}
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
PROCESSES = dict(distributed_executor_backend="mp")
ENGINES = [
    (dict(speculative_config=SPECULATION), "leave --speculative-config out"),
    (dict(long_prefill_token_threshold=100), "leave --long-prefill-token-threshold out"),
    (dict(kv_cache_dtype="fp8_e5m2"), "leave --kv-cache-dtype fp8_e5m2 out"),
    (dict(dtype="float16"), "add --dtype bfloat16"),
    (dict(scheduling_policy="priority"), "leave --scheduling-policy at fcfs"),
    (dict(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"), "leave --scheduler-cls out"),
    (dict(enable_lora=True), "leave --enable-lora out"),
    (dict(pipeline_parallel_size=2, **PROCESSES), "leave --pipeline-parallel-size out"),
    (dict(tensor_parallel_size=3, **PROCESSES), "4 KV heads cannot be shared out among 3"),
    (
        dict(tensor_parallel_size=2, distributed_executor_backend="mp", less={"policy": "tova", "budget": 51}),
        "tensor parallelism takes them apart",
    ),
    (dict(block_size=32), "leave --block-size out"),
    (dict(runner="pooling"), "leave --runner pooling out"),
]
SETTINGS = [
    (None, "add --additional-config"),
    ({}, "add --additional-config"),
    ({"policy": "h2o"}, "needs a budget"),
    ({"policy": "oldest", "budget": 5}, "no policy is called 'oldest'"),
    ({"policy": "h2o", "budget": 0}, "at least 1"),
    ({"policy": "h2o", "budget": "5%"}, "say it in tokens"),
    ({"policy": "h2o", "heavy": 3}, "takes all of its fields"),
    ({"policy": "h2o", "heavy": 3, "recent": 3, "budget": 6}, "leave it out, or them"),
    ({**H2O, "chnk": 64}, "no word of the setting is 'chnk'"),
    ({"budget": 64, "recent": 3, "window": 3}, "no word of the setting is 'recent'"),  # of no policy that was named
    ({**H2O, "chunk": 0}, "chunk must be an integer"),
    ({**H2O, "chunk": 15}, "pieces of 16 tokens or more"),
    ({**H2O, "chunk": None}, "pieces of 16 tokens or more"),
    ({**H2O, "context": 512, "chunk": 257}, "say a chunk of 256 at most"),
    ({**H2O, "context": "long"}, "context must be an integer"),
    ({**H2O, "context": 50}, "keep fewer"),
    ({**H2O, "budgets": [[51]]}, "4 layers x 4 KV heads"),
    ({**H2O, "kernels": "/nowhere"}, "no kernels at /nowhere"),
    ({**H2O, "kernels": 8}, "kernels are a folder"),
    ({"policy": "fastgen", "budget": 51}, "pages are of one size"),
]


@pytest.mark.parametrize(("changes", "sentence"), ENGINES, ids=[sentence for _, sentence in ENGINES])
def test_an_engine_that_would_compute_something_else_is_refused(changes, sentence):
    assert sentence in refusal(**{"less": H2O} | changes)


@pytest.mark.parametrize(("less", "sentence"), SETTINGS, ids=[sentence for _, sentence in SETTINGS])
def test_a_setting_that_is_none_is_refused(less, sentence):
    assert sentence in refusal(less=less)


def test_texts_longer_than_what_the_kernels_were_trained_on_stay_within_that_or_are_refused(tmp_path):
    kernels = LessKernels.from_pretrained(KERNELS)
    kernels.about["window"] = 512
    kernels.save_pretrained(tmp_path)
    less = {**H2O, "kernels": str(tmp_path)}
    assert refusal(less=less) is None
    for context in (None, 600):
        assert "add --max-model-len 512" in refusal(less=less | {"context": context})
        assert refusal(less=less | {"context": context}, max_model_len=512) is None


def test_texts_longer_than_the_model_knows_are_refused_without_a_context(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert 'say "context": 1024' in refusal(less=H2O, max_model_len=5000)
    assert refusal(less={**H2O, "context": 1024}, max_model_len=5000) is None


def test_what_vllm_would_do_by_itself_becomes_what_less_needs():
    config = engine_config(less={**H2O, "chunk": 64}, max_num_batched_tokens=64, enable_chunked_prefill=None)
    assert config.scheduler_config.max_num_batched_tokens == 72
    assert config.scheduler_config.enable_chunked_prefill
    assert (config.cache_config.mamba_cache_mode, config.cache_config.mamba_block_size) == ("align", 64)
    config = engine_config(less=H2O, enable_prefix_caching=False)
    assert config.cache_config.mamba_cache_mode == "none"


def test_what_can_run_is_not_refused():
    assert refusal(less=H2O) is None
    assert refusal(less=H2O, block_size=256) is None
    assert refusal(less=H2O, block_size=32, enable_prefix_caching=False) is None
    assert refusal(less={**H2O, "kernels": str(KERNELS)}) is None
    every_word = {"sinks": 4, "recent": 28, "kernels": "shipped", "budgets": "uniform", "chunk": 64, "context": 512, "int8": True}
    assert refusal(less={"policy": "lambda", **every_word}) is None


def test_less_asked_of_an_architecture_that_does_not_know_it_is_refused():
    """It would run with the full cache."""
    assert 'add --hf-overrides \'{"architectures": ["LessLlamaForCausalLM"]}\'' in refusal(hf_overrides={}, less=H2O)
