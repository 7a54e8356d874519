"""What the tests of tasks share: one thread, and a tiny run."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastebm.data import digits
from fastebm.training import (
    CoarseToFineConfig,
    CoarseToFineRun,
    DigitsSource,
    ImageSource,
    train,
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Results to the last bit hold for one number of threads, and so tiny nets are no faster with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(source: DigitsSource | ImageSource, path: Path, channels: int = 1) -> Path:
    """The folder of a run of a few updates at 4x4 and 8x8, by the engine that is ready the soonest."""
    config = CoarseToFineConfig(
        sizes=(4, 8),
        iterations=(3, 4),
        batch_sizes=(8, 8),
        learning_rates=(1e-3, 1e-3),
        channels=channels,
        base_width=1,
        num_steps=2,
        engine="autograd",
        log_every=1,
        checkpoint_every=3,
    )
    train(config, source, path, progress=False, save_pictures=False)
    return path


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on scikit-learn's digits, 8x8 and gray."""
    return tiny(DigitsSource(), tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="session")
def run(digits_run: Path) -> CoarseToFineRun:
    """The same, opened."""
    return CoarseToFineRun.load(digits_run)


@pytest.fixture(scope="session")
def fused_run(run: CoarseToFineRun) -> CoarseToFineRun:
    """The same, by the engine that gives the same bits for any batch; each call of it takes seconds to get ready."""
    return replace(run, config=replace(run.config, engine="fused"))


@pytest.fixture
def images() -> Tensor:
    """Six digits that the run has not seen."""
    return digits("test")[0][:6]
