"""Run folders, their lock and log."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastebm.runs.files import write_json
from fastebm.runs.folder import RunError, RunFolder, RunLog


def test_a_folder_is_made_and_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    RunFolder.open(path, "kind", {"x": 1, "sizes": (4, 8)})
    again = RunFolder.open(path, "kind", {"x": 1, "sizes": (4, 8)})
    assert again.config("kind") == {"x": 1, "sizes": [4, 8]}
    assert RunFolder.existing(path).path == path


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", "kind", {"rate": 1, "seed": 0})
    with pytest.raises(RunError, match="rate is 1 there and 2 here"):
        RunFolder.open(tmp_path / "run", "kind", {"rate": 2, "seed": 0})


def test_another_kind_a_foreign_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", "kind", {})
    with pytest.raises(RunError, match="of kind 'kind', not 'other'"):
        RunFolder.open(tmp_path / "run", "other", {})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("foreign", "file"):
        with pytest.raises(RunError, match=f"{name} exists and is not a run"):
            RunFolder.open(tmp_path / name, "kind", {})
    with pytest.raises(RunError, match="it has no config"):
        RunFolder.existing(tmp_path / "nothing")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"kind": "kind", "config": 3}'])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        RunFolder.existing(tmp_path).config("kind")


def test_the_log_rewinds_and_forgives_a_cut_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    assert log.lines() == []
    for iteration in range(1, 6):
        log.append({"iteration": iteration, "gap": 0.5, "seconds": 1.0})
    with log.path.open("a") as file:
        file.write('{"iteration": 6, "ga')
    assert [line["iteration"] for line in log.lines()] == [1, 2, 3, 4, 5]
    log.rewind(3)
    log.append({"iteration": 4, "gap": 0.5, "seconds": 1.0})
    assert [line["iteration"] for line in log.lines()] == [1, 2, 3, 4]


def test_mutable_fields_may_differ_and_new_ones_have_their_default(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "kind", {"rate": 1, "every": 5})
    config = {"rate": 1, "every": 9, "new": (1, 2)}
    RunFolder.open(tmp_path, "kind", config, defaults={"new": (1, 2)}, mutable_fields={"every"})
    with pytest.raises(RunError, match=r"every is 5 there and 9 here; new is \[0\] there and \[1, 2\] here"):
        RunFolder.open(tmp_path, "kind", config, defaults={"new": (0,)})


def test_a_folder_knows_its_images_and_threads(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "told", "kind", {}, images={"path": "there"})
    assert folder.images() == {"path": "there"}
    assert folder.threads() == torch.get_num_threads()
    assert RunFolder.open(tmp_path / "not", "kind", {}).images() is None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder.locked(path):
        RunFolder.open(path, "kind", {})
        with pytest.raises(RunError, match=r"another process is training in .*run"), RunFolder.locked(path):
            pass
    with RunFolder.locked(path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file exists and is not a run"), RunFolder.locked(tmp_path / "file"):
        pass


def test_what_a_kill_left_half_written_is_swept_away(tmp_path: Path) -> None:
    for folder in ("checkpoints", "flight"):
        (tmp_path / folder).mkdir()
    write_json(tmp_path / "config.json", {})
    parts = [tmp_path / ".log.jsonl.abc.part", tmp_path / "checkpoints" / ".iteration-000000003.json.abc.part"]
    parts += [tmp_path / "flight" / ".iteration-000000003-1.npz.abc.part"]
    for part in parts:
        part.write_text("half")
    with RunFolder.locked(tmp_path):
        assert not any(part.exists() for part in parts)
    # Also where the kill came while the folder was made, and in the folder of pictures.
    new = tmp_path / "new"
    (new / "pictures").mkdir(parents=True)
    (new / "pictures" / ".iteration-000000002.png.abc.part").write_text("half")
    write_json(new / "config.json", {})
    (new / "config.json").rename(new / ".config.json.abcd1234.part")
    with pytest.raises(RunError, match="is not a run"), RunFolder.locked(new):
        pass
    (new / "pictures").rename(tmp_path / "pictures")
    with RunFolder.locked(new):
        assert [entry.name for entry in new.iterdir()] == [".lock"]
        RunFolder.open(new, "kind", {})
    (tmp_path / "pictures").rename(new / "pictures")
    with RunFolder.locked(new):
        assert list((new / "pictures").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(RuntimeWarning, match="file system of .*run has no file locks .*second training") as warned,
        RunFolder.locked(tmp_path / "run"),
    ):
        RunFolder.open(tmp_path / "run", "kind", {}).save_checkpoint(1, {"x": torch.zeros(1)}, {})
    assert len(warned) == 1

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(RunError, match="run can't be locked: Input/output error"), RunFolder.locked(tmp_path / "run"):
        pass


def test_no_run_is_where_it_cannot_be_and_the_reason_comes_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    for path, message in (
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / "file", "is not a run"),
        (tmp_path / "foreign", "is not a run"),
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path / "new" / ("a" * 300), "File name too long"),
        (Path("/proc/run"), "can't be written to"),
    ):
        with pytest.raises(RunError, match=message):
            RunFolder.check_place(path)
    RunFolder.check_place(tmp_path / "new" / "run")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "foreign"]


def test_what_was_meant_by_another_path(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "runs" / "a", "kind", {})
    run.save_checkpoint(1, {"x": torch.zeros(1)}, {})
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    for path, message in (
        (tmp_path / "file", "it has no config.json; it is a file: give the folder"),
        (tmp_path / "run.zip", "it is an archive: unpack it first"),
        (tmp_path / "empty", "the folder is empty"),
        (tmp_path / "runs", "below it are runs: a$"),
        (run.checkpoints.folder, "it lies in the run .*runs/a: give that folder"),
        (run.checkpoints.folder / "iteration-000000001.safetensors", "it lies in the run .*runs/a: give that folder"),
        (run.path / "config.json", "it lies in the run"),
        (tmp_path / "nothing", "is not a run of fastebm: it has no config.json$"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(RunError, match=message):
            RunFolder.existing(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"iteration": 3}\n', "it has no seconds"),
        (b'{"seconds": 3.0}\n', "it has no iteration"),
        (b'{"iteration": "3", "seconds": 1.0}\n', "iteration must be a whole number, got '3'"),
        (b'{"iteration": 3, "seconds": 1.0, "gap": null}\n', "gap must be a number, got None"),
        (b'{"iteration": 2, "seconds": 1.0}\n', "its iteration is 2, after one of iteration 2"),
        (b"half a line\n", "Expecting value"),
        (b"\0\0\xff\xfe\n", "UTF-8"),
        (b"\n", "Expecting value"),
    ],
)
def test_a_damaged_line_of_the_log_is_named_and_stays(tmp_path: Path, text: bytes, message: str) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for iteration in (1, 2):
        log.append({"iteration": iteration, "seconds": 1.0})
    with log.path.open("ab") as file:
        file.write(text)
    log.append({"iteration": 4, "seconds": 1.0})
    before = log.path.read_bytes()
    acts: list[Callable[[], object]] = [log.lines, log.last, lambda: log.rewind(9)]
    for act in acts:
        with pytest.raises(RunError, match=rf"line 3 of .*log\.jsonl is damaged \(.*{message}"):
            act()
    assert log.path.read_bytes() == before


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(RunError, match=r"log\.jsonl can't be read: Is a directory"):
        RunLog(tmp_path / "log.jsonl").lines()


def test_whole_lines_are_read_beside_damaged_ones(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    assert log.whole_lines() == ([], [])
    lines = [{"iteration": k, "seconds": 1.0} for k in (1, 3, 4)]
    texts = [*map(json.dumps, lines)]
    log.path.write_text("\n".join([texts[0], "what", texts[0], texts[1], '{"iteration": 9}', texts[2], texts[2][:9]]))
    whole, faults = log.whole_lines()
    assert whole == lines
    assert [fault.split(" of ")[0] for fault in faults] == ["line 2", "line 3", "line 5"]


def test_the_last_line_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    assert log.last() is None
    for iteration in (1, 2):
        log.append({"iteration": iteration, "seconds": 1.0, "gap": float("nan")})
    last = log.last()
    assert last is not None
    assert last["iteration"] == 2
    assert math.isnan(last["gap"])


def test_to_rewind_takes_no_room_and_changes_only_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.path.write_bytes(b"".join(b'{"seconds":1,  "iteration": %d}\n' % number for number in range(1, 100)) + b'{"ite')
    inode, whole = log.path.stat().st_ino, log.path.read_bytes()
    log.rewind(98)
    assert log.path.stat().st_ino == inode
    assert whole.startswith(log.path.read_bytes())
    assert [line["iteration"] for line in log.lines()] == list(range(1, 99))


def test_a_config_that_vanishes_is_written_again_and_a_folder_that_does_is_named(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", "kind", {"a": 1}, images={"path": "there"})
    stored = (folder.path / "config.json").read_text()
    (folder.path / "config.json").unlink()
    folder.save_checkpoint(1, {"x": torch.zeros(1)}, {})
    assert (folder.path / "config.json").read_text() == stored
    folder.path.rename(tmp_path / "moved")
    with pytest.raises(RunError, match="The folder was moved or removed: what was saved is where it is now"):
        folder.save_checkpoint(2, {"x": torch.zeros(1)}, {})
    assert not folder.path.exists()
    assert RunFolder.existing(tmp_path / "moved").checkpoints.iterations() == [1]


@pytest.mark.parametrize(
    ("entry", "value"),
    [("threads", -1), ("threads", "2"), ("threads", 10**9), ("images", 3), ("kind", None), ("config", [])],
)
def test_a_wrong_entry_of_the_config_is_named(tmp_path: Path, entry: str, value: Any) -> None:
    folder = RunFolder.open(tmp_path, "kind", {})
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {entry: value}))
    with pytest.raises(RunError, match=rf"config\.json is damaged: {entry} must"):
        folder.threads()


def test_two_that_begin_at_once(tmp_path: Path) -> None:
    """One gets the new folder, and the other is told that it is taken, whatever the moment."""
    path = tmp_path / "run"
    with RunFolder.locked(path):
        (path / ".config.json.abcd1234.part").write_text("half")  # as the first is just writing it
        with pytest.raises(RunError, match="another process is training in"), RunFolder.locked(path):
            pass
