"""A conversation of many turns in constant memory: what is said at its end about its beginning, beside the full cache.

    python -m paper_checks.conversation --model qwen2.5-coder-1.5b

The first turn tells a few facts. Then come questions about the functions of Python's standard library, answered as `less-kv chat`
answers them, and at the end the facts are asked for. LESS talks. Then the full cache reads the same conversation, once all of it
and once the last turns alone, and is asked for the same facts. What is said of the facts is greedy.
"""

import random
import sys
import time
from functools import partial

import torch
from transformers.cache_utils import DynamicCache

from less_fast import LessCache
from less_fast.chat import Conversation
from less_fast.demo import corpus
from less_fast.hf.positions import trained_length
from less_fast.loading import AUTO, load_kernels, load_model
from less_fast.measuring.caches import held_bytes
from less_fast.setting import best_policy

from . import script
from .texts import tasks

BEGINNING = (
    "My name is Ada. My project is called Heron, it is written in Python, and it must never print a warning. Remember that."
)
ASKED = ("What is my name?", "What is my project called?", "What must my project never do?")
SHOWN = 10  # turns between two lines that are printed
PIECE = 1024  # tokens that the full cache reads at once, so that reading takes little memory


def questions(count: int, seed: int) -> list[str]:
    """About functions of the held-out standard library."""
    code, draw, found = [text for _, text in corpus.documents("test")], random.Random(seed), []
    while len(found) < count:
        found += draw.sample(some, 1) if (some := [*tasks(draw.choice(code))]) else []
    return [question[:400] for question in found]


def held(conversation: Conversation) -> dict[str, int]:
    """Its tokens, and the bytes that its cache holds."""
    return {"tokens": conversation.ids.shape[1], "bytes": held_bytes(conversation.cache)}


def last_turns(conversation: Conversation, tokens: int) -> list[dict[str, str]]:
    """As many of its last turns as the template writes in so many tokens."""
    turns, tokenizer = conversation.messages, conversation.tokenizer
    while turns and len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]) > tokens:
        turns = turns[2:]
    return turns


@torch.inference_mode()
def talk(conversation: Conversation, turns: list[str], new: int, temperature: float) -> list[dict[str, int]]:
    """Behind each turn the tokens and bytes, and how many characters its answer has."""
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    behind, start = [], time.perf_counter()
    for number, turn in enumerate(turns):
        answer = conversation.answer(turn, new, **how)
        behind.append(held(conversation) | {"answered": len(answer)})
        if number % SHOWN == 0:
            print(f"turn {number + 1}: {behind[-1]}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return behind


@torch.inference_mode()
def asked(conversation: Conversation, new: int) -> dict:
    """What is said about the beginning, and what is held then."""
    start = time.perf_counter()
    said = {}
    for question in ASKED:
        piece = {} if conversation.cache.get_seq_length() else {"prefill_chunk_size": PIECE}  # some versions begin anew with it
        said[question] = conversation.answer(question, new, do_sample=False, **piece)
    return {"said": said, "seconds": round(time.perf_counter() - start, 1)} | held(conversation)


def measure(chosen, write) -> None:
    """write: what is known so far, after each cache was asked."""
    model, tokenizer = load_model(chosen.model, dtype=AUTO)
    kernels = load_kernels(model, "")
    policy, context = best_policy(kernels, chosen.budget), trained_length(model, kernels)
    less, last, full = (
        Conversation(model, tokenizer, cache)
        for cache in (
            LessCache.for_model(model, policy, kernels, context=context),
            DynamicCache(config=model.config),
            DynamicCache(config=model.config),
        )
    )
    torch.manual_seed(chosen.seed)
    behind = talk(less, [BEGINNING, *questions(chosen.turns - 1, chosen.seed)], chosen.new, chosen.temperature)
    last.messages = last_turns(less, context * 3 // 4)  # the rest of the context is for what is asked
    full.ids, full.shown, full.messages = less.ids, less.shown, [*less.messages]
    rows = [{"cache": "LESS", "policy": repr(policy), "context": context, "behind": behind} | asked(less, chosen.new)]
    write(rows)
    for name, one in (("full, the last turns alone", last), ("full", full)):
        rows.append({"cache": name} | asked(one, chosen.new))
        write(rows)
    for row in rows:
        print(f"{row['cache']}: {row['tokens']} tokens, {row['bytes']} bytes", *map(": ".join, row["said"].items()), sep="\n")


def main(arguments: list[str] | None = None) -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="one that was trained to chat")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer, at most")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=script.Path, help="results/conversation_MODEL.json by default")
    chosen = parser.parse_args(arguments)
    out = chosen.out or script.results_of("conversation", chosen.model)
    return script.run("conversation", lambda: measure(chosen, partial(script.write, out, vars(chosen))))


if __name__ == "__main__":
    sys.exit(main())
