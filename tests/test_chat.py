"""Conversations: what goes through the cache is the template's text, each token once, and what cannot be so is refused."""

import warnings

import pytest
import torch
from caches import assert_same_states, feed
from models import TEMPLATE, make_kernels, make_talking

from less_fast import H2O, LessCache, LessError, Window
from less_fast.chat import Conversation

GREEDY = dict(do_sample=False)


@pytest.fixture(scope="module")
def talking():
    return make_talking()


def begin(talking, policy=H2O(6, 6), system="", **changes):
    model, tokenizer = talking
    return Conversation(model, tokenizer, LessCache.for_model(model, policy, make_kernels(model), **changes), system)


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def says(tokenizer, *words):
    """Options with which the model says these words, each as tokens of its own, whatever it would have said."""
    script = iter([token for word in words for token in encoded(tokenizer, word)])
    return GREEDY | dict(prefix_allowed_tokens_fn=lambda row, ids: [next(script)])


@pytest.mark.parametrize("policy", [H2O(6, 6), Window(999)], ids=["h2o", "full"])
def test_every_token_of_the_templates_text_goes_through_the_cache_once_and_in_its_order(talking, policy):
    """By hand: the text between answers, and the answers as they were written, in the same pieces."""
    model, tokenizer = talking
    conversation = begin(talking, policy, system="Be brief.")
    by_hand = LessCache.for_model(model, policy, make_kernels(model))
    fed = []
    hook = model.model.register_forward_pre_hook(lambda *call: fed.extend(call[2]["input_ids"][0].tolist()), with_kwargs=True)
    turns = [("Hello", 9, True), ("def f(x):\n", 5, False), ("more", 7, True)]
    text, ids, logits = "<|turn|>system\nBe brief.", torch.empty(1, 0, dtype=torch.long), []
    for said, new, ends in turns:
        end = dict(forced_eos_token_id=encoded(tokenizer, "<|end|>")) if ends else {}
        answer = conversation.answer(said, max_new_tokens=new, **GREEDY, **end)
        between = encoded(tokenizer, f"{text}<|end|>\n<|turn|>user\n{said}<|end|>\n<|turn|>assistant\n")
        written = conversation.ids[0, -(new - ends) :]
        assert tokenizer.decode(written) == answer
        assert conversation.ids.shape[1] == ids.shape[1] + len(between) + new - ends
        ids, before = torch.cat([ids, torch.tensor([between]), written[None]], 1), by_hand.get_seq_length()
        text = ""  # an answer that was cut off, or ended with a token that the cache has not seen, ends as the template says
        assert torch.equal(conversation.ids, ids)
        seen = conversation.cache.get_seq_length()
        assert seen == ids.shape[1] - (not ends)
        assert fed == ids[0, :seen].tolist()
        count = len(fed)
        logits = feed(model, ids[:, before:seen], by_hand, prompt=seen - before - new + 1)
        del fed[count:]
        assert torch.equal(logits[0, -new:].argmax(-1)[: new - ends], written)
        assert_same_states(conversation.cache, [by_hand], [0])
    hook.remove()


def test_with_room_for_everything_answers_are_those_of_a_full_cache_that_reads_all_again(talking):
    model, tokenizer = talking
    conversation = begin(talking, H2O(200, 200))
    for said in ("Hello", "def f(x):\n", "more"):
        answer = conversation.answer(said, max_new_tokens=8, **GREEDY)
        before = conversation.ids[:, :-8]
        again = model.generate(before, attention_mask=torch.ones_like(before), max_new_tokens=8, **GREEDY)
        assert tokenizer.decode(again[0, before.shape[1] :]) == answer


def test_a_conversation_far_beyond_the_budget_holds_no_more_bytes_than_at_its_beginning(talking):
    conversation = begin(talking)
    conversation.answer("a" * 20, max_new_tokens=5, **GREEDY)
    held = conversation.cache.memory()
    for _ in range(10):
        conversation.answer("a" * 20, max_new_tokens=20, **GREEDY)
    assert conversation.cache.memory() == held
    assert conversation.cache.get_seq_length() > 200


