"""Cascades up to 128x128, 256x256 and 512x512 at the least width: end to end, and their samples in any batches."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastebm
from fastebm.models.coarse_to_fine import WIDTHS
from fastebm.ops.backends import _extension
from fastebm.training import CoarseToFineConfig, CoarseToFineRun, train
from fastebm.training.trainer.energy_loss import EnergyLoss
from tests.training.resumed_runs import differing_tensors, final_tensors, log

CHANNELS = 3


def config_for(*sizes: int, **changes: Any) -> CoarseToFineConfig:
    """An update or two at each size, in a net of one channel at the largest."""
    count = len(sizes)
    settings: dict[str, Any] = {
        "iterations": (*[1] * (count - 1), 2),  # so that the last block fades in, and then is all there
        "batch_sizes": (2,) * count,
        "learning_rates": (1e-3,) * count,
        "base_width": max(1, sizes[-1] // 128),
        "num_steps": 1,
        "engine": "fused",
        "log_every": 1,
    }
    return CoarseToFineConfig(sizes=sizes, **(settings | changes))


def images_of(size: int) -> Tensor:
    return fastebm.ops.uniform((3, CHANNELS, size, size), seed=5) * 2 - 1


def trained(config: CoarseToFineConfig, path: Path) -> CoarseToFineRun:
    images = images_of(config.sizes[-1])
    return train(config, images, path, device="cpu", progress=False, save_pictures=False)


CASES = [
    (128, {}),
    (256, {"dtype": "bfloat16", "update_dtype": "bfloat16", "recompute_from": 64, "max_batch": 1}),
    pytest.param(512, {"dtype": "bfloat16", "recompute_from": 256}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "changes"), CASES, ids=lambda value: value if isinstance(value, int) else "")
def test_a_cascade_trains_and_samples_end_to_end(size: int, changes: dict[str, Any], tmp_path: Path) -> None:
    config = config_for(*[s for s in WIDTHS if 8 <= s <= size], **changes)
    trained(config, tmp_path)
    lines = log(tmp_path)
    assert [line["size"] for line in lines] == [*config.sizes, size]
    assert [line["beta"] for line in lines] == [1.0, *[0.0] * (len(config.sizes) - 1), 1.0]
    assert all(math.isfinite(line[name]) for line in lines for name in ("energy_data", "energy_samples", "loss"))
    assert all(line["gradient_norm"] > 0 and line["displacement"] > 0 for line in lines)

    run = CoarseToFineRun.load(tmp_path, "cpu")  # what is sampled comes from the folder
    assert run.finished
    assert tuple(run.levels) == config.sizes
    samples = run.sample(3, batch_size=3)
    assert (samples.shape, samples.dtype) == ((3, CHANNELS, size, size), torch.float32)
    assert -1 <= samples.min() < -0.5 < 0.5 < samples.max() <= 1
    assert len(samples.flatten(1).unique(dim=0)) == 3
    if _extension is not None:  # else library convolutions run, which may sum in another order for another batch
        assert torch.equal(run.sample(3, batch_size=1), samples)


def kept_numbers(
    config: CoarseToFineConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, dict[str, Tensor]]:
    """How many numbers passes forward of updates kept for passes back, and the tensors of the run's end."""
    kept = 0
    backward = EnergyLoss.backward

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    def counted(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return backward(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(EnergyLoss, "backward", counted)
        trained(config, path)
    return kept, final_tensors(path)


def test_recomputation_at_256x256_keeps_less_and_trains_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By autograd: a program keeps little anyway, and recomputes nothing.
    config = config_for(256, batch_sizes=(8,), engine="autograd")
    kept, plain = kept_numbers(config, tmp_path / "plain", monkeypatch)
    config = dataclasses.replace(config, recompute_from=256)
    less, recomputed = kept_numbers(config, tmp_path / "recomputed", monkeypatch)
    assert less < 0.6 * kept
    assert differing_tensors(plain, recomputed) == []
