"""A suite from end to end: `pytest benchmarks` prints a table and saves its rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastebm.build_extension import cpp_compiler
from fastebm.evaluation.speed import read_runs

ROOT = Path(__file__).resolve().parents[2]


def suite_run(tmp_path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--rounds", "2", "--budget", "0.1", "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: torch.compile can't run")
def test_a_suite_prints_its_table_and_saves_its_rows(tmp_path: Path) -> None:
    printed = suite_run(tmp_path, "benchmarks/ops/test_uniform.py", "-k", "64x3", "--save", str(tmp_path))
    assert "uniform: float32, 64x3x32x32, float32, time of one call" in printed
    assert "torch.compile of rand" in printed
    (path,) = tmp_path.rglob("uniform.json")
    (run,) = read_runs(path)
    assert path.parent.name == run.machine["name"]
    assert [row.baseline for row in run.rows] == ["fastebm", "torch.rand", "torch.compile of rand"]
    assert run.rows[0].achieved is not None


def test_a_fault_of_the_compiler_fails_a_benchmark(tmp_path: Path) -> None:
    """Not a warning beside a row that is slower than it should be."""
    (tmp_path / "test_fault.py").write_text(
        "import warnings\n\nfrom fastebm.compiler.faults import FaultWarning\n\n\n"
        "def test_fault():\n    warnings.warn('the compiler failed', FaultWarning)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "benchmarks.conftest", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FaultWarning: the compiler failed" in done.stdout
