"""Commands in tests: `fastebm train` for runs that take a second, processes, and commands that work on images."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from fastebm.cli import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--base-width", "1", "--num-steps", "2", "--batch-sizes", "8", "8", "--log-every", "1", "--engine", "autograd"]
TRAIN = ["train", "coarse-to-fine", "--preset", "digits", *TINY]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, for exit codes and kills."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastebm", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_task(command: list[str], files: set[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The numbers of a command that works on images, after a look at its files: `--out` is the last argument.

    What is there stays, unless asked otherwise.
    """
    out = Path(command[-1])
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == files | {"numbers.json"}
    assert all(name in printed for name in files)
    for name in files:
        if name.endswith(".png"):
            assert imread(out / name).std() > 0.05
    before = (out / "numbers.json").stat().st_mtime_ns
    assert main(command) == 2
    assert "has files in it, which stay" in capsys.readouterr().err
    assert (out / "numbers.json").stat().st_mtime_ns == before
    numbers: dict[str, Any] = json.loads((out / "numbers.json").read_text())
    assert numbers["seed"] == 0
    return numbers
