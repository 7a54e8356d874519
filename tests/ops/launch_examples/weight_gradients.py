"""Launches of the Triton kernels of gradients of weights, and what their machine code must show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastebm.ops.instructions import Layout
from fastebm.ops.triton.weight_gradients import STAGES, call_of
from fastebm.ops.weight_gradients import WeightKind, WeightTask
from tests.ops.weight_workspaces import Lying, program_of

from . import LaunchExample


def _integers(values: Sequence[int]) -> tuple[str, ...]:
    return tuple("i32:16" if value % 16 == 0 else "i32" for value in values)


def _example(name: str, task: WeightTask, size: int, shapes: Sequence[tuple[int, int, int]]) -> LaunchExample:
    """A kernel as its launcher compiles it, for numbers of `size` bytes."""
    kernel, _, (*arguments, shape) = call_of(program_of(shapes, Lying(size, 64, 1, Layout.PLAIN)), task)
    stored, convolution = {2: "*bf16", 4: "*fp32"}[size], task.kind == WeightKind.CONVOLUTION
    names = ["grid", "gradient_strides", *(["size"] if convolution else []), "source_strides"]
    signature: dict[str, Any] = {"result": "*fp32", "factors": "*fp32", "gradient": stored, "images": "i32"}
    if task.source_buffer >= 0:
        signature["source"] = stored
    signature |= {key: _integers(values) for key, values in zip(names, arguments, strict=True)}
    matrix = {2: "bf16", 4: "tf32"}[size] if convolution and not shape.one_pixel else None
    shared = {"shared": True, "most_shared": 24576}
    return LaunchExample(
        f"weights of {name}", kernel, signature, {"SHAPE": shape}, num_stages=STAGES, matrix=matrix, **shared
    )


def _convolution(
    name: str, size: int, inner: int, out: int, pixels: int, kernel: int, stride: int = 1
) -> LaunchExample:
    """A convolution to a map of pixels x pixels."""
    pad = (kernel - 1) // 2
    window = (pixels, pixels, kernel, kernel, stride, stride, pad, pad)
    task = WeightTask(WeightKind.CONVOLUTION, 0, 0, 0, out, 1, 0, inner, *window)
    shapes = [(out, pixels, pixels), (inner, pixels * stride, pixels * stride)]
    return _example(f"{inner} to {out} on {pixels}x{pixels} {name}", task, size, shapes)


def launch_examples() -> list[LaunchExample]:
    """Convolutions as CF-EBM has them, with few channels and on one pixel, and the sums."""
    shapes = [(128, 16, 16), (128, 16, 16)]
    grid = {"out": 128, "height": 16, "width": 16}
    product = {**grid, "source_buffer": 1}
    found = []
    for size, name in ((2, "bf16"), (4, "fp32")):
        for case in ((128, 128, 32, 3), (256, 256, 8, 3), (512, 512, 4, 3), (128, 128, 16, 4, 2), (4, 128, 32, 3)):
            found.append(_convolution(name, size, *case))
        linear = WeightTask(WeightKind.CONVOLUTION, 0, 0, 0, 256, 1, 0, 512)
        found += [
            _example(f"a linear map {name}", linear, size, [(256, 1, 1), (512, 1, 1)]),
            _example(f"a sum {name}", WeightTask(WeightKind.SUM, 0, 0, **grid), size, shapes),
            _example(f"a sum per pixel {name}", WeightTask(WeightKind.SUM, 0, 0, per_pixel=1, **grid), size, shapes),
            _example(f"a product {name}", WeightTask(WeightKind.PRODUCT, 0, 0, **product), size, shapes),
        ]
    return found
