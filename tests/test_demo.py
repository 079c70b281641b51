"""The embedded model: the corpus it comes from, its files, and the claim that LESS makes on it."""

import json
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from less_fast import H2O, Lambda, LessError, LessKernels, token_kinds
from less_fast.demo import KERNELS, MODEL, PAPER_KERNELS, corpus, own_decoder
from less_fast.measuring.compare import compare
from less_fast.text import dataset_texts, tokenized, windows


@pytest.fixture(scope="module")
def embedded():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(MODEL)


def test_the_splits_share_no_file_and_no_text():
    documents = {split: dict(corpus.documents(split)) for split in corpus.SPLITS}
    assert all(documents.values())
    for one in corpus.SPLITS:
        for other in corpus.SPLITS:
            if one < other:
                assert not documents[one].keys() & documents[other].keys()
                assert not set(documents[one].values()) & set(documents[other].values())


def test_tests_of_held_out_modules_are_not_trained_on():
    held_out = {path.removesuffix(".py") for split in ("validation", "test") for path, _ in corpus.documents(split)}
    train = {path for path, _ in corpus.documents("train")}
    assert not {f"test/test_{module}.py" for module in held_out} & train


def test_the_tokenizer_gives_any_text_back(embedded):
    _, tokenizer = embedded
    for text in ("def f(x):\n\treturn  x\n", "naïve 日本語 \x00\r\n", "  <b> \n\n\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_windows_are_the_same_for_the_same_seed_and_come_from_the_text(embedded):
    _, tokenizer = embedded
    texts = [text for _, text in corpus.documents("validation")]
    first, again, other = (windows(tokenizer, texts, 64, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    everything = windows(tokenizer, texts, 64)
    stream = torch.from_numpy(np.concatenate(tokenized(tokenizer, texts)))
    assert sorted(everything.tolist()) == sorted(stream[: everything.numel()].view(-1, 64).tolist())
    joined = tokenizer.eos_token.join(texts)
    assert all(tokenizer.decode(window).strip("\ufffd") in joined for window in first)
    with pytest.raises(LessError, match="give more text"):
        windows(tokenizer, ["short"], 64, 1)


def test_every_window_begins_with_what_the_tokenizer_puts_before_a_text():
    tokenizer, texts = AutoTokenizer.from_pretrained(MODEL), ["one text of some words", "and another one"]
    plain, stream = windows(tokenizer, texts, 4), np.concatenate(tokenized(tokenizer, texts))
    assert sorted(plain.tolist()) == sorted(stream[: plain.numel()].reshape(-1, 4).tolist())
    begin = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    begun = windows(tokenizer, texts, 5)
    assert torch.equal(begun[:, 0], torch.full((len(plain),), begin[1]))
    assert torch.equal(begun[:, 1:], plain)
    with pytest.raises(LessError, match="a shorter length"):
        windows(tokenizer, texts, 1)


def test_texts_come_from_a_data_set_until_there_are_enough(tmp_path):
    texts = [f"line {number}" for number in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text, "body": text.upper()}) for text in texts))
    assert dataset_texts(str(tmp_path), 10**6) == texts
    assert dataset_texts(str(tmp_path), 15) == texts[:3]
    assert dataset_texts(f"{tmp_path},,train,body", 1) == ["LINE 0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (",,test", "no texts from"),
        (",,train,none", "no texts from"),
        (",,train,number", "no texts from"),
        ("/empty", "no texts from"),
        (",,train,text,more", "a data set is NAME"),
    ],
)
def test_data_sets_that_are_not_there_are_refused(tmp_path, name, message):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a", "number": 1}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").touch()
    with pytest.raises(LessError, match=message):
        dataset_texts(str(tmp_path) + name, 1)


def test_a_data_set_without_rows_or_of_a_script_is_refused(embedded, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([]))
    with pytest.raises(LessError, match="the text has 0 tokens"):
        windows(embedded[1], dataset_texts("any", 1), 64, 1)

    def no_scripts(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", no_scripts)
    with pytest.raises(LessError, match="no texts from the data set 'any': RuntimeError Dataset scripts"):
        dataset_texts("any", 1)


def test_a_data_set_without_the_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LessError, match=r"pip install 'less-kv\[eval\]'"):
        dataset_texts("any", 1)


def test_the_embedded_tokenizers_punctuation_and_special_tokens_are_known(embedded):
    _, tokenizer = embedded
    kinds = token_kinds(tokenizer)
    assert kinds.shape == (len(tokenizer),)
    assert (kinds == 2).nonzero().flatten().tolist() == [tokenizer.eos_token_id]
    known = {tokenizer.decode([token]): kind for token, kind in enumerate(kinds.tolist())}
    for text in ("(", "):", " =", "_", ' """', "',", "####"):
        assert known[text] == 1, text
    for text in ("import", " self", "x", "0", "\n", " ", "\n    ", "\t", "'s"):
        assert known[text] == 0, text


