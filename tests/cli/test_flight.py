"""`fastebm flight`: shows the records of a run, and asks a training process for one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fastebm.cli import main
from fastebm.runs.folder import RunFolder
from fastebm.training.trainer.flight import FlightRecorder, records, write_record
from tests.cli.tiny_runs import TRAIN, start


def test_it_shows_each_record(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flight", str(trained)]) == 0
    assert "has no flight record: the guard never went back" in capsys.readouterr().out
    recorder = FlightRecorder(10)
    for iteration in (3, 4):
        recorder.begin({"iteration": iteration})
        recorder.finish({"gap": 0.1})
        write_record(trained, recorder.record(), "the guard went back", f"reason {iteration}")
    assert main(["flight", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert "iteration-000000003-1, updates 3 to 3\n  the guard went back: reason 3\n  Only 1 updates" in printed
    assert str(trained / "flight" / "iteration-000000004-1.png") in printed
    assert printed.index("reason 3") < printed.index("reason 4")
    write_record(trained, recorder.record(), "the guard gave the run up", "reason 5")
    newest = records(trained)[-1]
    os.utime(newest, (time.time() + 9, time.time() + 9))
    assert main(["info", str(trained)]) == 0
    assert f"the guard gave the run up: fastebm flight {trained} shows 3 records" in capsys.readouterr().out
    newest.write_text("[]")
    os.utime(newest, (time.time() + 9, time.time() + 9))
    assert main(["info", str(trained)]) == 0
    assert f"{newest.name} is damaged" in capsys.readouterr().out
    newest.unlink()
    records(trained)[0].write_text("{}")
    assert main(["flight", str(trained)]) == 2
    assert "is no flight record, or a damaged one: it has no 'event'" in capsys.readouterr().err
    assert main(["flight", str(trained.parent)]) == 2
    assert main(["flight", str(trained), "--now"]) == 2
    assert "no process trains in" in capsys.readouterr().err


def test_a_training_process_is_asked_for_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    process = start(*TRAIN, "--iterations", "3", "100000", "--out", str(run), cwd=tmp_path)
    try:
        while process.poll() is None and not (RunFolder.is_run(run) and RunFolder(run).log.last()):
            time.sleep(0.05)
        assert main(["flight", str(run), "--now", "--wait", "120"]) == 0, capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    printed = capsys.readouterr().out
    assert "the record was asked for" in printed
    (path,) = records(run)
    assert np.load(path.with_suffix(".npz"))["iterations"][0] == 1
    assert not (run / ".flight").exists()
