"""Files are written aside and renamed: no reader ever sees half of one, and no writer meets another."""

import threading

import pytest

from less_fast.files import aside


def test_a_file_appears_whole_and_replaces_the_one_before(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with aside(tmp_path / "a.txt") as file:
        file.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "new")]
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("begun", [True, False])
def test_after_an_error_the_old_file_stands_alone(tmp_path, begun):
    (tmp_path / "a.txt").write_text("old")

    def write():
        with aside(tmp_path / "a.txt") as file:
            if begun:
                file.write_text("ne")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_writers_of_one_path_do_not_meet_and_the_last_one_wins(tmp_path):
    everyone, names = threading.Barrier(8), []

    def write(number):
        with aside(tmp_path / "a.txt") as file:
            names.append(file.name)
            file.write_text(str(number) * 1000)
            everyone.wait()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(names)) == 8
    (path,) = tmp_path.iterdir()
    assert len(path.read_text()) == 1000
    assert len(set(path.read_text())) == 1


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path):
    path = tmp_path / ("a" * 243 + ".safetensors")
    with aside(path) as file:
        file.write_text("x")
    assert path.read_text() == "x"
