"""The guard: what it lets pass, where it goes back to, and that a run which it saved is as repeatable as any other."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm import rng
from fastebm.models import CoarseToFineEnergy
from fastebm.runs.folder import RunFolder
from fastebm.training import (
    CoarseToFineConfig,
    CoarseToFineRun,
    DivergedError,
    RunError,
    resume,
    train,
)
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer
from fastebm.training.trainer.guard import Guard
from tests.training.resumed_runs import Stop, stopping

HEALTHY = {"largest_energy_data": 3.0, "largest_energy_samples": 4.0, "gradient_norm": 1.0, "gap": 0.1, "loss": -0.1}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("largest_energy_data", math.nan, "an energy of data is nan"),
        ("largest_energy_samples", math.inf, "an energy of samples is inf"),
        ("largest_energy_samples", 100.5, "magnitude 100.5, more than max_energy = 100"),
        ("gap", -51.0, "the gap is -51, beyond max_gap = 50"),
        ("gap", math.nan, "the gap is nan"),
        ("loss", 71.0, "the loss is 71, beyond max_loss = 70"),
        ("gradient_norm", math.nan, "the gradient of the weights has the norm nan"),
    ],
)
def test_the_guard_says_what_is_wrong_and_when(name: str, value: float, message: str) -> None:
    with pytest.raises(DivergedError, match=f"iteration 17.*{message}"):
        Guard(100.0, 50.0, 70.0).check(17, HEALTHY | {name: value})


def test_the_guard_lets_healthy_energies_pass() -> None:
    Guard(100.0, 50.0, 70.0).check(
        1, HEALTHY | {"largest_energy_data": 100.0, "gap": -50.0, "loss": 70.0, "gradient_norm": 1e9}
    )


def test_each_rollback_has_a_key_of_its_own_and_a_lower_rate() -> None:
    guard = Guard(100.0, retries=3, retry_lr_factor=0.5)
    seeds, rates = [], []
    for _ in range(3):
        seeds.append(guard.seed(7))
        rates.append(guard.lr_factor)
        assert not guard.exhausted
        guard.record_rollback(20, 10, "because")
    assert guard.exhausted
    assert seeds == [7, rng.fold_in_seed(7, 1), rng.fold_in_seed(7, 2)]
    assert rates == [1.0, 0.5, 0.25]
    other = Guard(100.0, retries=3, retry_lr_factor=0.5)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.rollbacks == guard.rollbacks
    other.load_state_dict({})
    assert other.attempt == 0


def test_it_goes_further_back_where_the_newest_did_not_help() -> None:
    guard = Guard(100.0, retries=9)
    assert guard.target([]) is None
    assert guard.target([10, 20]) == 20
    guard.record_rollback(25, 20, "")
    assert guard.target([10, 20]) == 10
    assert guard.target([10, 20, 30]) == 30
    guard.record_rollback(25, 10, "")
    assert guard.target([10]) == 10


def explosive(monkeypatch: pytest.MonkeyPatch, iteration: int, attempts: int) -> None:
    """Makes updates from number `iteration` on go wrong, until the guard has gone back `attempts` times."""
    update = CoarseToFineTrainer.update

    def exploding(self: CoarseToFineTrainer) -> dict[str, float]:
        if self.iteration >= iteration and self.guard.attempt < attempts:
            raise DivergedError(self.iteration + 1, "for the test")
        return update(self)

    monkeypatch.setattr(CoarseToFineTrainer, "update", exploding)


def train_quietly(config: CoarseToFineConfig, images: Tensor, path: Path, stop_at: int | None = None) -> None:
    train(config, images, path, progress=False, save_pictures=False, on_log=stopping(stop_at))


def test_an_exploding_run_is_saved_by_fresh_noise_and_a_lower_rate(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explosive(monkeypatch, iteration=7, attempts=1)
    with pytest.warns(RuntimeWarning, match=r"iteration 8: for the test. Back to iteration 6, .* \(try 1 of 3\)"):
        train_quietly(tiny, images, tmp_path / "run")
    assert CoarseToFineRun.load(tmp_path / "run").finished
    folder = RunFolder.existing(tmp_path / "run")
    checkpoint = folder.checkpoints.load_newest()
    assert checkpoint is not None
    assert checkpoint.state["guard"]["rollbacks"] == [{"iteration": 8, "back_to": 6, "reason": "for the test"}]
    lines = folder.log.lines()
    assert [line["iteration"] for line in lines] == list(range(1, 14))
    assert [line["attempt"] for line in lines] == [0] * 6 + [1] * 7
    for line in lines:
        rate = tiny.learning_rate_at(line["iteration"] - 1)
        assert line["learning_rate"] == pytest.approx(rate * 0.5 ** line["attempt"])

    monkeypatch.undo()
    train_quietly(dataclasses.replace(tiny, retry_lr_factor=1.0), images, tmp_path / "calm")
    calm = RunFolder.existing(tmp_path / "calm").log.lines()
    health = [[line["energy_samples"] for line in log] for log in (lines, calm)]
    assert health[0][:6] == health[1][:6]
    assert health[0][6] != health[1][6]  # the same weights, but other noise


@pytest.mark.parametrize("stop_at", [6, 7, 8, 9, 12])
def test_a_run_that_went_back_resumes_to_the_last_bit(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    # Twice in vain: back to 6, then, as 6 did not help, to 5, where the first stage ended.
    explosive(monkeypatch, iteration=7, attempts=2)
    with pytest.warns(RuntimeWarning, match="Back to iteration 5"):
        train_quietly(tiny, images, tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same ones again, some before the stop, some after it
        with pytest.raises(Stop):
            train_quietly(tiny, images, tmp_path / "stopped", stop_at)
        train_quietly(tiny, images, tmp_path / "stopped")
    whole, stopped = (RunFolder.existing(tmp_path / name).checkpoints.load_newest() for name in ("whole", "stopped"))
    assert whole is not None
    assert stopped is not None
    assert whole.state["guard"] == stopped.state["guard"]
    assert [rollback["back_to"] for rollback in whole.state["guard"]["rollbacks"]] == [6, 5]
    assert [name for name in whole.tensors if not torch.equal(whole.tensors[name], stopped.tensors[name])] == []


def test_a_rollback_is_saved_at_once(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explosive(monkeypatch, iteration=7, attempts=2)
    seen = []

    def look(line: dict[str, Any]) -> None:
        if line["attempt"] == 2 and line["iteration"] == 6:
            checkpoints = RunFolder.existing(tmp_path).checkpoints
            newest = checkpoints.load_newest()
            assert newest is not None
            seen.append((checkpoints.iterations()[-1], len(newest.state["guard"]["rollbacks"])))

    with pytest.warns(RuntimeWarning, match="Back to iteration 5"):
        train(tiny, images, tmp_path, progress=False, save_pictures=False, on_log=look)
    assert seen == [(5, 2)]


def test_before_the_first_checkpoint_it_begins_again(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explosive(monkeypatch, iteration=1, attempts=1)
    with pytest.warns(RuntimeWarning, match="iteration 2: for the test. Back to iteration 0"):
        train_quietly(tiny, images, tmp_path)
    assert CoarseToFineRun.load(tmp_path).finished


def test_after_the_last_try_it_stops_and_more_tries_take_it_up(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explosive(monkeypatch, iteration=11, attempts=4)
    with (
        pytest.raises(DivergedError, match=r"iteration 12: for the test. The checkpoint .* went back 3 times in vain"),
        pytest.warns(RuntimeWarning, match="try 3 of 3"),
    ):
        train_quietly(tiny, images, tmp_path)
    run = CoarseToFineRun.load(tmp_path)
    assert 0 < run.iteration <= 9
    assert run.sample(3).isfinite().all()
    with pytest.warns(RuntimeWarning, match="try 4 of 4"):
        again = resume(tmp_path, images, retries=4, progress=False, save_pictures=False)
    assert again.finished


def test_it_does_not_begin_again_where_all_checkpoints_are_damaged(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explosive(monkeypatch, iteration=7, attempts=1)

    def damage(line: dict[str, Any]) -> None:
        if line["iteration"] == 7:
            for weights in (tmp_path / "checkpoints").glob("*.safetensors"):
                weights.write_bytes(b"damaged")

    with pytest.raises(RunError, match=r"checkpoints in .* are damaged; the newest, iteration-000000006\.safetensors"):
        train(tiny, images, tmp_path, progress=False, save_pictures=False, on_log=damage)


def test_energies_that_are_not_finite_are_survived(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = CoarseToFineEnergy.forward

    def broken(self: CoarseToFineEnergy, x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
        nonlocal calls
        energies = forward(self, x, beta)
        calls += torch.is_grad_enabled() and self.training
        return energies * math.nan if calls == 5 and self.training else energies

    monkeypatch.setattr(CoarseToFineEnergy, "forward", broken)
    with pytest.warns(RuntimeWarning, match="iteration 5: an energy of data is nan. Back to iteration 3"):
        train_quietly(tiny, images, tmp_path)
    checkpoint = RunFolder.existing(tmp_path).checkpoints.load_newest()
    assert checkpoint is not None
    assert checkpoint.iteration == 13
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())
