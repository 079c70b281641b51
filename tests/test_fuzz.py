"""Whatever comes through the door: a call ends in a result, or is refused in one sentence, and what lay on disk lies there."""

import io
import json
import os
import shutil
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
import torch
from authors import read, save_as_the_authors
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_kernels, make_kinds, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from less_fast import H2O, FastGen, LayerKernels, LayerState, LessCache, LessError, LessKernels, cli
from less_fast.budgets import Curves
from less_fast.demo import MODEL, corpus
from less_fast.hf.architecture import sizes
from less_fast.hub import CARD, CONFIG, WEIGHTS
from less_fast.layer.features import FAMILIES
from less_fast.setting import POLICIES
from less_fast.training import RECIPES

HUGE = 10**30
NUMBERS = [0, 1, 2, 3, -1, 10**6, 2**31 - 1, 2**63, HUGE, 0.5, 1.0, 2.5, -0.5, 1e300, float("nan"), float("inf"), True, False]
OTHERS = [None, "", "3", "h2o", "cpu", b"3", [], [2], [2, 2], [[2, 2]] * 3, {}, {"a": 1}, object(), (1, 2), len, H2O, H2O(2, 2)]
OTHERS += [np.int64(3), np.float32(0.5), np.ones(3), torch.tensor(3), torch.ones(2), torch.float16]
ANYTHING = st.sampled_from(NUMBERS + OTHERS)


@contextmanager
def a_result_or_one_sentence():
    """What is not done is refused by a LessError, or by the operating system. Anything else is a bug."""
    try:
        yield
    except (LessError, OSError) as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"not refused in one sentence: {error!r}") from error


def spoiled(arguments: dict, value=ANYTHING):
    """The arguments with one or two replaced by anything."""
    return st.dictionaries(st.sampled_from([*arguments]), value, min_size=1, max_size=2).map(lambda changes: arguments | changes)


# Arguments.


@given(st.sampled_from([*POLICIES.values()]), st.data())
def test_a_policy_of_any_fields_and_budget_is_made_or_refused(policy, data):
    fields = data.draw(spoiled(vars(policy))) if vars(policy) else {}
    with a_result_or_one_sentence():
        type(policy)(**fields)
    with a_result_or_one_sentence():
        policy.with_budget(data.draw(ANYTHING))


SHAPE = dict(query_heads=4, kv_heads=2, head_dim=8)


@given(st.sampled_from([*FAMILIES]), st.data())
def test_kernels_of_any_sizes_are_made_or_refused(family, data):
    of_layer = data.draw(spoiled(dict(**SHAPE, rank=2, hidden=3)))
    with a_result_or_one_sentence():
        FAMILIES[family](**of_layer)
    of_model = data.draw(spoiled(dict(**SHAPE, layers=3, rank=2, hidden=3, about={}, family=family, curves={})))
    with a_result_or_one_sentence():
        LessKernels(**of_model)


@given(spoiled(dict(**SHAPE, policy=H2O(2, 2), batch=2, kernels=LayerKernels(**SHAPE, rank=2, hidden=3), dtype=torch.float32)))
def test_a_state_of_anything_is_allocated_or_refused(arguments):
    with a_result_or_one_sentence():
        LayerState.allocate(**arguments)


@given(st.sampled_from([H2O(2, 2), FastGen(4, 1, 1, 0.9)]), st.sampled_from([None, [[3, 4]] * 3]), st.data())
def test_a_cache_of_anything_is_made_or_refused_before_the_model_is_changed(policy, budgets, data):
    model = make_model()
    good = dict(model=model, policy=policy, kernels=make_kernels(model), budgets=budgets, chunk=2, token_kinds=make_kinds())
    cache = None
    with a_result_or_one_sentence():
        cache = LessCache.for_model(**data.draw(spoiled(good | dict(compile=False))))
    assert (model.config._attn_implementation == "less") == (cache is not None)


# Folders of kernels.

ABOUT = {
    "model": "some/model",
    "policy": "H2O(heavy=2, recent=2)",
    "sequences": 8,
    "window": 64,
    "validation": [{"bare": 0.2, "less": 0.1}] * 3,
    "joint": {"budgets": [4, 8], "before": [0.2, 0.1], "after": [0.1, 0.05]},
}
CURVES = Curves(
    policy="H2O(heavy=2, recent=2)",
    budgets=[2, 4, 8],
    bare=[[[3.0, 2.0, 0.0], [5.0, 1.0, 0.0]]] * 3,
    less=[[[2.0, 1.0, 0.0], [4.0, 1.0, 0.0]]] * 3,
    window=64,
    windows=4,
    by="kl",
    refined={"less": {"30": [[5, 5]] * 3}},
)
JSON = st.sampled_from([None, True, 0, 1, -1, 2, 3, 0.5, 10**6, 10**12, HUGE, 1e300, float("nan"), float("inf"), "", "3", "elu"])
JSON |= st.sampled_from([[], {}, [1], [[1, 2]] * 3, {"a": 1}, [[[0.0] * 3] * 2] * 3])