TRIMMING = TEMPLATE.replace("message.content", "message.content | trim")


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING], ids=["exact", "trimming"])
@pytest.mark.parametrize(
    "words",
    [["return"], ["re", "tu", "rn"], [" return \n"], ["x"], [], ["  "]],
    ids=["one piece", "unusual tokens", "white space around", "the stand-in itself", "nothing", "white space alone"],
)
def test_an_answer_stays_as_it_was_written_and_its_end_is_the_templates(template, words):
    talking = _, tokenizer = make_talking(template)
    conversation = begin(talking)
    assert conversation.answer("Hi", **says(tokenizer, *words, "<|end|>")) == "".join(words)
    with warnings.catch_warnings(action="error"):
        conversation.answer("Go on", max_new_tokens=1, **GREEDY)
    start = "<|turn|>user\nHi<|end|>\n<|turn|>assistant\n"
    pieces = [start, *words, "<|end|>\n<|turn|>user\nGo on<|end|>\n<|turn|>assistant\n"]
    assert conversation.ids[0, :-1].tolist() == [token for piece in pieces for token in encoded(tokenizer, piece)]


@pytest.mark.parametrize("said", ["0", "0 or 1, 10 or 0?", "1"])
def test_whatever_numbers_the_user_says_the_whole_turn_is_fed(said):
    """A number stands in for the answer where the template is asked what stands behind it."""
    talking = _, tokenizer = make_talking()
    conversation = begin(talking)
    conversation.answer("Hi", **says(tokenizer, "return", "<|end|>"))
    before = conversation.ids[0].tolist()
    conversation.answer(said, **says(tokenizer, "x", "<|end|>"))
    between = encoded(tokenizer, f"<|end|>\n<|turn|>user\n{said}<|end|>\n<|turn|>assistant\n")
    assert conversation.ids[0].tolist() == [*before, *between, *encoded(tokenizer, "x")]


def test_half_a_character_at_the_end_of_an_answer_is_no_trouble(talking):
    _, tokenizer = talking
    conversation = begin(talking)
    (*_, first, _), euro = encoded(tokenizer, "€"), tokenizer.decode(encoded(tokenizer, "€")[:-1])
    assert "\ufffd" in euro
    assert conversation.answer("Hi", max_new_tokens=2, **says(tokenizer, "€")) == euro
    with warnings.catch_warnings(action="error"):
        conversation.answer("Go on", max_new_tokens=1, **GREEDY)
    assert first in conversation.ids[0].tolist()


@pytest.mark.parametrize("end", ["<|end|>", "<|endoftext|>", "return"])
def test_an_answer_ends_where_the_generation_config_or_the_tokenizer_or_its_name_ends_a_text(end):
    talking = model, tokenizer = make_talking()
    model.generation_config.eos_token_id = encoded(tokenizer, "return")[0]
    tokenizer.eos_token = "<|end|>"
    conversation = begin(talking)
    assert conversation.answer("Hi", max_new_tokens=3, **says(tokenizer, "import", end, "import")) == "import"
    assert conversation.cache.get_seq_length() == conversation.ids.shape[1]


THINKING = TEMPLATE.replace("message.content", "message.content.split('#')[-1]")


