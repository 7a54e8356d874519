"""Examples of how each Triton kernel is launched, so that the tests compile them for a GPU where there is none."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastebm.ops import schemas

__all__ = ["LaunchExample", "all_launch_examples", "typed"]


@dataclass(frozen=True)
class LaunchExample:
    """One kernel with the types of its arguments, and what its machine code must show.

    Attributes:
        name: unique among all examples.
        kernel: the `triton.jit` function.
        signature: Triton types by argument, as "*fp32" or "i32", and tuples of them; pointers are taken to be aligned
            to 16 bytes, and "i32:16" is a multiple of 16.
        constexprs: values by argument. An argument that neither names is None: an option that is off.
        num_warps: as launched.
        fused: fused multiply-adds that a thread executes as written, or None where that is not counted.
        fused_double: those in float64, or the counts that they may have; any other one that the compiler made of two
            operations is refused.
        vector_loads, vector_stores: 16-byte accesses to global memory, or None where that is not counted.
        shared: whether shared memory is used, up to `most_shared` bytes.
        most_spilled: bytes of registers that may spill. The assembler does that where more blocks then run at a time.
        num_stages: as launched, None for Triton's default.
        approximate: whether the GPU's approximate instructions are there, as for activations in programs of bfloat16.
        matrix: whether products must run on tensor cores (mma or wgmma), of bfloat16 or tf32.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    fused: int | None = None
    fused_double: int | tuple[int, ...] = 0
    vector_loads: int | None = None
    vector_stores: int | None = None
    shared: bool = False
    most_shared: int = 4096  # 2 KiB to spread accesses, 4 for 1024 lanes
    most_spilled: int = 0
    num_stages: int | None = None
    approximate: bool = False
    matrix: str | None = None


def typed(kind: Any, names: str) -> dict[str, Any]:
    """A part of a signature: arguments of one type, as "key chain_ids"."""
    return dict.fromkeys(names.split(), kind)


def all_launch_examples() -> list[LaunchExample]:
    """The examples of every kernel's Triton module. Needs Triton."""
    subjects = dict.fromkeys(kernel.subject for kernel in schemas.KERNELS.values() if "triton" in kernel.backends)
    modules = [importlib.import_module(f"{__package__}.{subject}") for subject in subjects]
    return [example for module in modules for example in module.launch_examples()]
