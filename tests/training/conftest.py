"""What the tests of training share: one thread, real digits, a configuration that takes a second."""

import pytest
from torch import Tensor

from fastebm.data import digits
from fastebm.training import CoarseToFineConfig

pytest.register_assert_rewrite("tests.training.resumed_runs")  # so that its asserts say what was compared


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def images() -> Tensor:
    return digits("train")[0]


@pytest.fixture
def tiny() -> CoarseToFineConfig:
    return CoarseToFineConfig(
        sizes=(4, 8),
        iterations=(5, 8),
        batch_sizes=(8, 6),
        learning_rates=(1e-3, 2e-3),
        lr_decay=0.5,
        channels=1,
        base_width=1,
        num_steps=3,
        data_noise=0.03,
        engine="autograd",  # making a fused program takes five times as long as such a run
        log_every=1,
        checkpoint_every=3,
    )
