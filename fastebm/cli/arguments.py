"""What several commands ask of their arguments, and how they print_error and write."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastebm.plotting import save_grid
from fastebm.runs.files import replacing


def print_error(error: BaseException) -> None:
    if os.environ.get("FASTEBM_TRACEBACK", "0") not in ("", "0"):
        raise error
    print(f"fastebm: {error}", file=sys.stderr)


def check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")


def parsed_device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was given, but there is no CUDA GPU here")
    return device


def write_images(path: Path, images: Tensor) -> None:
    if path.suffix == ".png":
        save_grid(path, images)
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=images.cpu().numpy())
