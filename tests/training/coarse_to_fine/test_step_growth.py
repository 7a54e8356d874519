"""Step sizes that grow from each resolution to the next."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.models import CoarseToFineEnergy
from fastebm.runs.run import Run
from fastebm.training import CoarseToFineConfig, train
from fastebm.training.coarse_to_fine.run import cascade
from tests.training.resumed_runs import assert_resumes_to_the_same_bits, stopping


def test_a_new_level_that_only_averages_moves_the_coarse_image_as_before(tiny: CoarseToFineConfig) -> None:
    torch.manual_seed(0)
    quiet = {"noise_start": 0.0, "noise_end": 0.0, "engine": "autograd", "step_size": 0.5, "num_steps": 6}
    config = dataclasses.replace(tiny, step_growth=4.0, **quiet)
    low, high = config.sizes
    net = CoarseToFineEnergy(high, 1, base_width=2, lowest=low).requires_grad_(False)
    frozen = net.frozen(low)
    before = cascade(config, {low: frozen})
    both = cascade(config, {low: frozen, high: functools.partial(net, beta=0.0)})
    ends = both.sample_levels(5, 0, channels=1)
    start = ends[low].clamp(-1, 1)
    coarse = before.sample(None, 0, x0=start)
    assert (coarse - start).abs().mean() > 1e-3
    torch.testing.assert_close(F.avg_pool2d(ends[high], 2), coarse, rtol=1e-4, atol=1e-5)


def test_only_a_cascade_has_them(tiny: CoarseToFineConfig) -> None:
    with pytest.raises(ValueError, match=r"step_growth must be 1 for the variant expanding.*got 2"):
        dataclasses.replace(tiny, variant="expanding", step_growth=2.0)


def test_a_run_with_them_resumes_to_the_last_bit(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    def train_quietly(config: Any, images: Tensor, path: Path, stop_at: int | None = None) -> Run:
        return train(config, images, path, progress=False, save_pictures=False, on_log=stopping(stop_at))

    starts = {"noisy_starts": 0.25, "start_temperature": 0.01, "hole_starts": 0.25, "chain_kl": 0.1}
    config = dataclasses.replace(tiny, step_growth=4.0, **starts)
    assert_resumes_to_the_same_bits(train_quietly, config, images, tmp_path, stop_at=8)
