"""Checks of arguments, and writing of images, that several commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def print_error(error: BaseException) -> None:
    """One line on stderr; with FASTEBM_TRACEBACK=1 the error is raised instead."""
    if os.environ.get("FASTEBM_TRACEBACK", "0") not in ("", "0"):
        raise error
    print(f"fastebm: {error}", file=sys.stderr)


def check_count(count: int) -> None:
    """Raises ValueError where --count is below 1."""
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")


def select_device(name: str | None) -> torch.device:
    """The device that --device names; without it a GPU if there is one, else the CPU.

    Raises ValueError for a name that is no device, and for CUDA without a GPU.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was given, but there is no CUDA GPU here")
    return device


def write_images(path: Path, images: Tensor) -> None:
    """A grid of images (N, C, S, S) in [-1, 1] for a .png; else an .npz with the float32 array "images"."""
    from fastebm.plotting import save_grid
    from fastebm.tasks.outputs import save_arrays

    if path.suffix == ".png":
        save_grid(path, images)
    else:
        save_arrays(path, images=images)
