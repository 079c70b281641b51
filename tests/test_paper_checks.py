"""The checks of the paper's claims: every script runs, and a planted error in what it looks at changes its verdict."""

import copy
import functools
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks.mutual import utils as mutual
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import paper_checks.__main__ as command
from less_fast import H2O, LessCache, LessError, LessKernels
from less_fast.demo import KERNELS, MODEL, PAPER_KERNELS
from less_fast.layer.slots import Slots
from less_fast.layer.state import LayerState
from less_fast.measuring.compare import contenders
from less_fast.measuring.harness import CachedLM, LessLM
from less_fast.measuring.reading import Reader
from less_fast.text import windows
from paper_checks import answers, conversation, exact, harness, real_model, streams, summarization, trained
from paper_checks.check import FAILS, HOLDS, IN_PART, MOST, UNMEASURED, Subject, verdict

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def here():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    kernels = [LessKernels.from_pretrained(where) for where in (KERNELS, PAPER_KERNELS)]
    return Subject(model, AutoTokenizer.from_pretrained(MODEL), *kernels, length=256, quick=True)


@pytest.fixture(scope="module")
def healthy(here):
    """What a check finds where nothing is broken, by its name."""
    return functools.cache(lambda name: check(name, here))


def named(name):
    return getattr(importlib.import_module(f"paper_checks.{command.NAMES[name]}"), name)


def check(name, subject):
    return named(name)(subject)


@pytest.mark.parametrize("name", command.NAMES)
def test_every_check_runs_and_says_what_it_finds(name, healthy):
    finding = healthy(name)
    assert finding.verdict in (HOLDS, IN_PART, FAILS, UNMEASURED)
    assert all(isinstance(text, str) and text for text in (named(name).claim, named(name).paper, finding.sentence))
    json.dumps(finding.figures)
    assert all(len(row) == len(finding.headings) for row in finding.rows)


