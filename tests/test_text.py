"""Texts as tokens and back: what tokenizers put before a text, long texts in pieces, and words behind others."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from less_fast import text
from less_fast.demo import MODEL, corpus
from less_fast.text import Printer, beginning, text_behind, tokenized, windows

EMBEDDED = AutoTokenizer.from_pretrained(MODEL)


def words_of(template, **names):
    """A tokenizer of single letters that writes its special tokens by that template."""
    own = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(["<|end|>", "[gMASK]", "<sop>", *"abc"])}, "<|end|>")
    )
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("[gMASK]", 1), ("<sop>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|end|>", **names)


def llama_like():
    """As Llama 2's: spaces are letters, one is put before a text, and the first one is taken off what is decoded."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(97, 123)), "▁cat", "he", "▁t", "do", "\n\n"]
    merges = [("▁", "t"), ("h", "e"), ("d", "o"), ("\n", "\n")]
    own = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LLAMA = llama_like()
CAT = LLAMA.convert_tokens_to_ids("▁cat")


@pytest.mark.parametrize(
    ("template", "names", "wanted"),
    [
        ("[gMASK] <sop> $A", {}, [1, 2]),
        ("[gMASK] <sop> $A", {"bos_token": "<sop>"}, [1, 2]),
        ("<sop> $A", {"cls_token": "<sop>"}, [2]),
        ("<sop> $A [gMASK]", {"bos_token": "<sop>"}, [2]),
        ("$A [gMASK]", {"bos_token": "<sop>"}, []),
        ("$A", {"bos_token": "<sop>"}, []),
    ],
)
def test_windows_begin_with_all_that_the_tokenizer_puts_before_a_text_and_nothing_else(template, names, wanted):
    tokenizer = words_of(template, **names)
    assert beginning(tokenizer) == wanted
    found = windows(tokenizer, ["a b c " * 20], 8, 2)
    assert found[:, : len(wanted)].tolist() == [wanted] * 2
    assert not set(found[:, len(wanted) :].flatten().tolist()) & {1, 2}


def test_some_windows_come_from_anywhere_in_the_text():
    every = windows(EMBEDDED, [" ".join(map(str, range(200)))], 20)
    wanted, seen = {*map(tuple, every.tolist())}, set()
    assert len(wanted) == len(every) > 10
    for seed in range(60):
        some = [*map(tuple, windows(EMBEDDED, [" ".join(map(str, range(200)))], 20, 3, seed).tolist())]
        assert len({*some} & wanted) == 3
        seen |= {*some}
    assert seen == wanted


@pytest.mark.parametrize("tokenizer", [EMBEDDED, LLAMA], ids=["of bytes", "of words"])
@given(
    some=st.lists(st.sampled_from(["the dog", " cat", "\n", "  ", "\n\n", "he", "x = 1", "日本", "\t"]), max_size=60),
    at_once=st.integers(1, 50),
)
@example(some=["he", "\n\n", "he"], at_once=2)  # a token of two lines' ends, and a cut would be between them
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer, some, at_once):
    whole, before = tokenizer("".join(some), add_special_tokens=False)["input_ids"], text.LETTERS_AT_ONCE
    text.LETTERS_AT_ONCE = at_once
    try:
        (found,) = tokenized(tokenizer, ["".join(some)])
    finally:
        text.LETTERS_AT_ONCE = before
    assert found.tolist() == [*whole, tokenizer.eos_token_id]


def test_long_texts_are_cut_where_few_letters_are_tokenized_together(monkeypatch):
    source, lengths = next(text for _, text in corpus.documents("validation") if len(text) > 20_000), []
    whole = EMBEDDED(source, add_special_tokens=False)["input_ids"]

    def counting(piece, **options):
        lengths.append(len(piece))
        return EMBEDDED(piece, **options)

    counting.eos_token_id = None
    monkeypatch.setattr(text, "LETTERS_AT_ONCE", 2_000)
    assert np.array_equal(np.concatenate(tokenized(counting, [source])), whole)
    assert max(lengths) < 2_000 + 500
    assert sum(lengths) < 1.5 * len(source)


def test_what_is_new_is_spelled_behind_what_stands_before():
    before = LLAMA("the dog")["input_ids"]
    assert text_behind(LLAMA, before, [CAT, CAT]) == " cat cat"
    assert text_behind(LLAMA, [], [CAT, CAT]) == "cat cat"
    assert text_behind(LLAMA, [*before, *[LLAMA.eos_token_id] * 20], [CAT, CAT]) == " cat cat"
    assert text_behind(LLAMA, before, [CAT, LLAMA.eos_token_id]) == " cat"


@pytest.mark.parametrize("tokenizer", [EMBEDDED, LLAMA], ids=["of bytes", "of words"])
@given(
    words=st.lists(st.sampled_from(["the", " cat", "dog", "€", "\n", "日本", " "]), max_size=12),
    before=st.sampled_from(["the dog", ""]),
    cut=st.integers(0, 2),
)
def test_what_is_printed_token_by_token_is_the_text_of_all_tokens(tokenizer, words, before, cut):
    """Half a character at the end, too, and the next text behind it, without its prompt."""
    before, new = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, "".join(words)))
    new = [token for token in new if token != tokenizer.unk_token_id][: len(new) - cut]
    shown, said = Printer(tokenizer, before), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, end, flush: said.append(text + end))
        for _ in range(2):
            said.clear()
            shown.put(torch.tensor([before or [CAT]]))
            assert not said
            for token in new:
                shown.put(torch.tensor([token]))
                assert not any("\ufffd" in part for part in said)
            shown.end()
            whole, shown_before = (tokenizer.decode(ids, skip_special_tokens=True) for ids in ([*before, *new], before))
            assert "".join(said) == whole[len(shown_before) :] + "\n"
            before = [*before, *new]


def test_several_texts_are_not_printed_at_once():
    with pytest.raises(ValueError, match="one text is printed at a time, and 2 come"):
        Printer(EMBEDDED).put(torch.ones(2, 3, dtype=torch.long))
