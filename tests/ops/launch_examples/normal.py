"""Launches of the Triton kernels of normal noise, and what their machine code must show."""

from __future__ import annotations

from typing import Any

from fastebm.ops.triton.normal import fill_kernel
from fastebm.ops.triton.philox import QUADS_A_THREAD, ROWS, WARPS

from . import LaunchExample, typed

# A quad of normals: 4 uniforms of one, 2 logarithms of 9, 2 roots of 5, 2 pairs of sine and cosine of 7.
FUSED_OF_NORMALS = 4 + 2 * 9 + 2 * 5 + 2 * 7


def fill_examples(name: str, is_normal: bool, fused: int) -> list[LaunchExample]:
    """`fill_kernel` for one kind of noise; `fused` multiply-adds make a quad of it."""
    types = typed("*i64", "key chain_ids") | typed("i32", "batch elements stream") | typed("*fp32", "out")
    plain = {"NORMAL": is_normal, "LISTED": False, "WHOLE": True, "QUADS": ROWS, "NUM_CHAINS": 1}
    tiny = {**plain, "LISTED": True, "QUADS": 4, "NUM_CHAINS": ROWS // 4}
    odd, far = {**plain, "WHOLE": False}, {**types, "elements": "i64"}
    shows: dict[str, Any] = {"num_warps": WARPS, "fused": QUADS_A_THREAD * fused, "approximate": is_normal}
    return [
        LaunchExample(name, fill_kernel, types, plain, vector_stores=QUADS_A_THREAD, **shows),
        LaunchExample(f"{name} in bfloat16", fill_kernel, {**types, "out": "*bf16"}, plain, **shows),
        LaunchExample(f"{name} of 4x4 images", fill_kernel, types, tiny, vector_stores=QUADS_A_THREAD, **shows),
        LaunchExample(f"{name} of odd sizes", fill_kernel, far, odd, vector_stores=0, shared=True, **shows),
    ]


def launch_examples() -> list[LaunchExample]:
    """The root of a logarithm begins with an approximation, and ends rounded."""
    return fill_examples("normal", True, FUSED_OF_NORMALS)
