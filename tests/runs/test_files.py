"""A file is complete or not there."""

import errno
import os
import stat
from pathlib import Path

import pytest

from fastebm.runs.files import check_writable, replacing, write_json


def test_replaces_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def stopped() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_syncing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_what_can_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    there = tmp_path / "there.npz"
    there.write_text("precious")
    assert check_writable(str(tmp_path / "new.npz")) == tmp_path / "new.npz"
    assert check_writable(there, overwrite=True) == there
    for path, said in (
        (there, "--overwrite"),
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "a.npz", "does not exist"),
        (there / "a.npz", "ot a directory|does not exist"),
        (tmp_path / ("a" * 300), "too long"),
        (Path("/proc/a.npz"), "can't be written"),
    ):
        with pytest.raises(ValueError, match=said):
            check_writable(path)
    (tmp_path / "link.npz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--overwrite"):
        check_writable(tmp_path / "link.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.npz", "there.npz"]
    assert there.read_text() == "precious"


def test_a_name_as_long_as_it_may_be_is_written(tmp_path: Path) -> None:
    path = check_writable(tmp_path / ("ä" * 127))
    with replacing(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"
