"""The output folder of a task: pictures, arrays, and the numbers in numbers.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastebm.runs.files import finite_json, replacing, write_json

NUMBERS = "numbers.json"


def task_folder(path: str | Path, *, overwrite: bool = False) -> Path:
    """Makes the folder at `path` and returns it. Raises ValueError as `check_free` does."""
    path = Path(path)
    check_free(path, overwrite=overwrite)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Raises ValueError where `path` is a file, or a folder with files in it unless `overwrite` allows that.

    With `overwrite`, files of the same names are replaced later and others stay.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose another folder")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"{path} has files in it, which stay: choose another folder (--out), or replace them (--overwrite)"
        )


def save_numbers(folder: Path, numbers: Mapping[str, Any]) -> None:
    """Writes numbers.json; numbers that are infinite or NaN become null."""
    write_json(folder / NUMBERS, finite_json(dict(numbers)))


def save_arrays(path: Path, **arrays: Tensor) -> None:
    """Writes an .npz of float32 arrays, completely or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        content: dict[str, Any] = {name: array.cpu().float().numpy() for name, array in arrays.items()}
        np.savez_compressed(file, **content)
