"""Ours at another revision: built into a temporary folder, and measured in a process of its own beside the present one.

Both processes stay for the whole session and do the same workloads in turns, a round each in a shuffled order, so that
they see the same machine. The workloads are today's, through the public face only.
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

from benchmarks.harness.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]
MINIMUM_ROUNDS = 5
# The time of one figure: longer than within one process, since a process that was waiting has to warm up.
SLICE_SECONDS = 0.1


class WorkerError(Exception):
    """What a workload failed with in a worker, in one line."""


class Worker:
    """A process that imports fastebm from `paths` and does workloads when told to."""

    def __init__(self, paths: Sequence[Path], package: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.harness.worker", str(ROOT), str(package)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: dict[str, Any]) -> float:
        """Seconds, as the worker answers. Raises WorkerError where it can't."""
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
    """The two workers, of the present checkout and of a revision."""

    revision: str
    now: Worker
    before: Worker

    @classmethod
    @contextmanager
    def built(cls, revision: str, device: str) -> Iterator[Base]:
        """Builds `revision` in a temporary worktree and starts both workers; all is gone afterwards.

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
