"""Rebuild the embedded tokenizer and model from nothing: python -m paper_checks.build_model

A byte-level BPE of 2048 tokens and a Llama of 3.7 million parameters, trained on the `train` split of the corpus. The
`validation` split is watched on the way and measured at the end.
"""

import argparse
import datetime
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from less_fast.demo import MODEL, corpus
from less_fast.measuring import versions
from less_fast.text import tokenized, windows

from . import script

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
WARM_UP = 0.02  # share of the steps; after it the learning rates fall linearly to zero
CHECK_EVERY = 500  # steps between two looks at the validation perplexity
HELD_OUT = 65536  # tokens on which it is measured
MUON, ADAM, WEIGHT_DECAY = 0.01, 3e-3, 0.1  # learning rates; the decay is of the matrices that Muon trains


def main() -> None:
    options = parse_options()
    started = time.perf_counter()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    docs = {split: corpus.documents(split) for split in corpus.SPLITS}
    digests = {split: corpus.digest(split) for split in corpus.SPLITS}
    tokenizer = train_tokenizer((text for _, text in docs["train"]), options.length)
    streams = tokenized(tokenizer, (text for _, text in docs["train"]))
    print(f"train: {sum(map(len, streams)) / 1e6:.2f} million tokens")
    every = windows(tokenizer, (text for _, text in docs["validation"]), options.length)
    held_out = every[: HELD_OUT // options.length].to(device)  # (W, T)

    model = new_model(tokenizer, options).to(device)
    history = train(model, streams, held_out, options.tokens, options.batch)

    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    tokenizer.save_pretrained(partial)

    saved = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32).to(device)
    reached = perplexity(saved, held_out, options.batch)
    print(f"validation perplexity: {reached:.3f}")

    record = {
        **{name: value for name, value in vars(options).items() if name != "out"},
        "corpus": digests,
        "validation_windows": len(held_out),
        "validation_perplexity": round(reached, 4),
        "validation_history": history,
        "seconds": round(time.perf_counter() - started, 1),
        "date": datetime.date.today().isoformat(),
        "device": script.hardware(device.type),
        "versions": versions(),
    }
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    replace_folder(options.out, partial)
    print(f"saved to {options.out} after {record['seconds']} s")


def train(
    model: PreTrainedModel, streams: list[np.ndarray], held_out: torch.Tensor, tokens: int, batch_size: int
) -> list[list[float]]:
    """Train in place for so many tokens of the streams, in windows as long as those held out (W, T), `batch_size` at a time.

    Returns [step, validation perplexity] pairs.
    """
    T = held_out.shape[1]
    steps = max(1, tokens // (batch_size * T))
    optimizers = new_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(steps)) for optimizer in optimizers]
    history = []
    progress = tqdm(total=steps * batch_size * T, unit="tok", unit_scale=True)
    for step, batch in zip(range(1, steps + 1), batches(streams, T, batch_size)):
        batch = batch.to(held_out.device)  # (B, T)
        model.train()
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = model(batch, use_cache=False).logits  # (B, T, V)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.update(batch.numel())
        if step % CHECK_EVERY == 0 or step == steps:
            history.append([step, round(perplexity(model, held_out, batch_size), 3)])
            progress.write(f"step {step} of {steps}: loss {loss.item():.3f}, validation perplexity {history[-1][1]}")
    progress.close()
    return history


def batches(streams: list[np.ndarray], T: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Endless batches (B, T), an epoch at a time.

    Each epoch shuffles the documents, cuts their stream at a random offset, and shuffles the windows: without that a
    batch is a stretch of one document.
    """
    rng = np.random.default_rng(0)
    while True:
        stream = np.concatenate([streams[i] for i in rng.permutation(len(streams))])[rng.integers(T) :]  # (N,)
        cut = stream[: len(stream) // T * T].reshape(-1, T)  # (W, T)
        yield from torch.from_numpy(rng.permutation(cut))[: len(cut) // batch_size * batch_size].split(batch_size)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch: int) -> float:
    """Perplexity of windows (W, T), all tokens after the first of each."""
    model.eval()
    total = 0.0
    for chunk in windows.split(batch):  # (B, T)
        logits = model(chunk, use_cache=False).logits  # (B, T, V)
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), chunk[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


def new_optimizers(model: PreTrainedModel) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding (tied to the head) and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=MUON, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr=ADAM, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


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
    parser = script.parser(__doc__)
    parser.add_argument("--out", type=Path, default=MODEL, help="folder that is made or replaced")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="training tokens in all, over several epochs")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a window, and the model's context")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--query-heads", type=int, default=4, help="which share 256 dimensions")
    parser.add_argument("--kv-heads", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