def test_a_report_holds_every_check_and_its_rows(tmp_path, capsys):
    names = ["memory", "residual_rank"]
    assert command.main([*names, "--quick", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert [*report["checks"]] == names
    assert report["about"]["quick"] is True
    text = (tmp_path / "report.md").read_text()
    for name in names:
        assert f"| {named(name).claim} | {named(name).paper} | **" in text
        assert report["checks"][name]["sentence"] in text
    assert "| layer | of the map in 8 | of the residual in 8 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexiti"], "no check is called perplexiti"),
        (["--model", "some/model"], "--model needs --kernels"),
        (["memory", "--tasks", "boolq"], "--tasks is for the check harness"),
        (["memory", "--summaries", "a,b,c,d,e"], "--summaries is for the check summarization"),
        (["--summaries", "news"], "--summaries takes NAME,CONFIG,SPLIT,ARTICLE,SUMMARY"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_library_that_is_missing_is_named_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "paper_checks.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command.main(["memory", "harness", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "lm_eval" in (message := capsys.readouterr().err)
    assert "pip install 'less-kv[eval]'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "no device 'tpu' here"),
        (["--model", "/no/such/folder", "--kernels", "x"], "no usable model at /no/such/folder"),
        (["--kernels", "none"], "the checks are about kernels"),
        (["--out", "/dev/null"], "/dev/null"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_computed(arguments, message, tmp_path, capsys):
    assert command.main(["memory", "--quick", "--out", str(tmp_path / "out"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [False, True])
def test_windows_for_training_are_none_of_those_held_out(own, here):
    subject = replace(here, texts=[f"{number} = {number}\n" for number in range(10_000)] if own else None)
    training, held_out = (subject.windows(MOST[split], split=split).tolist() for split in ("train", "test"))
    assert len(training) == 8
    assert len(held_out) == 2
    assert not [window for window in training if window in held_out]


def test_data_are_files_and_data_sets(tmp_path, capsys):
    texts = [f"{number} = {number}\n" for number in range(10_000)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    (tmp_path / "some.txt").write_text("a file")
    data, out = ["--data", f"{tmp_path},,train,body", "--data", str(tmp_path / "some.txt")], tmp_path / "out"
    assert command.subject(command.options(["--quick", *data])).texts == [*texts, "a file"]
    assert command.main(["memory", "tables_of_other_texts", "--quick", *data, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["about"]["text"] == f"{tmp_path},,train,body, {tmp_path}/some.txt"
    assert report["checks"]["tables_of_other_texts"]["verdict"] == UNMEASURED


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}/nowhere", "no texts from the data set"),
        ("{},,train,body", "0 windows of 256, and 1 are wanted"),
        ("{}/short.txt", "11 windows of 256 tokens, a third of them for training, and 8 are wanted for that"),
    ],
)
def test_data_that_cannot_serve_are_refused(data, message, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(json.dumps({"body": "too short"}))
    (tmp_path / "short.txt").write_text("x = 1\n" * 750)
    assert command.main(["memory", "--quick", "--data", data.format(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_verdict_needs_all_parts_to_hold():
    assert [verdict(parts) for parts in ([True] * 2, [True, False], [False] * 2)] == [HOLDS, IN_PART, FAILS]


def without_state(subject):
    """The same subject with kernels that add nothing."""
    broken = copy.deepcopy(subject)
    for kernels in broken.families().values():
        for layer in kernels.layers:
            layer.k3.fill_(-1e3 if kernels is broken.kernels else 0)
    return broken


@pytest.mark.parametrize("name", ["perplexity", "attention_maps", "performer", "long_sequences", "unequal_budgets"])
def test_kernels_that_add_nothing_change_the_verdict(name, here, healthy):
    broken = check(name, without_state(here)).verdict
    assert healthy(name).verdict != broken
    assert broken in (IN_PART, FAILS)


def test_transferred_kernels_that_add_nothing_or_do_as_well_as_matched_ones_change_the_verdict(here, monkeypatch):
    weak, strong, nothing = here.paper_kernels, here.kernels, without_state(here)

    def verdict_of(transferred, matched, subject=here):
        monkeypatch.setattr(Subject, "train", lambda subject, policy: transferred if isinstance(policy, H2O) else matched)
        return check("transfer", subject).verdict

    assert verdict_of(weak, strong) == HOLDS
    assert verdict_of(strong, weak) == verdict_of(nothing.kernels, strong) == IN_PART
    assert verdict_of(weak, strong, nothing) == IN_PART


def test_a_rank_that_is_ignored_or_too_small_changes_the_verdict_on_kernel_sizes(here, monkeypatch):
    by_rank = {1: here.paper_kernels, 8: here.kernels}
    monkeypatch.setattr(Subject, "train", lambda subject, policy, rank, hidden: by_rank[rank])
    for kernels in by_rank.values():
        monkeypatch.setitem(kernels.about, "layers", {"left": [[0.5]]})
    assert check("kernel_size", here).verdict == HOLDS
    monkeypatch.setattr("paper_checks.trained.SUFFICES", 1.1)
    assert check("kernel_size", here).verdict == IN_PART
    monkeypatch.undo()
    monkeypatch.setattr(Subject, "train", lambda subject, policy, rank, hidden: here.kernels)
    monkeypatch.setitem(here.kernels.about, "layers", {"left": [[0.5]]})
    assert check("kernel_size", here).verdict == IN_PART


def test_uniform_tables_change_the_verdict_on_tables_of_other_texts(here, healthy, monkeypatch):
    assert healthy("tables_of_other_texts").verdict in (HOLDS, IN_PART)
    shape = here.kernels.sizes
    monkeypatch.setattr(trained, "measure", lambda *rest: None)  # curves that nobody asks
    monkeypatch.setattr(trained, "table", lambda *rest, less: [[here.policies()[0].budget] * shape["kv_heads"]] * shape["layers"])
    assert trained.tables_of_other_texts(here).verdict == FAILS


def test_swapped_tables_change_the_verdict_on_tables_of_other_texts(here, monkeypatch):
    code = [here.windows(1, split="train")[:1].tolist(), here.windows(2).tolist()]

    def kind(windows):
        return "code" if windows.tolist() in code else "prose"

    def losses(subject, windows, policy=None, kernels=None, budgets=None):
        loss = {None: 3.0, "uniform": 2.0, kind(windows): 1.4}.get(budgets, 1.6) if policy else 1.0
        return loss + torch.tensor([0.0, 0.1], dtype=torch.float64)

    monkeypatch.setattr(trained, "measure", lambda model, windows, *rest: kind(windows))
    monkeypatch.setattr(trained, "table", lambda curves, *rest, less: curves)
    monkeypatch.setattr(Subject, "losses", losses)
    assert trained.tables_of_other_texts(here).verdict == HOLDS
    monkeypatch.setattr(trained, "table", lambda curves, *rest, less: {"code": "prose", "prose": "code"}[curves])
    assert trained.tables_of_other_texts(here).verdict == IN_PART


def test_a_state_that_grows_changes_the_verdict_on_memory(here, healthy, monkeypatch):
    assert healthy("memory").verdict == HOLDS
    memory = LayerState.memory
    monkeypatch.setattr(LayerState, "memory", lambda state: memory(state) | {"entries": int(state.n.sum())})
    assert exact.memory(here).verdict != HOLDS


def test_a_copy_in_the_place_of_replacement_changes_the_verdict(here, healthy, monkeypatch):
    assert healthy("inplace").verdict == HOLDS
    free_at = Slots.free_at

    def elsewhere(slots, *rest):
        free_at(slots, *rest)
        slots.k = slots.k.clone()

    monkeypatch.setattr(Slots, "free_at", elsewhere)
    assert check("inplace", here).verdict != HOLDS


@pytest.mark.parametrize("name", ["parallel_equals_recurrent", "near_ties", "residual_rank"])
def test_a_planted_error_changes_the_verdict_of_the_exact_checks(name, here, healthy, monkeypatch):
    assert healthy(name).verdict in (HOLDS, IN_PART)
    if name == "parallel_equals_recurrent":  # rows swapped
        own = exact.divergence
        monkeypatch.setattr(exact, "divergence", lambda model, ids, *rest: own(model, ids.flip(1), *rest))
    elif name == "near_ties":  # everything is close
        monkeypatch.setattr(exact, "CLOSE", 1e9)
    else:  # no singular value larger than another, in map and residual
        own = torch.linalg.svdvals
        monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: own(torch.eye(matrix.shape[-1]) + 0 * matrix))
    assert check(name, here).verdict == FAILS


def questions(count=5):
    """Requests of the harness, the longest context first: other text, one character, and what follows with an error in it."""
    words = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 2
    contexts = [words[: 20 + 23 * index].rstrip() for index in reversed(range(count))]
    pairs = [(said, end) for said in contexts for end in (words[40:70], "x", words[len(said) :][:20] + "~")]
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def language_model(subject, cache="full", **kwargs):
    caches = contenders(subject.model, [H2O(6, 6)], {"ours": subject.kernels})
    make = next(one.make for one in caches if one.cache == cache)
    return CachedLM(subject.model, subject.tokenizer, make, **kwargs)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
@pytest.mark.parametrize("cache", ["full", "less"])
def test_the_harness_gets_what_a_plain_pass_gives_and_batches_change_nothing(cache, batch_size, here):
    requests = questions()
    scores = language_model(here, cache, batch_size=batch_size).loglikelihood(requests, disable_tqdm=True)
    begun = False
    for request, (nats, greedy) in zip(requests, scores):
        context, whole = here.tokenizer(request.args[0])["input_ids"], here.tokenizer("".join(request.args))["input_ids"]
        ids = torch.tensor([[*context, *whole[len(context) :]]])  # as the harness cuts it
        kept = {} if cache == "full" else {"past_key_values": language_model(here, cache).make(1), "use_cache": True}
        logits = here.model(ids, **kept).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, ids[0, len(context) :, None]).sum()
        torch.testing.assert_close(torch.tensor(nats), expected, rtol=1e-4, atol=1e-4)
        right = logits.argmax(-1) == ids[0, len(context) :]
        assert greedy == right.all()
        begun |= bool(right[0]) and not greedy
    assert begun


def test_the_harness_scores_whole_texts_in_windows_and_writes_until_it_shall_stop(here):
    text = "import os\nimport sys\n\n\ndef main(arguments):\n    return os.path.join(*arguments)\n"
    model = language_model(here, max_length=16)
    (score,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = [here.tokenizer.bos_token_id, *here.tokenizer(text)["input_ids"]]
    assert len(ids) > 20
    nats = 0
    for start in range(1, len(ids), 16):  # the last window has as much context as there is room for
        end = min(start + 16, len(ids))
        seen = torch.tensor([ids[max(0, end - 17) : end]])
        logp = here.model(seen[:, :-1]).logits.log_softmax(-1).gather(-1, seen[:, 1:, None])[0, :, 0]
        nats += logp[start - end :].sum().item()
    assert score == pytest.approx(nats, rel=1e-4)
    model = language_model(here, "less")
    wishes = [{"until": ["\n"], "max_gen_toks": 40}, {"max_gen_toks": 5}]
    requests = [Instance("generate_until", {}, (text + "\n" * index, wish), 0) for index in (1, 2) for wish in wishes]
    texts = model.generate_until(requests, disable_tqdm=True)
    for request, written in zip(requests, texts):
        inputs = here.tokenizer(request.args[0], return_tensors="pt")
        out = here.model.generate(**inputs, past_key_values=model.make(1), max_new_tokens=request.args[1]["max_gen_toks"])
        expected = here.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert written == (expected.split("\n")[0] if "until" in request.args[1] else expected)
    with pytest.raises(ValueError, match="does not fit into max_length=2"):
        language_model(here, max_length=2).loglikelihood(questions(), disable_tqdm=True)
    with pytest.raises(ValueError, match="leave no room"):
        language_model(here, max_length=5).generate([[1, 2]], 5)


@pytest.mark.parametrize("cache", ["full", "less"])
def test_answers_are_those_of_generate_one_by_one(here, cache):
    contexts = [here.tokenizer(text)["input_ids"] for text in ("import os\n", "def main():\n    ", "class A:\n", "x = [1, 2")]
    model = language_model(here, cache)
    one_by_one = [model.generate([context], 24, do_sample=False)[0] for context in contexts]
    ended = sorted({here.tokenizer(text)["input_ids"][-1] for text in one_by_one[:2]})  # so that answers end one by one
    here.model.generation_config.eos_token_id, before = ended, here.model.generation_config.eos_token_id
    try:
        wanted = [model.generate([context], 24, do_sample=False)[0] for context in contexts]
        assert len({len(here.tokenizer(text)["input_ids"]) for text in wanted}) > 1
        assert model.answers(contexts, 24) == wanted
        model.batch_size = 3
        assert model.answers(contexts, 24) == wanted
    finally:
        here.model.generation_config.eos_token_id = before


def test_the_harness_begins_texts_and_empty_contexts_as_the_tokenizer_begins_a_text(here, monkeypatch):
    model = language_model(here, "less", max_length=32)
    first = model.prefix_token_id
    out = here.model.generate(torch.tensor([[first]]), past_key_values=model.make(1), max_new_tokens=4)
    empty = Instance("generate_until", {}, ("", {"max_gen_toks": 4}), 0)
    assert model.generate_until([empty], disable_tqdm=True) == [here.tokenizer.decode(out[0, 1:], skip_special_tokens=True)]
    with pytest.raises(LessError, match="a context holds no token"):
        model.generate([[]], 4)
    monkeypatch.setattr("less_fast.measuring.harness.beginning", lambda tokenizer: [first, 7])
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("import os", "")]
    ids = here.tokenizer("import os")["input_ids"]
    wanted, _ = model.scores([([first, 7], ids)], disable_tqdm=True)[0]
    assert model.loglikelihood_rolling(texts, disable_tqdm=True) == [pytest.approx(wanted), 0]


def test_with_room_for_everything_the_harness_hears_what_its_own_model_of_transformers_says():
    """Text beyond the context, an empty context, continuations of one token and of many; greedy texts until they shall stop."""
    arguments = f"max_length=64,batch_size=4,pretrained={MODEL}"
    theirs = get_model("hf").create_from_arg_string(f"{arguments},dtype=float32,device=cpu")
    ours = get_model("less-kv").create_from_arg_string(f"{arguments},cache=less,budget=100%,budgets=uniform,kernels={KERNELS}")
    text = "import os\n\n\ndef read(path):\n    with open(os.path.join(path)) as file:\n        return file.read()\n" * 4
    long = Instance("loglikelihood", {}, (text, "import sys"), 0)
    requests = [*questions(), long, Instance("loglikelihood", {}, ("", "import sys"), 0)]
    both = [model.loglikelihood(requests, disable_tqdm=True) for model in (theirs, ours)]
    nats = torch.tensor([[score for score, _ in scores] for scores in both])
    torch.testing.assert_close(nats[1], nats[0], rtol=1e-4, atol=1e-4)
    assert [bool(greedy) for _, greedy in both[0]] == [bool(greedy) for _, greedy in both[1]]
    requests = [Instance("loglikelihood_rolling", {}, (part,), 0) for part in (text, text[:50])]
    rolling = [model.loglikelihood_rolling(requests, disable_tqdm=True) for model in (theirs, ours)]
    assert rolling[1] == pytest.approx(rolling[0], rel=1e-4)
    wishes = [{"until": ["\n\n"], "max_gen_toks": 30}, {"until": [], "max_gen_toks": 7}]
    requests = [Instance("generate_until", {}, (text[:end], wish), 0) for end in (30, 90, 300) for wish in wishes]
    texts = [model.generate_until(requests, disable_tqdm=True) for model in (theirs, ours)]
    assert texts[0] == texts[1]
    assert any(texts[0])


def test_the_model_of_the_harness_comes_with_the_package_and_asks_for_lm_eval_by_name(monkeypatch):
    assert get_model("less-kv") is LessLM
    monkeypatch.delitem(sys.modules, "less_fast.measuring.harness")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs lm_eval .*: pip install 'less-kv\[eval\]'"):
        importlib.import_module("less_fast.measuring.harness")


def test_the_harness_takes_the_model_on_its_own_command_line(tmp_path):
    """One question of a task in a file, by the command that the docstring names."""
    model = "cache=less,policy=lambda,budget=8,max_length=64"
    arguments = ["run", "--model", "less-kv", "--model_args", model, "--tasks", yaml_task(tmp_path, "multiple_choice")]
    arguments += ["--device", "cpu", "--limit", "1", "--output_path", str(tmp_path / "out")]
    here = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "less_fast.measuring.harness", *arguments], capture_output=True, text=True, check=False, env=here
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("*.json")
    assert json.loads(file.read_text())["results"]["prints"]["acc,none"] == 1


def test_the_harness_knows_the_model_by_its_name():
    arguments = "cache=baseline+,policy=lambda,budget=5%,budgets=uniform,max_length=400"
    model = get_model("less-kv").create_from_arg_string(arguments, {"batch_size": 4})
    cache = model.make(1)
    model.model(torch.arange(1, 60)[None], past_key_values=cache, use_cache=True)
    assert {policy.budget for layer in cache.layers for policy in layer.state.policies()} == {24}  # 20, and the state's weight
    assert type(cache.layers[0].policy).__name__ == "Lambda"
    assert (model.batch_size, model.max_length) == (4, 400)


def test_the_harness_asks_for_the_best_cache_by_itself():
    model = get_model("less-kv").create_from_arg_string("max_length=400,budget=20")
    cache, wanted = model.make(None), LessCache.for_model(model.model, budget=20)
    assert (cache.setting.policy, cache.setting.budgets) == (wanted.setting.policy, wanted.setting.budgets)
    assert wanted.setting.budgets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("policy=h3o", "no policy is called 'h3o'"),
        ("budget=some", "a budget is a number of tokens"),
        ("cache=lesser", "there is no cache 'lesser'"),
        ("policy=tova,budgets=by head", "there is no cache 'less' with budgets 'by head'"),
        ("batch_size=auto", "batch_size is a number of requests"),
        ("batch_size=0", "batch_size is a number of requests"),
        ("max_length=long", "max_length must be an integer from 0 to"),
        ("device=tpu", "no device 'tpu' here"),
        ("dtype=float8", "no dtype 'float8' for a model"),
        ("pretrained=/no/such/folder", "no config of a model at /no/such/folder"),
    ],
)
def test_the_harness_is_told_what_cannot_be(arguments, message):
    with pytest.raises(LessError, match=message):
        get_model("less-kv").create_from_arg_string(arguments)


def test_questions_have_one_answer_and_it_lies_far_back(here):
    task = harness.far_names(here)
    documents = task["custom_dataset"]()["test"]
    texts = here.held_out()
    assert len({document["answer"] for document in documents}) == 4
    for document in documents:
        context, answer = document["context"], document["choices"][document["answer"]]
        assert sum(context + choice in text for text in texts for choice in document["choices"]) == 1
        assert any(context + answer in text for text in texts)
        names = [harness.NAME.match(choice).group() for choice in document["choices"]]
        assert [name in context for name in names] == [choice == answer for choice in document["choices"]]
        assert context.rfind(names[document["answer"]]) < len(context) / 2


@pytest.fixture
def asked_once(monkeypatch):
    """Of two readers that are asked the same, through caches that are made alike, the second says what the first said."""
    said = {}

    def alike(cache):
        layers = [(layer.policy, layer.kernels) for layer in getattr(cache, "less_layers", ())]
        return [(policy, kernels and [x.sum().item() for x in kernels.state_dict().values()]) for policy, kernels in layers]

    def remember(name, own):
        def answer(reader, *asked, **more):
            key = repr((name, alike(reader.make(1)), reader.max_length, asked, more))
            return said[key] if key in said else said.setdefault(key, list(own(reader, *asked, **more)))

        monkeypatch.setattr(Reader, name, answer)

    for name in ("_scores", "generate"):
        remember(name, getattr(Reader, name))


@pytest.mark.usefixtures("asked_once")
def test_dead_kernels_swapped_answers_and_ignored_budgets_change_the_verdict_on_classification(here, monkeypatch):
    healthy = harness.harness(here)
    full, bare, plus, less = (figure["mean"] for figure in healthy.figures.values())
    assert healthy.verdict == HOLDS
    assert full > 0.7 > bare
    assert less >= plus
    assert harness.harness(without_state(here)).verdict == FAILS
    with monkeypatch.context() as patch:  # Baseline+ keeps everything
        patch.setattr("less_fast.measuring.compare.baseline_plus", lambda *rest: H2O(140, 140))
        assert harness.harness(here).verdict == FAILS
    own = CachedLM._scores
    with monkeypatch.context() as patch:  # the worst answer in the place of the best
        patch.setattr(CachedLM, "_scores", lambda lm, pairs: [(-nats, greedy) for nats, greedy in own(lm, pairs)])
        assert harness.harness(here).verdict == FAILS
    monkeypatch.setattr(Subject, "policies", lambda subject: [H2O(140, 140)])
    assert harness.harness(here).verdict == FAILS


def yaml_task(folder, output_type):
    """A task of the harness of three questions, in files of its own."""
    rows = [{"text": f"x = {number}\nprint(", "ends": ["x)", "import"], "right": 0} for number in range(3)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = ["task: prints", "dataset_path: json", "dataset_kwargs:", "  data_files:", f"    test: {folder / 'rows.jsonl'}"]
    lines += ["test_split: test", f"output_type: {output_type}", 'target_delimiter: ""', "doc_to_text: text"]
    lines += ["doc_to_choice: ends", "doc_to_target: right"] if output_type == "multiple_choice" else ["doc_to_target: text"]
    (folder / "prints.yaml").write_text("\n".join(lines))
    return str(folder / "prints.yaml")


@pytest.fixture
def few_tasks(monkeypatch, tmp_path):
    """Reading the harness's own ten thousand tasks takes long; nor do data sets leave anything behind."""
    monkeypatch.setattr(harness, "TaskManager", functools.partial(harness.TaskManager, include_defaults=False))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_tasks_of_the_harness_can_be_named(few_tasks, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["harness", "--quick", "--tasks", yaml_task(tmp_path, "multiple_choice"), "--out", str(out)]
    assert command.main(arguments) == 0
    figures = json.loads((out / "report.json").read_text())["checks"]["harness"]["figures"]
    assert figures["prints, full, all"] == {"mean": 1, "stderr": 0, "documents": 2}


@pytest.mark.parametrize(
    ("task", "message"), [("prince", "cannot load prince"), ("generate_until", "prints is no multiple choice")]
)
def test_tasks_that_cannot_be_are_refused(few_tasks, task, message, tmp_path, capsys):
    name = task if task == "prince" else yaml_task(tmp_path, task)
    assert command.main(["harness", "--tasks", name, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def more(here):
    """The same subject with as many windows as it takes for ROUGE to tell caches apart, and kernels of one family."""
    subject = replace(here, paper_kernels=None)
    subject.windows = lambda count: windows(here.tokenizer, here.held_out(), here.length, 32, here.seed)
    return subject


@pytest.mark.usefixtures("asked_once")
def test_kernels_that_add_nothing_and_swapped_texts_change_the_verdict_on_summaries(more, monkeypatch):
    healthy = summarization.summarization(more)
    uniform = {name: figure for name, figure in healthy.figures.items() if "by head" not in name}
    measured = {name.split(",")[0]: figure["rouge"]["rouge1"] for name, figure in uniform.items()}
    assert measured["full"] == 1 > measured["less"] > measured["bare"]
    assert healthy.verdict in (HOLDS, IN_PART)
    assert summarization.summarization(without_state(more)).verdict == FAILS
    with monkeypatch.context() as patch:  # Baseline+ keeps everything
        patch.setattr("less_fast.measuring.compare.baseline_plus", lambda *rest: H2O(140, 140))
        assert summarization.summarization(more).verdict == FAILS
    own = summarization.rouge
    monkeypatch.setattr(summarization, "rouge", lambda references, texts: own(references, texts[1:] + texts[:1]))
    swapped = summarization.summarization(more)
    assert swapped.figures["full, all, "]["rouge"]["rouge1"] < 0.5


def test_rouge_is_that_of_its_definition():
    scores = summarization.rouge(["the cat sat on the mat"], ["the cat lay on the mat today"])
    one, two, longest = 5, 3, 5  # of 6 and 7 words, 5 and 6 pairs
    torch.testing.assert_close(scores, torch.tensor([[2 * one / 13, 2 * two / 11, 2 * longest / 13]], dtype=torch.float64))


def test_summaries_of_a_data_set_are_the_references(here, tmp_path, monkeypatch, capsys):
    rows = [{"article": "word " * 400 + f"END {number}", "highlights": f"summary {number}"} for number in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen = []

    def written(lm, contexts, new):
        seen.extend(contexts)
        return [f"summary {number}" if isinstance(lm.make(None), DynamicCache) else "" for number in range(3)]

    monkeypatch.setattr(Reader, "answers", written)
    arguments = ["--quick", "--summaries", f"{tmp_path},,test,article,highlights", "--out", str(tmp_path / "out")]
    assert command.main(["summarization", *arguments]) == 0
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["checks"]["summarization"]["figures"]
    assert figures["full, all, "]["rouge"] == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert figures["bare, 12, uniform"]["rouge"]["rouge1"] == 0
    for prompt in map(here.tokenizer.decode, seen):
        assert prompt.startswith("Article: word")
        assert prompt.endswith("\n\nSummary:")
        assert "END" not in prompt
    assert all(len(ids) <= 256 - 32 for ids in seen)


@pytest.fixture
def tables(few_tasks, tmp_path):
    """How to call one of the three parts, on the embedded model: two windows, questions and texts of each kind."""
    text = "\n".join(f"def name_{number}(first, second): return first * {number}. " for number in range(2000))
    words = "seven people walked slowly through another quiet little garden towards river. " * 40
    (tmp_path / "text.txt").write_text(words + text)
    rows = [{"document": words[: 300 + number], "summary": "people walked"} for number in range(3)]
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    inputs, measured, out = (tmp_path / f"{name}.json" for name in ("inputs", "measured", "out"))
    prepare = ["prepare", inputs, "--text", f"text={tmp_path}/text.txt", "--long", f"text={tmp_path}/text.txt"]
    prepare += ["--tasks", yaml_task(tmp_path, "multiple_choice"), "--summaries", f"news={tmp_path}/news,,test,document,summary"]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) for _ in range(3)))
    prepare += ["--answers", f"gsm8k={tmp_path}/sums.jsonl"]
    prepare += ["--windows", 2, "--length", 128, "--long-windows", 2, "--long-length", 160, "--questions", 2, "--texts", 2]
    prepare += ["--numbers", 1]
    parts = {"prepare": prepare, "measure": ["measure", inputs, measured], "report": ["report", inputs, measured, out]}
    return lambda part, *more: (real_model.main(list(map(str, [*parts[part], *more]))), measured, out)


def test_the_tables_of_a_real_model_come_in_three_parts_and_measuring_goes_on_where_it_stopped(tables, monkeypatch, capsys):
    monkeypatch.setattr(real_model, "NEW", 8)
    monkeypatch.setitem(answers.NEW, "gsm8k", 8)
    assert tables("prepare")[0] == 0
    with monkeypatch.context() as patch:  # what the machine with the GPU lacks
        for library in ("lm_eval", "rouge_score", "datasets"):
            patch.setitem(sys.modules, library, None)
        code, measured, _ = tables("measure", "--caches", "full", "--parts", "perplexity")
        assert (code, len(json.loads(measured.read_text())["results"])) == (0, 1)
        assert tables("measure", "--budgets", "10%", "--caches", "full,bare,baseline+,less")[0] == 0
        within = ("--budgets", "10%", "--caches", "less,bare", "--parts", "long", "--context", "32")
        assert tables("measure", *within)[0] == 0
    capsys.readouterr()
    code, measured, out = tables("report")
    rows, results = json.loads(out.read_text())["rows"], json.loads(measured.read_text())["results"]
    assert len(rows) == len(results) == len(real_model.PARTS) * 6 + 3  # each once
    grown, moved = (
        next(row for row in rows if (row["part"], row["cache"], row["context"]) == ("long", "less", context))
        for context in (None, 32)
    )
    assert grown["figures"][0]["value"] != moved["figures"][0]["value"]
    assert [row["cache"] for row in rows[:4]] == ["full", "bare", "baseline+", "less"]
    figures = {(row["part"], row["cache"], row["budgets"]): {one["column"]: one for one in row["figures"]} for row in rows[:-3]}
    assert figures["tasks", "full", None]["prints, acc"]["value"] == 1
    assert figures["tasks", "full", None]["prints, acc"]["n"] == 2
    full, bare = (figures[key]["text, perplexity"] for key in (("perplexity", "full", None), ("perplexity", "bare", "uniform")))
    assert full["value"] < bare["value"]
    assert "| full | all |" in capsys.readouterr().out


def test_tables_refuse_what_cannot_be(tables, tmp_path, capsys):
    assert tables("measure")[0] == 2
    assert "inputs.json" in capsys.readouterr().err
    (tmp_path / "inputs.json").write_text('{"about": {"length": 128}}')
    assert tables("measure", "--parts", "perplexities")[0] == 2
    assert tables("measure", "--caches", "lesss")[0] == 2
    assert "is for the part 'perplexities': choose some of perplexity" in capsys.readouterr().err
    assert tables("measure", "--kernels", "none")[0] == 2
    assert "say which with --kernels" in capsys.readouterr().err


def test_figures_of_other_kernels_or_inputs_are_measured_anew_and_never_reported_together(tables, tmp_path, monkeypatch, capsys):
    assert tables("prepare")[0] == 0
    few = ("--caches", "full,bare", "--parts", "perplexity", "--budgets", "10%")
    assert tables("measure", *few)[0] == tables("measure", *few)[0] == 0
    measured = tables("measure", *few)[1]
    (first,) = [record for record in json.loads(measured.read_text())["results"] if record["cache"] == "bare"]
    kernels = LessKernels.from_pretrained(KERNELS)
    with torch.no_grad():
        kernels.layers[0].q0 += 1
    kernels.save_pretrained(tmp_path / "others")
    assert tables("measure", *few, "--kernels", tmp_path / "others")[0] == 0
    records = [record for record in json.loads(measured.read_text())["results"] if record["cache"] == "bare"]
    assert [record["kernels"] == first["kernels"] for record in records] == [True, False]
    assert tables("report")[0] == 2
    assert "has figures of several kernels" in capsys.readouterr().err
    inputs = json.loads((tmp_path / "inputs.json").read_text())
    inputs["text"]["text"]["ids"][0][0] += 1
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    assert tables("measure", *few)[0] == 2
    assert "has figures of perplexity from other inputs" in capsys.readouterr().err


def test_a_pair_that_was_not_measured_has_no_score():
    noted = harness.Noted(None, 64, {((1,), (2,)): (0.5, True)})
    assert noted.scores([((1,), (2,))]) == [(0.5, True)]
    with pytest.raises(LessError, match="asks what was not measured"):
        noted.scores([((1,), (2,)), ((1,), (3,))])


def test_recall_at_1_and_2_is_of_the_ranks_of_the_right_answers():
    choices, right = [["aaa", "aa", "a", "aaaa"]] * 4, "CBAD"

    class Shortest(harness.Noted):
        def scores(self, pairs, disable_tqdm=False):
            return [(-float(len(self.tokenizer.decode(answer))), False) for _, answer in pairs]

    task = {
        "task": "ranks",
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"options": o, "answers": a} for o, a in zip(choices, right)])},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "options",
        "doc_to_target": 0,
        "process_results": mutual.process_results,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("r@1", "r@2", "mrr")],
    }
    found = harness.metrics(Shortest(AutoTokenizer.from_pretrained(MODEL), 64), [task])["ranks"]
    assert found["r@1"].tolist() == [1, 0, 0, 0]
    assert found["r@2"].tolist() == [1, 1, 0, 0]
    assert found["mrr"].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_the_gap_is_bare_h2os_even_for_a_policy_whose_bare_cache_was_not_measured(tables):
    assert tables("prepare")[0] == 0
    what = ("measure", "--parts", "perplexity", "--budgets", "10%")
    assert tables(*what, "--policies", "h2o", "--caches", "full,bare")[0] == 0
    assert tables(*what, "--policies", "retention", "--caches", "less,baseline+")[0] == 0
    full, plain, *others = (row["figures"][0] for row in json.loads(tables("report")[2].read_text())["rows"])
    for other in others:
        wanted = (plain["value"] - other["value"]) / (plain["value"] - full["value"])
        assert other["recovered"][0] == pytest.approx(wanted)
    assert len(others) == 4


