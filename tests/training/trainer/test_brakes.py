"""What holds energies: each option changes an update as it says, and a run with all of them resumes to the last bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm.runs.run import Run
from fastebm.training import CoarseToFineConfig, train
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer
from tests.training.resumed_runs import assert_resumes_to_the_same_bits, stopping, trainer_at

ALL: dict[str, Any] = {
    "chain_clip": 0.05,
    "step_shrink": 0.5,
    "gap_brake": 1e-3,
    "gap_hinge": 1e-2,
    "trim": 0.2,
    "gradient_penalty": 0.1,
    "chain_kl": 0.1,
    "energy_l2": 0.02,
}


def train_quietly(config: Any, images: Tensor, path: Path, stop_at: int | None = None) -> Run:
    return train(config, images, path, progress=False, save_pictures=False, on_log=stopping(stop_at))


def test_a_run_with_all_of_them_resumes_to_the_last_bit(
    tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny, noisy_starts=0.25, hole_starts=0.25, **ALL)
    assert_resumes_to_the_same_bits(train_quietly, config, images, tmp_path, stop_at=8)


def after_an_update(config: CoarseToFineConfig, images: Tensor) -> tuple[dict[str, float], list[Tensor]]:
    """The metrics of the first update, and how far it moved each parameter."""
    trainer = trainer_at(CoarseToFineTrainer, config, images, 0)
    before = [p.detach().clone() for p in trainer.net.parameters()]
    numbers = trainer.update()
    return numbers, [p.detach() - old for p, old in zip(trainer.net.parameters(), before, strict=True)]


def seed_with_a_positive_gap(config: CoarseToFineConfig, images: Tensor) -> CoarseToFineConfig:
    seeds = (dataclasses.replace(config, seed=seed) for seed in range(20))
    return next(config for config in seeds if after_an_update(config, images)[0]["gap"] > 0)


def test_beyond_the_hinge_only_the_other_terms_are_left(tiny: CoarseToFineConfig, images: Tensor) -> None:
    _, moved = after_an_update(dataclasses.replace(tiny, gap_hinge=-100.0), images)
    assert all(not move.any() for move in moved)
    numbers, moved = after_an_update(dataclasses.replace(tiny, gap_hinge=-100.0, energy_l2=0.5), images)
    assert any(move.any() for move in moved)
    assert numbers["loss"] >= 0  # the squares alone
    plain, free = after_an_update(tiny, images), after_an_update(dataclasses.replace(tiny, gap_hinge=100.0), images)
    assert plain[0] == free[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], free[1], strict=True))


def test_the_brake_shortens_the_update(tiny: CoarseToFineConfig, images: Tensor) -> None:
    config = seed_with_a_positive_gap(tiny, images)
    numbers, moved = after_an_update(config, images)
    _, less = after_an_update(dataclasses.replace(config, gap_brake=numbers["gap"] / 4), images)
    for move, short in zip(moved, less, strict=True):
        torch.testing.assert_close(short, move / 4, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("starts", [{}, {"noisy_starts": 0.25, "hole_starts": 0.25}])
def test_the_clip_shortens_steps(tiny: CoarseToFineConfig, images: Tensor, starts: dict[str, float]) -> None:
    config = dataclasses.replace(tiny, noise_start=0.0, noise_end=0.0, **starts)
    free, _ = after_an_update(config, images)
    clipped, _ = after_an_update(dataclasses.replace(config, chain_clip=1e-4), images)
    assert free["displacement"] > 1e-4 > config.num_steps * 1e-4 / 4 > clipped["displacement"] > 0


@pytest.mark.parametrize(("name", "value"), [("trim", 0.5), ("gradient_penalty", 1.0)])
def test_trim_and_penalty_change_the_update(tiny: CoarseToFineConfig, images: Tensor, name: str, value: float) -> None:
    plain, moved = after_an_update(tiny, images)
    changed, otherwise = after_an_update(dataclasses.replace(tiny, **{name: value}), images)
    assert changed["energy_samples"] == plain["energy_samples"]
    assert changed["loss"] > plain["loss"]
    assert any(not torch.equal(a, b) for a, b in zip(moved, otherwise, strict=True))
