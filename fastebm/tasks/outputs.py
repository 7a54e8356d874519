"""What a task leaves: a folder of its own with pictures, arrays and the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastebm.runs.files import replacing, write_json

NUMBERS = "numbers.json"


def task_folder(path: str | Path, *, overwrite: bool = False) -> Path:
    """The folder at `path`, made if it is not there. Raises ValueError where something is in it, unless `overwrite`,
    with which files of the same names are replaced and others stay."""
    path = Path(path)
    check_free(path, overwrite=overwrite)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Raises as `task_folder` does, without making anything."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose another folder")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} has files in it, which stay: choose another folder, or ask to overwrite")


def save_numbers(folder: Path, numbers: Mapping[str, Any]) -> None:
    """numbers.json, in which what is infinite or not a number is null."""
    write_json(folder / NUMBERS, _finite(dict(numbers)))


def save_arrays(path: Path, **arrays: Tensor) -> None:
    """An .npz of float32 arrays, all or nothing."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        content: dict[str, Any] = {name: array.cpu().float().numpy() for name, array in arrays.items()}
        np.savez_compressed(file, **content)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
