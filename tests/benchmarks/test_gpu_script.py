"""benchmarks/gpu.sh runs to its end on a CPU: all steps in small sizes, so that no minute of a GPU is lost to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def rehearsed(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    dropped = {"FASTEBM_BACKEND", "FASTEBM_CPU"}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        ["bash", str(SCRIPT), str(out), sys.executable],
        env=inherited | {"FASTEBM_REHEARSAL": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def rows(out: Path, step: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows" / f"{step}.jsonl").read_text().splitlines()]


def test_a_cut_off_step_keeps_its_rows_and_the_next_ones_run(tmp_path):
    """The limit of all steps together is hit by none of the first ones; the last one has no time left."""
    done = rehearsed(tmp_path, STEPS="bandwidth scale", SECONDS_IN_ALL="12")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bandwidth" in [row["step"] for row in rows(tmp_path, "steps")]
    assert rows(tmp_path, "bandwidth")
    assert "failed: scale" in done.stdout
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        assert "rows/bandwidth.jsonl" in packed.getnames()


def test_without_a_gpu_it_says_so(tmp_path):
    done = rehearsed(tmp_path, FASTEBM_REHEARSAL="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "finds no CUDA GPU" in done.stderr


def test_an_unknown_step_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "speed", "out"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "STEP one of facts, " in done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="done without it")
def test_rehearsal(tmp_path):
    done = rehearsed(tmp_path, SECONDS_IN_ALL="1800", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = {row["step"]: row["exit"] for row in rows(tmp_path, "steps")}
    assert set(found.values()) == {0}
    checks = [row for step in found if step not in ("core", "sanitizer", "build") for row in rows(tmp_path, step)]
    assert sum("ok" in row for row in checks) > 20
    assert all(row.get("ok", True) for row in checks)
