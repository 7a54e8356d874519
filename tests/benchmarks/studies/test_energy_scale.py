"""The fall of the energy along a chain, beside what its way predicts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastebm
from benchmarks.studies.energy_scale import falls


def test_a_straight_way_lowers_the_energy_as_predicted() -> None:
    def slope(x: Tensor) -> Tensor:
        return 0.01 * x.flatten(1).sum(1)

    sampler = fastebm.Cascade({4: slope, 8: slope}, step_size=0.5, noise_std=0.0, num_steps=6)
    ends = sampler.sample_levels(3, 0, channels=2)
    (row,) = falls({4: slope, 8: slope}, ends, step_sizes={8: 0.5}, num_steps=6)
    assert row["size"] == 8
    assert row["squared_way"] == pytest.approx(2 * 64 * 0.03**2, rel=1e-4)
    assert row["fall"] == pytest.approx(row["predicted"], rel=1e-3)
    assert torch.isfinite(torch.tensor(list(row.values()))).all()


def test_a_bent_way_lowers_it_more() -> None:
    def well(x: Tensor) -> Tensor:
        return 4 * x.square().flatten(1).sum(1)

    start = torch.full((3, 1, 8, 8), 0.5)
    ends = {4: start[..., :4, :4], 8: fastebm.Langevin(well, step_size=0.05, noise_std=0.0).sample(start, 9, 0)}
    (row,) = falls({4: well, 8: well}, ends, step_sizes={8: 0.05}, num_steps=9)
    assert row["fall"] > 1.5 * row["predicted"]
