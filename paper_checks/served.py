"""A conversation of 20,000 tokens with a served model, through the OpenAI client, and whether a LessCache says the same.

    less-kv serve qwen2.5-coder-1.5b --dtype float32                                # where vLLM is installed: VLLM.md
    python -m paper_checks.served --model qwen2.5-coder-1.5b                        # meanwhile, in the same environment

Each turn shows a piece of the held-out standard library and asks what it does. A request sends the whole conversation so far.
Afterwards the prompts, as tokens that the server tells, go through one LessCache with the server's setting. In float32: in 16
bits two engines round differently, and texts part where two words are almost as likely.
"""

import copy
import random
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from less_fast import LessCache, LessError
from less_fast.demo import corpus
from less_fast.loading import load_kernels, load_model

from . import script

CHUNK = 256  # tokens in a piece of a prompt: that of less_fast/vllm/asked.py, which only its own room imports


def talk(client, name: str, tokens: int, letters: int, new: int) -> list[dict]:
    """The turns until a prompt has so many tokens. client: OpenAI's; letters: of the code that a turn shows; new: tokens of an
    answer, at most."""
    texts, draw = [text for _, text in corpus.documents("test")], random.Random(0)
    messages: list[dict[str, str]] = []
    turns: list[dict] = []
    while not turns or len(turns[-1]["prompt"]) < tokens:
        shown = draw.choice([text for text in texts if len(text) > letters])[:letters]
        messages.append({"role": "user", "content": f"What does this code do? Answer in one sentence.\n\n{shown}"})
        start, more = time.perf_counter(), {"return_token_ids": True}
        said = client.chat.completions.create(
            model=name, messages=messages, temperature=0, max_tokens=new, logprobs=True, extra_body=more
        )
        answer = said.choices[0]
        messages.append({"role": "assistant", "content": answer.message.content})
        turns.append({"prompt": said.prompt_token_ids, "answer": answer.token_ids, "text": answer.message.content})
        turns[-1]["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{len(turns[-1]['prompt']):,} tokens, {turns[-1]['seconds']} s: {answer.message.content}", flush=True)
    return turns


@torch.inference_mode()
def again(model: PreTrainedModel, make: Callable[[], LessCache], turns: list[dict], chunk: int) -> list[list[int]]:
    """What a LessCache says to the prompts of the turns, each as long as the answer there. make: an empty cache.

    Prompts enter in pieces of `chunk` tokens, the whole ones through one cache while a prompt goes on from the one before.
    LessError if a prompt does not.
    """
    whole, fed, said = make(), [], []
    for turn in turns:
        if turn["prompt"][: len(fed)] != fed:
            raise LessError("a prompt does not begin as the one before: the chat template changes earlier turns")
        prompt = torch.tensor([turn["prompt"]], device=model.device)  # (1, T)
        end = (prompt.shape[1] - 1) // chunk * chunk
        for start in range(len(fed), end, chunk):
            model(prompt[:, start : start + chunk], past_key_values=whole, logits_to_keep=1)
        fed, cache, new = turn["prompt"][:end], copy.deepcopy(whole), prompt[:, end:]
        tokens: list[int] = []
        while len(tokens) < len(turn["answer"]):
            new = model(new, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)  # (1, 1)
            tokens.append(int(new))
        said.append(tokens)
    return said


def measure(chosen, write: Callable[[list], None]) -> None:
    import openai

    model, _ = load_model(chosen.model)  # float32
    kernels = load_kernels(model, "")
    if kernels is None:
        raise LessError(f"there are no kernels for {chosen.model} in the package: choose a model that has some")
    chunk = min(CHUNK, kernels.window // 2)  # as the server's setting has it
    make = partial(LessCache.for_model, model, budget=chosen.budget, chunk=chunk, context=kernels.window)
    client = openai.OpenAI(base_url=chosen.address, api_key="none", timeout=3600)
    try:
        turns = talk(client, chosen.model, chosen.tokens, chosen.letters, chosen.new)
    except openai.OpenAIError as error:
        raise LessError(f"the server at {chosen.address} does not answer as it should: {error}") from error
    rows = []
    for turn, tokens in zip(turns, again(model, make, turns, chunk)):
        same = next((index for index, pair in enumerate(zip(turn["answer"], tokens)) if len({*pair}) > 1), len(tokens))
        rows.append({"prompt": len(turn["prompt"]), "answer": len(tokens), "same": same})
        rows[-1] |= {"text": turn["text"], "seconds": turn["seconds"]}
    write(rows)
    whole = sum(row["same"] == row["answer"] for row in rows)
    print(f"{whole} of {len(rows)} answers are a LessCache's, behind prompts of up to {rows[-1]['prompt']:,} tokens")


def main(arguments: list[str] | None = None) -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="as less-kv serve was given it")
    parser.add_argument("--address", default="http://localhost:8000/v1")
    parser.add_argument("--budget", type=int, default=64, help="as less-kv serve was given it")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the last prompt, at least")
    parser.add_argument("--letters", type=int, default=8_000, help="of the code that a turn shows")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer, at most")
    parser.add_argument("--out", type=script.Path, help="results/served_MODEL.json by default")
    chosen = parser.parse_args(arguments)
    out = chosen.out or script.results_of("served", chosen.model)
    return script.run("served", lambda: measure(chosen, partial(script.write, out, vars(chosen))))


if __name__ == "__main__":
    sys.exit(main())
