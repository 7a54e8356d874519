"""A run folder and its log.

config.json       the method, its settings, the source of the images, threads and versions
log.jsonl         a line of metrics every few iterations
checkpoints/      see `fastebm.runs.checkpoints`
*.png, pictures/  pictures
tensorboard/      events for TensorBoard, if the config asks for them
.lock             locked by the process that trains; the system unlocks it however that process ends
"""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastebm.runs.checkpoints import Checkpoint, Checkpoints
from fastebm.runs.files import PART, replacing, write_json

LOCK = ".lock"


class RunError(RuntimeError):
    """A run folder that can't be used: it holds another run, or is incomplete or damaged."""


class RunFolder:
    """The folder of one run. `open` makes it or opens the run in it for training; `existing` is for reading."""

    def __init__(self, path: Path, keep_checkpoints: int = 3) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep_checkpoints)
        self.log = RunLog(path / "log.jsonl")

    @classmethod
    @contextmanager
    def locked(cls, path: str | Path) -> Iterator[None]:
        """Makes the folder at `path` and locks it for this process until the end of the block.

        Raises RunError where another process has locked it, it holds files that are no run's, or can't be written to.
        """
        path = Path(path)
        _refuse_foreign(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / LOCK).open("a")
        except OSError as error:
            raise RunError(f"{path} can't be written to: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"another process is training in {path}: wait for it, or choose another folder"
                ) from None
            # Files that a killed process has half written. The lock shows that no process is writing them now.
            for part in (*path.glob(f".*{PART}"), *path.glob(f"checkpoints/.*{PART}")):
                part.unlink(missing_ok=True)
            yield

    @classmethod
    def open(
        cls,
        path: str | Path,
        kind: str,
        config: Mapping[str, Any],
        *,
        images: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        mutable_fields: Collection[str] = (),
        keep_checkpoints: int = 3,
    ) -> RunFolder:
        """The folder at `path` for a run of `kind` with `config`, new or started before.

        Args:
            images: the source of the images, which is stored with a new run.
            defaults: values of fields that the stored config of an older version does not have.
            mutable_fields: fields that may differ from those of a run that is there.

        Raises RunError where it holds another kind of run, a run with another config (naming the difference) or files
        that are no run's, or can't be written to.
        """
        folder = cls(Path(path), keep_checkpoints)
        if not folder.is_run(folder.path):
            _refuse_foreign(folder.path)
            begun = {"kind": kind, "config": dict(config), "images": images and dict(images)}
            with folder.writing("config.json"):
                folder.path.mkdir(parents=True, exist_ok=True)
                write_json(folder._config, {**begun, "threads": torch.get_num_threads(), "versions": _versions()})
            return folder
        # Through JSON, which turns tuples into lists, as in the stored config.
        wanted, stored = json.loads(json.dumps([dict(config), dict(defaults or {})]))
        stored |= folder.config(kind)
        differences = [
            f"{name} is {stored.get(name)!r} there and {value!r} here"
            for name, value in wanted.items()
            if stored.get(name) != value and name not in mutable_fields
        ]
        if differences:
            raise RunError(f"{path} holds a run with another config ({'; '.join(differences)}): choose another folder")
        return folder

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of an existing run. Raises RunError where there is none."""
        if not cls.is_run(path):
            raise RunError(f"{path} is not a run of fastebm: it has no config.json")
        return cls(Path(path))

    @staticmethod
    def is_run(path: str | Path) -> bool:
        return (Path(path) / "config.json").is_file()

    def newest_checkpoint(self, last: int | None = None) -> Checkpoint | None:
        """The newest good checkpoint (with `last`: of that iteration or before), or None where none was saved yet.

        Raises RunError if all are damaged.
        """
        saved = self.checkpoints.iterations()
        checkpoint = self.checkpoints.load_newest(last)
        if checkpoint is None and saved:
            where = self.checkpoints.folder
            raise RunError(f"all {len(saved)} checkpoints in {where} are damaged: choose another folder")
        return checkpoint

    def save_checkpoint(self, iteration: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Saves a checkpoint. Raises RunError where it can't be written, with what is left of the run."""
        with self.writing(f"the checkpoint of iteration {iteration}"):
            self.checkpoints.save(iteration, tensors, state)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turns file system errors within the block (a full disk, a read-only folder) into RunError.

        The message names `what` could not be written, and what is left of the run.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            saved = self.checkpoints.iterations()
            left = (
                f"The checkpoint of iteration {saved[-1]} is whole: once there is room, the run goes on from it"
                if saved
                else "The run has no checkpoint yet"
            )
            raise RunError(f"{what} could not be written to {self.path}: {error}. {left}") from error

    def config(self, kind: str) -> dict[str, Any]:
        """The stored config. Raises RunError if the run is not of `kind`, or the file is damaged."""
        content = self._stored()
        if content["kind"] != kind:
            raise RunError(f"{self.path} holds a run of kind {content['kind']!r}, not {kind!r}")
        return dict(content["config"])

    def kind(self) -> str:
        """The kind of the run. Raises RunError if the file is damaged."""
        return str(self._stored()["kind"])

    def images(self) -> dict[str, Any] | None:
        """The source of the images, if it is known. Raises RunError if the file is damaged."""
        return self._stored().get("images")

    def threads(self) -> int | None:
        """The number of CPU threads that the run was started with. Raises RunError if the file is damaged."""
        return self._stored().get("threads")

    def _stored(self) -> dict[str, Any]:
        try:
            content = dict(json.loads(self._config.read_text()))
            return content | {"kind": content["kind"], "config": dict(content["config"])}
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._config} is damaged: {error!r}") from error

    @property
    def _config(self) -> Path:
        return self.path / "config.json"


class RunLog:
    """`log.jsonl`: one JSON object per line, in the order of "iteration"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines, except a last one that a kill cut short."""
        if not self.path.is_file():
            return []
        complete = [text for text in self.path.read_text().splitlines(keepends=True) if text.endswith("\n")]
        return [json.loads(text) for text in complete]

    def rewind(self, iteration: int) -> None:
        """Removes lines of iterations after `iteration`, which a resumed run will write again."""
        kept = [line for line in self.lines() if line["iteration"] <= iteration]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def _refuse_foreign(path: Path) -> None:
    """Raises RunError where `path` is neither free nor a run. A killed process may have left only its lock."""
    if RunFolder.is_run(path) or not path.exists():
        return
    if not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir()):
        raise RunError(f"{path} exists and is not a run of fastebm: choose another folder")


def _versions() -> dict[str, str]:
    try:
        own = version("fastebm")
    except PackageNotFoundError:
        own = "not installed"
    return {"fastebm": own, "torch": torch.__version__, "python": platform.python_version()}
