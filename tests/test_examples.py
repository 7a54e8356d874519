"""The examples run as a user runs them, if with few iterations."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_quickstart(tmp_path: Path) -> None:
    printed = run("quickstart.py", "--quick", cwd=tmp_path)
    assert "mean energy of real digits" in printed
    pictures = {path.name for path in (tmp_path / "runs" / "quickstart").glob("*.png")}
    assert {"samples.png", "strip.png", "curves.png", "quickstart.png", "quickstart_strip.png"} == pictures


def test_own_energy(tmp_path: Path) -> None:
    printed = run("own_energy.py", "--quick", cwd=tmp_path)
    assert "temperature 1" in printed
    noise, samples = (float(part.split()[-1].strip(",")) for part in printed.splitlines()[-1].split(", samples"))
    assert samples < noise


def test_own_generator(tmp_path: Path) -> None:
    printed = run("own_generator.py", "--quick", cwd=tmp_path)
    last = printed.splitlines()[-1]
    assert float(last.split("one pass ")[1].split(";")[0]) < float(last.split("untrained ")[1].split(",")[0])


@pytest.mark.parametrize("name", ["gan_generator.py", "autoregressive_generator.py"])
def test_calibrated_generators(name: str, tmp_path: Path) -> None:
    """Both models are trained, with and without calibration, and judged; far too briefly for one to be the better."""
    lines = run(name, "--iterations", "6", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["plain", "calibrated"]
    distances = [float(line.split("distance ")[1].split()[0]) for line in lines]
    assert all(0 < distance < 1000 for distance in distances)
    plain, calibrated = (re.sub(r"\b\d+ s\b", "", line).split(maxsplit=1)[1] for line in lines)
    assert plain != calibrated  # whatever the time, the calibration changed a number
