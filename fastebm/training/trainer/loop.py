"""The training loop of every method: log, guard, checkpoints, pictures, stops by signals, and rollbacks.

A method is a subclass of `Trainer`. It defines an update of the weights, a check of the weights before they are saved,
and the tensors of a checkpoint. Everything that lets a run survive a kill or an explosion is in this file.

Several processes ("ranks") may train one run together. All of them hold the same weights and take the same decisions,
from numbers that they have gathered. Only the first one reads and writes the run's folder, and prints.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastebm import distributed
from fastebm.runs.checkpoints import Checkpoint
from fastebm.runs.fields import checked
from fastebm.runs.folder import RunError, RunFolder
from fastebm.runs.run import Run, belongs_to
from fastebm.training.images import ImageLevels
from fastebm.training.tensorboard import TensorBoardWriter
from fastebm.training.trainer.config import TrainerConfig
from fastebm.training.trainer.flight import GAVE_UP, WENT_BACK, FlightRecorder, diagnose, take_request, write_record
from fastebm.training.trainer.guard import DivergedError, Guard
from fastebm.training.trainer.metrics import LogNumbers, to_floats
from fastebm.training.trainer.parts import Part, Parts
from fastebm.training.trainer.progress import ProgressBar
from fastebm.training.trainer.signals import StoppedError, StopRequest

OnLog = Callable[[dict[str, Any]], None]

FOR_THE_RECORDER = ("clamped_data",)
"""Metrics that the log does not have."""


class Trainer(ABC):
    """A run in memory: its nets, its optimizers and its guard.

    Attributes:
        run_type: the class of the method's runs, which knows the tensors of a checkpoint.
        recorder: keeps what the last updates were like; of several ranks, that of the first one records its own chains.
        parts: cuts the batch of an update into parts, and knows the ranks that compute them.
        hint: the settings that may stop energies from exploding, for the message of `DivergedError`.
        iteration: the number of updates so far.
        elapsed_seconds: the time that they took.
    """

    run_type: ClassVar[type[Run]]
    hint: ClassVar[str]
    config: TrainerConfig

    def __init__(self, config: TrainerConfig, images: ImageLevels, device: torch.device) -> None:
        self.config = config
        self.images = images
        self.device = device
        self.ranks = distributed.ranks()
        self.parts = Parts(self.ranks, config.microbatches, config.smallest_batch)
        self.guard = Guard(**config.guard_bounds, retries=config.retries, retry_lr_factor=config.retry_lr_factor)
        self.recorder = FlightRecorder(config.flight_updates if self.ranks.first else 0)
        self.iteration = 0
        self.elapsed_seconds = 0.0
        self.means = LogNumbers()
        self._note = ""
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Sets `iteration` to 0 and makes everything that `update` changes, from the config's seed."""

    @abstractmethod
    def update(self) -> dict[str, float]:
        """Updates the weights once, adds 1 to `iteration`, and returns metrics for the log.

        Raises DivergedError before the weights change, where the guard refuses the update.
        """

    @abstractmethod
    def check_before_save(self) -> None:
        """Shows the guard energies under the weights that are about to be saved, and changes nothing.

        No update has come from these weights yet. Chains are those that the next update would start.
        """

    @abstractmethod
    def log_fields(self) -> dict[str, Any]:
        """What a line of the log says about the next update besides its metrics."""

    @abstractmethod
    def progress_metrics(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """A title and a few numbers for the progress bar."""

    @abstractmethod
    def save_pictures(self, folder: RunFolder, board: TensorBoardWriter) -> None:
        """Draws pictures of the run so far."""

    @abstractmethod
    def collect(self) -> None:
        """Brings what other ranks have of `tensors` to the first one; called on all."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next iteration depends on, by name."""

    @abstractmethod
    def load_state(self, checkpoint: Checkpoint) -> None:
        """Loads `tensors`, and what the method added to `state`; `iteration` and guard are loaded already."""

    @property
    @abstractmethod
    def images_seen(self) -> int:
        """The number of images, and of chains, before the next update."""

    def stage_ended(self) -> bool:
        """Whether the last update was the last one of a stage, which is logged, drawn and saved."""
        return self.iteration == self.config.total_iterations

    def next_stage(self) -> None:  # noqa: B027  (most methods have a single stage)
        """Called after the last update of a stage, between its line of the log and its pictures."""

    @property
    def seed(self) -> int:
        """The key of all noise. The order of the images follows the config's seed, so that each epoch is complete."""
        return self.guard.seed(self.config.seed)

    def train(
        self,
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        *,
        progress: bool = True,
        save_pictures: bool = True,
        on_log: OnLog | None = None,
    ) -> None:
        """Trains from the folder's newest checkpoint to the end; arguments and errors as of `fastebm.train`."""
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)
            self.recorder.clear(f"the run was resumed at iteration {self.iteration:,}, and nothing before is recorded")
        first = self.ranks.first
        if first:
            with folder.writing("the log"):
                folder.log.rewind(self.iteration)
        enabled = first and self.config.tensorboard
        board = TensorBoardWriter.create(folder.path / "tensorboard", enabled, self.iteration)
        with (
            closing(board),
            ProgressBar.over(self.config.total_iterations, self.iteration, first and progress) as bar,
            StopRequest.handle_signals() as request,
        ):
            try:
                for line in self._iterate(folder, bar, board, request, first and save_pictures):
                    if not first:
                        continue
                    with folder.writing("the log"):
                        folder.log.append(line)
                    board.add_scalars(line)
                    if on_log is not None:
                        on_log(line)
            except FloatingPointError as error:
                self._write_flight(folder, "the run crashed", str(error))
                raise
            request.raise_if_interrupted()
        if first:
            self._warn_of_a_flat_end()

    def _iterate(
        self, folder: RunFolder, bar: ProgressBar, board: TensorBoardWriter, request: StopRequest, pictures: bool
    ) -> Iterator[dict[str, Any]]:
        """Updates the weights until the end, with checkpoints and pictures; yields lines for the log."""
        config = self.config
        start_time = time.monotonic() - self.elapsed_seconds
        while self.iteration < config.total_iterations:
            request.raise_if_interrupted()
            line = {"iteration": self.iteration + 1, **self.log_fields(), "attempt": self.guard.attempt}
            self.recorder.begin(line)
            try:
                metrics = self.update()
                self.recorder.finish(metrics)
                request.raise_if_interrupted()
                ended = self.stage_ended()
                # Read once, as SIGTERM may come at any moment: a run that stops here must have been saved here.
                stopping = self._any(request.received)
                saving = ended or stopping or self.iteration % config.checkpoint_every == 0
                if saving:
                    # The check runs the chains that the next update would.
                    self.recorder.begin({"iteration": self.iteration + 1, "attempt": self.guard.attempt})
                    self.check_before_save()
                    self.recorder.drop()
            except DivergedError as error:
                self._roll_back(folder, error)
                bar.go_back(self.iteration)
                continue
            if self.ranks.first and take_request(folder.path):
                self._write_flight(folder, "the record was asked for", "")
            self.elapsed_seconds = time.monotonic() - start_time
            self.means.add({name: value for name, value in metrics.items() if name not in FOR_THE_RECORDER})
            title, numbers = self.progress_metrics(metrics)
            bar.advance(title, **numbers)
            if ended or self.iteration % config.log_every == 0:
                note, self._note = self._note, ""
                said = {"note": note} if note else {}
                yield {**line, **self.means.pop(), "seconds": round(self.elapsed_seconds, 3), **said}
            if ended:
                self.next_stage()
            # Pictures come before the checkpoint, so that a killed run that is finished has them.
            if pictures and (ended or (config.pictures_every and self.iteration % config.pictures_every == 0)):
                self.save_pictures(folder, board)
            if saving:
                self.collect()
                if self.ranks.first:
                    folder.save_checkpoint(self.iteration, self.tensors(), self.state())
            if stopping and self.iteration < config.total_iterations:
                raise StoppedError(
                    f"stopped as asked; iteration {self.iteration} is saved, and the run goes on from it"
                )

    def _check_energies(self, net: nn.Module, parts: Sequence[Part], energies: Sequence[tuple[Tensor, ...]]) -> None:
        """Shows the guard the energies of images and chain ends of each part, (B,), under weights of `net` to be saved.

        The flight recorder sees them too, of several ranks those of the first one.
        """
        sizes = [len(part) for part in parts]
        names = ("data", "samples")
        largest = [
            {f"largest_energy_{n}": e.abs().max() for n, e in zip(names, both, strict=True)} for both in energies
        ]
        found = to_floats(self.parts.means(largest, sizes))
        data, samples = (torch.cat(each).detach() for each in zip(*energies, strict=True))
        means = {f"energy_{name}": each.float().mean() for name, each in zip(names, (data, samples), strict=True)}
        if self.recorder.length:
            means |= {"gap": means["energy_samples"] - means["energy_data"]}
            self.recorder.finish(found | to_floats(means), data, samples, net)
        self.guard.check(self.iteration, found | {"gradient_norm": 0.0})

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.ranks.size == 1:
            return flag
        return bool(self.ranks.gather(torch.tensor([flag], device=self.device), self.ranks.size).any())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors, as JSON values."""
        return {
            "images_seen": self.images_seen,
            "chains_started": self.images_seen,
            "images": self.images.digest,
            "guard": self.guard.state_dict(),
            "means": self.means.state_dict(),
            "seconds": self.elapsed_seconds,
            "config": dataclasses.asdict(self.config),
            **({"note": self._note} if self._note else {}),
        }

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint. Raises RunError if it was trained on other images, or its state is damaged."""
        state = checkpoint.state
        try:
            if checked("images", state["images"], str) != self.images.digest:
                raise RunError(
                    "the run in this folder was trained on other images than these: give the ones it knows, or train "
                    "in another folder"
                )
            self.iteration = checkpoint.iteration
            self.elapsed_seconds = checked("seconds", state["seconds"], float)
            # Checkpoints of older versions have neither of these.
            self.guard.load_state_dict(checked("guard", state.get("guard", {}), dict[str, Any]))
            self.means.load_state_dict(checked("means", state.get("means", {}), dict[str, Any]))
            self._note = checked("note", state.get("note", ""), str)
            self.load_state(checkpoint)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise RunError(
                f"the state of the checkpoint of iteration {checkpoint.iteration} is damaged: {reason}"
            ) from error

    def _roll_back(self, folder: RunFolder, error: DivergedError) -> None:
        """Returns to a good checkpoint, to go on from there with fresh noise and a lower learning rate.

        Raises DivergedError, with advice, where that was done as often as the config allows.
        """
        guard = self.guard
        if guard.exhausted:
            why = self._write_flight(folder, GAVE_UP, error.reason)
            raise DivergedError(error.iteration, error.reason, f"{self._advice(folder)}.{why}") from None
        why = self._write_flight(folder, WENT_BACK, error.reason)
        rollbacks, checkpoint = guard.state_dict(), None
        if self.ranks.first:
            belongs = belongs_to(self.config, self.run_type)
            checkpoint = folder.newest_checkpoint(guard.target(folder.checkpoints.iterations()), belongs)
        checkpoint = self.ranks.broadcast(checkpoint)
        if checkpoint is None:
            self.reset()
            self.means = LogNumbers()
        else:
            self.load_checkpoint(checkpoint)
        guard.load_state_dict(rollbacks)  # the checkpoint had only the earlier rollbacks
        guard.record_rollback(error.iteration, self.iteration, error.reason)
        self.recorder.go_back(self.iteration)
        if not self.ranks.first:
            return
        note = f"The guard went back from iteration {error.iteration} to {self.iteration}: {error.reason}.{why}"
        self._note = note.replace(f"{folder.path}/", "")  # which may be moved
        with folder.writing("the log or a checkpoint"):
            if checkpoint is not None:
                folder.checkpoints.overwrite_state(checkpoint, self.state())
            folder.log.rewind(self.iteration)
        warnings.warn(
            f"iteration {error.iteration}: {error.reason}. Back to iteration {self.iteration}, with fresh noise and "
            f"the learning rate times {guard.lr_factor:g} (try {guard.attempt} of {guard.retries}).{why}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _write_flight(self, folder: RunFolder, event: str, reason: str) -> str:
        """Writes the flight record. Returns what it shows as sentences, after a space; "" without one."""
        if not self.ranks.first or not self.recorder.length:
            return ""
        try:
            stem, diagnosis = write_record(folder.path, self.recorder.record(), event, reason)
        except OSError as error:
            where = error.filename or folder.path
            warnings.warn(f"the flight record can't be written to {where}: {error.strerror}", RuntimeWarning, 3)
            return ""
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            # A fault of the recorder must not end a run that the guard saves.
            warnings.warn(f"the flight record could not be made: {error!r}", RuntimeWarning, stacklevel=3)
            return ""
        return f" {diagnosis} The last updates are in {stem}.png and .json"

    def _warn_of_a_flat_end(self) -> None:
        """Warns where the energy has collapsed, which the guard does not see."""
        try:
            findings = diagnose(self.recorder.record())
        except (ArithmeticError, LookupError, TypeError, ValueError):
            return  # a fault of the diagnosis must not end a run that came to its end
        for finding in findings:
            if finding.cause == "flat":
                warnings.warn(f"the run came to its end, but: {finding.sentence}", RuntimeWarning, stacklevel=4)

    def _advice(self, folder: RunFolder) -> str:
        """What is left of a run that the guard gives up, and what to try next."""
        tries = self.guard.attempt
        tried = f"The guard went back {tries} times in vain; a" if tries else "A"
        wish = f"{tried} new run with {self.hint} may hold the energies"
        saved = folder.checkpoints.iterations()
        if not saved:
            return f"There is no checkpoint yet. {wish}"
        where = f"The checkpoint of iteration {saved[-1]} in {folder.path}"
        return f"{where} is from before that and can be sampled from. {wish}"
