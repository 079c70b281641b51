"""A chat: the turns of one conversation go through one LessCache, written as the model's own chat template writes them."""

import warnings
from itertools import count
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .hf import LessCache
from .layer.checks import LessError
from .loading import check_length, first_line
from .text import ends


class Conversation:
    """One conversation with a model through one cache: `answer` says something to the model and returns what it answers.

    Only what is new goes through the model: what the template puts behind the last answer, what is said now, and the beginning of
    the next answer. An answer stays in the cache as the tokens that the model wrote, whatever tokens its text would have.

    ids: (1, T) int64, the conversation so far. The cache has seen all of it, or all but the last token if an answer was cut off.
    The token that ended an answer is not among them: the template writes what stands there.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: LessCache, system: str = ""):
        """system: what the model is told before the first turn; if empty, what its template says then.

        Raises LessError if there is no chat template, or the cache has seen another text.
        """
        if not tokenizer.chat_template:
            raise LessError(
                "this model has no chat template, so it was not trained to talk: take one that was (--model smollm2), or let it "
                "go on with a text (`less-kv generate`)"
            )
        if cache.get_seq_length():
            raise LessError("this cache has seen another text: reset() it first, or make one for this conversation")
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.messages = [{"role": "system", "content": system}] if system else []
        self.ids = torch.empty(1, 0, dtype=torch.int64, device=model.device)  # (1, 0)
        self.shown = ""  # the messages and the beginning of an answer, as the template wrote them last

    def answer(self, text: str, max_new_tokens: int = 512, **options: Any) -> str:
        """What the model answers to `text`. Options go to `model.generate`: a streamer, stopping_criteria, ...
        Long conversations need do_sample=True: greedy answers imitate the last ones, and get shorter.

        An answer ends with a token that ends texts (`text.ends`). The conversation also goes on behind one that was cut off.
        Raises LessError if the template refuses this turn, or does not tell where answers end; warns if it would now write
        earlier turns in another way (a new date, thinking left out): the cache keeps them as they were fed.
        """
        said = {"role": "user", "content": text}
        shown = self._written([*self.messages, said])
        new = self._behind_the_answer(said, shown) if self.shown else self._tokens(shown)
        ids = torch.cat([self.ids, torch.tensor([new], device=self.ids.device)], 1)  # (1, T)
        check_length(self.model, ids.shape[1] + max_new_tokens)
        last, pad = ends(self.model, self.tokenizer), self.tokenizer.pad_token_id
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # (1, T)
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            eos_token_id=last or None,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            **options,
        )
        whole = out[:, :-1] if out[0, -1] in last else out  # the last token of `out` has not gone through the model
        answer = self.tokenizer.decode(whole[0, ids.shape[1] :], clean_up_tokenization_spaces=False)
        self.messages += [said, {"role": "assistant", "content": answer}]
        self.ids, self.shown = whole, shown
        return answer

    def _behind_the_answer(self, said, shown):
        """The tokens between the last answer and the next, which the template writes around any answer.

        What the cache was fed stays as it was fed, whatever the template now makes of it: a new date, reasoning left out.
        """
        *before, last = self.messages
        mark = next(mark for mark in map(str, count()) if mark not in shown)  # an answer in the place of the model's
        around = self._written([*before, last | {"content": mark}, said])
        _, found, rest = around.rpartition(mark)
        token, tokens = self._tokens(mark), self._tokens(mark + rest)
        if not found or tokens[: len(token)] != token:
            raise LessError(
                "the chat template of this model writes answers in a way that does not tell where they end, so nobody knows what "
                "stands behind the last one: begin a new conversation, or use a full cache for this model"
            )
        answer = last["content"].strip()
        if not shown.startswith(self.shown) or shown.removeprefix(self.shown).removesuffix(rest).strip() != answer:
            warnings.warn(
                "the chat template of this model now shows earlier turns in another way than the cache was fed (another date, or "
                "answers without their thinking, for example); the cache keeps them as they were fed",
                stacklevel=3,
            )
        return tokens[len(token) :]

    def _written(self, messages):
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template says of what it does not take
            raise LessError(f"the chat template of this model does not take this turn: {first_line(error)}") from error

    def _tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