def test_of_the_caches_those_are_measured_that_are_named(tables):
    assert tables("prepare")[0] == 0
    what = ("measure", "--parts", "perplexity", "--budgets", "10%", "--policies", "retention")
    named = {
        "full,less by head": [("full", None), ("less", "by head")],
        "bare,less uniform": [("bare", "uniform"), ("less", "uniform")],
    }
    for caches in named:
        assert tables(*what, "--caches", caches)[0] == 0
    records = json.loads(tables("report")[1].read_text())["results"]
    assert [(record["cache"], record["budgets"]) for record in records] == [one for some in named.values() for one in some]
    assert tables(*what, "--caches", "full by head")[0] == 2


def test_the_gap_is_bare_h2os_where_that_was_measured(tables):
    assert tables("prepare")[0] == 0
    assert (
        tables("measure", "--parts", "perplexity", "--budgets", "10%", "--policies", "retention,h2o", "--caches", "full,bare")[0]
        == 0
    )
    _, _, out = tables("report")
    full, learned, plain = (row["figures"][0] for row in json.loads(out.read_text())["rows"])
    wanted = (plain["value"] - learned["value"]) / (plain["value"] - full["value"])
    assert learned["recovered"][0] == pytest.approx(wanted)
    assert "recovered" not in plain
    assert "over_bare" not in learned


