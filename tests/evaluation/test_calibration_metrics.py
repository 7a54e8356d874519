"""What an energy has left to calibrate, for an energy whose chains are known in closed form."""

import doctest
import importlib

import pytest
import torch
from torch import Tensor

from fastebm.evaluation import calibration_metrics
from fastebm.training import DataTerm

REAL, SAMPLES = torch.zeros(50, 1, 2, 4), torch.full((40, 1, 2, 4), 0.5)


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum((1, 2, 3))


def test_gaps_of_a_quadratic_energy() -> None:
    """Without noise a step of η shrinks an image by 1 - η."""
    metrics = calibration_metrics(quadratic, SAMPLES, REAL, step_size=0.1, noise_std=0.0, num_steps=7)
    left = 0.9**7
    assert metrics.count == 40
    assert metrics.gap == pytest.approx(0.5 * 8 * 0.25)
    assert metrics.gap_ends == pytest.approx(metrics.gap * left**2, rel=1e-5)
    assert metrics.distance == pytest.approx(8 * 0.25 * (1 - left) ** 2, rel=1e-5)
    assert metrics.noise_floor == 0
    assert metrics.energy_data_std == 0
    torch.testing.assert_close(metrics.ends, SAMPLES * left)
    assert "ends" not in metrics.to_json()


def test_noise_alone_is_the_floor() -> None:
    flat = calibration_metrics(
        lambda x: 0 * x.sum((1, 2, 3)),
        SAMPLES.repeat(20, 1, 1, 1),
        REAL.repeat(20, 1, 1, 1),
        step_size=0.1,
        noise_std=0.02,
        num_steps=5,
    )
    assert flat.noise_floor == pytest.approx(5 * 8 * 0.02**2)
    assert flat.distance == pytest.approx(flat.noise_floor, rel=0.05)


def test_an_anchor_holds_chains_back() -> None:
    options = {"step_size": 0.1, "noise_std": 0.0, "num_steps": 7}
    free, held = (
        calibration_metrics(quadratic, SAMPLES, REAL, data_term=data_term, **options)
        for data_term in (None, DataTerm(5.0))  # type: ignore[arg-type]
    )
    assert held.distance is not None
    assert free.distance is not None
    assert held.distance < free.distance


def test_chains_that_run_away_are_told() -> None:
    metrics = calibration_metrics(
        lambda x: -x.square().square().sum((1, 2, 3)),
        torch.full((3, 1, 2, 2), 0.9),
        torch.zeros(3, 1, 2, 2),
        step_size=1.0,
        noise_std=0.0,
        num_steps=20,
    )
    assert metrics.energy_ends is None
    assert metrics.to_json()["gap_ends"] is None
    assert len(metrics.ends) == 0


def test_images_have_to_be_alike() -> None:
    with pytest.raises(ValueError, match="must be alike"):
        calibration_metrics(quadratic, SAMPLES, REAL[..., :2], step_size=0.1, noise_std=0.0, num_steps=1)


def test_docstring_example() -> None:
    assert doctest.testmod(importlib.import_module("fastebm.evaluation.calibration_metrics")) == (0, 6)
