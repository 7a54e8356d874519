"""The loop around the updates of any method: log, guard, checkpoints, pictures, polite stops, and going back.

A method is a subclass of `Loop`. It says what an update is, what its weights are looked at by before they are saved,
and which tensors they are; everything that makes a run survive a kill or an explosion is here.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fastebm.data import Images
from fastebm.data.sources import DigitsSource, ImageSource, source_from_json
from fastebm.runs.checkpoints import Checkpoint
from fastebm.runs.folder import Progress, RunError, RunFolder
from fastebm.training.images import ImageLevels
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.guard import DivergedError, Guard
from fastebm.training.trainer.signals import StoppedError, StopRequest

Metrics = dict[str, Tensor]
ImageInput = Tensor | Images | ImageSource | DigitsSource
OnLog = Callable[[dict[str, Any]], None]


class LoopConfig(Protocol):
    """The settings that the loop itself reads."""

    @property
    def seed(self) -> int: ...
    @property
    def total_iterations(self) -> int: ...
    @property
    def max_energy(self) -> float: ...
    @property
    def max_gap(self) -> float: ...
    @property
    def max_loss(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def retry_lr_factor(self) -> float: ...
    @property
    def log_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def pictures_every(self) -> int: ...
    @property
    def tensorboard(self) -> bool: ...


class Loop(ABC):
    """A run in memory: `iteration` updates done, `seconds` spent on them, and the guard.

    Attributes:
        hint: what may hold a run of this method that exploded, for the message.
    """

    hint: ClassVar[str]
    config: LoopConfig

    def __init__(self, config: LoopConfig, images: ImageLevels, device: torch.device) -> None:
        self.config = config
        self.images = images
        self.device = device
        self.guard = Guard(
            config.max_energy, config.max_gap, config.max_loss, retries=config.retries, rate=config.retry_lr_factor
        )
        self.iteration = 0
        self.seconds = 0.0
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Sets `iteration` to 0 and makes all that `update` changes, from the config's seed."""

    @abstractmethod
    def update(self) -> dict[str, float]:
        """One update of the weights, of which `iteration` counts one more, and its health, for log and guard.

        Raises DivergedError where the guard has something against it.
        """

    @abstractmethod
    def check_before_save(self) -> None:
        """Lets the guard see energies under the weights that are about to be saved, and leaves no trace."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a line of the log says of the next update besides its health."""

    @abstractmethod
    def progress_metrics(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """A title and a few numbers for the progress bar."""

    @abstractmethod
    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        """Pictures of the run so far."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next iteration depends on, by name."""

    @abstractmethod
    def load_state(self, checkpoint: Checkpoint) -> None:
        """Takes up `tensors`, and what the method added to `state`; `iteration` and guard have been."""

    @property
    @abstractmethod
    def images_seen(self) -> int:
        """How many images, and chains, came before the next update."""

    def stage_ended(self) -> bool:
        """Whether the last update was the last one of a stage, which is logged, drawn and saved."""
        return self.iteration == self.config.total_iterations

    def next_stage(self) -> None:  # noqa: B027  (most methods have a single stage)
        """What follows the last update of a stage, after its line of the log and before its pictures."""

    @property
    def seed(self) -> int:
        """Of all noise. The order of the images goes on by the config's seed, so that none is left out of an epoch."""
        return self.guard.seed(self.config.seed)

    def run(
        self, folder: RunFolder, bar: Progress, board: TensorBoardWriter, request: StopRequest, pictures: bool
    ) -> Iterator[dict[str, Any]]:
        """Trains to the end with a checkpoint now and then; yields lines for the log."""
        config = self.config
        began = time.monotonic() - self.seconds
        means = _RunningMeans()
        while self.iteration < config.total_iterations:
            line = {"iteration": self.iteration + 1, **self.describe(), "attempt": self.guard.attempt}
            try:
                metrics = self.update()
                ended = self.stage_ended()
                stopping = request.asked  # read once: it may be asked at any moment, and what stops must be saved
                saving = ended or stopping or self.iteration % config.checkpoint_every == 0
                if saving:
                    self.check_before_save()
            except DivergedError as error:
                self._roll_back(folder, error)
                bar.go_back(self.iteration)
                means.take()
                continue
            self.seconds = time.monotonic() - began
            means.add(metrics)
            title, numbers = self.progress_metrics(metrics)
            bar.advance(title, **numbers)
            if ended or self.iteration % config.log_every == 0:
                yield {**line, **means.take(), "seconds": round(self.seconds, 3)}
            if ended:
                self.next_stage()
            # Before the checkpoint, so that no kill leaves a finished run without them.
            if pictures and (ended or (config.pictures_every and self.iteration % config.pictures_every == 0)):
                self.save_pictures(folder, board)
            if saving:
                folder.save_checkpoint(self.iteration, self.tensors(), self.state())
            if stopping and self.iteration < config.total_iterations:
                raise StoppedError(
                    f"stopped as asked; iteration {self.iteration} is saved, and the run goes on from it"
                )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors, as JSON values."""
        return {
            "images_seen": self.images_seen,
            "chains_started": self.images_seen,
            "images": self.images.digest,
            "guard": self.guard.state(),
            "seconds": self.seconds,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes up where `tensors` and `state` were saved. Raises RunError if that was with other images."""
        if checkpoint.state["images"] != self.images.digest:
            raise RunError("the run in this folder was trained on other images: choose another folder")
        self.iteration = checkpoint.iteration
        self.seconds = float(checkpoint.state["seconds"])
        self.guard.restore(checkpoint.state.get("guard", {}))
        self.load_state(checkpoint)

    def _roll_back(self, folder: RunFolder, error: DivergedError) -> None:
        """Goes back to a good checkpoint, and on from there with fresh noise and a lower learning rate.

        Raises DivergedError, with what is left of the run, where that was done as often as the config allows.
        """
        guard = self.guard
        if guard.exhausted:
            advice = _advice(folder, guard.attempt, self.hint)
            raise DivergedError(error.iteration, error.reason, advice) from None
        rollbacks = guard.state()
        checkpoint = folder.newest_checkpoint(guard.target(folder.checkpoints.iterations()))
        if checkpoint is None:
            self.start()
        else:
            self.restore(checkpoint)
        guard.restore(rollbacks)  # restoring the rest has restored those of that time
        guard.record_rollback(error.iteration, self.iteration, error.reason)
        with folder.writing("the log or a checkpoint"):
            if checkpoint is not None:
                folder.checkpoints.amend(checkpoint, self.state())
            folder.log.rewind(self.iteration)
        warnings.warn(
            f"iteration {error.iteration}: {error.reason}. Back to iteration {self.iteration}, with fresh noise and "
            f"the learning rate times {guard.lr_factor:g} (try {guard.attempt} of {guard.retries})",
            RuntimeWarning,
            stacklevel=2,
        )


def train_in(loop: Loop, folder: RunFolder, progress: bool, save_pictures: bool, on_log: OnLog | None) -> None:
    """Trains from the folder's newest checkpoint on to the end, with a bar, the log and what TensorBoard wants."""
    config = loop.config
    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        loop.restore(checkpoint)
    with folder.writing("the log"):
        folder.log.rewind(loop.iteration)
    board = TensorBoardWriter.open(folder.path / "tensorboard", config.tensorboard, loop.iteration)
    try:
        with (
            Progress.over(config.total_iterations, loop.iteration, progress) as bar,
            StopRequest.listening() as request,
        ):
            for line in loop.run(folder, bar, board, request, save_pictures):
                with folder.writing("the log"):
                    folder.log.append(line)
                board.line(line)
                if on_log is not None:
                    on_log(line)
    finally:
        board.close()


def update_metrics(net: nn.Module, loss: Tensor, data: Tensor, samples: Tensor) -> Metrics:
    """What guard and log ask of an update of an energy, from its loss and its energies of data and samples (B,)."""
    return {
        "loss": loss,
        "energy_data": data.mean(),
        "energy_samples": samples.mean(),
        "gap": samples.mean() - data.mean(),
        "largest_energy_data": data.abs().max(),
        "largest_energy_samples": samples.abs().max(),
        "gradient_norm": gradient_norm(net),
    }


def to_floats(found: Metrics) -> dict[str, float]:
    """One copy to the host for all of them."""
    return dict(zip(found, torch.stack([value.detach() for value in found.values()]).tolist(), strict=True))


def gradient_norm(net: nn.Module) -> Tensor:
    """The norm of the gradients of all parameters that have one."""
    return get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


def opened(images: ImageInput, progress: bool) -> tuple[dict[str, Any] | None, Tensor | Images]:
    """Where images come from, if that can be kept with a run, and the images; with `progress` says what they are."""
    source, found = (None, images) if isinstance(images, Tensor | Images) else (images.to_json(), images.open())
    if progress and isinstance(found, Images):
        print(found, file=sys.stderr, flush=True)  # what the file or folder was taken for
    return source, found


def stored_images(folder: RunFolder) -> ImageInput:
    """The source of a run's images. Raises RunError where nobody knows it."""
    stored = folder.images()
    if stored is None:
        raise RunError(f"{folder.path} doesn't say where its images come from: give them")
    return source_from_json(stored)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The given one, or else a GPU if there is one."""
    return torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")


def defaults_of(config: type[Any]) -> dict[str, Any]:
    """Of the fields that have one: what a run means that was begun before such a field existed."""
    fields = dataclasses.fields(config)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def checkpoint_of(folder: RunFolder, checkpoint_every: int, iteration: int | None = None) -> Checkpoint:
    """The newest good checkpoint of a run, or that of one `iteration`. Raises RunError where there is none."""
    checkpoint = folder.newest_checkpoint(iteration)
    if iteration is not None and (checkpoint is None or checkpoint.iteration != iteration):
        raise RunError(f"{folder.path} has no good checkpoint of iteration {iteration}")
    if checkpoint is None:
        raise RunError(f"{folder.path} has no checkpoint yet: train it for at least {checkpoint_every} iterations")
    return checkpoint


def trained_checkpoint(run_dir: str | Path, config_type: Any, iteration: int | None = None) -> tuple[Any, Checkpoint]:
    """The config of a run, and its newest good checkpoint, or that of one `iteration`.

    Raises RunError where there is no such run, or where it has no such checkpoint, or none after an update.
    """
    folder = RunFolder.existing(run_dir)
    config = config_type.from_json(folder.config(config_type.kind))
    checkpoint = checkpoint_of(folder, config.checkpoint_every, iteration)
    if not checkpoint.iteration:
        raise RunError(f"{run_dir} has no trained net yet: its newest checkpoint is of iteration 0")
    return config, checkpoint


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The moments of each parameter by name, `prefix` in front."""
    named: dict[str, Tensor] = {}
    for index, moments in optimizer.state_dict()["state"].items():
        named |= {f"{prefix}{index}.{name}": tensor for name, tensor in moments.items()}
    return named


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Takes up what `optimizer_tensors` gave."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part(tensors, prefix).items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """A step by the gradients that are there, with the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def average(mean: nn.Module, net: nn.Module, decay: float) -> None:
    """Moves the averaged weights; buffers (the spectral norm's vectors) are taken as they are."""
    with torch.no_grad():
        torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), 1 - decay)
        for averaged, current in zip(mean.buffers(), net.buffers(), strict=True):
            averaged.copy_(current)


class _RunningMeans:
    """Running means of numbers by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, numbers: Mapping[str, float]) -> None:
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in numbers.items()}
        self._count += 1

    def take(self) -> dict[str, float]:
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


def _advice(folder: RunFolder, tries: int, hint: str) -> str:
    tried = f"The guard went back {tries} times in vain; a" if tries else "A"
    wish = f"{tried} new run with {hint} may hold the energies"
    saved = folder.checkpoints.iterations()
    if not saved:
        return f"There is no checkpoint yet. {wish}"
    where = f"The checkpoint of iteration {saved[-1]} in {folder.path}"
    return f"{where} is from before that and can be sampled from. {wish}"
