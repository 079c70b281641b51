"""LESS beside plain vLLM in one run: two engines, each in a process of its own, take turns on the same prompts.

    python -m less_fast.vllm.measure --out FILE [--model FOLDER] [--budget 51] [--lengths 1024,4096] [--sequences 1,8,32,128]

Prompts are random tokens. Speed: a step of the engine in which all sequences decode, the median of the steps, by the clock and by
the time that the process computes (the clock's on a quiet machine, with one thread). Time to the first token: of the first
prompts that enter. Sequences per GiB: of that length, by the engine's own count of its pages.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

STEPS = 32  # decoding steps in a turn
FIGURES = ("tokens_per_second", "tokens_per_second_computing", "first_token", "first_token_computing")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def serve(options: dict[str, Any]) -> None:
    """The process of one engine: it reads [sequences, length] from standard input, and answers in JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(**options)
    engine, cache = llm.llm_engine, llm.llm_engine.vllm_config.cache_config
    generator = torch.Generator().manual_seed(0)
    print(json.dumps({"pages": cache.num_gpu_blocks, "page": cache.block_size}), file=answers, flush=True)
    for line in sys.stdin:
        sequences, length = json.loads(line)
        params = SamplingParams(temperature=0, max_tokens=STEPS + 2 + sequences, ignore_eos=True)
        seen: set[str] = set()
        waiting: set[str] = set()
        started, first = _now(), None
        for index in range(sequences):
            prompt = torch.randint(100, 1000, (length,), generator=generator).tolist()
            waiting.add(str(index))
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while seen < waiting:
            seen |= {out.request_id for out in engine.step()}
            first = _since(started) if first is None else first
        steps = []
        for _ in range(STEPS):
            before = _now()
            decoded = len(engine.step())
            steps.append([spent / decoded for spent in _since(before)])
        engine.abort_request(list(waiting))
        while engine.has_unfinished_requests():
            engine.step()
        speeds = [1 / statistics.median(spent) for spent in zip(*steps)]
        answer = dict(zip(FIGURES, [*speeds, *(first or ())]))
        print(json.dumps(answer), file=answers, flush=True)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(before: tuple[float, float]) -> list[float]:
    """Seconds by the clock, and of this process's computing."""
    return [now - then for now, then in zip(_now(), before)]


class Engine:
    """An engine in a process of its own."""

    def __init__(self, options: dict[str, Any], gigabytes: int):
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--serve", json.dumps(options)]
        environment = os.environ | ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(gigabytes)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
        self.gigabytes, self.about = gigabytes, self._answer()

    def measure(self, sequences: int, length: int) -> dict[str, Any]:
        """What `serve` says."""
        print(json.dumps([sequences, length]), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the engine has ended: what it said last stands above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="")
    parser.add_argument("--out")
    parser.add_argument("--budget", type=int, default=51)
    parser.add_argument("--lengths", default="1024,4096")
    parser.add_argument("--sequences", default="1,8,32,128")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each engine")
    parser.add_argument("--gigabytes", type=int, default=5, help="that each engine has for its caches")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="vLLM compiles the model, as it does by default")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return
    from transformers import AutoConfig

    from ..demo import MODEL
    from ..gguf import unpacked
    from ..measuring.bench import boundless
    from .asked import kernels_at

    folder = unpacked(arguments.model) if arguments.model else str(MODEL)
    lengths, counts = ([int(part) for part in text.split(",")] for text in (arguments.lengths, arguments.sequences))
    longest = max(lengths) + 2 * STEPS + max(counts)
    shared = dict(model=folder, dtype=arguments.dtype, max_model_len=longest, max_num_seqs=max(counts), skip_tokenizer_init=True)
    shared |= dict(enforce_eager=not arguments.compile, distributed_executor_backend="uni", enable_prefix_caching=False)
    far = {"max_position_embeddings": max(8192, longest)}
    asked = {"policy": "h2o", "budget": arguments.budget, "kernels": "shipped", "budgets": "uniform"}
    with TemporaryDirectory() as place:
        boundless(kernels_at("shipped", AutoConfig.from_pretrained(folder))).save_pretrained(place)
        less = dict(enable_chunked_prefill=False, additional_config={"less": asked | {"kernels": place}})
        less["hf_overrides"] = {"architectures": ["LessLlamaForCausalLM"], **far}
        engines = {
            "plain": Engine({**shared, "hf_overrides": far}, arguments.gigabytes),
            "LESS": Engine({**shared, **less}, arguments.gigabytes),
        }
    rows = []
    for length in lengths:
        for sequences in counts:
            turns: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for _ in range(arguments.rounds):
                for name, engine in engines.items():
                    room = _room(engine, name, length)
                    if room >= sequences:
                        turns[name].append(engine.measure(sequences, length))
            for name, said in turns.items():
                row: dict[str, Any] = {"cache": name, "length": length, "sequences": sequences, "turns": said}
                row |= {key: round(statistics.median(turn[key] for turn in said), 3) if said else None for key in FIGURES}
                row["sequences_per_gib"] = _room(engines[name], name, length) // arguments.gigabytes
                rows.append(row)
                print({key: value for key, value in row.items() if key != "turns"}, flush=True)
                _write(arguments, asked, rows)
    for engine in engines.values():
        engine.close()


def _room(engine: Engine, name: str, length: int) -> int:
    """How many sequences of that length, and what they generate, fit at once."""
    pages = engine.about["pages"] - 1
    return pages if name == "LESS" else pages // -(-(length + 2 * STEPS) // engine.about["page"])


def _write(arguments, asked, rows):
    if arguments.out:
        import vllm

        from ..files import write_text

        about = {
            "model": arguments.model or "embedded",
            "dtype": arguments.dtype,
            "setting": asked,
            "gigabytes": arguments.gigabytes,
        }
        about |= {"compiled": arguments.compile, "vllm": vllm.__version__, "threads": os.environ.get("OMP_NUM_THREADS", "all")}
        about |= {"gigabytes": arguments.gigabytes, "steps": STEPS, "rounds": arguments.rounds}
        about |= {"machine": platform.machine(), "command": " ".join(sys.argv[1:])}
        write_text(arguments.out, json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
