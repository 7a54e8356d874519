"""Commands by several processes: the files of one, to the last byte; one line for an error; no process left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastebm.cli import main
from fastebm.evaluation import train_features
from fastebm.evaluation.sources import open_real
from fastebm.tasks.generation.files import ArrayFile
from fastebm.training import DigitsSource
from tests.cli.tiny_runs import ROOT, TRAIN
from tests.distributed import tasks
from tests.distributed.processes import Outcome, outcomes_of

LINES = [
    ["sample", "cf", "--count", "11", "--seed", "1", "--out", "samples.npz"],
    ["sample", "cf", "--count", "1", "--seed", "1", "--out", "one.npz"],
    ["sample", "vae", "--count", "11", "--out", "decoded.npz"],
    ["sample", "flow", "--count", "11", "--out", "inverted.npz"],
    ["generate", "cf", "--count", "13", "--chunk", "2", "--out", "generated.npz"],
    ["generate", "cf", "--count", "13", "--chunk", "2", "--out", "generated.png"],
    ["generate", "cf", "--count", "13", "--chunk", "2", "--out", "pictures"],
    ["denoise", "cf", "--count", "5", "--tuning-images", "2", "--num-steps", "2", "--out", "denoised"],
    ["inpaint", "cf", "--count", "5", "--restarts", "3", "--out", "inpainted"],
    ["translate", "cf", "--data", "data.npz", "--count", "5", "--num-steps", "2", "--out", "translated"],
    ["translate", "cf", "--data", "data.npz", "--count", "5", "--start-size", "4", "--num-steps", "2", "--out", "up"],
    ["interpolate", "cf", "--count", "7", "--points", "4", "--iterations", "3", "--out", "paths"],
    ["restore", "cf", "--count", "5", "--refine-steps", "2", "--out", "restored"],
    ["restore", "vae", "--count", "5", "--num-steps", "3", "--out", "searched"],
    ["detect", "cf", "--count", "30", "--batch-size", "16", "--out", "detected"],
    ["evaluate", "cf", "--count", "12", "--features", "features.safetensors", "--all-real", "--out", "judged.json"],
    ["diagnose", "cf", "--count", "3", "--num-steps", "2", "--out", "traces.png"],
    ["info"],
    # And what is refused.
    ["sample", "cf", "--count", "0"],
    ["sample", "cf", "--count", "11", "--out", "samples.npz"],
    ["sample", "nowhere"],
    ["sample", "cf", "--cuont", "3"],
    ["generate", "cf", "--count", "13", "--out", "other.npz", "--processes", "2"],
    ["detect", "cf", "--data", "nowhere", "--out", "undetected"],
]
FEW = ("samples.npz", "one.npz", "decoded.npz", "generated.npz", "inpainted", "nowhere", "other.npz")
"""Ends of the commands that four processes run too."""
CLOCK = ("seconds", "images_per_second", "processes", "threads")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, vae_run: Path) -> Path:
    """A folder with runs by the fused engine, whose chains don't depend on their batch, and images."""
    folder = tmp_path_factory.mktemp("runs")
    fused = ["--engine", "auto", "--iterations", "2", "2", "--pictures-every", "0"]
    assert main([*TRAIN, *fused, "--out", str(folder / "cf")]) == 0
    tiny = ["--iterations", "2", "--levels", "1", "--flow-steps", "1", "--width", "4", "--energy-width", "4"]
    assert main(["train", "ec-flow", *tiny, "--batch-size", "4", "--out", str(folder / "flow")]) == 0
    shutil.copytree(vae_run, folder / "vae")
    real = open_real(DigitsSource(), 8)
    train_features(real.train, images_seen=1000).save(folder / "features.safetensors")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", images=rng.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8))
    return folder


def by(size: int, runs: Path, folder: Path, lines: list[list[str]]) -> list[Outcome]:
    """What the processes come to that run commands in a folder beside copies of the runs."""
    shutil.copytree(runs, folder)
    return outcomes_of(size, tasks.commands, folder, lines)


