"""Launches of the Triton kernels of the block tail, and what their machine code must show."""

from __future__ import annotations

from typing import Any

from fastebm.ops.activations import activation_code
from fastebm.ops.triton.block_tail import backward_kernel, double_backward_kernel, forward_kernel
from fastebm.ops.triton.expand_blend import ROWS
from fastebm.ops.triton.philox import WARPS

from . import LaunchExample


def _example(
    kernel: Any, dtype: str, layout: str, activation: str = "scaled_swish", fading: bool = True, **shown: Any
) -> LaunchExample:
    """A kernel as its launcher compiles it for whole 16-byte accesses ("nchw", "channels-last") or for none ("odd")."""
    vector = {"*fp32": 4, "*bf16": 8}[dtype]
    lanes = {"nchw": vector // 2, "channels-last": vector, "odd": 1}[layout]
    options = {"ACTIVATION": activation_code(activation)[0], "LANES": lanes, "PAIRED": layout == "nchw"}
    options |= {"ROWS": ROWS, "WIDE": False}
    absent = dict.fromkeys(() if fading else {"fade", "grad_fade", "beta"} & {*kernel.arg_names})
    numbers = dict.fromkeys(("packs", "height", "width", "inner", "row", "plane"), "i32")
    types = {"beta": "*fp32", **numbers, "parameter": "fp32"}
    signature = {
        name: types.get(name, dtype) for name in kernel.arg_names if name not in options and name not in absent
    }
    name = f"block_tail {kernel.fn.__name__.removesuffix('_kernel')} {dtype[1:]} {layout} {activation}"
    return LaunchExample(name if fading else f"{name} plain", kernel, signature, {**options, **absent}, WARPS, **shown)


def launch_examples() -> list[LaunchExample]:
    """Every kernel in every layout, and every activation. A lane's fused multiply-adds: 9 an exponential, 1 a blend."""
    forward, backward, double = forward_kernel, backward_kernel, double_backward_kernel
    lane = {"scaled_swish": 9, "silu": 9, "gelu": 20, "gelu_tanh": 10, "elu": 9, "leaky_relu": 0, "relu": 0}
    channels_last: dict[str, Any] = {"dtype": "*fp32", "layout": "channels-last"}
    return [
        *(
            _example(forward, **channels_last, activation=name, fused=4 * (count + 1), vector_loads=9, vector_stores=1)
            for name, count in lane.items()
        ),
        _example(forward, **channels_last, fading=False, fused=4 * 9, vector_loads=8, vector_stores=1),
        _example(forward, "*fp32", "nchw", fused=2 * 10, vector_loads=4, vector_stores=0),
        _example(forward, "*bf16", "channels-last", fused=8 * 10, vector_loads=9, vector_stores=1),
        _example(forward, "*bf16", "nchw", fused=4 * 10, vector_loads=4, vector_stores=0),
        _example(forward, "*bf16", "odd", fused=10, vector_loads=0, vector_stores=0),
        _example(backward, **channels_last, activation="gelu", fused=4 * 21, vector_loads=5, vector_stores=9),
        _example(backward, **channels_last, fading=False, fused=4 * 10, vector_loads=5, vector_stores=8),
        _example(backward, "*bf16", "channels-last", fused=8 * 10, vector_loads=5, vector_stores=9),
        _example(backward, "*bf16", "nchw", "gelu_tanh", fused=4 * 12, vector_loads=2, vector_stores=4),
        _example(double, **channels_last, activation="elu", fused=4 * 11, vector_loads=14, vector_stores=5),
        _example(double, "*bf16", "channels-last", fused=8 * 13, vector_loads=14, vector_stores=5),
        _example(double, "*bf16", "nchw", "gelu", False, fused=4 * 23, vector_loads=6, vector_stores=2),
    ]