def test_a_figure_is_paired_and_its_shares_are_of_a_loss_that_is_one():
    full, gap, bare, plus, own = (
        torch.tensor(x, dtype=torch.float64) for x in ([3, 4, 3.5], [5, 6.1, 5.4], [4.75, 5.75, 5.25], [4.5, 5.5, 5], [4, 5, 4.5])
    )
    nats = real_model.figure("text, perplexity", own, full, gap, bare, plus)
    assert nats["value"] == pytest.approx(own.mean().exp().item())
    assert (nats["over_plus"], nats["over_bare"], nats["over_full"][0]) == ((-0.5, 0), (-0.75, 0), 1)
    assert nats["removed"][0] == pytest.approx(0.5 / 1.5)
    assert nats["recovered"][0] == pytest.approx((gap.mean().exp() - own.mean().exp()) / (gap.mean().exp() - full.mean().exp()))
    assert "recovered" not in real_model.figure("text, perplexity", own, full, full + torch.tensor([1, -1, 0]), None, None)
    right = real_model.figure("boolq, acc", -own, -full, -gap, -bare, -plus)
    assert right["recovered"][0] == pytest.approx(((gap - own).mean() / (gap - full).mean()).item())


def test_the_last_turns_of_a_conversation_are_as_many_as_have_room_and_are_whole(here):
    tokenizer = copy.deepcopy(here.tokenizer)
    tokenizer.chat_template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    turns = [{"role": role, "content": f"of turn {turn}"} for turn in range(5) for role in ("user", "assistant")]
    size = [len(tokenizer(tokenizer.apply_chat_template(turns[2 * at :], tokenize=False))["input_ids"]) for at in range(5)]
    talked = SimpleNamespace(messages=turns, tokenizer=tokenizer)
    for first in range(5):
        assert conversation.last_turns(talked, size[first]) == turns[2 * first :]
        assert conversation.last_turns(talked, size[first] - 1) == turns[2 * first + 2 :]


