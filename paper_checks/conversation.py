"""A conversation of many turns in constant memory: what is said at its end about its beginning, beside the full cache.

    python -m paper_checks.conversation --model qwen2.5-coder-1.5b

The first turn tells a few facts. Then come questions about the functions of Python's standard library, and at the end the facts
are asked for. Answers are greedy, as `Conversation` of less_fast/chat.py gives them. LESS talks; then the full cache reads the
same conversation and is asked for the same facts.
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


@torch.inference_mode()
def talk(conversation: Conversation, turns: list[str], new: int) -> list[dict[str, int]]:
    """Tokens and bytes behind each turn."""
    behind, start = [], time.perf_counter()
    for number, turn in enumerate(turns):
        conversation.answer(turn, new, do_sample=False)
        behind.append(held(conversation))
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
    less = Conversation(model, tokenizer, LessCache.for_model(model, policy, kernels, context=context))
    behind = talk(less, [BEGINNING, *questions(chosen.turns - 1, chosen.seed)], chosen.new)
    full = Conversation(model, tokenizer, DynamicCache(config=model.config))
    full.ids, full.shown, full.messages = less.ids, less.shown, [*less.messages]
    row = {"cache": "LESS", "policy": repr(policy), "context": context, "behind": behind} | asked(less, chosen.new)
    write(rows := [row])
    rows.append({"cache": "full"} | asked(full, chosen.new))
    write(rows)
    for row in rows:
        print(f"{row['cache']}: {row['tokens']} tokens, {row['bytes']} bytes", *map(": ".join, row["said"].items()), sep="\n")


def main(arguments: list[str] | None = None) -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="smollm2", help="one that was trained to chat")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer, at most")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=script.Path, help="results/conversation_MODEL.json by default")
    chosen = parser.parse_args(arguments)
    out = chosen.out or script.results_of("conversation", chosen.model)
    return script.run("conversation", lambda: measure(chosen, partial(script.write, out, vars(chosen))))


if __name__ == "__main__":
    sys.exit(main())