def test_a_template_that_leaves_thinking_out_later_is_warned_of_and_the_cache_keeps_it():
    talking = _, tokenizer = make_talking(THINKING)
    conversation = begin(talking)
    conversation.answer("Hi", **says(tokenizer, "import#", "return", "<|end|>"))
    with pytest.warns(UserWarning, match="shows earlier turns in another way than the cache was fed"):
        conversation.answer("Go on", **says(tokenizer, "return", "<|end|>"))
    with warnings.catch_warnings(action="error"):  # which has not changed since
        conversation.answer("On", **says(tokenizer, "return", "<|end|>"))
    turns = [("Hi", "import#return"), ("Go on", "return"), ("On", "return")]
    text = [f"<|turn|>user\n{said}<|end|>\n<|turn|>assistant\n{answer}" for said, answer in turns]
    assert tokenizer.decode(conversation.ids[0]) == "<|end|>\n".join(text)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + TEMPLATE,
        "{{ messages[-1].content }}" + TEMPLATE,
        TEMPLATE + "{% if add_generation_prompt %}<think></think>{% endif %}",
        TEMPLATE.replace("message.content", "message.content | upper"),
    ],
    ids=["a count in front", "the last words in front", "a generation prompt of its own", "other letters"],
)
def test_what_was_fed_stays_as_it_was_fed_whatever_the_template_now_makes_of_it(template):
    talking = _, tokenizer = make_talking(template)
    conversation = begin(talking)
    conversation.answer("Hi", **says(tokenizer, "return", "<|end|>"))
    before = conversation.ids
    with pytest.warns(UserWarning, match="the cache keeps them as they were fed"):
        conversation.answer("Go on", **says(tokenizer, "x", "<|end|>"))
    said, opening = "GO ON" if "upper" in template else "Go on", "<think></think>" * ("think" in template)
    between = encoded(tokenizer, f"<|end|>\n<|turn|>user\n{said}<|end|>\n<|turn|>assistant\n{opening}")
    assert conversation.ids.tolist() == [[*before[0].tolist(), *between, *encoded(tokenizer, "x")]]


def test_a_template_that_does_not_tell_where_answers_end_is_refused():
    talking = _, tokenizer = make_talking("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    conversation = begin(talking)
    conversation.answer("Hi", **says(tokenizer, "return", "<|end|>"))
    seen, ids = conversation.cache.get_seq_length(), conversation.ids
    with pytest.raises(LessError, match="does not tell where they end, so nobody knows what stands behind the last one"):
        conversation.answer("Go on", max_new_tokens=1)
    assert conversation.cache.get_seq_length() == seen
    assert conversation.ids is ids


def test_a_conversation_goes_on_after_midnight_under_a_template_that_writes_the_date():
    talking = _, tokenizer = make_talking("{{ today }}\n" + TEMPLATE)
    conversation, written = begin(talking), tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **named: written(*args, **named, today=today)
    today = "Saturday"
    conversation.answer("Hi", **says(tokenizer, "return", "<|end|>"))
    today = "Sunday"
    with pytest.warns(UserWarning, match="another date"):
        conversation.answer("Go on", **says(tokenizer, "return", "<|end|>"))
    with warnings.catch_warnings(action="error"):
        conversation.answer("On", **says(tokenizer, "return", "<|end|>"))
    text = tokenizer.decode(conversation.ids[0])
    assert text.startswith("Saturday\n")
    assert "Sunday" not in text


def test_a_turn_whose_answer_may_go_beyond_the_models_positions_is_refused_before_it_is_fed(talking, monkeypatch):
    conversation, asked = begin(talking), []
    monkeypatch.setattr("less_fast.chat.check_length", lambda model, length: asked.append(length))
    conversation.answer("Hi", max_new_tokens=5, **GREEDY)
    assert asked == [conversation.ids.shape[1]]  # with an answer that was cut off

    def refuse(model, length):
        raise LessError(f"{length} tokens")

    monkeypatch.setattr("less_fast.chat.check_length", refuse)
    seen, ids = conversation.cache.get_seq_length(), conversation.ids
    with pytest.raises(LessError, match="tokens"):
        conversation.answer("more", max_new_tokens=7)
    assert (conversation.cache.get_seq_length(), len(conversation.messages)) == (seen, 2)
    assert conversation.ids is ids


def test_a_turn_that_the_template_does_not_take_is_refused_with_its_reason():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    conversation = begin(make_talking(refuses + TEMPLATE), system="Be brief.")
    with pytest.raises(LessError, match="does not take this turn: System role not supported"):
        conversation.answer("Hi")
    assert conversation.cache.get_seq_length() == 0


def test_a_tokenizer_without_a_template_and_a_cache_of_another_text_are_refused(talking):
    model, _ = talking
    with pytest.raises(LessError, match=r"has no chat template, .* take one that was"):
        begin(make_talking(None))
    cache = LessCache.for_model(model, H2O(6, 6))
    feed(model, torch.tensor([[1, 2, 3]]), cache, prompt=3)
    with pytest.raises(LessError, match="this cache has seen another text"):
        Conversation(*talking, cache)
