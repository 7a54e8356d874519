"""Compares this checkout with another revision of fastebm, which is built into a temporary folder.

Two processes, one for each revision, stay for the whole session and run the same workloads in turns, one round each in
a random order, so that both see the machine in the same state. The workloads are those of this checkout and use the
public interface only.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.pages import ROOT
from benchmarks.harness.workloads import Workload
from fastebm.evaluation.speed import Summary, ratios

MINIMUM_ROUNDS = 5
# The time of one figure is longer than within one process, because a process that was waiting has to warm up.
SLICE_SECONDS = 0.1
# Medians of the same code differ by a few per cent between two runs on a shared machine.
REGRESSION_LIMIT = 1.10


@dataclass(frozen=True)
class RegressionResult:
    """The rounds' ratios, time now over time at the base revision, and whether they show a regression."""

    ratio: Summary
    limit: float = REGRESSION_LIMIT

    @property
    def regressed(self) -> bool:
        """The median is beyond the limit, and even the 20 % quantile is above 1, so most rounds agree."""
        return self.ratio.median > self.limit and self.ratio.low > 1.0

    def __str__(self) -> str:
        result = "REGRESSION" if self.regressed else "no regression"
        return f"{self.ratio.median:.3f} ({self.ratio.low:.3f} to {self.ratio.high:.3f}) of the base's time: {result}"


def check_regression(now: Sequence[float], base: Sequence[float], limit: float = REGRESSION_LIMIT) -> RegressionResult:
    """Compares the seconds of interleaved rounds, as many of one as of the other."""
    return RegressionResult(Summary.of(ratios(now, base)), limit)


class WorkerError(Exception):
    """The reason, in one line, why a workload failed in a worker."""


class Worker:
    """A process that imports fastebm from `paths` and runs workloads."""

    def __init__(self, paths: Sequence[Path], package: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.harness.worker", str(ROOT), str(package)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: dict[str, Any]) -> float:
        """The seconds that the worker answers. Raises WorkerError where it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended, exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["seconds"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@dataclass(frozen=True)
class Base:
    """The two workers, of this checkout and of a revision."""

    revision: str
    now: Worker
    before: Worker

    @classmethod
    @contextmanager
    def built(cls, revision: str, device: str) -> Iterator[Base]:
        """Builds `revision` in a temporary worktree and starts both workers; everything is removed afterwards.

        Raises pytest.UsageError where the revision is unknown or can't be built.
        """
        with ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="fastebm-base-")))
            tree, site, suites = folder / "tree", folder / "site", folder / "suites"
            _run("git", "worktree", "add", "--detach", str(tree), revision)
            undo.callback(_run, "git", "worktree", "remove", "--force", str(tree))
            print(f"building fastebm at {revision}", flush=True)
            options = ("--no-build-isolation", "--no-deps", "--quiet", "--disable-pip-version-check")
            _run(sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(tree))
            shutil.copytree(ROOT / "benchmarks", suites / "benchmarks", ignore=shutil.ignore_patterns("results"))
            now = Worker([ROOT], ROOT)
            undo.callback(now.stop)
            before = Worker([site, suites], site)
            undo.callback(before.stop)
            yield cls(revision, now, before)

    def measure(self, work: Workload, rounds: int, budget_seconds: float) -> tuple[list[float], list[float]]:
        """The seconds of each round, now and at the base. Skips the test where the base can't do this workload."""
        each = self.now.ask({"prepare": work.to_json()})
        try:
            each += self.before.ask({"prepare": work.to_json()})
        except WorkerError as error:
            pytest.skip(f"not comparable: at {self.revision} {error}")
        repeats = max(1, min(1000, int(2 * SLICE_SECONDS / each)))
        rounds = min(rounds, max(MINIMUM_ROUNDS, int(budget_seconds / (repeats * each))))
        times: dict[str, list[float]] = {"now": [], "before": []}
        order = [("now", self.now), ("before", self.before)]
        shuffle = random.Random(0).shuffle
        for _ in range(rounds):
            shuffle(order)
            for name, worker in order:
                times[name].append(worker.ask({"repeats": repeats}))
        return times["now"], times["before"]


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise pytest.UsageError(f"{' '.join(command[:4])} ... failed:\n{said}")
