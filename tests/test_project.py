"""The house: which room may know which, what importing costs, and that the README's snippets run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["allocate", "kernels", "policies", "store", "state", "attend", "step", "parallel", "architecture"]
ORDER += ["seam", "hf", "damage", "recording", "train", "text", "demo", "plan", "compare", "bench", "cli"]


def imported(file):
    """What a file imports of the project: first names below less_fast, or less_ref."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").removeprefix("less_fast").strip(".")
            if node.level or (node.module or "").startswith("less_"):
                yield from [module.split(".")[0]] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("less_"))


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_above_it(name):
    path = ROOT / "less_fast" / name
    for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        of_demo = [name, "corpus", "MODEL", "KERNELS", "PAPER_KERNELS"]
        allowed = {*ORDER[: ORDER.index(name)], *(of_demo if path.is_dir() or name == "cli" else [])}
        assert set(imported(file)) <= allowed, file


def test_the_specification_and_the_fast_path_never_import_each_other():
    assert not list(imported(ROOT / "less_ref.py"))
    for file in (ROOT / "less_fast").rglob("*.py"):
        assert "less_ref" not in set(imported(file))


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


def test_the_readme_fits_on_few_screens():
    assert SNIPPETS
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_the_readme_shows_the_table_that_the_script_wrote():
    """paper_checks/architectures.py writes the file; its summary stands in the README, too."""
    table = (ROOT / "paper_checks" / "ARCHITECTURES.md").read_text().split("## One by one")[0].split("\n\n")[-2]
    assert table.startswith("| types |")
    assert table in (ROOT / "README.md").read_text()
