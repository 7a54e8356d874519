"""Launches of the Triton kernels of the Expand blend, and what their machine code must show."""

from __future__ import annotations

from fastebm.ops.triton.expand_blend import ROWS, blend_backward_kernel, blend_kernel
from fastebm.ops.triton.philox import WARPS

from . import LaunchExample


def launch_examples() -> list[LaunchExample]:
    """Both kernels: a fused multiply-add an element forward, and none backward."""
    return [
        LaunchExample(
            f"{kernel.fn.__name__} {dtype[1:]}",
            kernel,
            {**dict.fromkeys(tensors, dtype), "beta": "*fp32", "packs": "i32"},
            {"LANES": lanes, "ROWS": ROWS, "WIDE": False},
            WARPS,
            fused=lanes * is_forward,
            vector_loads=1 + is_forward,
            vector_stores=2 - is_forward,
        )
        for kernel, tensors, is_forward in (
            (blend_kernel, ("out", "primal", "fade"), True),
            (blend_backward_kernel, ("grad_primal", "grad_fade", "grad"), False),
        )
        for dtype, lanes in (("*fp32", 4), ("*bf16", 8))
    ]
