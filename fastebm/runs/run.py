"""What every run offers, whichever method trained it: samples, an energy, its settings."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fastebm.runs.checkpoints import Check, Checkpoint, Layout
from fastebm.runs.folder import RunError, RunFolder, config_differences
from fastebm.runs.nets import PickledNet, picklable

Energy = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Run(ABC):
    """A run as its checkpoint has it, finished or not. Its nets are in eval mode, their parameters without gradients.

    `fastebm.load`, `fastebm.train` and `fastebm.resume` return one.

    Attributes:
        path: the run's folder.
        config: the settings of the method that trained it, a subclass of `TrainerConfig`.
        iteration: the number of updates so far.
        energy: the energy of the highest resolution, `E(x) -> (B,)` for images (B, channels, size, size), low where
            they look real; None where the run trains none.
    """

    path: Path
    config: Any
    iteration: int
    energy: Energy | None = field(init=False, repr=False)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.path)!r}, iteration {self.iteration} of {self.config.total_iterations})"
        )

    @property
    def finished(self) -> bool:
        """Whether all iterations of the config are done."""
        return bool(self.iteration == self.config.total_iterations)

    @property
    def size(self) -> int:
        """The resolution of samples, in pixels: the highest one so far."""
        return int(self.config.sizes[-1])

    @abstractmethod
    def sample(self, count: int, seed: int | None = None, *, batch_size: int = 1000, progress: bool = False) -> Tensor:
        """Images `(count, channels, size, size)` in [-1, 1], float32.

        Args:
            seed: the key of all noise. Without one, chains (or latent vectors) continue the numbering of those of
                training, with its seed: the images are always the same, from noise that training has not used.
            batch_size: number of images that are drawn at a time; it changes none of them.
            progress: show a bar, where drawing takes chains.
        """

    @classmethod
    @abstractmethod
    def load(cls, run_dir: str | Path, device: torch.device | str | None = None) -> Self:
        """The run in a folder, from its newest good checkpoint.

        Raises RunError where there is no such run or it has no checkpoint yet.
        """

    @staticmethod
    @abstractmethod
    def layout(config: Any, iteration: int) -> Layout:
        """The tensors of a checkpoint after `iteration` updates. None of them takes memory."""

    def __getstate__(self) -> dict[str, Any]:
        seen: dict[int, PickledNet] = {}
        return {name: picklable(value, seen) for name, value in vars(self).items()}

    def _key(self, seed: int | None) -> tuple[int, int]:
        """The seed and the first chain id of `sample`."""
        return (self.config.seed, self.config.total_chains) if seed is None else (seed, 0)


def trained_checkpoint(
    run_dir: str | Path, run_type: Any, config_type: Any, iteration: int | None = None
) -> tuple[Any, Checkpoint]:
    """The config of a run, and its newest good checkpoint, or that of one `iteration`.

    Raises RunError where there is no run of this config's kind, no such checkpoint, or none after an update.
    """
    folder = RunFolder.existing(run_dir)
    config = config_type.from_json(folder.config(config_type.kind))
    checkpoint = folder.newest_checkpoint(iteration, belongs_to(config, run_type))
    if iteration is not None and (checkpoint is None or checkpoint.iteration != iteration):
        raise RunError(f"{folder.path} has no good checkpoint of iteration {iteration}")
    if checkpoint is None:
        raise RunError(
            f"{folder.path} has no checkpoint yet: train it for at least {config.checkpoint_every} iterations"
        )
    if not checkpoint.iteration:
        raise RunError(f"{run_dir} has no trained net yet: its newest checkpoint is of iteration 0")
    return config, checkpoint


def belongs_to(config: Any, run_type: type[Run]) -> Check:
    """A check whether a checkpoint is of a run with this config: it names the same settings, and has its tensors."""

    def check(checkpoint: Checkpoint) -> None:
        # Checkpoints of older versions do not name the settings.
        stored = checkpoint.state.get("config", {})
        settings = json.loads(json.dumps(dataclasses.asdict(config)))
        if not isinstance(stored, dict):
            raise ValueError("its config is no JSON object")
        common = {name: value for name, value in settings.items() if name in stored}
        if differences := config_differences(stored, common, config.mutable_fields):
            raise ValueError(f"it was saved with another config than that of config.json: {differences}")
        if checkpoint.iteration > config.total_iterations:
            raise ValueError(f"the run has {config.total_iterations} iterations")
        run_type.layout(config, checkpoint.iteration).check(checkpoint.tensors)

    return check