@pytest.fixture(scope="module", params=["exponential", "paper", "elu"])
def saved(request, tmp_path_factory):
    """A good folder of kernels."""
    folder = tmp_path_factory.mktemp(request.param)
    LessKernels(3, **SHAPE, rank=2, hidden=3, about=ABOUT, family=request.param, curves={"H2O": CURVES}).save_pretrained(folder)
    return folder


FILES = [b"", b"null", b"[]", b'"x"', b"{}", b"[" * 10**5, b"\xff\xfe", b"\x00" * 99]


def contents(folder):
    """Every file and folder below, with the bytes of the files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def spoil_bytes(file, data):
    """Cuts a file off, flips some of its bits, or puts something else in its place."""
    change = data.draw(st.sampled_from(["delete", "cut", "flip", "replace", "folder"]))
    content = file.read_bytes()
    file.unlink()
    if change == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif change == "flip":
        flipped = bytearray(content)
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)) if content else []:
            flipped[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(flipped)
    elif change == "replace":
        file.write_bytes(data.draw(st.sampled_from(FILES) | st.binary()))
    elif change == "folder":
        file.mkdir()


def places(value):
    """Every container in nested lists and dicts, with every key of it."""
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def spoil_json(file, data):
    """Replaces, removes or adds values anywhere in a JSON file."""
    value = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(places(value)))
        if data.draw(st.integers(0, 3)):
            container[key] = deepcopy(data.draw(JSON))  # another change may lie within
        elif isinstance(container, dict) and data.draw(st.booleans()):
            container["extra"] = deepcopy(data.draw(JSON))
        else:
            del container[key]
    file.write_text(json.dumps(value))


def spoil_weights(file, data):
    """Gives one of the weights another shape, dtype, name or number, or takes it away."""
    weights = load_file(file)
    name = data.draw(st.sampled_from([*sorted(weights), "layers.0.extra"]))
    weight = weights.pop(name, torch.zeros(2))
    change = data.draw(st.sampled_from(["away", "shape", "dtype", "number", "name"]))
    if change == "shape":
        weights[name] = weight.flatten()[: data.draw(st.integers(0, weight.numel()))].clone()
    elif change == "dtype":
        weights[name] = weight.to(data.draw(st.sampled_from([torch.bfloat16, torch.float64, torch.int32, torch.bool])))
    elif change == "number":
        weights[name] = weight.fill_(data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e38])))
    elif change == "name":
        weights[data.draw(st.sampled_from(["", "layers", "layers.3.q1", "x.y.z"]))] = weight
    save_file(weights, file)


@given(st.data())
def test_a_spoiled_folder_of_kernels_is_read_or_refused_and_left_as_it_is(saved, data):
    with TemporaryDirectory() as place:
        folder = Path(shutil.copytree(saved, Path(place) / "kernels"))
        of_file = {CONFIG: [spoil_json, spoil_bytes], WEIGHTS: [spoil_weights, spoil_bytes], CARD: [spoil_bytes]}
        name = data.draw(st.sampled_from([*of_file]))
        data.draw(st.sampled_from(of_file[name]))(folder / name, data)
        before = contents(folder)
        with a_result_or_one_sentence():
            kernels = LessKernels.from_pretrained(folder)
            kernels.budgets_for(H2O(2, 3))
            kernels.save_pretrained(Path(place) / "again")
        assert contents(folder) == before


# The command line.

WORDS = ["", " ", "0", "1", "2", "3", "-1", "1.5", "nan", "inf", "-inf", "1e400", "5%", "-5%", "nan%", "inf%", "1e30%", "%", ","]
WORDS += ["1,,2", "8,9", "none", "full", "tova", "fastgen", "lambda", "snapkv", "elu", "performer", "paper", "error", "cuda"]
WORDS += ["meta", "cpu:x", "float16", "no/such", "a/b/c", "é", "\udcff", "x\ny", "--json", "a,b,c,d,e", "x.png", "/dev/null"]
WORDS += ["/no/x.png", "model", "kernels", "official", "story.txt", "short.txt", "binary", "empty", "folder"]
WORDS += ["1000000000000", "99999999999999999999", "-99999999999999999999", "1e15", "9" * 30]
ON_MODEL = {"--model": "model", "--policy": "h2o", "--dtype": "float32"}
ON_DEVICE = ON_MODEL | {"--device": "cpu", "--seed": 0}
ON_TEXT = ON_DEVICE | {"--text": "story.txt", "--length": 32}
COMMANDS = {
    "compare": ON_TEXT | {"--kernels": "kernels", "--budgets": 8, "--windows": 2},
    "generate --max-new-tokens 3": ON_DEVICE | {"prompt": "x =", "--kernels": "kernels", "--budget": 8, "--temperature": 0.7},
    "bench --no-compile --rounds 1": ON_MODEL
    | {"--device": "cpu", "--kernels": "kernels", "--budget": 8, "--batch": 1, "--length": 32},
    "train": ON_MODEL
    | {
        "--text": "story.txt",
        "--length": 32,
        "--seed": 0,
        "--family": "exponential",
        "--out": "out",
        "--budget": 8,
        "--hours": 1,
    },
    "allocate": ON_TEXT | {"--out": "out", "--kernels": "kernels", "--windows": 1, "--refine": 8},
    "import-official": {"folder": "official", "--out": "out"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with all that the commands above name: a model of one layer, kernels for it, texts, good and bad."""
    home = tmp_path_factory.mktemp("home")
    model = make_model(vocab_size=2048, num_hidden_layers=1).float()
    model.save_pretrained(home / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(home / "model")
    LessKernels(**sizes(model), rank=2, hidden=3, family="exponential").save_pretrained(home / "kernels")
    (home / "official").mkdir()
    save_as_the_authors(read("D_gen_llama_less_h2o_long_dyn_f64.npz"), home / "official", layers=2)
    (home / "story.txt").write_text("".join(text for _, text in corpus.documents("validation"))[:3000])
    (home / "short.txt").write_text("x = 1")
    (home / "binary").write_bytes(bytes(range(256)))
    (home / "empty").touch()
    (home / "folder").mkdir()
    small = {family: replace(recipe, rank=2, hidden=3, uses=1, joint_steps=1, curves=1) for family, recipe in RECIPES.items()}
    offline = patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with offline, patch("less_fast.cli.making.MOST", 3), patch.dict(RECIPES, small):
        yield home


@contextmanager
def copied(home):
    """A copy of the folder, which is the working directory for a while."""
    here = Path.cwd()
    with TemporaryDirectory() as place:
        os.chdir(shutil.copytree(home, Path(place) / "home"))
        try:
            yield Path.cwd()
        finally:
            os.chdir(here)


def run(command, options):
    """(exit code, standard error) of a command; its positional arguments are options whose names do not begin with dashes."""
    words = [word for name, value in options.items() for word in ([name, value] if name.startswith("--") else [value])]
    error = io.StringIO()
    argv = patch.object(sys, "argv", ["less-kv", *command.split(), *map(str, words)])
    with argv, redirect_stdout(io.StringIO()), redirect_stderr(error), pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, error.getvalue()


def files(folder):
    return {path: content for path, content in contents(folder).items() if content is not None}


def assert_done_or_refused_in_one_sentence(place, command, options):
    """And nothing is written but where a command that succeeded was to write."""
    before = files(place)
    code, error = run(command, options)
    after = files(place)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    if code == 0:
        targets = [place / str(options["--out"])] if "--out" in options else []
        assert all(any(path.is_relative_to(target) for target in targets) for path in changed)
    else:
        assert (code, changed) == (2, set())
        assert error.startswith("Usage: ") or [line[:9] for line in error.splitlines()] == ["less-kv: "], error


@settings(max_examples=30)
@pytest.mark.parametrize("command", COMMANDS)
@given(data=st.data())
def test_a_command_with_any_options_is_done_or_refused(home, command, data):
    with copied(home) as place:
        assert_done_or_refused_in_one_sentence(place, command, data.draw(spoiled(COMMANDS[command], st.sampled_from(WORDS))))


@settings(max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("generate --max-new-tokens 3", ["model/config.json", "model/model.safetensors", "model/tokenizer.json"]),
        ("allocate", ["kernels/config.json", "kernels/kernels.safetensors", "story.txt"]),
        ("import-official", ["official/layer_0.pth"]),
    ],
)
def test_a_command_on_spoiled_files_is_done_or_refused(home, command, names, data):
    with copied(home) as place:
        spoil_bytes(place / data.draw(st.sampled_from(names)), data)
        assert_done_or_refused_in_one_sentence(place, command, COMMANDS[command])
