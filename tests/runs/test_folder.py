"""Run folders, their lock and log."""

from pathlib import Path

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
    (tmp_path / "checkpoints").mkdir()
    write_json(tmp_path / "config.json", {})
    parts = [tmp_path / ".log.jsonl.abc.part", tmp_path / "checkpoints" / ".iteration-000000003.json.abc.part"]
    for part in parts:
        part.write_text("half")
    with RunFolder.locked(tmp_path):
        assert not any(part.exists() for part in parts)
