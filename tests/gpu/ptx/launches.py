"""Launches of Triton's kernels run as PTX on the CPU, as a GPU would run them."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tests.gpu.fake_driver import Launch, fake_gpu

from .machine import Kernel


class Launches(list[Launch]):
    """What a driver was asked to launch; each launch runs before it is kept.

    Attributes:
        kernels: by Triton's compiled kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[int, tuple[Kernel, Any]] = {}

    def append(self, launch: Launch) -> None:
        self.run(launch)
        super().append(launch)

    def run(self, launch: Launch) -> None:
        compiled = launch.kernel
        if id(compiled) not in self.kernels:  # the compiled kernel is kept as well, so that its id stays its own
            self.kernels[id(compiled)] = Kernel(compiled.asm["ptx"]), compiled
        kernel, _ = self.kernels[id(compiled)]
        kernel.run(**arguments_of(launch), seed=len(self))


def arguments_of(launch: Launch) -> dict[str, Any]:
    """A launch as `Kernel.run` takes it. It may touch the tensors that it was handed, from first number to last."""
    tensors = [value for _, value in launch.arguments if isinstance(value, Tensor)]
    return {
        "grid": launch.grid,
        "warps": launch.kernel.metadata.num_warps,
        "arguments": [bits(kind, value) for kind, value in launch.arguments],
        "tensors": [(tensor.data_ptr(), extent(tensor)) for tensor in tensors],
        "shared": launch.kernel.metadata.shared,
    }


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def bits(kind: str, value: Any) -> int:
    """A parameter as the kernel gets it."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind == "fp32":
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    if kind == "fp64":
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    return 0 if value is None else int(value)


@contextlib.contextmanager
def ptx_machine(capability: int = 80) -> Iterator[Launches]:
    """Triton's kernels run on the CPU's tensors, compiled for a GPU of this capability and run as PTX."""
    with fake_gpu(capability) as gpu:
        gpu.launches = launches = Launches()
        yield launches
