"""Streams far beyond the context that a model was trained for: does what a cache knows go on helping, or does it break?

    python -m paper_checks.streams --ways within,anew,growing    # the embedded model, 8 streams of 12,500 held-out tokens
    python -m paper_checks.streams --tokens 100000 --streams 1 --policies retention --caches less --ways within --out FILE
    python -m paper_checks.streams --model smollm2 --text book.txt --tokens 100000 --streams 1 --dtype bfloat16 --compile

Held-out text goes through each cache token by token: as one stream that stays within the context, which is what the model and
its kernels were trained for (`LessCache.for_model(context=...)`), anew for every window of the context's length, and, if asked,
as one whose positions grow. Beside them the full cache, which is anew alone. Writes the nats per token of each tenth to
results/streams_MODEL.json.
"""

import sys
import time

import torch
from transformers.cache_utils import Cache, DynamicCache

from less_fast import LessCache, LessError, Window
from less_fast.hf.positions import trained_length
from less_fast.loading import load_kernels, load_model, load_texts
from less_fast.setting import policy_named
from less_fast.text import tokenized

from . import script

PIECE = 128  # tokens of one forward pass: their logits lie in memory at once
TENTHS = 10


@torch.inference_mode()
def losses(model, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Nats of each token of a stream but the first: ids (N, T) -> (N, T - 1)."""
    found, last = [], None
    for piece in ids.split(PIECE, 1):
        logits = model(piece, past_key_values=cache, use_cache=True).logits.float()  # (N, m, vocabulary)
        seen = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], 1)
        said = piece[:, 1:] if last is None else piece
        found.append(torch.nn.functional.cross_entropy(seen.transpose(1, 2), said, reduction="none"))
        last = logits[:, -1:]
    return torch.cat(found, 1)


def anew(model, ids: torch.Tensor, length: int, make) -> torch.Tensor:
    """The same with a fresh cache for every window of `length` tokens: nothing says the first token of one, which is NaN."""
    parts = [losses(model, window, make()) for window in ids.split(length, 1) if window.shape[1] > 1]
    missing = torch.full((len(ids), 1), torch.nan)
    return torch.cat([parts[0], *(x for part in parts[1:] for x in (missing, part))], 1)


def main(arguments=None) -> int:
    parser = script.parser(__doc__)
    script.add_model(parser)
    parser.add_argument("--tokens", type=int, default=12_500, help="of each stream")
    parser.add_argument("--streams", type=int, default=8, help="side by side")
    parser.add_argument("--budget", default="5%", help="tokens kept, or a share of the context")
    parser.add_argument("--policies", default="h2o,retention", help="separated by commas; a window stands beside them")
    parser.add_argument("--caches", default="full,bare,less", help="some of these")
    parser.add_argument("--ways", default="within,anew", help="of within, anew and growing")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model and its slots")
    parser.add_argument("--compile", action="store_true", help="steps: faster in long streams on a CPU, after a minute")
    parser.add_argument("--out", type=script.Path, help="results/streams_MODEL.json by default")
    chosen = parser.parse_args(arguments)
    about = {name: value for name, value in vars(chosen).items() if name != "text"}
    out = chosen.out or script.results_of("streams", chosen.model)
    return script.run("streams", lambda: script.write(out, about, measure(chosen)))


def measure(chosen) -> list[dict]:
    """A row for each way to read the stream; printed as they come."""
    if chosen.streams < 1 or chosen.tokens <= TENTHS:
        raise LessError(f"--streams is at least 1, and --tokens more than {TENTHS}: there are tenths to tell")
    caches, ways = chosen.caches.split(","), chosen.ways.split(",")
    script.known("cache", caches, ("full", "bare", "less"))
    script.known("way", ways, ("within", "anew", "growing"))
    model, tokenizer = load_model(chosen.model, dtype=chosen.dtype)
    kernels = load_kernels(model, "")
    length = trained_length(model, kernels)
    if kernels is None or length is None:
        raise LessError("streams are about kernels and a trained context, and this model lacks one: choose another")
    texts, _ = load_texts(chosen.text, "", "test")
    stream = torch.cat([torch.from_numpy(ids) for ids in tokenized(tokenizer, texts)])
    if len(stream) < chosen.tokens * chosen.streams:
        raise LessError(f"the text has {len(stream)} tokens, and {chosen.tokens * chosen.streams} are wanted: give more text")
    ids = stream[: chosen.tokens * chosen.streams].view(chosen.streams, -1)
    rows: list[dict] = []

    def note(cache, rule, way, values, seconds, held=None):
        tenths = [part.nanmean().item() for part in values.tensor_split(TENTHS, 1)]
        rows.append(
            {"cache": cache, "policy": rule and repr(rule), "way": way, "nats": values.nanmean().item(), "tenths": tenths}
        )
        rows[-1] |= {"bytes": held, "seconds": round(seconds, 1)}
        shown = " ".join(f"{tenth:.3f}" for tenth in tenths)
        print(f"{cache} {rule or ''} {way}: {rows[-1]['nats']:.4f} nats; by tenths {shown}; {seconds:.0f} s", flush=True)

    start = time.perf_counter()
    if "full" in caches:
        values = anew(model, ids, trained_length(model) or length, lambda: DynamicCache(config=model.config))
        note("full", None, "anew", values, time.perf_counter() - start)
    rules = [policy_named(name, chosen.budget, length) for name in chosen.policies.split(",")]
    for rule in [Window(rules[0].budget), *rules]:
        bare = kernels.without_state() if rule.needs == "rho" else None
        for cache, own in {"bare": bare, "less": kernels}.items():
            if cache not in caches or (cache == "less" and isinstance(rule, Window)):
                continue

            def make(within=None, rule=rule, own=own):
                return LessCache.for_model(model, rule, own, budgets="uniform", chunk=1, compile=chosen.compile, context=within)

            for way in ways:
                start, whole = time.perf_counter(), make(length if way == "within" else None)
                values = anew(model, ids, length, make) if way == "anew" else losses(model, ids, whole)
                held = None if way == "anew" else sum(whole.memory().values()) // chosen.streams
                note(cache, rule, way, values, time.perf_counter() - start, held)
    return rows


if __name__ == "__main__":
    sys.exit(main())
