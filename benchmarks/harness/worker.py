"""A process that runs workloads for `compare_revisions.py`: JSON requests on stdin, JSON replies on stdout.

    {"prepare": {...}}   makes a workload and warms it up    -> {"seconds": of one run}
    {"repeats": 3}       runs it 3 times                     -> {"seconds": of one run, the mean}

It uses only the public interface of fastebm, which may be an older revision, and the measurement of this checkout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fastebm
from benchmarks.harness.workloads import Run, Workload, ours


def measurement(checkout: Path) -> ModuleType:
    """This checkout's `fastebm.evaluation.speed.measurement`, loaded by its path: an older fastebm may have none."""
    path = checkout / "fastebm" / "evaluation" / "speed" / "measurement.py"
    spec = importlib.util.spec_from_file_location("measurement", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules["measurement"] = module
    spec.loader.exec_module(module)
    return module


class Answers:
    def __init__(self, clock: ModuleType) -> None:
        self.clock = clock
        self.run: Run | None = None
        self.device = "cpu"

    def answer(self, question: dict[str, Any]) -> float:
        if "prepare" in question:
            self.run = None  # frees the memory of the last one
            work = Workload.from_json(question["prepare"])
            self.device, self.run = work.device, ours(work)
            self.run()
            return min(self.clock.seconds(self.run, 1, self.device) for _ in range(2))
        if self.run is None:
            raise RuntimeError("nothing was prepared")
        return self.clock.seconds(self.run, question["repeats"], self.device)


def main() -> None:
    checkout, package = (Path(argument).resolve() for argument in sys.argv[1:3])
    # Output of libraries goes to stderr, so that only answers are on the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = Path(fastebm.__file__).resolve()
    wrong = None if package in found.parents else f"fastebm was imported from {found}, not from {package}"
    worker = Answers(measurement(checkout))
    for line in sys.stdin:
        try:
            if wrong:
                raise RuntimeError(wrong)
            answer: dict[str, Any] = {"seconds": worker.answer(json.loads(line))}
        except Exception as error:  # the parent process decides what it means
            text = next(iter(str(error).strip().splitlines()), "")
            answer = {"error": f"{type(error).__name__}: {text}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
