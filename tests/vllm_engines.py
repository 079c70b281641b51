"""Engines of vLLM with LESS, small models in folders for them, and what a LessCache says to the same prompts."""

import os

import torch
import transformers
from models import SIZES
from transformers import AutoModelForCausalLM

from less_fast import LessCache, LessError
from less_fast.demo import MODEL
from less_fast.setting import POLICIES, policy_named

ENVIRONMENT = dict(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
CHUNK = 256  # of the plugin's own
PLAIN = dict(dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8)
LESS = PLAIN | dict(distributed_executor_backend="uni")
WIDE = dict(
    hidden_size=128, head_dim=32, intermediate_size=96, max_position_embeddings=1024, tie_word_embeddings=False
)  # vLLM knows no narrower heads


def make_folder(where, config, changes):
    """A small random model of that class of config, in the folder; returns its architecture."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**SIZES | WIDE | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
    model.save_pretrained(where)
    return model.config.architectures[0]


def arguments(folder=MODEL, architecture="LlamaForCausalLM", less=None, **changes):
    """What vLLM's engine takes for LESS, with the words of its setting."""
    overrides = {"architectures": ["Less" + architecture]}
    return dict(model=str(folder), hf_overrides=overrides, additional_config={"less": less}) | LESS | changes


def engine(*args, **changes):
    os.environ |= ENVIRONMENT
    from vllm import LLM

    return LLM(**arguments(*args, **changes))


def close(llm):
    """So that another engine may start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def generate(llm, prompts, lengths):
    """For each prompt (token ids) the tokens generated, and their log-probabilities."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0) for length in lengths]
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    tokens = [list(out.outputs[0].token_ids) for out in outs]
    return [
        (said, [step[token].logprob for step, token in zip(out.outputs[0].logprobs, said)]) for said, out in zip(tokens, outs)
    ]


class Reference:
    """The same by a LessCache of transformers, each prompt alone, remembered by prompt."""

    def __init__(self, folder, less, kernels=None, dtype=torch.float32):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        others = ("policy", "kernels", "budgets", "chunk", "context", "int8")
        fields = {name: value for name, value in less.items() if name not in others}
        policy = policy_named(less["policy"], fields["budget"]) if set(fields) == {"budget"} else None
        policy = policy or type(POLICIES[less["policy"]])(**fields)
        self.asked = dict(policy=policy, kernels=kernels, budgets=less.get("budgets"), chunk=less.get("chunk", CHUNK))
        self.asked |= dict(context=less.get("context"), int8=less.get("int8", False))
        self.said = {}

    @torch.no_grad()
    def generate(self, prompt, length):
        """The tokens, their log-probabilities, and by how much each was likelier than the next best."""
        if len(self.said.get(tuple(prompt), [()])[0]) < length:
            cache, ids, steps = LessCache.for_model(self.model, **self.asked), torch.tensor([prompt]), []
            for _ in range(length):
                best = self.model(ids, past_key_values=cache).logits[0, -1].float().log_softmax(-1).topk(2)
                steps.append((int(best.indices[0]), float(best.values[0]), float(best.values[0] - best.values[1])))
                ids = best.indices[None, :1]
            self.said[tuple(prompt)] = [list(part) for part in zip(*steps)]
        return [part[:length] for part in self.said[tuple(prompt)]]


def difference(reference, prompts, answers, tie):
    """The largest difference of log-probabilities up to the first token that differs. AssertionError if one differs that is not
    nearly as likely as the best, by less than `tie`."""
    largest = 0.0
    for prompt, (said, logprobs) in zip(prompts, answers):
        tokens, expected, margin = reference.generate(prompt, len(said))
        same = next((i for i, (a, b) in enumerate(zip(said, tokens)) if a != b), len(said))
        assert same == len(said) or margin[same] < tie, (
            f"token {same} behind {len(prompt)} differs, with a margin of {margin[same]}"
        )
        largest = max([largest, *(abs(a - b) for a, b in zip(logprobs[:same], expected))])
    return largest


def engine_config(**changes):
    """How vLLM would run an engine that is asked for."""
    os.environ |= ENVIRONMENT
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**arguments(**changes)).create_engine_config()


def refusal(**changes):
    """What vLLM says when an engine is asked for."""
    try:
        engine_config(**changes)
    except (LessError, ValueError, OSError) as error:
        return str(error)
    return None
