"""Standard streams that are gone, full or closed: the work is done, and the exit code says what was lost."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastebm.cli import METHODS, main
from tests.cli.tiny_runs import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which `fastebm` is the command line."""
    line = f'fastebm() {{ "{sys.executable}" -m fastebm "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300
    )


SAMPLE = 'fastebm sample "$RUN" --count 2 --out out.npz'


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (f"{SAMPLE} | true; exit ${{PIPESTATUS[0]}}", 0),
        (f"{SAMPLE} 2>&1 | true; exit ${{PIPESTATUS[0]}}", 0),
        (f"{SAMPLE} 2>&-", 0),
        (f"{SAMPLE} >&-", 0),
        (f"{SAMPLE} <&- >&- 2>&-", 0),
        (f"{SAMPLE} 2</dev/null", 0),  # open, but not for writing
        (f"{SAMPLE} >/dev/full", 1),
        (f"{SAMPLE} 2>/dev/full", 1),  # its bar is lost
    ],
)
def test_the_work_is_done_without_a_reader(trained: Path, tmp_path: Path, command: str, code: int) -> None:
    done = shell(command, tmp_path, RUN=str(trained))
    assert done.returncode == code, done.stderr
    assert np.load(tmp_path / "out.npz")["images"].shape == (2, 1, 8, 8)
    assert "Traceback" not in done.stderr
    if command.endswith(" >/dev/full"):
        assert done.stderr.splitlines()[-1] == "fastebm: standard output could not be written: No space left on device"


def test_a_training_without_a_reader_goes_to_its_end(tmp_path: Path) -> None:
    tiny = "--base-width 1 --num-steps 2 --batch-sizes 4 4 --iterations 1 5 --log-every 1 --engine autograd --out run"
    done = shell(f"fastebm train coarse-to-fine {tiny} 2>&1 | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 6
    assert (tmp_path / "run" / "samples.png").is_file()


def test_a_terminal_that_was_closed(trained: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastebm", "sample", str(trained), "--count", "2", "--out", "out.npz"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.close(ours)
    assert process.wait(timeout=300) == 0
    assert (tmp_path / "out.npz").is_file()


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"COLUMNS": "5"},
        {"COLUMNS": "0"},
    ],
    ids=str,
)
def test_help_on_any_terminal(tmp_path: Path, environment: dict[str, str]) -> None:
    commands = ["fastebm --help", *(f"fastebm train {method} --help" for method in METHODS)]
    done = shell("; ".join(f"{command} || exit 1" for command in commands), tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(commands)
    assert done.stderr == ""


def test_a_name_that_the_terminal_can_not_show(trained: Path, tmp_path: Path) -> None:
    done = shell("fastebm sample \"$RUN\" --count 2 --out $'\\xff\\xc3\\xbc.npz'", tmp_path, RUN=str(trained))
    assert done.returncode == 0, done.stderr
    assert "\\udcff" in done.stdout
    assert len(list(tmp_path.iterdir())) == 1


def test_a_log_has_no_control_codes(trained: Path, tmp_path: Path) -> None:
    done = shell(
        'fastebm sample "$RUN" --count 2 --out out.npz; fastebm --help; fastebm info "$RUN"', tmp_path, RUN=str(trained)
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_within_another_program_streams_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    assert main(["info"]) == 0
    assert (sys.stdout, sys.stderr) == before
    assert "known answer given" in capsys.readouterr().out
