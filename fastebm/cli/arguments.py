"""Checks of arguments, and writing of images, that several commands share."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastebm.distributed import ranks, says_first

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_COUNT = 10**9
DEVICES = ("cpu", "cuda")


def print_error(error: BaseException) -> None:
    """One line on stderr; with FASTEBM_TRACEBACK=1 the error is raised instead."""
    if os.environ.get("FASTEBM_TRACEBACK", "0") not in ("", "0"):
        raise error
    text = " ".join(str(error).split("\n")).strip() or type(error).__name__
    if lacks_memory(error):
        text = f"not enough memory: {text}"
    print(f"fastebm: {text}", file=sys.stderr)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Within the block each warning is one line on stderr, `fastebm: warning: ...`, without its place in the code.

    Ours are all shown, but what several processes say, once.
    """

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if says_first(f"warning: {message}"):
            print(f"fastebm: warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = show
        yield


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had. On the CPU torch has no class for it."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def check_count(count: int) -> None:
    """Raises ValueError where --count is below 1 or above a billion."""
    check_range("--count", count, 1, LARGEST_COUNT)


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError where the option `name` has a value outside of [low, high]."""
    if value < low:
        raise ValueError(f"{name} must be at least {low:,}, got {value}")
    if value > high:
        raise ValueError(f"{name} must be at most {high:,}, got {value}")


def select_device(name: str | None) -> torch.device:
    """The device that --device names; without it a GPU if there is one, else the CPU. Each rank has a GPU of its own.

    Raises ValueError for a name that is no device or of another kind than cpu and cuda, for a GPU that is not there,
    and where the backend that FASTEBM_BACKEND asks for can't run on the device.
    """
    import torch

    from fastebm.ops.backends import select_backend

    if name is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"--device {name!r} is not a device: {str(error).splitlines()[0]}") from error
    if device.type not in DEVICES:
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name} was given, but there is no CUDA GPU here")
        if (device.index or 0) >= (there := torch.cuda.device_count()):
            raise ValueError(f"--device {name} was given, but there are {there} GPUs here, from cuda:0 on")
        device = _own_gpu(name, device, there)
    elif device.index:
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    try:
        select_backend(device.type, index=device.index)
    except RuntimeError as error:
        raise ValueError(f"FASTEBM_BACKEND: {error}") from error
    return device


def _own_gpu(name: str | None, device: torch.device, there: int) -> torch.device:
    """The GPU of this process, if several work together. Raises ValueError where they would have to share one."""
    import torch

    if ranks().size == 1:
        return device
    if str(device) != "cuda":
        raise ValueError(f"--device {name} is one GPU for {ranks().size} processes: cuda gives each its own")
    if ranks().local_size > there:
        raise ValueError(
            f"{ranks().local_size} processes were started on this machine, and it has {there} GPUs: start as many, or "
            "say --device cpu"
        )
    return torch.device("cuda", ranks().local_rank)


def write_images(path: Path, images: Tensor) -> None:
    """A grid of images (N, C, S, S) in [-1, 1] for a .png; else an .npz with the float32 array "images"."""
    from fastebm.plotting import save_grid
    from fastebm.tasks.outputs import save_arrays

    if path.suffix == ".png":
        save_grid(path, images)
    else:
        save_arrays(path, images=images)
