"""Training by several processes: the bits of one process, one folder, stops and resumes, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastebm.training.trainer.config import TrainerConfig
from tests.training.ranks import (
    configs,
    run,
    said,
    start,
    train_all,
    train_and_write_errors,
    train_with_an_explosion,
    wait,
)
from tests.training.resumed_runs import differing, final_tensors, log

KINDS = tuple(configs())
SETTINGS: dict[str, dict[str, TrainerConfig]] = {
    "parts": configs(microbatches=4),
    "whole": configs(),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of all configs, by the number of processes that trained them."""
    folders = {size: tmp_path_factory.mktemp(f"by-{size}") for size in (1, 2, 3, 4)}
    for size, folder in folders.items():
        run(size, train_all, SETTINGS, folder)
    return folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 4])  # 3 does not divide 4
def test_weights_are_those_of_one_process_to_the_last_bit(trained: dict[int, Path], kind: str, size: int) -> None:
    one, other = (trained[count] / "parts" / kind for count in (1, size))
    assert differing(one, other) == []
    for line, again in zip(log(one), log(other), strict=True):
        assert line | {"seconds": 0} == again | {"seconds": 0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_batches_cut_by_the_number_of_processes_agree(trained: dict[int, Path], kind: str, size: int) -> None:
    one, other = (final_tensors(trained[count] / "whole" / kind) for count in (1, size))
    for name, tensor in one.items():
        print(name, float((tensor.double() - other[name].double()).norm() / tensor.double().norm().clamp_min(1e-30)))
