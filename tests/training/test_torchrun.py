"""torchrun and the command line: a process that is killed, and the run that goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed

from fastebm.distributed import Ranks, _meeting
from fastebm.runs.folder import RunFolder
from tests.training.resumed_runs import differing, log

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240
"""Seconds that a training here may take, on a busy machine."""
OPTIONS = (
    *("--iterations", "30", "120", "--batch-sizes", "4", "6", "--base-width", "1", "--num-steps", "2"),
    *("--microbatches", "2", "--engine", "autograd", "--checkpoint-every", "10", "--keep-checkpoints", "99"),
    *("--log-every", "1", "--device", "cpu"),
)


@contextmanager
def training(folder: Path, *torchrun: str) -> Iterator[subprocess.Popen[str]]:
    """`fastebm train` of digits, started by torchrun if that gets options. All of it ends with the block."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    command = [sys.executable, *launcher, "-m", "fastebm", "train", "coarse-to-fine", "--out", str(folder), *OPTIONS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def worker(torchrun: int, rank: int) -> int:
    """The id of the process with this rank that torchrun, with the id `torchrun`, has started."""
    for child in map(int, Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise ProcessLookupError(f"torchrun has no child of rank {rank}")


def test_processes_that_meet_again_do_not_take_earlier_ones_for_one_another() -> None:
    """As after a restart by torchrun, whose store still has what earlier processes wrote."""
    store = torch.distributed.HashStore()

    def meeting(late: int) -> set[str]:
        def come(rank: int) -> str:
            time.sleep(0.2 * (rank == late))  # meanwhile the others find the words of earlier ones in its place
            return _meeting(store, Ranks(rank, 3), 60.0)

        with ThreadPoolExecutor(3) as threads:
            return set(threads.map(come, range(3)))

    names = [meeting(late) for late in (0, 1, 2, 0)]
    assert [len(found) for found in names] == [1, 1, 1, 1]
    assert len(set.union(*names)) == 4


def test_processes_that_do_not_all_come_do_not_meet() -> None:
    store = torch.distributed.HashStore()
    store.set("word 1", "of an earlier process")
    with pytest.raises(ConnectionError, match=r"not all of 2 processes have come within 0\.1 s"):
        _meeting(store, Ranks(0, 2), 0.1)


def test_torchrun_starts_again_what_was_killed_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with training(killed, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1") as process:
        while not (killed / "log.jsonl").exists() or len(log(killed)) < 45:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        saved = RunFolder.existing(killed).checkpoints.iterations()
        before = {path: path.stat().st_mtime_ns for path in (killed / "checkpoints").iterdir()}
        out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    assert 40 <= saved[-1] < 150
    # Nothing up to the newest checkpoint was computed again: no file of a checkpoint was written anew.
    kept = {path for path in before if path.suffix == ".safetensors" and path.with_suffix(".json") in before}
    assert len(kept) >= 4
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    assert [line["iteration"] for line in log(killed)] == list(range(1, 151))
    assert out.count("trained 150 iterations") == 1
    assert "Traceback" not in errors
    with training(whole) as process:
        process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert differing(whole, killed) == []