def test_every_special_token_is_special_even_one_that_looks_like_punctuation_or_was_added():
    kinds = {"<unk>": 2, "word": 0, ",": 1, "...": 1, "a,": 0, "7": 0, "__": 2, "</s>": 2, "<s>": 2, "|": 1, "日": 0}
    model = Tokenizer(models.WordLevel({text: index for index, text in enumerate(kinds)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="__")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **names)
    assert token_kinds(tokenizer).tolist() == [*kinds.values()]
    tokenizer.add_special_tokens({"sep_token": "<sep>"})
    tokenizer.add_tokens(["->", "<b>"])
    tokenizer.add_tokens(["<turn>"], special_tokens=True)  # special, though no name is given to it
    assert token_kinds(tokenizer).tolist() == [*kinds.values(), 2, 1, 0, 2]


def test_a_vocabulary_with_holes_has_a_kind_for_every_id():
    model = Tokenizer(models.WordLevel({"<unk>": 0, "word": 2, ",": 5}, unk_token="<unk>"))
    assert token_kinds(PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")).tolist() == [2, 0, 0, 0, 0, 1]


def test_less_beats_the_bare_policy_and_equal_memory_on_held_out_text(embedded):
    """The claim in small; `less-kv compare` measures it on more text."""
    model, tokenizer = embedded
    texts = (text for _, text in corpus.documents("test"))
    kernels = {"ours": LessKernels.from_pretrained(KERNELS), "paper": LessKernels.from_pretrained(PAPER_KERNELS)}
    rows = compare(model, windows(tokenizer, texts, 512, 6), [H2O(13, 12)], kernels)
    full, bare, plus, ours, paper, plus_by_head, ours_by_head = rows
    assert full.perplexity < ours.perplexity < paper.perplexity < plus.perplexity < bare.perplexity
    assert full.perplexity < ours_by_head.perplexity < plus_by_head.perplexity < ours.perplexity
    assert ours.bytes == ours_by_head.bytes == paper.bytes <= plus.bytes == plus_by_head.bytes
    assert [row.kernels for row in rows] == [None, None, None, "ours", "paper", None, "ours"]


def test_the_embedded_kernels_bring_tables_of_every_total_for_h2o_and_lambda():
    kernels = LessKernels.from_pretrained(KERNELS)
    for policy in (H2O(10, 10), H2O(26, 25), H2O(51, 51), Lambda(4, 16), Lambda(4, 98)):
        table = np.array(kernels.budgets_for(policy))
        assert table.shape == (4, 4)
        assert table.sum() == 16 * policy.budget
        assert table.max() > 3 * policy.budget


@pytest.mark.parametrize(("folder", "family"), [(KERNELS, "exponential"), (PAPER_KERNELS, "paper")])
def test_the_shipped_files_say_where_they_come_from(folder, family):
    training = json.loads((MODEL / "training.json").read_text())
    assert set(training["corpus"]) == set(corpus.SPLITS)
    kernels = LessKernels.from_pretrained(folder)
    assert kernels.sizes["family"] == kernels.about["recipe"].get("family", "paper") == family
    assert kernels.about["policy"].startswith("H2O")
    assert kernels.about["identity"]


def test_the_model_can_be_rebuilt_from_nothing(tmp_path, monkeypatch):
    """The script's whole path with two training steps and a library of some files; the shipped model took 20 million tokens."""
    out, library = tmp_path / "model", tmp_path / "library"
    for split, letters in {"train": 400_000, "validation": 40_000, "test": 1}.items():
        for path, text in corpus.documents(split):
            (library / path).parent.mkdir(parents=True, exist_ok=True)
            (library / path).write_text(text, encoding="utf-8")
            if (letters := letters - len(text)) <= 0:
                break
    arguments = ["--out", out, "--tokens", 2048, "--batch", 1]
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    monkeypatch.setattr(sys, "argv", ["build_model", *map(str, arguments)])
    runpy.run_module("paper_checks.build_model", run_name="__main__")
    shutil.rmtree(library)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 2048
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("seed", range(3))
def test_a_decoder_of_ones_own_with_room_for_all_writes_what_causal_attention_writes(seed):
    torch.manual_seed(seed)
    decoder, ids = own_decoder.Decoder(), torch.randint(own_decoder.VOCABULARY, (2, 10))
    written = torch.cat([token for token, _ in own_decoder.generate(decoder, ids, new=12, policy=H2O(11, 10))], 1)

    def dense(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for _ in range(12):
        logits = decoder(ids, 0, [dense] * own_decoder.LAYERS)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids[:, 10:])
    assert written.unique().numel() > 5  # it does not repeat itself


def test_a_decoder_of_ones_own_holds_as_much_after_hundred_tokens_as_after_one():
    command = [sys.executable, "-m", "less_fast.demo.own_decoder"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    held = [int(line.split("token")[1].split()[1].replace(",", "")) for line in lines]
    assert len(held) == 100
    assert len({*held}) == 1
