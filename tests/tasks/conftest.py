"""What the tests of tasks share: one thread, and a run of a few updates on digits."""

from collections.abc import Iterator

import pytest
import torch

from fastebm.training import CoarseToFineConfig, CoarseToFineRun, DigitsSource, train_coarse_to_fine


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> CoarseToFineRun:
    config = CoarseToFineConfig(
        sizes=(4, 8),
        iterations=(3, 4),
        batch_sizes=(8, 8),
        learning_rates=(1e-3, 1e-3),
        channels=1,
        base_width=1,
        steps=3,
    )
    path = tmp_path_factory.mktemp("tasks") / "run"
    return train_coarse_to_fine(config, DigitsSource(), path, progress=False, save_pictures=False)
