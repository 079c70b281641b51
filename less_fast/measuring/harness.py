"""The model "less-kv" for lm-evaluation-harness: any of its tasks, through the full cache, a bare policy, Baseline+ or LESS.

The harness (0.4.13) knows its own models and those that were imported; no entry point of a package tells it of others. So its own
command is run through this file:

    python -m less_fast.measuring.harness run --model less-kv \\
        --model_args pretrained=FOLDER,kernels=FOLDER,cache=less,policy=h2o,budget=5% --tasks boolq --device cpu

and in Python `import less_fast.measuring.harness` comes before `lm_eval.simple_evaluate(model="less-kv", ...)`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..layer.checks import LessError, integer
from ..layer.fastgen import token_kinds
from ..loading import load_config, load_kernels, load_model
from ..setting import policy_named
from .compare import contenders

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise ImportError(f"the model of lm-evaluation-harness needs lm_eval ({missing}): pip install 'less-kv[eval]'") from missing

ROWS = 256  # requests in one forward pass


class CachedLM(TemplateLM):
    """A model of the harness that reads and writes through the caches that `make` makes: make(chunk), an empty one.

    chunk: how a text enters: 1 for streaming, through the decode path alone; None for prompts in one piece.
    batch_size: requests in one forward pass, padded.
    max_length: tokens of a request, as many as the model takes if 0; what is longer loses its beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        make: Callable,
        chunk: int | None = 1,
        batch_size: int = ROWS,
        max_length: int = 0,
    ):
        super().__init__()
        self.model, self.tokenizer, self.make, self.chunk, self.batch_size = model, tokenizer, make, chunk, batch_size
        self.max_length = max_length or model.config.get_text_config(decoder=True).max_position_embeddings
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = True, **kwargs: object) -> list[int]:
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence, disable_tqdm: bool = False, **kwargs: object) -> list[tuple[float, bool]]:
        """For each request (texts, context, continuation): nats, and whether greedy decoding would say the continuation."""
        scores = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: (len(requests[index][1]), requests[index][1]))
        for indices in self._batches(order, "log-likelihoods", disable_tqdm):
            pairs = [self._fitting(*requests[index][1:]) for index in indices]
            for index, score in zip(indices, self._scores(pairs)):
                scores[index] = score
        return scores

    def _fitting(self, context, continuation):
        """The pair with as much of the context as there is room for; the last token need not be read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise LessError(
                f"a continuation of {len(continuation)} tokens does not fit into max_length={self.max_length}: make it larger"
            )
        return tuple(context[-room:]), continuation

    def _scores(self, pairs: Sequence[tuple]) -> Iterator[tuple[float, bool]]:
        """The same for one batch. Continuations (R, M) of one context share its pass: there are N <= R contexts."""
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        rows = torch.tensor([contexts.index(context) for context, _ in pairs], device=self.device)  # (R,)
        cache = self.make(self.chunk)
        ids, mask = self._padded(contexts)  # (N, C)
        logits = self._read(cache, ids, mask, logits_to_keep=1)[rows]  # (R, 1, vocabulary)
        ids, new = self._padded([continuation for _, continuation in pairs], left=False)  # (R, M)
        if ids.shape[1] > 1:
            cache.reorder_cache(rows)
            rest = self._read(cache, ids[:, :-1], torch.cat([mask[rows], new[:, :-1]], 1))
            logits = torch.cat([logits, rest], 1)  # (R, M, vocabulary)
        nats = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0] * new  # (R, M)
        greedy = (logits.argmax(-1) == ids) | (new == 0)  # (R, M)
        return zip(nats.double().sum(1).tolist(), greedy.all(1).tolist())

    def _read(self, cache, ids, mask, **kwargs):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **kwargs
        ).logits

    def _padded(self, rows, left=True):
        """Token ids (N, T) of rows of tokens, and the mask that is 0 at pads."""
        longest = max(map(len, rows))
        pads = [[0] * (longest - len(row)) for row in rows]
        ids = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads)]
        mask = [[*pad, *[1] * len(row)] if left else [*[1] * len(row), *pad] for row, pad in zip(rows, pads)]
        return torch.tensor([ids, mask], device=self.device)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts; what is longer than max_length goes in windows, each through a cache of its own."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        windows = [
            [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)]
            for ids in texts
        ]
        scores = iter(self._loglikelihood_tokens([(None, *pair) for pairs in windows for pair in pairs], disable_tqdm))
        return [sum(next(scores)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """What follows each context, until one of its stop sequences: greedy unless the request asks to sample."""
        written = [""] * len(requests)
        wishes = [repr(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (wishes[index], len(requests[index].args[0])))
        for _, alike in groupby(order, key=wishes.__getitem__):
            for indices in self._batches(list(alike), "texts", disable_tqdm):
                wish = normalize_gen_kwargs(requests[indices[0]].args[1], 256)
                stop = handle_stop_sequences(wish.pop("until"), self.tokenizer.decode([self.eot_token_id]))
                wish["max_new_tokens"] = wish.pop("max_gen_toks")
                if not wish.setdefault("do_sample", False):
                    wish.pop("temperature", None)
                contexts = [self.tok_encode(requests[index].args[0]) for index in indices]
                texts = self.generate(contexts, **wish, stop_strings=stop, tokenizer=self.tokenizer)
                for index, text in zip(indices, texts):
                    written[index] = postprocess_generated_text(text, stop, None)
        return written

    @torch.inference_mode()
    def generate(self, contexts: list[list[int]], max_new_tokens: int, **kwargs: object) -> list[str]:
        """What the model writes after each context of tokens; kwargs go to `model.generate`."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise LessError(
                f"{max_new_tokens} new tokens leave no room for a context in max_length={self.max_length}: make it larger"
            )
        ids, mask = self._padded([context[-room:] for context in contexts])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.make(self.chunk),
            max_new_tokens=max_new_tokens,
            pad_token_id=self.eot_token_id,
            **kwargs,
        )
        return self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

    def _batches(self, indices, what, disable_tqdm):
        for start in tqdm(range(0, len(indices), self.batch_size), what, disable=disable_tqdm):
            yield indices[start : start + self.batch_size]


