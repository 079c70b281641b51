"""Rebuild the embedded tokenizer and model from nothing: python -m less_fast.demo.build_model

A byte-level BPE of 2048 tokens and a Llama of 3.7 million parameters, trained on the `train` split of the corpus. The
`validation` split is watched on the way and measured at the end, once dense and once with a short view in each layer.
"""

import argparse
import datetime
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..text import tokenized, windows
from . import MODEL, corpus

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
WARM_UP = 0.02  # share of the steps; after it the learning rates fall linearly to zero
CHECK_EVERY = 500  # steps between two looks at the validation perplexity
VIEWS = (32, 64, 128, 256)


def main() -> None:
    options = parse_options()
    started = time.perf_counter()
    torch.manual_seed(options.seed)

    docs = {split: corpus.documents(split, options.stdlib) for split in corpus.SPLITS}
    digests = {split: corpus.digest(split, options.stdlib) for split in corpus.SPLITS}
    for split in corpus.SPLITS:
        megabytes = sum(len(text.encode()) for _, text in docs[split]) / 1e6
        print(f"{split}: {len(docs[split])} files, {megabytes:.2f} MB, digest {digests[split]}")

    tokenizer = train_tokenizer((text for _, text in docs["train"]), options.length)
    streams = tokenized(tokenizer, (text for _, text in docs["train"]))
    print(f"train: {sum(map(len, streams)) / 1e6:.2f} million tokens")
    held_out = windows(tokenizer, (text for _, text in docs["validation"]), options.length, options.validation // options.length)
    held_out = held_out.to(options.device)  # (W, T)

    model = new_model(tokenizer, options).to(options.device)
    history = train(model, streams, held_out, options)

    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    tokenizer.save_pretrained(partial)

    saved = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32).to(options.device)
    perplexities = {"dense": perplexity(saved, held_out, options.batch)}
    perplexities |= {f"last {view}": perplexity(saved, held_out, options.batch, view) for view in VIEWS}
    for name, value in perplexities.items():
        print(f"validation perplexity, {name}: {value:.3f}")

    record = {
        **{name: value for name, value in vars(options).items() if name not in ("out", "device", "stdlib")},
        "corpus": digests,
        "validation_windows": len(held_out),
        "validation_perplexity": {name: round(value, 4) for name, value in perplexities.items()},
        "validation_history": history,
        "seconds": round(time.perf_counter() - started, 1),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    replace_folder(options.out, partial)
    print(f"saved to {options.out} after {record['seconds']} s")


def train(
    model: PreTrainedModel, streams: list[np.ndarray], held_out: torch.Tensor, options: argparse.Namespace
) -> list[list[float]]:
    """Train in place for `options.tokens` tokens; return [step, validation perplexity] pairs."""
    steps = max(1, options.tokens // (options.batch * options.length))
    optimizers = new_optimizers(model, options)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(steps)) for optimizer in optimizers]
    forward = torch.compile(model) if options.compile else model
    history = []
    progress = tqdm(total=steps * options.batch * options.length, unit="tok", unit_scale=True)
    for step, batch in zip(range(1, steps + 1), batches(streams, options)):  # batch (B, T)
        model.train()
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = forward(batch, use_cache=False).logits  # (B, T, V)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.update(batch.numel())
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % CHECK_EVERY == 0 or step == steps:
            history.append([step, round(perplexity(model, held_out, options.batch), 3)])
            progress.write(f"step {step} of {steps}: loss {loss.item():.3f}, validation perplexity {history[-1][1]}")
    progress.close()
    return history


def batches(streams: list[np.ndarray], options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Endless batches (B, T), an epoch at a time on the device.

    Each epoch shuffles the documents, cuts their stream at a random offset, and shuffles the windows: without that a
    batch is a stretch of one document.
    """
    rng, T = np.random.default_rng(options.seed), options.length
    while True:
        stream = np.concatenate([streams[i] for i in rng.permutation(len(streams))])[rng.integers(T) :]  # (N,)
        cut = stream[: len(stream) // T * T].reshape(-1, T)  # (W, T)
        epoch = torch.from_numpy(rng.permutation(cut)).to(options.device)  # (W, T)
        yield from epoch[: len(epoch) // options.batch * options.batch].split(options.batch)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch: int, view: int | None = None) -> float:
    """Perplexity of windows (W, T), all tokens after the first of each; `view`: each layer sees the last `view` tokens."""
    model.eval()
    mask = None
    if view is not None:
        position = torch.arange(windows.shape[1], device=windows.device)  # (T,)
        distance = position[:, None] - position  # (T, T)
        mask = ((distance >= 0) & (distance < view))[None, None]  # (1, 1, T, T)
    total = 0.0
    for chunk in windows.split(batch):  # (B, T)
        logits = model(chunk, attention_mask=mask, use_cache=False).logits  # (B, T, V)
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), chunk[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


def new_optimizers(model: PreTrainedModel, options: argparse.Namespace) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding (tied to the head) and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return muon, adam


def learning_rate(steps: int) -> Callable[[int], float]:
    """The factor on the learning rates at a step: a linear rise, then a linear fall to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    return lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def new_model(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=options.layers,
        num_attention_heads=options.query_heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.length,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_tokenizer(texts: Iterable[str], length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token, so that any text survives the round trip."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def replace_folder(folder: Path, complete: Path) -> None:
    """Put the complete folder in the place of `folder`, which may exist; at no moment is there a half-written one."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    complete.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m less_fast.demo.build_model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=MODEL, help="folder that is made or replaced")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="training tokens in all, over several epochs")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a window, and the model's context")
    parser.add_argument("--validation", type=int, default=65536, help="held-out tokens on which it is measured")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--query-heads", type=int, default=4, help="which share 256 dimensions")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stdlib", type=Path, help="a standard library to read in place of this Python's own")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1, help="on the matrices that Muon trains")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model for training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
