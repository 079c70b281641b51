"""The house: which room may know which, what importing costs, what lies where, and that the README's snippets run."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "less_fast"
ORDER = ["layer", "files", "budgets", "hub", "official", "kernels", "setting", "hf", "__init__", "text", "demo", "loading"]
ORDER += ["training", "measuring", "cli", "__main__"]
"""The rooms: a room knows only those before it. `__init__` is the package's face, `from less_fast import ...`."""
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file):
    """("measuring", "bench") for less_fast/measuring/bench.py, ("measuring",) for its __init__.py."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


NAMES = {name_of(file) for file in FILES}


def imports(file):
    """(dotted name, whether at module level) of all that a file imports; of relative imports the full name."""
    tree, package = ast.parse(file.read_text()), file.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            names = [".".join(filter(None, (*base, node.module, alias.name))) for alias in node.names]
        for name in names:
            yield name, node in tree.body


def own(file):
    """The same as names of the package's own files, without all others."""
    for name, at_module_level in imports(file):
        first, *rest = name.split(".")
        while rest and tuple(rest) not in NAMES:  # what is defined in a file
            rest.pop()
        if first == "less_fast":
            yield tuple(rest) or ("__init__",), at_module_level


def test_imports_are_seen_in_all_their_forms(tmp_path, monkeypatch):
    """Or the tests below would see nothing wrong."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "less_fast" / "hf").mkdir(parents=True)
    file = tmp_path / "less_fast" / "hf" / "cache.py"
    lines = [
        "import numpy",
        "import less_fast.kernels",
        "from .seam import a",
        "from .. import setting",
        "from ..text import windows",
    ]
    lines += ["from less_fast import H2O, cli", "def f():", "    from ..layer.state import LayerState as S"]
    file.write_text("\n".join(lines))
    assert [name for name, _ in own(file)] == [
        ("kernels",), ("hf", "seam"), ("setting",), ("text",), ("__init__",), ("cli",), ("layer", "state")
    ]  # fmt: skip
    assert [name for name, at_module_level in imports(file) if not at_module_level] == ["less_fast.layer.state.LayerState"]


def test_every_room_has_its_place_in_the_order():
    assert {name[0] for name in NAMES} == {*ORDER}


@pytest.mark.parametrize("file", FILES, ids=lambda file: ".".join(name_of(file)))
def test_a_room_imports_only_what_stands_above_it(file):
    room = name_of(file)[0]
    for name, at_module_level in own(file):
        if at_module_level or room != "layer":  # to save its state, a layer asks for files
            assert ORDER.index(name[0]) <= ORDER.index(room), name


def test_no_file_imports_itself_through_others():
    TopologicalSorter({name_of(file): {name for name, _ in own(file)} for file in FILES}).prepare()


@pytest.mark.parametrize("file", sorted((PACKAGE / "layer").glob("*.py")), ids=lambda file: file.stem)
def test_the_layer_can_be_copied_into_a_project_that_has_torch_alone(file):
    allowed = {"torch", *sys.stdlib_module_names}
    for name, at_module_level in imports(file):
        assert not at_module_level or name.startswith("less_fast.layer.") or name.partition(".")[0] in allowed, name


def test_the_specification_asks_for_numpy_alone_and_the_fast_path_never_for_the_specification():
    libraries = {name.partition(".")[0] for name, _ in imports(ROOT / "less_ref.py")}
    assert "numpy" in libraries
    assert libraries - {"numpy"} <= sys.stdlib_module_names
    assert not [file for file in FILES for name, _ in imports(file) if name.partition(".")[0] == "less_ref"]


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


def test_importing_the_cache_registers_the_attention_by_name_and_changes_no_other():
    """A model that uses it may be sent to another process, which has to know the name."""
    in_a_fresh_process(
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "interfaces = AttentionInterface(), AttentionMaskInterface()\n"
        "before = [{name: known[name] for name in known.valid_keys()} for known in interfaces]\n"
        "assert all('less' not in known for known in before)\n"
        "import less_fast.hf\n"
        "for interface, known in zip(interfaces, before):\n"
        "    assert {*interface.valid_keys()} == {*known, 'less'}\n"
        "    assert all(interface[name] is function for name, function in known.items())\n"
    )


def tracked():
    """The files of the repository."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode or not listing.stdout:
        pytest.skip("no checkout of the repository")
    return [Path(name) for name in listing.stdout.splitlines()]


TOP = {"pyproject.toml", "README.md", "less_ref.py", "less_fast", "tests", "paper_checks", "LICENSE", "CITATION.cff", "AGENTS.md"}


def test_the_top_level_holds_what_it_should_and_no_file_is_for_what_has_no_place():
    assert {name for path in tracked() if not (name := path.parts[0]).startswith(".")} == TOP
    assert not [path for path in tracked() if path.stem in ("utils", "common", "helpers", "misc")]


STUB = """#!/bin/sh
mkdir -p "$3/bin"
printf '#!/bin/sh\\nexit 0\\n' > "$3/bin/pip"
printf '#!/bin/sh\\nexit $PYTEST_ENDS_IN\\n' > "$3/bin/pytest"
chmod +x "$3/bin/pip" "$3/bin/pytest"
"""


@pytest.mark.parametrize("arguments", [["5.5.0", "5.23.0"], ["--python", "3.11", "3.12"]], ids=" ".join)
def test_failures_under_any_version_are_collected_and_end_in_exit_code_1(arguments, tmp_path):
    """.ci/versions, with stubs in the place of Python, pip and pytest."""
    for folder in (".ci", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".ci" / "constraints.txt").write_text("torch==2.13.0\n")
    script = tmp_path / ".ci" / "versions"
    shutil.copy(ROOT / ".ci" / "versions", script)
    for version in ("3.11", "3.12"):
        (tmp_path / "bin" / f"python{version}").write_text(STUB)
        (tmp_path / "bin" / f"python{version}").chmod(0o755)

    def run(code):
        env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYTEST_ENDS_IN": code}
        done = subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    kind = "Python" if arguments[0] == "--python" else "transformers"
    names = [f"{kind} {version}" for version in arguments[-2:]]
    assert run("0") == (0, [f"{name}: passed" for name in names])
    assert run("1") == (1, [f"{name}: FAILED" for name in names] + [f"failed: {name}" for name in names])


TESTS = sorted((ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
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
    """paper_checks/architectures.py writes the file; the README shows its summary."""
    table = (ROOT / "paper_checks" / "ARCHITECTURES.md").read_text().split("## One by one")[0].split("\n\n")[-2]
    assert table.startswith("| types |")
    assert table in (ROOT / "README.md").read_text()
