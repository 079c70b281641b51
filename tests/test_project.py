"""The house: which room may know which, what importing costs, what lies where, and that the README's snippets run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from less_fast.cli import app

ROOT = Path(__file__).parent.parent
FAST = ROOT / "less_fast"
ROOMS = ["layer", "files", "budgets", "hub", "official", "kernels", "setting", "hf", "text", "gguf", "demo", "loading"]
ROOMS += ["chat", "training", "measuring", "cli", "vllm"]


def imported(file):
    """The modules that a file imports, within functions, too, with dots, those of the project without less_fast."""
    tree, here = ast.parse(file.read_text()), file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            start = here[: len(here) + 1 - node.level] if node.level else ()
            module = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                yield f"{module}.{alias.name}".removeprefix("less_fast.")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("less_fast.") for alias in node.names)


def room(file):
    return file.relative_to(FAST).parts[0].removesuffix(".py")


FILES = [file for file in sorted(FAST.rglob("*.py")) if room(file) not in ("__init__", "__main__")]


def test_every_file_is_in_a_room():
    assert {room(file) for file in FILES} == set(ROOMS)
    assert not {file.stem for file in FILES} & {"utils", "common", "helpers", "misc"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(FAST).as_posix())
def test_a_file_imports_only_its_own_room_and_those_that_stand_above_it(file):
    own = room(file)
    others = {name.split(".")[0] for name in imported(file)} & set(ROOMS)
    assert others <= set(ROOMS[: ROOMS.index(own) + 1])


def test_vllm_is_imported_in_its_own_room_alone():
    for file in [*ROOT.glob("*.py"), *FAST.rglob("*.py"), *(ROOT / "paper_checks").glob("*.py")]:
        if file.relative_to(ROOT).parts[:2] != ("less_fast", "vllm"):
            assert not [name for name in imported(file) if name.split(".")[0] == "vllm"], file


def test_no_file_of_a_room_imports_one_that_imports_it():
    """Within rooms: the arrows have no circle."""
    arrows = {}
    for file in FILES:
        name = file.relative_to(FAST).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        names = {part for module in imported(file) for part in (module, module.rpartition(".")[0])}
        arrows[name] = names - {name}
    inside = {name: {other for other in to if other in arrows} for name, to in arrows.items() if "." in name}
    while ends := [name for name, to in inside.items() if not to & inside.keys()]:
        for name in ends:
            del inside[name]
    assert not inside


def test_the_layer_needs_torch_and_the_standard_library_alone():
    for file in (FAST / "layer").glob("*.py"):
        others = {name.split(".")[0] for name in imported(file)}
        assert others <= {"torch", "layer", *sys.stdlib_module_names}, file


def test_the_specification_and_the_fast_path_never_import_each_other():
    assert not [name for name in imported(ROOT / "less_ref.py") if name.startswith("less_")]
    for file in FAST.rglob("*.py"):
        assert not [name for name in imported(file) if name.startswith("less_ref")]


def test_the_top_level_holds_nothing_else():
    tracked = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git checkout, so nobody knows what belongs to it")
    allowed = {"pyproject.toml", "README.md", "less_ref.py", "less_fast", "tests", "paper_checks", "LICENSE"}
    allowed |= {"CITATION.cff", "AGENTS.md"}
    assert {name for name in tracked.stdout.split() if not name.startswith(".")} == allowed


def in_a_fresh_process(code):
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_less_fast_needs_no_transformers_and_changes_nothing():
    in_a_fresh_process(
        "import sys, torch\n"
        "before = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()\n"
        "import less_fast\n"
        "from less_fast import LayerState, extend\n"
        "assert 'transformers' not in sys.modules and 'less_ref' not in sys.modules\n"
        "assert before == (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())\n"
    )


def test_importing_the_cache_registers_its_attention_with_transformers_and_importing_less_fast_does_not():
    """Models that use it are pickled and sent to other processes."""
    in_a_fresh_process(
        "import less_fast\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert 'less' not in AttentionInterface().valid_keys()\n"
        "from less_fast import LessCache\n"
        "assert 'less' in AttentionInterface().valid_keys()\n"
        "assert 'less' in AttentionMaskInterface().valid_keys()\n"
    )


TEST_FILES = sorted((ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("file", TEST_FILES, ids=lambda file: file.stem)
def test_test_modules_import_helpers_never_each_other_and_take_small_models_from_there(file):
    text = file.read_text()  # the text, because some tests write programs
    assert not re.findall(r"(?:from|import) test_\w+", text)
    assert "from" + "_config(" not in text


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_the_readmes_snippets_run(snippet):
    assert len(snippet.splitlines()) <= 15
    exec(compile(snippet, "README.md", "exec"), {})


PAGES = [page for folder in ("", "paper_checks", "less_fast/**") for page in ROOT.glob(f"{folder}/*.md".lstrip("/"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_prose_is_read_on_a_phone(page):
    """No line of it is longer than 130 characters; rows of tables and indented commands may be."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 130 and not line.startswith(("|", "    "))]


def test_the_readme_is_read_once():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert SNIPPETS
    assert len(text.splitlines()) <= 140
    assert len(text.encode()) <= 10_000


HELP = ["compare", "generate", "chat", "bench", "train", "allocate", "import-official"]


@pytest.mark.parametrize("command", HELP)
def test_the_help_of_a_command_fits_on_one_screen(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = CliRunner().invoke(app, [command, "--help"]).stdout.splitlines()
    assert len(said) <= 40
    assert max(map(len, said)) <= 80
