"""Tasks by runs with larger steps, or steps that grow with the resolution: as by those with larger energies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastebm import tasks
from fastebm.training import CoarseToFineRun

GROWTH = 4.0


class Divided(nn.Module):
    def __init__(self, energy: Callable[[Tensor], Tensor], by: float) -> None:
        super().__init__()
        self.energy, self.by = energy, by

    def forward(self, x: Tensor) -> Tensor:
        return self.energy(x) / self.by


@pytest.fixture(scope="module")
def pair(run: CoarseToFineRun) -> tuple[CoarseToFineRun, CoarseToFineRun]:
    """A run, and one with a quarter of its energy at 8x8 and four times the step size there."""
    plain = replace(run, config=replace(run.config, engine="autograd"))
    levels = {size: Divided(energy, GROWTH**k) for k, (size, energy) in enumerate(sorted(run.levels.items()))}
    return plain, replace(plain, config=replace(plain.config, step_growth=GROWTH), levels=levels)


def test_settings_of_denoising_are_tried_in_the_unit_of_the_training(run: CoarseToFineRun, images: Tensor) -> None:
    plain = replace(run, config=replace(run.config, engine="autograd"))
    levels = {size: Divided(energy, 4) for size, energy in run.levels.items()}
    scaled = replace(plain, config=replace(plain.config, step_size=4 * run.config.step_size), levels=levels)
    options = tasks.DenoiseOptions(num_steps=2)
    one, four = (tasks.tune_denoising(model, images, 0.3, options) for model in (plain, scaled))
    assert four == replace(one, step_size=4 * one.step_size, temperature=one.temperature / 4)


def test_denoising(pair: tuple[CoarseToFineRun, CoarseToFineRun], images: Tensor) -> None:
    ends = []
    for run, unit in zip(pair, (1.0, GROWTH), strict=True):
        options = tasks.DenoiseOptions(4, step_size=unit, temperature=0.01 / unit, start_size=4)
        ends.append(tasks.denoise(run, images, 0.3, options).restored)
    torch.testing.assert_close(*ends)


def test_inpainting(pair: tuple[CoarseToFineRun, CoarseToFineRun], images: Tensor) -> None:
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:6, 2:6] = True
    options = tasks.InpaintOptions(num_steps=4, coarse=True)
    ends = [
        tasks.inpaint(run, images, hole, replace(options, step_size=unit)).filled
        for run, unit in zip(pair, (1.0, GROWTH), strict=True)
    ]
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("start_size", [None, 4])
def test_translation(pair: tuple[CoarseToFineRun, CoarseToFineRun], images: Tensor, start_size: int | None) -> None:
    ends = []
    for run, unit in zip(pair, (1.0, GROWTH), strict=True):
        options = tasks.TranslateOptions(4, step_size=unit, data_weight=0.1 / unit, snapshots=2, start_size=start_size)
        ends.append(tasks.translate(run, images, options).images)
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("between", ["noise", "coarse"])
def test_interpolation(pair: tuple[CoarseToFineRun, CoarseToFineRun], between: str) -> None:
    ends = [tasks.interpolate_chains(run, between, pairs=2, points=3).images for run in pair]
    torch.testing.assert_close(*ends)
