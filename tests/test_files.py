"""Files are written aside and renamed: no reader ever sees half of one, and no writer meets another. They are as files that are
opened there would be, and what was read from one does not change with it."""

import os
import resource
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from models import make_kernels, make_model, tokens

from less_fast import H2O, LayerState, LessCache, LessError, LessKernels, extend
from less_fast.files import aside, load_state, read, save_state, write_text


def test_a_file_appears_whole_and_replaces_the_one_before(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with aside(tmp_path / "a.txt") as file:
        file.write(b"new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "new")]


@pytest.mark.parametrize("begun", [True, False])
def test_after_an_error_the_old_file_stands_alone(tmp_path, begun):
    (tmp_path / "a.txt").write_text("old")

    def write():
        with aside(tmp_path / "a.txt") as file:
            if begun:
                file.write(b"ne")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_writers_of_one_path_do_not_meet_and_the_last_one_wins(tmp_path):
    everyone, names = threading.Barrier(8), []

    def write(number):
        with aside(tmp_path / "a.txt") as file:
            names.append(file.name)
            file.write(str(number).encode() * 1000)
            everyone.wait()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(names)) == 8
    (path,) = tmp_path.iterdir()
    assert len(path.read_text()) == 1000
    assert len(set(path.read_text())) == 1


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path):
    for name in ("a" * 243 + ".safetensors", "日本" * 42):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_leaves_and_one_that_was_there_keeps_its_own(tmp_path, umask, mask):
    umask(mask)
    model, plain = make_model(num_hidden_layers=1), tmp_path / "plain"
    plain.touch()
    cache, kernels = LessCache.for_model(model, H2O(3, 3)), make_kernels(model)
    with torch.no_grad():
        model(tokens(1, 9), past_key_values=cache)
    cache.save(tmp_path / "cache")
    kernels.save_pretrained(tmp_path / "kernels")
    for file in (tmp_path / "cache", *(tmp_path / "kernels").iterdir()):
        assert mode(file) == mode(plain), file
    (tmp_path / "cache").chmod(0o640)
    cache.save(tmp_path / "cache")
    assert mode(tmp_path / "cache") == 0o640


def test_where_modes_cannot_be_set_files_are_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    for owner, name in ((os, "chmod"), (os, "fchmod"), (Path, "chmod")):
        monkeypatch.setattr(owner, name, refuse)
    for text in ("old", "new"):
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text() == text
    LessKernels(1, 2, 2, 4, hidden=3).save_pretrained(tmp_path / "kernels")


def test_a_link_stays_a_link_to_the_new_file(tmp_path):
    (tmp_path / "far").mkdir()
    for target in ("there", "not yet there"):
        (tmp_path / target).symlink_to(tmp_path / "far" / target)
    (tmp_path / "far" / "there").write_text("old")
    for target in ("there", "not yet there"):
        write_text(tmp_path / target, "new")
        assert (tmp_path / target).is_symlink()
        assert (tmp_path / "far" / target).read_text() == "new"


@pytest.mark.parametrize("path", ["", "/dev/null"])
def test_what_is_no_file_is_not_replaced(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="choose another name"):
        write_text(path, "x")
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match=r"no space left.*a\.txt"), aside(tmp_path / "a.txt"):
        raise OSError(28, "no space left")


HARMS = {"overwritten": lambda file, other: shutil.copyfile(other, file), "cut short": lambda file, _: os.truncate(file, 0)}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_what_was_loaded_does_not_change_with_its_file(tmp_path, harm, dtype, int8):
    """Written in place, as `cp` does it: the same file gets other bytes. Before the first step, and after it."""
    torch.manual_seed(0)
    model = make_model(num_hidden_layers=1).to(dtype)
    kernels = {name: make_kernels(model).to(torch.float32) for name in ("one", "other")}
    for seed, name in enumerate(kernels):
        for weight in kernels[name].parameters():
            weight += seed
        kernels[name].save_pretrained(tmp_path / name)
        cache = LessCache.for_model(model, H2O(3, 3), kernels["one"], int8=int8)
        state = LayerState.allocate(H2O(3, 3), 1, 2, 2, 8, dtype=dtype, int8=int8)
        with torch.no_grad():
            model(tokens(1, 20, seed=seed), past_key_values=cache)
        extend(state, *(torch.randn(1, 2, 9, 8, dtype=dtype) for _ in "qkv"))
        cache.save(tmp_path / name / "cache")
        save_state(state, tmp_path / name / "state")

    def load():
        again = LayerState.allocate(H2O(3, 3), 1, 2, 2, 8, dtype=dtype, int8=int8)
        load_state(again, tmp_path / "one" / "state")
        cache = LessCache.load(tmp_path / "one" / "cache", model, kernels["one"])
        return LessKernels.from_pretrained(tmp_path / "one"), cache, again

    def said(kernels, cache, state):
        with torch.no_grad():
            steps = [model(tokens(1, 1, seed=5), past_key_values=cache).logits for _ in range(2)]
        return [*kernels.state_dict().values(), *(x for _, x in state.tensors().items()), *steps]

    wanted, loaded = said(*load()), load()
    for file in ("kernels.safetensors", "cache", "state"):
        HARMS[harm](tmp_path / "one" / file, tmp_path / "other" / file)
    assert all(torch.equal(now, before) for now, before in zip(said(*loaded), wanted, strict=True))


def test_kernels_that_a_full_disk_cuts_short_leave_the_folder_as_it_was(tmp_path):
    """So few bytes that they are written when the file is closed, and not before."""
    model = make_model(num_hidden_layers=1)
    make_kernels(model).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert max(len(before[name]) for name in ("config.json", "README.md")) < 2000 < len(before["kernels.safetensors"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            make_kernels(model, rank=2).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_path_that_cannot_be_is_named_as_it_was_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/text'$"), aside(tmp_path / "none" / "text"):
        pass
    with pytest.raises(LessError, match="is no state of a cache"):
        read(f"{tmp_path}/\0")
