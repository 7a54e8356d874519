"""The output folder of a task: pictures, arrays, and the numbers in numbers.json."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastebm.runs.files import PART, finite_json, lock, probe, replacing, write_json
from fastebm.training import RunError

NUMBERS = "numbers.json"


@contextmanager
def task_folder(path: str | Path, files: Iterable[str] = (), *, overwrite: bool = False) -> Iterator[Path]:
    """The folder at `path`, made and locked for this process until the end of the block.

    If the block leaves nothing in a folder that this made, it is removed again. Raises ValueError as `check_folder`
    does, RunError where another process is writing to the folder.
    """
    path, files = Path(path), tuple(files)
    check_folder(path, files, overwrite=overwrite)
    made = make_folders(path)
    with locked(path):
        try:
            check_folder(path, files, overwrite=overwrite)  # another process may have written in between
            yield path
        finally:
            remove_empty(made)


def check_folder(path: str | Path, files: Iterable[str] = (), *, overwrite: bool = False) -> Path:
    """`path` as a Path, if a task can write `files` there: asked before the work whose results they are to hold.

    With `overwrite`, files of these names are replaced later and others stay. Raises ValueError, with the reason, where
    `path` is a file, or a folder with files in it unless `overwrite` is set, one of the files is a folder, or the
    folder can't be made or written to: a name too long, no permission, a parent that is a file, a full disk.
    """
    path = Path(path)
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise ValueError(f"{path} is a file: choose another folder (--out)")
        there = os.listdir(path) if path.is_dir() else []
        # Files that a killed process had not finished are nobody's.
        if not overwrite and any(not re.fullmatch(rf"\..*{re.escape(PART)}", name) for name in there):
            raise ValueError(
                f"{path} has files in it, which stay: choose another folder (--out), or replace them (--overwrite)"
            )
        for name in files:
            if (path / name).is_dir():
                raise ValueError(
                    f"{path / name} is a folder, and a file is to be written: choose another folder (--out)"
                )
        made = make_folders(path)
        try:
            probe(path)
        finally:
            remove_empty(made)
    except OSError as error:
        raise ValueError(f"{path} can't be written to: {error.strerror or error}") from error
    return path


def make_folders(path: Path) -> list[Path]:
    """Makes the folder at `path` and those above it, and returns those that were not there, the lowest first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.insert(0, folder)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder for this process until the end of the block. Raises RunError where another process has it.

    The lock is on the folder itself, so that it leaves no file. On a file system without locks it is only a warning.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            if not lock(descriptor):
                raise RunError(f"another process is writing to {folder}: wait for it, or choose another folder")
        except OSError as error:
            warnings.warn(
                f"{folder} can't be locked ({error.strerror}): let no other process write there meanwhile", stacklevel=4
            )
        yield
    finally:
        os.close(descriptor)


def save_numbers(folder: Path, numbers: Mapping[str, Any]) -> None:
    """Writes numbers.json; numbers that are infinite or NaN become null."""
    write_json(folder / NUMBERS, finite_json(dict(numbers)))


def save_arrays(path: Path, **arrays: Tensor) -> None:
    """Writes an .npz of float32 arrays, completely or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        content: dict[str, Any] = {name: array.cpu().float().numpy() for name, array in arrays.items()}
        np.savez_compressed(file, **content)