@register_model("less-kv")
class LessLM(CachedLM):
    """The same for `--model less-kv` of the harness, by what --model_args can say.

    pretrained: folder or hub name of a model; the embedded one if empty. kernels: of kernels for it; the embedded model's own if
    empty, and none for another model. cache: full, bare, baseline+ (as many bytes as LESS holds) or less.
    policy: a name of `less_fast.setting.POLICIES`. budget: tokens that each KV head keeps (51), or a share of max_length (5%).
    budgets: uniform, or by head, the kernels' table.
    Raises OSError or LessError, with the reason, if these are not there or do not go together.
    """

    def __init__(
        self,
        pretrained: str = "",
        kernels: str = "",
        cache: str = "less",
        policy: str = "h2o",
        budget: int | str = "5%",
        budgets: str = "uniform",
        dtype: str = "float32",
        device: str = "cpu",
        batch_size: int | str = 8,
        max_length: int = 0,
        max_batch_size: int | None = None,
    ):
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size:
            raise LessError(f"batch_size is a number of requests, not {batch_size!r}: it is not sought automatically")
        context = load_config(pretrained).get_text_config(decoder=True).max_position_embeddings
        max_length = integer("max_length", max_length, 0) or context
        rule = policy_named(policy, budget, max_length)
        if rule.budget is None:
            raise LessError("policy=full evicts nothing: for the full cache say cache=full, with any other policy")
        model, tokenizer = load_model(pretrained, device or "cpu", dtype)
        super().__init__(model, tokenizer, None, 1, int(batch_size), max_length)
        learned = load_kernels(model, pretrained, kernels)
        kinds = token_kinds(tokenizer) if rule.kinds else None
        caches = contenders(model, [rule], {"": learned} if learned else {}, kinds)
        known = {(contender.cache, contender.budgets or budgets): contender.make for contender in caches}
        if (cache, budgets) not in known:
            raise LessError(
                f"there is no cache {cache!r} with budgets {budgets!r} for this policy and these kernels: choose one of "
                f"{', '.join(f'{kind} ({spread})' for kind, spread in known)}"
            )
        self.make = known[cache, budgets]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
