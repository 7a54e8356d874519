"""Training by several processes: the bits of one process, one folder, stops and resumes, errors."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastebm.runs.folder import RunFolder
from fastebm.training import CoarseToFineConfig
from fastebm.training.trainer.config import TrainerConfig
from tests.training.ranks import (
    configs,
    run,
    said,
    start,
    train_all,
    train_and_say,
    train_with_an_explosion,
    wait,
)
from tests.training.resumed_runs import differing, final_tensors, log

KINDS = tuple(configs())
PARTS = configs(microbatches=4)
WHOLE: dict[str, TrainerConfig] = {
    kind: dataclasses.replace(config, iterations=(9, 11) if isinstance(config, CoarseToFineConfig) else 20)
    for kind, config in configs().items()
    if kind != "data_term"
}
FUSED = {
    kind: config for kind, config in configs(microbatches=2, engine="auto").items() if kind in ("data_term", "ec_vae")
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of all configs, by the number of processes that trained them."""
    folders = {size: tmp_path_factory.mktemp(f"by-{size}") for size in (1, 2, 3, 4)}
    for size, folder in folders.items():
        more = {"whole": WHOLE, "fused": FUSED} if size <= 2 else {}
        run(size, train_all, {"parts": PARTS, **more}, folder)
    return folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 4])  # 3 does not divide 4
def test_weights_are_those_of_one_process_to_the_last_bit(trained: dict[int, Path], kind: str, size: int) -> None:
    one, other = (trained[count] / "parts" / kind for count in (1, size))
    assert_equal_runs(one, other)


@pytest.mark.parametrize("kind", FUSED)
def test_so_they_are_where_programs_compute_gradients(trained: dict[int, Path], kind: str) -> None:
    assert_equal_runs(*(trained[size] / "fused" / kind for size in (1, 2)))


@pytest.mark.parametrize("kind", WHOLE)
def test_batches_cut_by_the_number_of_processes_agree_over_20_updates(trained: dict[int, Path], kind: str) -> None:
    one, other = (final_tensors(trained[size] / "whole" / kind) for size in (1, 2))
    weights = [name for name in one if "optimizer" not in name]
    assert any(not torch.equal(one[name], other[name]) for name in weights), "they were not cut"
    for name in weights:
        difference = (one[name].double() - other[name].double()).norm()
        assert float(difference) <= 1e-4 * float(one[name].double().norm()), name


def test_the_parts_of_a_batch_matter_and_their_gradients_are_those_of_the_whole(trained: dict[int, Path]) -> None:
    """Cut batches differ from whole ones by their rounding, and are not whole ones under another name."""
    one, other = (final_tensors(trained[1] / name / "ec_flow") for name in ("parts", "whole"))
    assert one.keys() == other.keys()
    (first, *_), (again, *_) = (log(trained[1] / name / "ec_flow") for name in ("parts", "whole"))
    for name, value in first.items():
        if name != "seconds":
            assert value == pytest.approx(again[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_processes_is_taken_up_by_any_number(
    stopped: dict[bool, dict[int, Path]], trained: dict[int, Path], kind: str, sharded: bool
) -> None:
    for folder in stopped[sharded].values():
        assert_equal_runs(trained[1] / "parts" / kind, folder / "parts" / kind)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[int, Path]]:
    """Runs that two processes began and stopped, and others ended: by whether moments were spread, and their number."""
    runs: dict[bool, dict[int, Path]] = {}
    for sharded in (False, True):
        # Moments that were spread may be taken up by processes that each have them all, and the other way round.
        here, there = (
            {"parts": configs(microbatches=4, checkpoint_every=2, shard_optimizer=on)} for on in (sharded, not sharded)
        )
        folder = tmp_path_factory.mktemp("stopped")
        run(2, train_all, here, folder, 3)
        runs[sharded] = {}
        for size in (1, 4):
            runs[sharded][size] = Path(shutil.copytree(folder, folder / f"by-{size}"))
            run(size, train_all, there, runs[sharded][size])
    return runs


def test_all_processes_go_back_together(tmp_path: Path) -> None:
    config = dataclasses.replace(configs(microbatches=2)["coarse_to_fine"], checkpoint_every=3)
    for size in (1, 2):
        run(size, train_with_an_explosion, config, tmp_path / str(size))
    assert_equal_runs(tmp_path / "1", tmp_path / "2")
    assert [line["attempt"] for line in log(tmp_path / "2")][-1] == 1


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (3, {"microbatches": 2}, "ValueError: microbatches is 2, too few for 3 ranks: give as many or more, or 1"),
        (3, {"batch_sizes": (4, 2)}, "ValueError: a batch of 2 is too small for 3 ranks: each needs one image"),
    ],
)
def test_what_does_not_fit_the_number_of_processes_is_refused(
    tmp_path: Path, size: int, settings: dict[str, Any], message: str
) -> None:
    config = dataclasses.replace(configs()["coarse_to_fine"], **settings)
    run(size, train_and_say, config, tmp_path / "run")
    found = said(tmp_path / "run")
    assert len(found) == size
    assert all(line.startswith(message) for line in found)
    assert not (tmp_path / "run").exists()


def test_microbatches_without_images_are_refused() -> None:
    with pytest.raises(ValueError, match="microbatches must be at most the number of images in a batch, got 12 and 11"):
        dataclasses.replace(configs()["ec_vae"], microbatches=12)


def assert_equal_runs(one: Path, other: Path) -> None:
    assert differing(one, other) == []
    for line, again in zip(log(one), log(other), strict=True):
        assert line | {"seconds": 0} == again | {"seconds": 0}


def until(process: BaseProcess, folder: Path, iteration: int) -> None:
    """Waits until the log of the run in `folder` has come to an iteration."""
    while not (folder / "log.jsonl").exists() or (log(folder) or [{"iteration": 0}])[-1]["iteration"] < iteration:
        assert process.exitcode is None, f"it ended before, with exit code {process.exitcode}"
        time.sleep(0.02)


def endless(**settings: Any) -> TrainerConfig:
    few = configs(microbatches=2)["coarse_to_fine"]
    return dataclasses.replace(few, iterations=(5, 10**6), checkpoint_every=10**6, **settings)


def test_sigterm_to_one_process_saves_the_last_update_and_stops_all(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    processes = start(2, train_and_say, endless(), folder)
    until(processes[0], folder, 7)
    pid = processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert wait(processes) == [0, 0]
    saved = RunFolder.existing(folder).checkpoints.iterations()[-1]
    message = f"StoppedError: stopped as asked; iteration {saved} is saved, and the run goes on from it"
    assert said(folder) == [message, message]
    assert log(folder)[-1]["iteration"] == saved


def test_a_process_that_hangs_ends_the_others_in_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    processes = start(2, train_and_say, endless(), folder, FASTEBM_TIMEOUT="4")
    until(processes[0], folder, 7)
    pid = processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert wait(processes[:1]) == [0]  # it would wait for half an hour by default, which is beyond the limit of `wait`
    assert wait(processes[1:], 0) == [None]
    (line,) = said(folder)
    assert line == "LostRankError: another of 2 processes did not answer within 4 s"
