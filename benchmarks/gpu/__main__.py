"""`python -m benchmarks.gpu STEP OUT`: one step of benchmarks/gpu.sh."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.gpu.step import Rows

STEPS = ("facts", "warm", "bits", "programs", "replay", "bandwidth", "instructions", "update", "peer", "scale", "small")


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in STEPS:
        sys.exit(f"usage: python -m benchmarks.gpu STEP OUT, with STEP one of {', '.join(STEPS)}")
    step, out = sys.argv[1], Path(sys.argv[2])
    rows = Rows(out, step)
    importlib.import_module(f"benchmarks.gpu.{step}").run(rows)
    if rows.failed:
        sys.exit(f"{step}: {rows.failed} checks failed")


if __name__ == "__main__":
    main()
