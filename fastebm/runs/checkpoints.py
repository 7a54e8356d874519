"""Checkpoints: all tensors in a safetensors file, and everything else in a JSON file beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastebm.runs.fields import checked, shown
from fastebm.runs.files import read_json, replacing, write_json

_NAME = re.compile(r"iteration-(\d{9})\.json")


class DamagedError(ValueError):
    """Checkpoints are there, and none of them is good."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `iteration` updates: `tensors` by name, on the CPU, and `state` as JSON values."""

    iteration: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


Check = Callable[[Checkpoint], None]
"""Raises ValueError, with the reason, for a checkpoint that is not one of the run."""


@dataclass(frozen=True)
class Layout:
    """The names, shapes and dtypes of a checkpoint's tensors, as tensors without memory.

    Attributes:
        tensors: those that it must have.
        groups: sets of tensors of which it has all or none, as the moments of a parameter that had a gradient or not.
    """

    tensors: Mapping[str, Tensor]
    groups: Sequence[Mapping[str, Tensor]] = ()

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError, which names the tensor, for tensors that are missing, too many, or of another form."""
        wanted = dict(self.tensors)
        for group in self.groups:
            if group.keys() & tensors.keys():
                wanted |= group
        if missing := wanted.keys() - tensors.keys():
            raise ValueError(f"it lacks the tensor {min(missing)}")
        if unknown := tensors.keys() - wanted.keys():
            raise ValueError(f"its tensor {shown(min(unknown))} is none of this run")
        for name, tensor in tensors.items():
            if (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype):
                raise ValueError(f"its tensor {name} is {_form(tensor)}, and the config's {_form(wanted[name])}")


class Checkpoints:
    """The checkpoints of one run, in `folder`: `iteration-000000300.safetensors` and `.json`.

    The JSON file is written last and holds digests of the other file and of itself. A checkpoint exists once its JSON
    file does, and it is good if the digests match and all its numbers are finite. The newest `keep` checkpoints are
    kept.
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
        """Writes a checkpoint, completely or not at all, and removes those before it but for the newest `keep`.

        Raises OSError or SafetensorError where it can't be written, as where the run's folder is gone.
        """
        self.folder.mkdir(exist_ok=True)
        weights, _ = self._paths(iteration)
        with replacing(weights) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
            digest = _digest(temporary)
        self._describe(iteration, digest, state)
        # Newer ones are damaged, or else the run had gone on from them: they must not count, and push this one out.
        for old in [old for old in self.iterations() if old <= iteration][: -self.keep]:
            with suppress(OSError):  # what can't be removed does no harm
                self._remove(old)

    def overwrite_state(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Overwrites the state of a checkpoint of this folder, and removes all newer checkpoints.

        After a kill in between the newer ones are still there, and good.
        """
        weights, _ = self._paths(checkpoint.iteration)
        self._describe(checkpoint.iteration, _digest(weights), state)
        for iteration in self.iterations():
            if iteration > checkpoint.iteration:
                self._remove(iteration)

    def load_newest(self, last: int | None = None, check: Check | None = None) -> Checkpoint | None:
        """The newest good checkpoint (with `last`: of that iteration or before), or None where there is none at all.

        It warns about each damaged one that it passes over: with another content than was written, with numbers that
        are not finite, or refused by `check`.

        Raises DamagedError where all are damaged, with what is wrong with the newest; OSError where one can't be read,
        which says nothing about its content.
        """
        while True:
            saved = [iteration for iteration in self.iterations() if last is None or iteration <= last]
            reasons: dict[Path, str] = {}
            for iteration in reversed(saved):
                weights, description = self._paths(iteration)
                try:
                    checkpoint = self._load(iteration)
                    if check is not None:
                        check(checkpoint)
                except FileNotFoundError:
                    if os.path.lexists(description):  # else the process that trains has just removed it
                        reasons[weights] = "it is missing"
                except ValueError as error:
                    reasons[weights] = str(error)
                else:
                    for path, reason in reasons.items():
                        warnings.warn(
                            f"the checkpoint {path} is damaged ({reason}); the one before it is used",
                            RuntimeWarning,
                            stacklevel=2,
                        )
                    return checkpoint
            if reasons:
                path, reason = next(iter(reasons.items()))
                raise DamagedError(f"{path.name}: {reason}")
            if not saved:
                return None

    def newest_state(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint whose description is good, without its tensors; None where there is none.

        Raises OSError where one can't be read.
        """
        for iteration in reversed(self.iterations()):
            with suppress(FileNotFoundError, ValueError):  # it has just been removed, or it is damaged
                return self._description(iteration)[1]
        return None

    def _description(self, iteration: int) -> tuple[str, dict[str, Any]]:
        """The digest of a checkpoint's tensors, and its state. Raises ValueError for a damaged file, OSError."""
        description = self._paths(iteration)[1]
        content = read_json(description)
        try:
            found = checked("the iteration", content["iteration"], int)
            digest = checked("the digest", content["sha256"], str)
            state = checked("the state", content["state"], dict[str, Any])
        except KeyError as error:
            raise ValueError(f"{description.name} has no entry {error}") from None
        except TypeError as error:
            raise ValueError(f"in {description.name} {error}") from None
        # Checkpoints of older versions have no digest of their description.
        if content.get("description_sha256", own := _own_digest(found, digest, state)) != own:
            raise ValueError(f"{description.name} does not have the digest that it names")
        if found != iteration:
            raise ValueError(f"{description.name} is of iteration {shown(found)}")
        return digest, state

    def _load(self, iteration: int) -> Checkpoint:
        """Raises ValueError for a damaged checkpoint, OSError for one that can't be read."""
        weights, description = self._paths(iteration)
        digest, state = self._description(iteration)
        if _digest(weights) != digest:
            raise ValueError(f"its content does not have the digest that {description.name} names")
        try:
            with torch.device("cpu"):  # the library follows the default device
                tensors = load_file(weights)
            bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"it is no safetensors file of numbers: {shown(str(error))}") from error
        if bad:
            raise ValueError(f"the numbers of its tensor {shown(min(bad))} are not finite")
        return Checkpoint(iteration, tensors, state)

    def _describe(self, iteration: int, digest: str, state: Mapping[str, Any]) -> None:
        # Through JSON, so that the digest is that of what will be read.
        content = json.loads(json.dumps({"iteration": iteration, "sha256": digest, "state": dict(state)}))
        own = _own_digest(iteration, digest, content["state"])
        write_json(self._paths(iteration)[1], content | {"description_sha256": own})

    def _paths(self, iteration: int) -> tuple[Path, Path]:
        stem = f"iteration-{iteration:09d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"

    def _remove(self, iteration: int) -> None:
        weights, description = self._paths(iteration)
        description.unlink(missing_ok=True)  # first, so that no checkpoint is ever without its tensors
        weights.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(iteration: int, digest: str, state: Mapping[str, Any]) -> str:
    content = json.dumps([iteration, digest, state], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
