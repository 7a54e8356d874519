"""Runs of tests, which are stopped and taken up again, and what is left of them to compare, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from fastebm.runs.folder import RunFolder
from fastebm.runs.run import Run
from fastebm.training import DivergedError
from fastebm.training.images import image_levels
from fastebm.training.trainer.entry import ImageInput
from fastebm.training.trainer.loop import OnLog, Trainer

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class Stop(BaseException):
    """A stop that nothing in the trainer catches, as a kill would be."""


def stopping(stop_at: int | None) -> OnLog:
    """Lets a run come only up to iteration `stop_at`, which gets its line in the log but no checkpoint; None: on."""

    def stop(line: dict[str, Any]) -> None:
        if line["iteration"] == stop_at:
            raise Stop

    return stop


def trainer_at(kind: type[AnyTrainer], config: Any, images: Tensor, iteration: int) -> AnyTrainer:
    """A trainer before the update number `iteration`."""
    trainer = kind(config, image_levels(images, config.sizes, config.channels), torch.device("cpu"))
    while trainer.iteration < iteration:
        trainer.update()
        if trainer.stage_ended():
            trainer.next_stage()
    return trainer


def final_tensors(path: Path) -> dict[str, Tensor]:
    checkpoint = RunFolder.existing(path).checkpoints.load_newest()
    assert checkpoint is not None
    return checkpoint.tensors


def log(path: Path) -> list[dict[str, Any]]:
    return RunFolder.existing(path).log.lines()


def differing(one: Path, other: Path) -> list[str]:
    """The names of tensors that ended with other bits in one of two runs."""
    return differing_tensors(final_tensors(one), final_tensors(other))


def differing_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def uninterrupted(train: Callable[..., Run], config: Any, images: ImageInput, folder: Path) -> Run:
    """A run without a stop, trained once for all tests of the same config and images, in a folder beside `folder`."""
    key = repr((train.__module__, config, id(images) if isinstance(images, Tensor) else images))
    if key not in _UNINTERRUPTED:
        path = folder.parent / f"uninterrupted-{len(_UNINTERRUPTED)}"
        _UNINTERRUPTED[key] = images, train(config, images, path)
    return _UNINTERRUPTED[key][1]


_UNINTERRUPTED: dict[str, tuple[ImageInput, Run]] = {}  # with the images, so that no others get their id


def assert_resumes_to_the_same_bits(
    train: Callable[..., Any], config: Any, images: ImageInput, folder: Path, stop_at: int
) -> None:
    """`train(config, images, path, stop_at)` ends in the same place whether it was stopped on the way or not."""
    whole = uninterrupted(train, config, images, folder)
    with pytest.raises(Stop):
        train(config, images, folder / "stopped", stop_at)
    resumed = train(config, images, folder / "stopped")
    assert resumed.finished
    assert differing(whole.path, folder / "stopped") == []
    assert torch.equal(whole.sample(5), resumed.sample(5))
    for line, again in zip(log(whole.path), log(folder / "stopped"), strict=True):
        assert line | {"seconds": 0} == again | {"seconds": 0}


def assert_resumes_after_going_back(
    kind: type[Trainer], train: Callable[..., Any], config: Any, images: Tensor, folder: Path
) -> None:
    """Likewise where the guard went back before the stop: from update 5 of 7 to iteration 3, once."""
    trained = kind.update

    def exploding(self: Trainer) -> dict[str, float]:
        if self.iteration == 4 and self.guard.attempt == 0:
            raise DivergedError(5, "for the test")
        return trained(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "update", exploding)
        with pytest.warns(RuntimeWarning, match="Back to iteration 3"):
            train(config, images, folder / "whole")
        with pytest.warns(RuntimeWarning, match="Back to iteration 3"), pytest.raises(Stop):
            train(config, images, folder / "stopped", stop_at=6)
    train(config, images, folder / "stopped")
    assert differing(folder / "whole", folder / "stopped") == []
    assert [line["attempt"] for line in log(folder / "whole")] == [0, 0, 0, 1, 1, 1, 1]
