"""The conversation with a served model: what is asked, and what a LessCache says to its prompts."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import make_kernels, make_model, tokens

from less_fast import H2O, LessCache, LessError
from paper_checks import served


def test_each_prompt_is_answered_as_by_a_cache_of_its_own():
    model = make_model()
    make = partial(LessCache.for_model, model, H2O(3, 3), make_kernels(model), chunk=4, context=16)
    text = tokens(1, 60)[0].tolist()
    turns = [{"prompt": text[:end], "answer": [0] * 5} for end in (3, 16, 17, 43)]

    def alone(turn):
        cache, new, said = make(), torch.tensor([turn["prompt"]]), []
        for _ in turn["answer"]:
            new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
            said.append(int(new))
        return said

    with torch.no_grad():
        assert served.again(model, make, turns, chunk=4) == [alone(turn) for turn in turns]
    turns[2]["prompt"] = text[1:18]
    with pytest.raises(LessError, match="a prompt does not begin as the one before"):
        served.again(model, make, turns, chunk=4)


def test_a_turn_sends_all_that_was_said_until_there_are_enough_tokens(capsys):
    asked = []

    def create(model, messages, **_):
        asked.append(json.loads(json.dumps(messages)))
        said = SimpleNamespace(message=SimpleNamespace(content=f"answer {len(asked)}"), token_ids=[1, 2])
        return SimpleNamespace(choices=[said], prompt_token_ids=[7] * 300 * len(asked))

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    turns = served.talk(client, "m", tokens=900, letters=2000, new=2)
    assert [len(turn["prompt"]) for turn in turns] == [300, 600, 900]
    assert [len(messages) for messages in asked] == [1, 3, 5]
    assert asked[2][:4] == [*asked[1], {"role": "assistant", "content": "answer 2"}]
    assert len({messages[-1]["content"] for messages in asked}) == 3
    assert "900 tokens" in capsys.readouterr().out
