"""How fast LESS is on a GPU, at the shape of Llama 2 (random weights, bfloat16, 4,096 tokens, 5 % kept):

    python -m paper_checks.gpu --out FILE            # some ten minutes; each part is written when it is done

- A step of 1 and of 8 sequences: full caches and LESS, eager and compiled, as `generate` compiles, with CUDA graphs.
- The same in eight bits, eager.
- A prompt.
- Tokens per second of each cache alone, at the largest batch that fits (the paper's table 6).
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from less_fast import H2O, LessKernels, Retention
from less_fast.hf.architecture import sizes
from less_fast.loading import load_shape
from less_fast.measuring.bench import Contenders, Row, alone, decode, maker, prefill

from . import script

CACHES = ("DynamicCache", "StaticCache")


def contenders_for(model: PreTrainedModel, length: int, **options) -> Contenders:
    """H2O and Retention with kernels of random weights."""
    kernels = LessKernels(**sizes(model), family="exponential", hidden=32, rho=32)
    kernels = kernels.to(model.device).requires_grad_(False)
    policies = (H2O(1, 1).with_budget(length // 20), Retention(32, 4).with_budget(length // 20))
    return {f"LESS, {type(policy).__name__}": maker(model, policy, kernels, **options) for policy in policies}


def largest(model: PreTrainedModel, contenders: Contenders, length: int, rounds: int, most: int) -> list[Row]:
    """Each cache alone, at the largest batch of 1, 2, 4, ... that fits, and that is at most so large."""
    best = {}
    for name in [*CACHES, *contenders]:
        batch = 1
        while batch <= most:
            try:
                best[name] = alone(model, contenders, name, batch, length, rounds)
            except torch.OutOfMemoryError:
                break
            finally:
                torch.cuda.empty_cache()
            batch *= 2
    return [*best.values()]


def measure(chosen: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = load_shape(chosen.model, chosen.device, "bfloat16")
    exact, eight = (contenders_for(model, chosen.length, int8=int8) for int8 in (False, True))
    parts = {
        f"step, {batch}": partial(decode, model, exact, batch, chosen.length, chosen.rounds, compile=chosen.compile)
        for batch in (1, 8)
    }
    parts["step, eight bits"] = partial(decode, model, eight, 8, chosen.length, chosen.rounds, compile=False)
    parts["prompt"] = partial(prefill, model, exact, 1, chosen.length, chosen.rounds)
    parts["largest batch"] = partial(largest, model, exact, chosen.length, chosen.rounds, chosen.most)
    rows: list[dict] = []
    about = {name: str(value) for name, value in vars(chosen).items()} | {"hardware": script.hardware(chosen.device)}
    for part, run in parts.items():
        rows += [{"part": part, **asdict(row)} for row in run()]
        script.write(chosen.out, about, rows)
        print(script.markdown(rows[0], [[str(x) for x in row.values()] for row in rows if row["part"] == part]), flush=True)


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="llama-2-7b", help="a shape, as less-kv bench takes it: llama-2-13b, too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=4096, help="tokens before the measured ones, and of the prompt")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each cache")
    parser.add_argument("--most", type=int, default=512, help="the largest batch that is tried")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--out", type=Path, required=True)
    return script.run("gpu", lambda: measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
