"""Ctrl-C, SIGTERM and SIGKILL at random moments: exit codes, no traceback, nothing half written, the same bits after.

A kill costs seconds, so there is one for several tries of the other fuzzers.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastebm.runs.folder import RunFolder
from fastebm.training import CoarseToFineConfig, DigitsSource, train

ROOT = Path(__file__).resolve().parents[2]
PER_KILL = 13
SECONDS = 120
"""A process that is still there so long after a signal does not end."""
TRAIN = [
    *("train", "coarse-to-fine", "--base-width", "1", "--num-steps", "2", "--batch-sizes", "4", "4", "--iterations"),
    *("20", "60", "--log-every", "1", "--checkpoint-every", "3", "--out", "new"),
]
COMMANDS = [
    TRAIN,
    TRAIN,
    ["sample", "run", "--count", "300", "--out", "out.npz"],
    ["generate", "run", "--count", "300", "--chunk", "10", "--out", "out"],
    ["generate", "run", "--count", "300", "--chunk", "10", "--processes", "2", "--out", "out.npz"],
    ["inpaint", "run", "--count", "4", "--num-steps", "3", "--out", "out"],
    ["detect", "run", "--count", "20", "--out", "out"],
]
RESUMED = ("train", "generate")
"""Commands that go on when they are given again, and clean up what SIGKILL left of their own. The others begin anew."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run."""
    folder = tmp_path_factory.mktemp("world")
    sizes: dict[str, Any] = {
        "sizes": (4, 8),
        "iterations": (1, 1),
        "batch_sizes": (4, 4),
        "learning_rates": (1e-3, 1e-3),
    }
    config = CoarseToFineConfig(**sizes, channels=1, base_width=1, num_steps=2)
    train(config, DigitsSource(), folder / "run", progress=False, save_pictures=False)
    return folder


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastebm", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class Whole:
    """Results of commands that nobody stopped, and how long they took."""

    def __init__(self, world: Path, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._known: dict[str, tuple[Path, float]] = {}

    def of(self, arguments: list[str]) -> tuple[Path, float]:
        name = str(COMMANDS.index(arguments))
        if name not in self._known:
            folder = Path(shutil.copytree(self._world, self._folder / name))
            began = time.monotonic()
            process = start(arguments, folder)
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            self._known[name] = folder, time.monotonic() - began
        return self._known[name]


def results(folder: Path) -> dict[str, Any]:
    """What must be the same at the end: arrays, pictures of samples, and the tensors of the last checkpoint."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as arrays:
            found |= {f"{path.name}/{name}": torch.from_numpy(arrays[name]) for name in arrays.files}
    if (folder / "new").is_dir():
        checkpoint = RunFolder(folder / "new").checkpoints.load_newest()
        assert checkpoint is not None
        found |= checkpoint.tensors
    found |= {path.name: path.read_bytes() for path in folder.glob("out/[0-9]*.png")}
    return found


def same(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else bool(left == right)


def parts(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*.part")]


def test_kills_at_random_moments(tries: int, world: Path, tmp_path: Path) -> None:
    whole, found = Whole(world, tmp_path / "whole"), {}
    for number in range(max(1, tries // PER_KILL)):
        draw = random.Random(number)
        arguments = draw.choice(COMMANDS)
        reference, seconds = whole.of(arguments)
        folder = Path(shutil.copytree(world, tmp_path / "try"))
        if wrong := faults(draw, arguments, folder, results(reference), seconds):
            found[number] = arguments[:2], wrong
        shutil.rmtree(folder)
    assert not found, "\n".join(f"try {number}: {wrong}" for number, wrong in found.items())


def faults(
    draw: random.Random, arguments: list[str], folder: Path, expected: dict[str, Any], seconds: float
) -> list[str]:
    """Starts a command, stops it at a random moment, repeats it, and says what was wrong."""
    kind = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    process, found = start(arguments, folder), []
    handlers = Path(f"/proc/{process.pid}/status")
    while process.poll() is None and not handled(handlers, signal.SIGTERM):  # Python itself starts, in some 0.1 s
        time.sleep(0.001)
    time.sleep(draw.uniform(0, seconds))
    (os.killpg if draw.random() < 0.5 else os.kill)(process.pid, kind)  # a terminal's Ctrl-C reaches all
    try:
        _, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return [f"{kind.name}: did not end: {process.communicate()[1][-500:]}"]
    # The interpreter's own end, when the work is done, dies of a signal, which shells report by the same code.
    allowed = (0, -kind) if kind == signal.SIGKILL else (0, 128 + kind, -kind)
    if process.returncode not in allowed:
        found.append(f"{kind.name}: exit code {process.returncode}: {errors[-500:]}")
    if kind != signal.SIGKILL and ("Traceback" in errors or "ignored" in errors):
        found.append(f"{kind.name}: {errors[-800:]}")
    if kind != signal.SIGKILL and parts(folder):
        found.append(f"{kind.name} left {parts(folder)}")
    if process.returncode == 0:
        return found
    again = start([*arguments, *([] if arguments[0] in RESUMED else ["--overwrite"])], folder)
    _, errors = again.communicate(timeout=600)
    if again.returncode:
        return [*found, f"{kind.name}, given again: exit code {again.returncode}: {errors[-500:]}"]
    if arguments[0] in RESUMED and parts(folder):
        found.append(f"{kind.name}, given again: left {parts(folder)}")
    after = results(folder)
    if after.keys() != expected.keys() or not all(same(after[name], expected[name]) for name in expected):
        found.append(f"{kind.name}, given again: other results")
    return found


def handled(status: Path, number: int) -> bool:
    """Whether a process handles a signal, as /proc/PID/status says."""
    try:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    except (OSError, StopIteration):
        return True  # it has ended
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