def test_a_prompt_by_the_chat_template_asks_within_its_room(here):
    tokenizer = copy.copy(here.tokenizer)
    article = "word " * 400 + "END"
    assert tokenizer.decode(summarization.prompt(tokenizer, article, 60)).startswith("Article: word")
    tokenizer.chat_template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<answer>"
    asked = summarization.prompt(tokenizer, article, 100)
    assert len(asked) <= 100
    said = tokenizer.decode(asked)
    assert said.startswith("<user>" + summarization.REQUEST.format("word"))
    assert said.endswith("<answer>")
    assert "END" not in said


def test_a_stream_stays_what_a_fresh_window_is_within_the_context_and_breaks_beyond_it(tmp_path, capsys):
    """H2O with LESS, one and a half contexts."""
    rest = ["--streams", "1", "--policies", "h2o", "--caches", "less", "--ways", "within,growing"]
    assert streams.main(["--tokens", "1536", *rest, "--out", str(tmp_path / "streams.json")]) == 0
    within, growing = json.loads((tmp_path / "streams.json").read_text())["rows"]
    assert [(row["cache"], row["way"], len(row["tenths"])) for row in (within, growing)] == [
        ("less", way, 10) for way in ("within", "growing")
    ]
    assert within["tenths"][:6] == growing["tenths"][:6]
    assert within["tenths"][-1] < growing["tenths"][-1] - 0.1
    assert "less H2O(heavy=26, recent=25) within: " in capsys.readouterr().out
    assert streams.main(["--ways", "sideways"]) == 2
    assert streams.main(["--tokens", "100000000"]) == 2
    assert "give more text" in capsys.readouterr().err
