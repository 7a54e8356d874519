"""A GPU for Triton that isn't there: launches are bound, specialised, compiled and checked, and launch nothing.

    with fake_gpu(90) as gpu:
        fastebm.ops.normal((64, 3, 32, 32), seed=0)  # tensors on the CPU; what they hold afterwards means nothing
    gpu.launches[0].kernel.asm["ptx"]

Nothing of Triton is replaced but its driver. So a launch fails here where it would fail on a GPU of that architecture:
in the binder, in the compiler, in the assembler, and where a block asks for more than a multiprocessor has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastebm import ops
from fastebm.ops import backends

# Bytes of shared memory that one block may have, by the architecture's compute capability.
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# Of every one of them: registers of a thread and of a multiprocessor, which are given out eight at a time.
MOST_REGISTERS, ALL_REGISTERS, REGISTERS_AT_ONCE = 255, 65536, 8
WARP, MOST_THREADS = 32, 1024


@dataclass(frozen=True)
class Resources:
    """What a thread of a compiled kernel takes: registers, and bytes of its stack, where spilled registers lie too."""

    registers: int
    stack: int


@dataclass(frozen=True)
class Launch:
    """One launch as the driver gets it.

    Attributes:
        name: of the kernel's function.
        kernel: Triton's CompiledKernel, with `asm["ptx"]`, `asm["cubin"]`, `metadata.shared`, `metadata.num_warps`.
        grid: blocks in each dimension.
        arguments: (type, value) of each parameter of the PTX, tuples flattened and constants left out. Pointers are
            tensors. Behind them the PTX has two more, of scratch memory that these kernels don't use.
    """

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, Any], ...]


class FakeDriver(DriverBase):
    """What Triton asks a driver for.

    Attributes:
        launches: what it was asked to launch.
        asked: each kernel that had to be compiled or was left out, as (function, key), in the order of first launches.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[Launch] = []
        self.asked: dict[tuple[str, str], None] = {}
        self.handed_over: tuple[Any, Any] | None = None  # grid and arguments of the launch that is under way
        self.launcher_cls = _Launcher
        self.utils = _Utilities(capability)

    @property
    def kernels(self) -> list[Launch]:
        """The first launch of each compiled kernel."""
        return list({id(launch.kernel): launch for launch in reversed(self.launches)}.values())[::-1]

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device, and each architecture has its own

    def set_current_device(self, device: int) -> None:
        pass

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("a launcher in C is for another driver")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here, so nothing can be measured")


class _Utilities:
    """The part of a driver that loads machine code and knows the device."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_device_properties(self, device: int) -> Mapping[str, int]:
        return {"max_shared_mem": MOST_SHARED[self._capability], "max_num_regs": ALL_REGISTERS, "warpSize": WARP}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """(module, function, registers, bytes of stack, the most threads of a block), as CUDA's loader finds them."""
        taken = resources_of(cubin)
        each = -(-max(taken.registers, 1) // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        threads = min(MOST_THREADS, ALL_REGISTERS // (each * WARP) * WARP)
        return None, None, taken.registers, taken.stack, threads  # no module: Triton would ask to unload it


class _Launcher:
    """Stands for the C code that hands a kernel's arguments to CUDA: keeps them for `_recording`."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._types = tuple(source.signature.values())

    def __call__(self, *call: Any) -> None:
        # Grid, stream, function, metadata of kernel and launch, and two hooks come before the arguments.
        gpu, grid, arguments = driver.active, call[:3], call[9:]
        if not isinstance(gpu, FakeDriver):
            raise RuntimeError("this kernel was compiled for a GPU that isn't there, and can't be launched on another")
        gpu.handed_over = grid, tuple(_parameters(self._types, arguments))


def _parameters(types: tuple[Any, ...], arguments: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """(type, value) of what is no constant, within tuples too."""
    for kind, value in zip(types, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _recording(run: Any) -> Any:
    """`JITFunction.run`, which keeps what was launched."""

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        kernel, gpu = run(self, *arguments, **options), driver.active
        if isinstance(gpu, FakeDriver) and gpu.handed_over is not None:
            gpu.launches.append(Launch(self.fn.__name__, kernel, *gpu.handed_over))
            gpu.handed_over = None
        return kernel

    return recorded


@contextlib.contextmanager
def fake_gpu(capability: int, compiles: Callable[[tuple[str, str]], bool] = lambda asked: True) -> Iterator[FakeDriver]:
    """Launches of this thread's operators on the CPU are those of a GPU of that compute capability, as 90 for sm_90.

    Args:
        capability: of `MOST_SHARED`.
        compiles: of what is asked of the compiler, whether it is compiled; other launches end there.

    Raises:
        ValueError: for another capability.
        RuntimeError: in a process that has Triton's interpreter in the compiler's place.
    """
    if not isinstance(_normal_kernel(), JITFunction):
        raise RuntimeError("Triton's interpreter runs here (TRITON_INTERPRET=1), which compiles nothing")
    if capability not in MOST_SHARED:
        raise ValueError(f"the capability must be one of {[*MOST_SHARED]}, got {capability}")
    gpu, before = FakeDriver(capability), driver._active
    with contextlib.ExitStack() as stack:
        # The CPU's tensors then are taken as those of a GPU, without a word of the interpreter.
        stack.enter_context(mock.patch.object(backends, "_interpreted", return_value=True))
        stack.enter_context(mock.patch.object(JITFunction, "run", _recording(JITFunction.run)))
        stack.enter_context(ops.backend("triton"))

        def leave_out(*, key: str, fn: Any, **told: Any) -> bool:
            gpu.asked[fn.name, key] = None
            return not compiles((fn.name, key))

        stack.enter_context(mock.patch.object(knobs.runtime, "jit_cache_hook", leave_out))
        driver.set_active(gpu)
        stack.callback(driver.set_active, before)
        yield gpu


def _normal_kernel() -> Any:
    return importlib.import_module("fastebm.ops.triton.normal").fill_kernel


@functools.cache
def resources_of(cubin: bytes) -> Resources:
    """What machine code takes, read by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no resources: {said.stdout or said.stderr}")
    return Resources(int(found[1]), int(found[2]))
