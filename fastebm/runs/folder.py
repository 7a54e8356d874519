"""A run folder and its log.

config.json       the method, its settings, the source of the images, threads, machine and versions
log.jsonl         a line of metrics every few iterations
checkpoints/      see `fastebm.runs.checkpoints`
*.png, pictures/  pictures
tensorboard/      events for TensorBoard, if the config asks for them
.lock             locked by the process that trains; the system unlocks it however that process ends
"""

from __future__ import annotations

import json
import os
import platform
import warnings
import zipfile
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastebm.runs.checkpoints import Check, Checkpoint, Checkpoints, DamagedError
from fastebm.runs.fields import checked, shown
from fastebm.runs.files import (
    NoLocksError,
    is_leftover,
    lock,
    parse_json,
    probe,
    read_json,
    remove_leftovers,
    write_json,
)

LOCK = ".lock"
MAX_THREADS = 2**12

_CONTENT = {"kind": str, "config": dict[str, Any], "images": dict[str, Any] | None, "threads": int | None}
"""The entries of config.json that are read. Older versions wrote neither images nor threads."""


class RunError(RuntimeError):
    """A run folder that can't be used: it holds another run, or is incomplete or damaged."""


class RunFolder:
    """The folder of one run. `open` makes it or opens the run in it for training; `existing` is for reading."""

    def __init__(self, path: Path, keep_checkpoints: int = 3) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep_checkpoints)
        self.log = RunLog(path / "log.jsonl")
        self._content: dict[str, Any] | None = None

    @staticmethod
    def check_place(path: str | Path) -> None:
        """Raises RunError where no run can be in `path`: asked before anything is computed for it."""
        path = Path(path)
        try:
            _refuse_foreign(path)
            there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
            for name in path.absolute().relative_to(there).parts:
                (there / name).exists()  # raises for a name too long
            probe(there)
        except OSError as error:
            raise RunError(f"{path} can't be written to: {error.strerror or error}") from error

    @classmethod
    @contextmanager
    def locked(cls, path: str | Path) -> Iterator[None]:
        """Makes the folder at `path` and locks it for this process until the end of the block.

        It warns where the file system has no locks. Raises RunError where another process has locked it, it holds files
        that are no run's, or can't be written to.
        """
        path = Path(path)
        try:
            _refuse_foreign(path)
            path.mkdir(parents=True, exist_ok=True)
            file = (path / LOCK).open("a")
        except OSError as error:
            raise RunError(f"{path} can't be written to: {error.strerror or error}") from error
        with file:
            try:
                if not lock(file.fileno()):
                    raise RunError(f"another process is training in {path}: wait for it, or choose another folder")
                # Files that a killed process has half written. The lock shows that no process is writing them now.
                for folder in (path, path / "checkpoints", path / "pictures", path / "flight"):
                    remove_leftovers(folder)
            except NoLocksError as error:
                warnings.warn(
                    f"the file system of {path} has no file locks ({error.strerror}): nothing keeps a second training "
                    "out of this folder, so start only one",
                    RuntimeWarning,
                    stacklevel=2,
                )
            except OSError as error:
                raise RunError(f"{path} can't be locked: {error.strerror or error}") from error
            yield

    @staticmethod
    def is_locked(path: str | Path) -> bool:
        """Whether a process trains in the run at `path`. Raises RunError where the file system does not tell."""
        try:
            with (Path(path) / LOCK).open("a") as file:
                return not lock(file.fileno())
        except OSError as error:
            raise RunError(f"{path} does not say whether a process trains in it: {error.strerror or error}") from error

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
            machine = {"threads": torch.get_num_threads(), "machine": _machine(), "versions": _versions()}
            content = begun | machine
            with folder.writing("config.json"):
                folder.path.mkdir(parents=True, exist_ok=True)
                write_json(folder._config, content)
            folder._content = content
            return folder
        # Through JSON, which turns tuples into lists, as in the stored config.
        wanted, stored = json.loads(json.dumps([dict(config), dict(defaults or {})]))
        stored |= folder.config(kind)
        if differences := config_differences(stored, wanted, mutable_fields):
            raise RunError(f"{path} holds a run with another config ({differences}): choose another folder")
        folder._content = folder._stored()
        return folder

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of an existing run. Raises RunError where there is none, with a hint at what is there."""
        path = Path(path)
        if not cls.is_run(path):
            raise RunError(f"{path} is not a run of fastebm: it has no config.json{_hint(path)}")
        return cls(path)

    @staticmethod
    def is_run(path: str | Path) -> bool:
        """Whether a run is in `path`. Raises RunError where the system does not tell."""
        try:
            return (Path(path) / "config.json").is_file()
        except (OSError, ValueError) as error:
            raise RunError(f"{shown(str(path))} can't be read: {getattr(error, 'strerror', error)}") from error

    def newest_checkpoint(self, last: int | None = None, check: Check | None = None) -> Checkpoint | None:
        """The newest good checkpoint (with `last`: of that iteration or before), or None where none was saved yet.

        `check` refuses checkpoints that are not of this run. Raises RunError if all are damaged, or one that may be
        good can't be read.
        """
        where = self.checkpoints.folder
        try:
            return self.checkpoints.load_newest(last, check)
        except DamagedError as error:
            count = len(self.checkpoints.iterations())
            raise RunError(f"all {count} checkpoints in {where} are damaged; the newest, {error}") from error
        except OSError as error:
            reason = f"{error.filename or where} can't be read: {error.strerror or error}"
            raise RunError(f"{reason}. It may be whole: make it readable, nothing here was changed") from error

    def save_checkpoint(self, iteration: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Saves a checkpoint. Raises RunError where it can't be written, with what is left of the run."""
        with self.writing(f"the checkpoint of iteration {iteration}"):
            self.checkpoints.save(iteration, tensors, state)
            if self._content is not None and not self._config.exists():  # without it checkpoints can't be used
                write_json(self._config, self._content)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turns file system errors within the block (a full disk, a read-only folder) into RunError.

        The message names `what` could not be written, and what is left of the run.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            if self._content is not None and not self.path.is_dir():
                left = "The folder was moved or removed: what was saved is where it is now"
                raise RunError(f"{what} could not be written to {self.path}: {error}. {left}") from error
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
        images: dict[str, Any] | None = self._stored()["images"]
        return images

    def threads(self) -> int | None:
        """The number of CPU threads that the run was started with. Raises RunError if the file is damaged."""
        threads: int | None = self._stored()["threads"]
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RunError(f"{self._config} is damaged: threads must lie in [1, {MAX_THREADS}], got {shown(threads)}")
        return threads

    def _stored(self) -> dict[str, Any]:
        try:
            content = read_json(self._config)
            return content | {name: checked(name, content.get(name), hint) for name, hint in _CONTENT.items()}
        except (ValueError, TypeError) as error:
            raise RunError(f"{self._config} is damaged: {error}") from error
        except OSError as error:
            raise RunError(f"{self._config} can't be read: {error.strerror or error}") from error

    @property
    def _config(self) -> Path:
        return self.path / "config.json"


