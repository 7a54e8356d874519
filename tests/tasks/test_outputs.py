"""Places for results: found to be unwritable before the work, locked during it, and nothing empty is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fastebm.cli import main
from fastebm.tasks import generate
from fastebm.tasks.outputs import check_folder, locked, task_folder
from fastebm.training import CoarseToFineRun, RunError

COMMANDS = {
    "denoise": ["--tuning-images", "0", "--num-steps", "1"],
    "inpaint": ["--restarts", "1"],
    "translate": ["--data", "DATA", "--num-steps", "2"],
    "interpolate": ["--points", "3", "--iterations", "1"],
    "detect": ["--engine", "autograd"],
    "restore": ["--restarts", "1"],
    "generate": [],
}
each_command = pytest.mark.parametrize("command", COMMANDS)


def words(command: str, run: Path, out: str | Path) -> list[str]:
    return [command, str(run), *COMMANDS[command], "--count", "4", "--out", str(out)]


@pytest.fixture
def no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it a failure to load a run, without which no chain runs."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the place for results was not checked before the work")

    monkeypatch.setattr("fastebm.cli.restore.load", load)  # first: it is imported here, with the true one
    monkeypatch.setattr("fastebm.training.load", load)
    monkeypatch.setattr(CoarseToFineRun, "load", load)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "n" * 300: (lambda here: None, "File name too long"),
    "letter/out": (lambda here: (here / "letter").write_text("mine"), "directory|does not exist"),
    "letter": (lambda here: (here / "letter").write_text("mine"), "is a file"),
    "closed/out": (lambda here: (here / "closed").mkdir(), "No space left on device"),
}


@each_command
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("no_chain")
def test_places_that_can_not_be_written_are_found_before_the_work(
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    place: str,
) -> None:
    make, message = PLACES[place]
    make(tmp_path)
    if place.startswith("closed"):

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("tempfile._mkstemp_inner", full)
    before = sorted(tmp_path.rglob("*"))
    assert main(words(command, digits_run, tmp_path / place)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "generate"])
@pytest.mark.usefixtures("no_chain")
def test_files_of_the_user_stay(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "grid.png").write_text("precious")
    assert main(words(command, digits_run, tmp_path)) == 2
    assert "has files in it, which stay" in capsys.readouterr().err
    assert (tmp_path / "grid.png").read_text() == "precious"
    assert os.listdir(tmp_path) == ["grid.png"]


@pytest.mark.parametrize(
    ("command", "name"),
    [("restore", "grid.png"), ("detect", "roc.png"), ("denoise", "denoised.npz"), ("inpaint", "numbers.json")],
)
@pytest.mark.usefixtures("no_chain")
def test_a_folder_in_the_place_of_a_file_is_found_before_the_work(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    (tmp_path / name).mkdir()
    assert main([*words(command, digits_run, tmp_path), "--overwrite"]) == 2
    assert f"{name} is a folder, and a file is to be written" in capsys.readouterr().err


def test_overwrite_replaces_its_own_files_and_leaves_others(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_text("old")
    (tmp_path / "letter.txt").write_text("mine")
    assert main([*words("restore", digits_run, tmp_path), "--overwrite"]) == 0
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_a_failed_block_leaves_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), task_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    (tmp_path / "own").mkdir()
    with suppress(ZeroDivisionError), task_folder(tmp_path / "own" / "b") as folder:
        (folder / "half.png").write_text("")
        raise ZeroDivisionError
    assert (tmp_path / "own" / "b" / "half.png").exists()


def test_what_a_kill_left_half_written_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".denoised.png.x1.part").write_text("")
    assert check_folder(tmp_path) == tmp_path


@each_command
def test_two_tasks_in_one_folder_are_refused(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / "out"
    locked_folder = out / ".generate" if command == "generate" else out
    locked_folder.mkdir(parents=True)
    data = tmp_path / "data.npz"
    np.savez(data, images=np.zeros((4, 8, 8), np.uint8))
    arguments = [str(data) if word == "DATA" else word for word in words(command, digits_run, out)]
    with locked(locked_folder):
        assert main(arguments) == 2
    assert "another process is writing to" in capsys.readouterr().err
    assert [entry for entry in out.rglob("*") if entry.is_file()] == []


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF):

        def flock(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.warns(UserWarning, match="can't be locked"), locked(tmp_path):
            pass


def test_python_functions_refuse_as_well(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("mine")
    for out in (tmp_path / "letter" / "x.npz", tmp_path / ("n" * 250 + ".npz"), tmp_path / "letter" / "x"):
        with pytest.raises(ValueError, match=r"does not exist|can't be written|Not a directory"):
            generate(digits_run, 5, out)
    with locked(tmp_path), pytest.raises(RunError, match="another process"), locked(tmp_path):
        pass
