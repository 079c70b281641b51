"""What a model says through a cache: how likely it finds continuations of contexts, and what it writes after them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..layer.checks import LessError
from ..text import ends, text_behind

ROWS = 256  # requests in one forward pass
LOGITS_AT_ONCE = 512  # tokens whose logits, as wide as the vocabulary, are there together


@torch.inference_mode()
def body_and_head(model: PreTrainedModel) -> tuple[Callable, Callable]:
    """Two functions: head(body(**inputs)) are the model's logits, and the head may be given some of the tokens.

    If the model does more to its logits (a softcap, a scale), the body makes them, and the head leaves them as they are.
    """
    head, ids = model.get_output_embeddings(), torch.arange(8, device=model.device)[None]  # (1, 8): one may be a pad, all zeros
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (1, 8, hidden)
    if torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits):
        return lambda **inputs: model.base_model(**inputs).last_hidden_state, head
    return lambda **inputs: model(**inputs).logits, lambda logits: logits


class Reader:
    """A model and its tokenizer that read and write through the caches that `make` makes: make(chunk), an empty one.

    chunk: how a text enters: 1 for streaming, through the decode path alone; None for contexts in one piece, of which the last
    token is left to decoding, so that all scores come from the compressed context.
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
        self.model, self.tokenizer, self.make, self.chunk, self.batch_size = model, tokenizer, make, chunk, batch_size
        self.max_length = max_length or model.config.get_text_config(decoder=True).max_position_embeddings

    @torch.inference_mode()
    def scores(self, pairs: Sequence[tuple], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) of tokens: nats, and whether greedy decoding would say the continuation."""
        pairs = [self.fitting(*pair) for pair in pairs]
        scores = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda index: (len(pairs[index][0]), pairs[index][0]))
        for indices in self.batches(order, "log-likelihoods", disable_tqdm):
            for index, score in zip(indices, self._scores([pairs[index] for index in indices])):
                scores[index] = score
        return scores

    def fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple, tuple]:
        """The pair with as much of the context as there is room for; the last token need not be read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise LessError(
                f"a continuation of {len(continuation)} tokens does not fit into max_length={self.max_length}: make it larger"
            )
        return tuple(context[-room:]), tuple(continuation)

    def _scores(self, pairs: Sequence[tuple]) -> Iterator[tuple[float, bool]]:
        """The same for one batch. Continuations (R, M) of one context share its pass: there are N <= R contexts."""
        body, head = body_and_head(self.model)
        contexts = {context: row for row, context in enumerate(dict.fromkeys(context for context, _ in pairs))}
        rows = torch.tensor([contexts[context] for context, _ in pairs], device=self.model.device)  # (R,)
        cache = self.make(self.chunk)
        ids, mask = self._padded([context[:-1] for context in contexts])  # (N, C - 1)
        if ids.shape[1]:
            self._read(body, cache, ids, mask)
            cache.reorder_cache(rows)
        said, new = self._padded([continuation for _, continuation in pairs], left=False)  # (R, M)
        last, _ = self._padded([context[-1:] for context, _ in pairs])  # (R, 1)
        mask = torch.cat([mask[rows], torch.ones_like(last), new[:, :-1]], 1)  # (R, C - 1 + M)
        hidden = self._read(body, cache, torch.cat([last, said[:, :-1]], 1), mask)  # (R, M, hidden)
        # nats, and whether greedy decoding says something else
        told = torch.zeros(2, *said.shape, dtype=torch.float64, device="cpu")  # (2, R, M)
        parts = []
        for tokens, targets in zip(hidden[new > 0].split(LOGITS_AT_ONCE), said[new > 0].split(LOGITS_AT_ONCE)):
            logits = head(tokens).float()  # (LOGITS_AT_ONCE, vocabulary)
            parts.append(torch.stack([-cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) != targets).float()]))
        told[:, new.cpu() > 0] = torch.cat(parts, 1).double().cpu()
        nats, errors = told.sum(-1)  # (R,)
        return zip(nats.tolist(), (errors == 0).tolist())

    def _read(self, body, cache, ids, mask):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return body(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)

    def _padded(self, rows, left=True):
        """Token ids (N, T) of rows of tokens, and the mask that is 0 at pads."""
        longest = max(map(len, rows))
        pads = [[0] * (longest - len(row)) for row in rows]
        ids = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads)]
        mask = [[*pad, *[1] * len(row)] if left else [*[1] * len(row), *pad] for row, pad in zip(rows, pads)]
        return torch.tensor([ids, mask], device=self.model.device)

    @torch.inference_mode()
    def generate(self, contexts: list[list[int]], max_new_tokens: int, **kwargs: object) -> list[str]:
        """What the model writes after each context of tokens; kwargs go to `model.generate`."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise LessError(
                f"{max_new_tokens} new tokens leave no room for a context in max_length={self.max_length}: make it larger"
            )
        if not all(contexts):
            raise LessError("a context holds no token, and nothing can be written after nothing: begin it with a token")
        ids, mask = self._padded([context[-room:] for context in contexts])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.make(self.chunk),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends(self.model, self.tokenizer) or None,
            pad_token_id=self.tokenizer.eos_token_id,
            **kwargs,
        )
        new = ids.shape[1]
        return [text_behind(self.tokenizer, row[:new], row[new:]) for row in out.tolist()]

    @torch.inference_mode()
    def answers(self, contexts: list[list[int]], most: int) -> list[str]:
        """What the model writes after each context of tokens, greedily: at most so many tokens."""
        batches = self.batches([*range(len(contexts))], "answers", True)
        return [text for rows in batches for text in self._answers([contexts[row] for row in rows], most)]

    def _answers(self, contexts, most):
        """The same for one batch. An answer that has ended leaves the cache, so that the others go on faster."""
        (body, head), cache = body_and_head(self.model), self.make(self.chunk)
        ended, going = set(ends(self.model, self.tokenizer)), list(range(len(contexts)))
        said: list[list[int]] = [[] for _ in contexts]
        new, mask = self._padded(contexts)  # (N, C)
        for _ in range(most):
            new = head(self._read(body, cache, new, mask)[:, -1]).argmax(-1, keepdim=True)  # (n, 1)
            for row, token in zip(going, new[:, 0].tolist()):
                said[row].append(token)
            stay = [place for place, row in enumerate(going) if said[row][-1] not in ended]
            if not stay:
                break
            if len(stay) < len(going):
                going, new, mask = [going[place] for place in stay], new[stay], mask[stay]
                cache.batch_select_indices(torch.tensor(stay, device=new.device))
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        return [text_behind(self.tokenizer, *pair) for pair in zip(contexts, said)]

    def batches(self, indices: list[int], what: str, disable_tqdm: bool) -> Iterator[list[int]]:
        """batch_size of the indices at a time, with a progress bar that says what they are."""
        for start in tqdm(range(0, len(indices), self.batch_size), what, disable=disable_tqdm):
            yield indices[start : start + self.batch_size]
