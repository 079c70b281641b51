"""vLLM's OpenAI server with LESS, as its clients meet it: streams, aborts, many at once, a client that is killed; and the same on
two processes that share out the heads."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm has an environment with it")

import openai
import psutil
from vllm_engines import ENVIRONMENT, Reference

from less_fast import LessKernels
from less_fast.demo import KERNELS, MODEL

LESS = {"policy": "h2o", "heavy": 26, "recent": 25, "kernels": "shipped", "chunk": 32, "context": 320}
BEGINNING = random.Random(99).choices(range(300, 2000), k=70)
PROMPTS = [random.Random(seed).choices(range(300, 2000), k=1 + 7 * seed % 120) for seed in range(12)]
PROMPTS += [BEGINNING + random.Random(seed).choices(range(300, 2000), k=60 * seed) for seed in range(1, 6)]
REQUESTS, CLIENTS = int(os.environ.get("VLLM_REQUESTS", "320")), 32
CLIENT = """
import openai, sys
stream = openai.OpenAI(base_url=sys.argv[1], api_key="none").completions.create(
    model="m", prompt=[500] * 20, max_tokens=800, temperature=0, stream=True, extra_body={"ignore_eos": True})
for part in stream:
    print("said", flush=True)
"""


def start(*more):
    """A server of the embedded model, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides, config = {"architectures": ["LessLlamaForCausalLM"]}, {"less": LESS}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--served-model-name", "m"]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "32",
    ]
    command += ["--enforce-eager", "--hf-overrides", json.dumps(overrides), "--additional-config", json.dumps(config), *more]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server, address = subprocess.Popen(command, env=environment), f"http://127.0.0.1:{port}"
    for _ in range(600):
        time.sleep(0.5)
        try:
            urllib.request.urlopen(f"{address}/health")
            return server, f"{address}/v1"
        except OSError:
            assert server.poll() is None, "the server has ended: what it said stands above"
    raise AssertionError("the server does not answer")


def stop(server):
    server.send_signal(signal.SIGINT)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.fixture(scope="module")
def reference():
    return Reference(MODEL, LESS, LessKernels.from_pretrained(KERNELS))


@pytest.fixture(scope="module")
def started():
    server, address = start()
    yield server, address
    stop(server)


@pytest.fixture(scope="module")
def address(started):
    return started[1]


def ask(address, prompt, length, stream=False):
    """The tokens that the server answers, in streams one by one."""
    client = openai.OpenAI(base_url=address, api_key="none", timeout=300)
    more = {"ignore_eos": True, "return_token_ids": True}
    said = client.completions.create(model="m", prompt=prompt, max_tokens=length, temperature=0, stream=stream, extra_body=more)
    if not stream:
        return list(said.choices[0].token_ids)
    return [token for part in said if part.choices for token in part.choices[0].token_ids or ()]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_gets_the_text_of_a_less_cache(address, reference, stream):
    for prompt in PROMPTS[:4]:
        assert ask(address, prompt, 40, stream) == reference.generate(prompt, 40)[0]


def test_two_hundred_at_once_get_their_texts_though_some_clients_go_and_one_is_killed(address, reference):
    for prompt in PROMPTS:
        reference.generate(prompt, 30)
    killed = subprocess.Popen([sys.executable, "-c", CLIENT, address], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "said\n"

    with ThreadPoolExecutor(200) as pool:
        leaving = [pool.submit(leave, address, prompt) for prompt in PROMPTS[:6]]
        answers = [(prompt, pool.submit(ask, address, prompt, 30)) for prompt in PROMPTS * 17][:200]
        killed.kill()
        for prompt, answer in answers:
            assert answer.result() == reference.generate(prompt, 30)[0]
        for gone in leaving:
            gone.result()
    assert ask(address, PROMPTS[3], 40) == reference.generate(PROMPTS[3], 40)[0]


def leave(address, prompt):
    """A client that goes away in the middle of its answer."""
    client = openai.OpenAI(base_url=address, api_key="none")
    stream = client.completions.create(
        model="m", prompt=prompt, max_tokens=500, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()


def test_clients_that_come_and_go_for_long_change_no_text_and_leave_no_memory(started, reference):
    server, address = started
    texts = [reference.generate(prompt, 30)[0] for prompt in PROMPTS]

    def client(seed):
        draw = random.Random(seed)
        for _ in range(REQUESTS // CLIENTS // 2):
            which, length = draw.randrange(len(PROMPTS)), draw.randint(1, 30)
            if draw.random() < 0.2:
                leave(address, PROMPTS[which])
            else:
                assert ask(address, PROMPTS[which], length, draw.random() < 0.5) == texts[which][:length]

    def resident():
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        return sum(process.memory_info().rss for process in family)

    held = []
    for half in range(2):
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(client, CLIENTS * half + one) for one in range(CLIENTS)]:
                done.result()
        held.append(resident())
    assert held[1] < 1.02 * held[0], held


def test_two_processes_share_out_the_heads(reference):
    server, address = start("--tensor-parallel-size", "2")
    try:
        for prompt in PROMPTS[:4]:
            assert ask(address, prompt, 40) == reference.generate(prompt, 40)[0]
    finally:
        stop(server)