@pytest.fixture(scope="module")
def alone(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("alone") / "folder"
    (outcome,) = by(1, runs, folder, LINES)
    assert not outcome.error, outcome.error
    return folder, outcome


@pytest.mark.parametrize("size", [2, 4])
def test_files_are_those_of_one_process_to_the_last_byte(
    size: int, runs: Path, alone: tuple[Path, Outcome], tmp_path: Path
) -> None:
    lines = LINES if size == 2 else [line for line in LINES if line[-1] in FEW or "--processes" in line]
    first, *others = by(size, runs, tmp_path / "folder", lines)
    assert not first.error, first.error
    one, outcome = alone
    code_of = {tuple(line): code for line, code in zip(LINES, outcome.result, strict=True)}
    # --processes is refused beside other processes alone, where there are some.
    codes = [2 if "--processes" in line else code_of[tuple(line)] for line in lines]
    assert first.result == codes
    assert 0 < codes.count(0) == len(codes) - codes.count(2)
    for other in others:
        assert not other.error, other.error
        assert (other.result, other.printed, other.errors) == (codes, "", "")
    errors = [line for line in first.errors.splitlines() if line.startswith("fastebm: ")]
    assert len(errors) == codes.count(2) >= 2
    assert any(f"torchrun started {size} already" in line for line in errors)
    files = {path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*") if path.is_file()}
    there = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    if lines == LINES:
        # The words are the same too, but for how long it took.
        assert without_numbers(first.printed) == [
            line for line in without_numbers(outcome.printed) if not line.startswith("other.npz")
        ]
        assert files == {path for path in there if not path.name.startswith("other.npz")}
        assert len(files) > 50
    assert len(files) > 20
    for path in sorted(files):
        assert content(tmp_path / "folder" / path) == content(one / path), path


def content(path: Path) -> Any:
    """The bytes of a file; of JSON, all that does not come from the clock."""
    if path.suffix != ".json":
        return path.read_bytes()
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in CLOCK}


def without_numbers(printed: str) -> list[str]:
    return [re.sub(r"\d[\d.]*", "", line) for line in printed.splitlines()]


def test_generate_goes_on_by_any_number_of_processes(
    runs: Path, alone: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, line = tmp_path / "folder", ["generate", "cf", "--count", "13", "--chunk", "2", "--out", "generated.npz"]
    shutil.copytree(runs, folder)
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        write = ArrayFile.write

        def interrupted(self: ArrayFile, request: Any, chunk: int, pixels: Any) -> None:
            if chunk == 3:
                raise OSError(28, "no space left on device")
            write(self, request, chunk, pixels)

        patch.setattr(ArrayFile, "write", interrupted)
        assert main(line) == 2
    begun = sorted(path.name for path in Path(".generated.npz.generate").glob("chunk-*"))
    assert begun
    outcomes = outcomes_of(2, tasks.commands, folder, [line])
    assert [outcome.result for outcome in outcomes] == [[0], [0]], outcomes
    assert "of them were there before" in outcomes[0].printed
    assert (folder / "generated.npz").read_bytes() == (alone[0] / "generated.npz").read_bytes()


@contextmanager
def torchrun(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """`torchrun --nproc-per-node 2 -m fastebm ...`, of which nothing is left after the block."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, "-m", "fastebm", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for child in [*children(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.communicate()


def children(parent: int) -> list[int]:
    """The processes that a process has started, in the order of their ranks."""
    try:
        return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def test_an_error_is_one_line_of_all_processes(runs: Path, tmp_path: Path) -> None:
    with torchrun("sample", "nowhere", cwd=tmp_path) as process:
        printed, errors = process.communicate(timeout=120)
    assert printed == ""
    ours = [line for line in errors.splitlines() if line.startswith("fastebm: ")]
    assert ours == ["fastebm: nowhere is not a run of fastebm: it has no config.json"]
    # What follows is torchrun's own report, which names the process that told of it and its exit code.
    root_cause = errors.partition("Root Cause")[2]
    assert re.search(r"rank +: 0 ", root_cause)
    assert re.search(r"exitcode +: 2 ", root_cause)
    assert "fastebm/cli" not in errors, "a traceback of ours"


@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9"])
def test_all_processes_end_together(how: str, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    with torchrun("sample", str(runs / "cf"), "--count", "10000000", "--out", str(out), cwd=tmp_path) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Langevin"):
                break
        started = children(process.pid)
        assert len(started) == 2
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(started[1], signal.SIGKILL)
        began = time.monotonic()
        _, errors = process.communicate(timeout=120)
        assert time.monotonic() - began < 60
        assert process.returncode != 0
        assert not any(Path(f"/proc/{child}").exists() for child in started)
    assert [line for line in errors.splitlines() if line.startswith("fastebm: ")][1:] == []
    assert list(tmp_path.iterdir()) == []
