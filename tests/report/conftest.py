"""Runs that take a second each: one of every method with its pictures, trained once; tests that change one copy it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastebm.training import (
    CoarseToFineConfig,
    DigitsSource,
    ECFlowConfig,
    ECPosteriorConfig,
    ECVAEConfig,
    train,
)

SMALL: dict[str, Any] = {"size": 8, "channels": 1, "iterations": 3, "batch_size": 4, "width": 2, "log_every": 1}
STAGES = CoarseToFineConfig(
    sizes=(4, 8),
    iterations=(2, 3),
    batch_sizes=(8, 8),
    learning_rates=(1e-3, 1e-3),
    channels=1,
    base_width=1,
    num_steps=3,
    log_every=1,
    checkpoint_every=2,
    pictures_every=2,
    engine="autograd",
)
CONFIGS: dict[str, Any] = {
    "coarse_to_fine": STAGES,
    "ec_vae": ECVAEConfig(**SMALL, latent=2, energy_width=2, engine="autograd"),
    "ec_posterior": ECPosteriorConfig(**SMALL, latent=2, num_steps=1, engine="autograd"),
    "ec_flow": ECFlowConfig(**SMALL, energy_width=2, flow_steps=1, engine="autograd"),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run by its method. Tests write nothing into it."""
    folder, made = tmp_path_factory.mktemp("reported"), {}

    def of(kind: str) -> Path:
        if kind not in made:
            train(CONFIGS[kind], DigitsSource(), folder / kind, progress=False)
            made[kind] = folder / kind
        return made[kind]

    return of


@pytest.fixture
def run(run_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the coarse-to-fine run, for tests that change it."""
    return Path(shutil.copytree(run_of("coarse_to_fine"), tmp_path / "run"))
