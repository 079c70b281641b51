"""What paper_checks makes of a model that chats: texts to train kernels with, and a long conversation."""

import json
import random

import pytest
from models import make_talking

from less_fast import LessError
from less_fast.loading import load_model
from paper_checks import conversation, texts

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MODULE = 'def add(a, b=1, *rest):\n    """The sum."""\n    return a + b\n\n\ndef silent():\n    pass\n'


def test_tasks_are_the_functions_that_say_what_they_do():
    assert [*texts.tasks(MODULE)] == ["Write a Python function `add(a, b=1, *rest)`.\n\nThe sum."]


def test_questions_are_a_third_each_of_code_tasks_and_prose():
    found = texts.questions([MODULE], ["It was night.\nNobody spoke.\n"], 6, random.Random(0))
    assert [("```python" in question, question.startswith("Write a Python function")) for question in found[:3]] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert "Nobody spoke." in found[2]


def test_pieces_are_whole_texts_until_there_are_enough_letters():
    assert len(texts.pieces(["abc" * 50, "def" * 50], 200, random.Random(0))) == 200
    with pytest.raises(LessError, match="the texts have 3 letters, and 200 are wanted"):
        texts.pieces(["abc"], 200, random.Random(0))


def test_the_three_files_are_written_and_chats_stand_under_the_template(tmp_path, monkeypatch, capsys):
    model, tokenizer = load_model("")
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(texts, "load_model", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr(texts, "AT_ONCE", 2)
    asked, generate = [], model.generate

    def generate_and_note(**inputs):
        asked.extend(tokenizer.batch_decode(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", generate_and_note)
    (tmp_path / "prose.txt").write_text("It was night.\nNobody spoke.\n" * 400)
    arguments = ["--model", "any", "--out", str(tmp_path / "out"), "--windows", "1", "--questions", "3", "--new", "4"]
    assert texts.main([*arguments, "--prose", str(tmp_path / "prose.txt")]) == 0
    assert {file.name: len(file.read_text()) > 1000 for file in (tmp_path / "out").iterdir()} == dict.fromkeys(
        ("code.txt", "prose.txt", "chats.txt"), True
    )
    chats = (tmp_path / "out" / "chats.txt").read_text()
    assert chats.count("<user>") == chats.count("</><assistant>") == 3
    assert [text.endswith("</><assistant>") for text in asked] == [True] * 3
    assert "3 of 3 questions are answered" in capsys.readouterr().err
    assert texts.main(arguments) == 2
    tokenizer.chat_template = None
    assert texts.main([*arguments, "--prose", str(tmp_path / "prose.txt")]) == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(("budget", "positions"), [(9, 400), (900, 2000)])
def test_a_conversation_holds_the_same_bytes_behind_every_turn_and_full_caches_read_the_same_text(
    budget, positions, tmp_path, capsys
):
    model, tokenizer = make_talking(max_position_embeddings=positions)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--turns", "5", "--new", "4", "--budget", str(budget)]
    assert conversation.main([*options, "--out", str(tmp_path / "out.json")]) == 0
    less, last, full = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["cache"] for row in (less, last, full)] == ["LESS", "full, the last turns alone", "full"]
    assert [*less["said"]] == [*last["said"]] == [*full["said"]] == [*conversation.ASKED]
    behind = [one["tokens"] for one in less["behind"]]
    assert len(behind) == 5
    assert behind == sorted({*behind})
    assert len({one["bytes"] for one in less["behind"]}) == 1
    if budget > less["tokens"]:  # nothing is evicted
        assert (less["said"], less["tokens"]) == (full["said"], full["tokens"])
    else:  # the first turns are out of the context
        assert 0 < last["tokens"] < full["tokens"]
    assert "turn 1: " in capsys.readouterr().err
