"""Processes that work together, for tests: forks of one that has imported everything, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastebm.distributed import Ranks, launched
from fastebm.runs.registry import method
from fastebm.training import CoarseToFineConfig, ECFlowConfig, ECPosteriorConfig, ECVAEConfig, train
from fastebm.training.trainer.config import TrainerConfig
from fastebm.training.trainer.guard import DivergedError
from fastebm.training.trainer.loop import Trainer

Task = Callable[..., None]
LIMIT = 120
"""Seconds that any of these may take, on a busy machine."""

_forks = multiprocessing.get_context("forkserver")
# What a first use would import, for seconds in each fork.
_forks.set_forkserver_preload(["tests.training.ranks", "torch.distributed.optim", "torch._dynamo"])


def configs(**settings: Any) -> dict[str, TrainerConfig]:
    """A config of each method, and two of coarse-to-fine, with spectral norms and batch norms; with these settings."""
    small: dict[str, Any] = {"channels": 1, "num_steps": 2, "engine": "autograd", "flip": True, "log_every": 1}
    small |= settings
    single: dict[str, Any] = {
        "size": 8,
        "iterations": 4,
        "batch_size": 11,
        "width": 2,
        "warmup": 1,
        "ema": 0.9,
        **small,
    }
    energy: dict[str, Any] = {"energy_width": 2, "energy_depth": 1, "data_noise": 0.1, "energy_l2": 0.1}
    stages: dict[str, Any] = {"iterations": (3, 4), "batch_sizes": (9, 10), "learning_rates": (1e-3, 2e-3), **small}
    starts: dict[str, Any] = {"noisy_starts": 0.3, "hole_starts": 0.3, "data_noise": 0.1, "energy_l2": 0.1}
    return {
        "coarse_to_fine": CoarseToFineConfig(sizes=(4, 8), base_width=1, **{"ema": 0.9, **stages, **starts}),
        "data_term": CoarseToFineConfig(
            sizes=(4, 8),
            base_width=1,
            start_temperature=0.01,
            max_batch=2,
            clamp_ends=True,
            continued_starts=0.2,
            restart=0.5,
            **stages,
            **starts,
        ),
        "ec_vae": ECVAEConfig(latent=3, **single, **energy),
        "ec_posterior": ECPosteriorConfig(latent=3, learned_variance=True, **single),
        "ec_flow": ECFlowConfig(levels=1, flow_steps=1, **single, **energy),
    }


def some_images() -> Tensor:
    return torch.rand(37, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def start(size: int, task: Task, *arguments: Any, **environment: str) -> list[BaseProcess]:
    """`size` processes that call `task(ranks, *arguments)`; each writes its error, if any, as one line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    started: list[BaseProcess] = []
    for rank in range(size):
        process = _forks.Process(
            target=_work, args=(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, task, arguments)
        )
        process.start()
        started.append(process)
    return started


def run(size: int, task: Task, *arguments: Any, **environment: str) -> None:
    """`start`, and their end, which must be a good one for all."""
    codes = wait(start(size, task, *arguments, **environment))
    assert codes == [0] * size, f"the exit codes are {codes}"


def wait(processes: Sequence[BaseProcess], limit: float = LIMIT) -> list[int | None]:
    """The exit codes of processes, of those that don't end within the limit None; then they are killed."""
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _work(place: dict[str, str], task: Task, arguments: Sequence[Any]) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    with launched() as ranks:
        if not ranks.first:  # the first one alone may write files
            tempfile.gettempdir()  # found by writing one, which a first capture would do
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        task(ranks, *arguments)


# Tasks --------------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """A stop that nothing in a trainer catches."""


def train_all(ranks: Ranks, settings: dict[str, dict[str, TrainerConfig]], folder: Path, stop_at: int = -1) -> None:
    """Trains a run for each config, in `folder / name / kind`, up to iteration `stop_at`, which is not saved."""
    for name, some in settings.items():
        for kind, config in some.items():
            trainer = method(config.kind, folder).Trainer
            update = trainer.update

            def stopping(self: Trainer, update: Callable[[Trainer], dict[str, float]] = update) -> dict[str, float]:
                if self.iteration == stop_at:
                    raise Stop
                return update(self)

            with pytest.MonkeyPatch.context() as patch, suppress(Stop):
                patch.setattr(trainer, "update", stopping)
                train(config, some_images(), folder / name / kind, progress=False, save_pictures=False)


def train_with_an_explosion(ranks: Ranks, config: TrainerConfig, folder: Path) -> None:
    """Trains a run whose guard goes back from update 5."""
    trainer = method(config.kind, folder).Trainer
    update = trainer.update

    def exploding(self: Trainer) -> dict[str, float]:
        if self.iteration == 4 and self.guard.attempt == 0:
            raise DivergedError(5, "for the test")
        return update(self)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        patch.setattr(trainer, "update", exploding)
        train(config, some_images(), folder, progress=False, save_pictures=False)
    assert len(said) == ranks.first, "the first rank alone warns"


def train_and_say(ranks: Ranks, config: TrainerConfig, folder: Path) -> None:
    """Trains a run. What goes wrong becomes the name of a link beside its folder, as files are forbidden."""
    try:
        train(config, some_images(), folder, progress=False, save_pictures=False)
    except (ValueError, RuntimeError) as error:
        os.symlink(f"{type(error).__name__}: {error}", folder.with_name(f"said-{ranks.rank}"))


def said(folder: Path) -> list[str]:
    """What went wrong in `train_and_say`, of each rank."""
    return [os.readlink(path) for path in sorted(folder.parent.glob("said-*"))]
