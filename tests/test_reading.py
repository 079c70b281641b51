"""A Reader, which scores and writes through caches: what is too long loses its beginning, and a batch changes nothing."""

import torch
from models import make_talking, tokens

from less_fast import H2O, LessCache
from less_fast.measuring.reading import Reader
from less_fast.text import text_behind


def test_a_context_that_is_too_long_to_write_behind_loses_its_beginning_alone():
    model, tokenizer = make_talking()
    reader = Reader(model, tokenizer, lambda chunk: LessCache.for_model(model, H2O(40, 40), chunk=chunk), max_length=20)
    contexts = [tokens(1, length, seed=length) for length in (30, 9, 14)]
    said = reader.generate([ids[0].tolist() for ids in contexts], 6, do_sample=False)
    assert len(set(said)) == 3
    for ids, text in zip(contexts, said):
        ids = ids[:, -14:]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert text == text_behind(tokenizer, ids[0].tolist(), out[0, ids.shape[1] :].tolist())