class RunLog:
    """`log.jsonl`: one JSON object per line, in the order of "iteration"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines, except a last one that a kill cut short.

        Raises RunError, with the number of the line, for one that is not of a log, or where the file can't be read.
        """
        return [line for line, _ in self._read()]

    def whole_lines(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The lines that are whole, and a sentence for each of the others, which `lines` would raise.

        Raises RunError where the file can't be read.
        """
        faults: list[str] = []
        return [line for line, _ in self._read(faults)], faults

    def last(self) -> dict[str, Any] | None:
        """The last line, or None without any; errors as of `lines`."""
        return next((line for line, _ in deque(self._read(), maxlen=1)), None)

    def rewind(self, iteration: int) -> None:
        """Removes lines of iterations after `iteration`, which a resumed run will write again.

        Raises RunError as `lines` does, and OSError where the file can't be written.
        """
        end = 0
        for line, after in self._read():
            if line["iteration"] > iteration:
                break
            end = after
        # To cut it short takes no room on a disk, and happens at once or not at all.
        with self.path.open("ab") as file:
            if file.tell() > end:
                file.truncate(end)
                os.fsync(file.fileno())

    def _read(self, faults: list[str] | None = None) -> Iterator[tuple[dict[str, Any], int]]:
        """Each line, and the position of its end in the file; a log may have a million lines.

        With `faults` damaged lines are passed over, and a sentence for each is added to the list.
        """
        end, before = 0, -1
        try:
            if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):  # a pipe, which has no end
                raise RunError(f"{self.path} can't be read: it is not a file")
            with self.path.open("rb") as file:
                for number, text in enumerate(file, 1):
                    if not text.endswith(b"\n"):
                        return
                    end += len(text)
                    try:
                        line = _log_line(text, before)
                    except (ValueError, TypeError) as error:
                        remedy = "remove that line, or move the file away"
                        message = f"line {number} of {self.path} is damaged ({error}): {remedy}"
                        if faults is None:
                            raise RunError(message) from error
                        faults.append(message)
                        continue
                    before = line["iteration"]
                    yield line, end
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(f"{self.path} can't be read: {error.strerror or error}") from error


def config_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], mutable_fields: Collection[str]) -> str:
    """What differs from a stored config, in words; "" where nothing does but `mutable_fields`."""
    return "; ".join(
        f"{name} is {shown(stored.get(name))} there and {shown(value)} here"
        for name, value in wanted.items()
        if stored.get(name) != value and name not in mutable_fields
    )


def _log_line(text: bytes, before: int) -> dict[str, Any]:
    """A line of the log, which follows one of iteration `before`. Raises ValueError, TypeError for anything else."""
    line = parse_json(text, nan=True)
    for name in ("iteration", "seconds"):
        if name not in line:
            raise ValueError(f"it has no {name}")
    if checked("iteration", line["iteration"], int) <= before:
        raise ValueError(f"its iteration is {shown(line['iteration'])}, after one of iteration {before}")
    for name, value in line.items():
        checked(name, value, str if name == "note" else float)
    return line


def _refuse_foreign(path: Path) -> None:
    """Raises RunError where `path` is neither free nor a run.

    A process that was killed while it made the folder, or is just making it, has no more there than its lock and half
    a config.
    """
    if RunFolder.is_run(path) or not path.exists():
        return
    if not path.is_dir() or any(
        entry.name != LOCK and not is_leftover(entry.name, of="config.json") for entry in path.iterdir()
    ):
        raise RunError(f"{path} exists and is not a run of fastebm: choose another folder")


def _hint(path: Path) -> str:
    """What may be meant by a path that is not a run, for the end of an error message."""
    try:
        for above in path.absolute().parents[:2]:
            if (above / "config.json").is_file():
                return f"; it lies in the run {above}: give that folder"
        if path.is_file():
            return (
                "; it is an archive: unpack it first" if zipfile.is_zipfile(path) else "; it is a file: give the folder"
            )
        if not path.exists():
            return ""
        below = sorted(entry.name for entry in path.iterdir() if (entry / "config.json").is_file())
        if below:
            return f"; below it are runs: {', '.join(below[:5])}{', ...' if len(below) > 5 else ''}"
        return "" if any(path.iterdir()) else "; the folder is empty"
    except OSError as error:
        return f"; it can't be read: {error.strerror or error}"


def _machine() -> str:
    """System, processor and GPU in words, for a report of the run."""
    gpus = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{gpus}"


def _versions() -> dict[str, str]:
    try:
        own = version("fastebm")
    except PackageNotFoundError:
        own = "not installed"
    return {"fastebm": own, "torch": torch.__version__, "python": platform.python_version()}
