"""A file is complete or not there."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastebm.runs import files
from fastebm.runs.files import NoLocksError, check_writable, lock, read_json, remove_leftovers, replacing, write_json


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


HOLDER = """
import fcntl, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from fastebm.runs.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    sys.stdin.read()
"""


def half_written(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has begun to write `path` and waits, and its temporary file."""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, path.parent / process.stdout.readline().strip()


def test_what_a_kill_left_is_removed_and_what_is_written_now_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    process, part = half_written(path)
    foreign = [".out.npz.part", "out.npz.abcd1234.part", ".out.npz.My notes.part", ".other.npz.abcd1234.part"]
    for name in foreign:
        (tmp_path / name).write_text("precious")
    (tmp_path / ".out.npz.folder00.part").mkdir()
    (tmp_path / ".out.npz.link0000.part").symlink_to(tmp_path / foreign[0])
    foreign += [".out.npz.folder00.part", ".out.npz.link0000.part"]

    files._leftovers_in.cache_clear()  # as in a new process
    with replacing(path) as temporary:
        temporary.write_text("ours")
    remove_leftovers(tmp_path / "no folder")
    assert part.exists()

    process.kill()
    process.communicate()
    files._leftovers_in.cache_clear()
    with replacing(path) as temporary:
        temporary.write_text("again")
    assert not part.exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*foreign, "out.npz"])
    remove_leftovers(tmp_path)  # of any name
    foreign.remove(".other.npz.abcd1234.part")
    foreign.remove(".out.npz.part")  # which could be that of a file called "out"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*foreign, "out.npz"])


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_files_are_written_and_leftovers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    part = tmp_path / ".a.txt.abcd1234.part"
    part.write_text("half")
    files._leftovers_in.cache_clear()
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    remove_leftovers(tmp_path)
    assert part.exists()
    with part.open() as file, pytest.raises(NoLocksError):
        lock(file.fileno())


def test_a_temporary_file_that_was_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def swept(handle: int, *, wait: bool = False) -> bool:
        if not taken:
            (part,) = tmp_path.glob(".a.txt.*.part")
            taken.append(part)
            part.unlink()
        return True

    monkeypatch.setattr(files, "lock", swept)
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert taken
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"[]", "not a JSON object"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the name 'c' occurs twice"),
        ("{}".encode("utf-16"), "not a text in UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "4300"),
    ],
    ids=["empty", "list", "nan", "twice", "utf-16", "bom", "lists", "objects", "digits"],
)
def test_other_files_than_json_objects_are_value_errors(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")
