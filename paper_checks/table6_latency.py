"""The paper's table 6, latency and throughput of generation: full cache, Baseline+ and LESS, with random weights.

    python paper_checks/table6_latency.py --device cuda                 # Llama 2 7B, float16, 5000 + 5000 tokens
    python paper_checks/table6_latency.py --device cuda --shape llama-2-13b --batches 4,8
    python paper_checks/table6_latency.py --quick                       # a tiny model on a CPU, to see that it runs

Latency is the time for a whole batch, prompts read and tokens generated, at each of the batches; throughput is measured at the
largest batch that fits the memory (`less-kv plan` predicts it; where it does not fit, it shrinks by a tenth until it does).
Generating thousands of tokens is not waited for: a step is measured at the first, the middle and the last length, and
Simpson's rule adds them up. Prompts are read a few rows at a time, as long prompts of a large batch have to be.
The paper (A100): latency 1.1 to 1.3 times lower than the full cache's, throughput 1.7 times higher.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from less_fast import H2O, LessError, LessKernels
from less_fast.files import write_text
from less_fast.hf.architecture import sizes
from less_fast.loading import SHAPES, find_device
from less_fast.measuring import versions
from less_fast.measuring.bench import decode, prefill
from less_fast.measuring.compare import baseline_plus
from less_fast.measuring.plan import plan

HERE = Path(__file__).parent
QUICK = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
)
ROWS_AT_ONCE = 2  # prompts that are read together
SPARE = 0.8  # of the memory for weights and caches; the rest is for what is computed


@dataclass
class Cell:
    cache: str
    batch: int
    prompt: int
    new: int
    seconds: float  # for the whole batch
    tokens_per_second: float  # generated
    predicted: bool  # whether the batch is the largest that fits


def generation(model, cache, policy, kernels, batch, prompt, new, compile) -> float:
    """Seconds to read `batch` prompts and to generate `new` tokens for each."""
    rows = min(batch, ROWS_AT_ONCE)
    kind = "DynamicCache" if cache == "full" else cache
    reading = next(row.seconds for row in prefill(model, policy, {cache: kernels}, rows, prompt, 1) if row.cache == kind)
    if cache == "full" and compile:
        kind = "StaticCache"
    name = f"{kind}, compiled" if compile else kind
    first, middle, last = (
        decode(model, policy, {cache: kernels}, batch, length, 1, compile, only=name)[0].seconds
        for length in (prompt, prompt + new // 2, prompt + new)
    )
    if kind == "StaticCache":  # it is allocated at its full length from the start
        first = middle = last
    return reading * batch / rows + new * (first + 4 * middle + last) / 6


def measure(model, contenders, batches, prompt, new, memory, compile):
    """Cells of all caches at equal batches, then each at the largest batch that fits `memory` bytes."""
    for cache, (policy, kernels) in contenders.items():
        for batch in batches:
            try:
                seconds = generation(model, cache, policy, kernels, batch, prompt, new, compile)
            except torch.OutOfMemoryError:
                print(f"{cache}: a batch of {batch} does not fit")
                continue
            yield Cell(cache, batch, prompt, new, seconds, batch * new / seconds, False)
        rank = kernels.layers[0].rank if kernels else 0
        costs = plan(model.config, policy, rank, 512, 1, prompt + new, model.dtype, int(memory * SPARE))
        batch = max(1, costs.full_batch if cache == "full" else costs.less_batch)
        while batch:
            try:
                seconds = generation(model, cache, policy, kernels, batch, prompt, new, compile)
                yield Cell(cache, batch, prompt, new, seconds, batch * new / seconds, True)
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                batch = batch * 9 // 10


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--batches", type=numbers, default="4,16", help="separated by commas")
    parser.add_argument("--prompt", type=int, default=5000)
    parser.add_argument("--new", type=int, default=5000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--memory", type=float, help="gigabytes of the device, if it does not say so itself")
    parser.add_argument("--quick", action="store_true", help="a tiny model on a CPU, nothing written")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.device, chosen.batches, chosen.prompt, chosen.new, chosen.memory = "cpu", [2], 64, 16, 0.002
    try:
        device = find_device(chosen.device)
    except LessError as error:
        parser.error(str(error))
    if device.type == "cpu" and not chosen.memory:
        parser.error("on a CPU say how many gigabytes there are: --memory 16")
    torch.manual_seed(0)
    with device:
        dtype = torch.float32 if chosen.quick else torch.float16
        model = AutoModelForCausalLM.from_config(QUICK if chosen.quick else SHAPES[chosen.shape], dtype=dtype).eval()
        kernels = LessKernels(**sizes(model)).requires_grad_(False)
    model.requires_grad_(False)
    memory = int(chosen.memory * 1e9) if chosen.memory else torch.cuda.get_device_properties(device).total_memory
    policy = H2O(1, 1).with_budget((chosen.prompt + chosen.new) // 20)
    contenders = {
        "full": (policy, None),
        "Baseline+": (baseline_plus(model, policy, kernels), None),
        "LESS": (policy, kernels),
    }
    cells = list(measure(model, contenders, chosen.batches, chosen.prompt, chosen.new, memory, compile=not chosen.quick))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    table = Table(title=f"{'tiny' if chosen.quick else chosen.shape}, {chosen.prompt} + {chosen.new} tokens, 5 %, {hardware}")
    for heading in ("cache", "batch", "latency, s", "tokens/s", "against the full cache"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    full = {cell.predicted or cell.batch: cell for cell in cells if cell.cache == "full"}
    for cell in cells:
        other = full.get(cell.predicted or cell.batch)
        ratio = f"{cell.tokens_per_second / other.tokens_per_second:.2f}x" if other else "the full cache does not fit"
        batch = f"{cell.batch}{' (largest)' * cell.predicted}"
        table.add_row(cell.cache, batch, f"{cell.seconds:.1f}", f"{cell.tokens_per_second:,.0f}", ratio)
    Console(width=120).print(table)
    if chosen.quick:
        return
    record = {
        "command": f"python paper_checks/table6_latency.py --device {chosen.device} --shape {chosen.shape} "
        f"--batches {','.join(map(str, chosen.batches))} --prompt {chosen.prompt} --new {chosen.new}",
        "hardware": hardware,
        "versions": versions(),
        "cells": [asdict(cell) for cell in cells],
    }
    write_text(HERE / "results" / f"table6_{chosen.shape}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
