"""Checkpoints: all tensors in a safetensors file, and everything else in a JSON file beside it."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastebm.runs.files import replacing, write_json

_NAME = re.compile(r"iteration-(\d{9})\.json")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `iteration` updates: `tensors` by name, on the CPU, and `state` as JSON values."""

    iteration: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `folder`: `iteration-000000300.safetensors` and `.json`.

    The JSON file is written last and holds a digest of the other file. A checkpoint exists once its JSON file does, and
    it is good if the digest matches. The newest `keep` checkpoints are kept.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    def iterations(self) -> list[int]:
        """The iterations of all checkpoints, good or not, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def save(self, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes a checkpoint, completely or not at all, and removes all but the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights, description = self._paths(iteration)
        with replacing(weights) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
            digest = _digest(temporary)
        write_json(description, {"iteration": iteration, "sha256": digest, "state": dict(state)})
        self._prune()

    def overwrite_state(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Overwrites the state of a checkpoint of this folder, and removes all newer checkpoints.

        After a kill in between the newer ones are still there, and good.
        """
        weights, description = self._paths(checkpoint.iteration)
        content = {"iteration": checkpoint.iteration, "sha256": _digest(weights), "state": dict(state)}
        write_json(description, content)
        for iteration in self.iterations():
            if iteration > checkpoint.iteration:
                self._remove(iteration)

    def load_newest(self, last: int | None = None) -> Checkpoint | None:
        """The newest good checkpoint (with `last`: of that iteration or before), or None where there is none.

        It warns about each damaged one.
        """
        for iteration in reversed(self.iterations()):
            if last is not None and iteration > last:
                continue
            try:
                return self._load(iteration)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                weights, _ = self._paths(iteration)
                warnings.warn(
                    f"the checkpoint {weights} is damaged ({error}); the one before it is used",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return None

    def _load(self, iteration: int) -> Checkpoint:
        weights, description = self._paths(iteration)
        content = json.loads(description.read_text())
        if _digest(weights) != content["sha256"]:
            raise ValueError(f"its content does not have the digest that {description.name} names")
        return Checkpoint(iteration, load_file(weights), content["state"])

    def _paths(self, iteration: int) -> tuple[Path, Path]:
        stem = f"iteration-{iteration:09d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"

    def _prune(self) -> None:
        for iteration in self.iterations()[: -self.keep]:
            self._remove(iteration)

    def _remove(self, iteration: int) -> None:
        weights, description = self._paths(iteration)
        description.unlink(missing_ok=True)  # first, so that no checkpoint is ever without its tensors
        weights.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
