"""Images that are read at the points of a grid: a constant matrix, which depends on the grid alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx

from ..lowering import Lowering
from ..recording import LaneError
from ..values import Real, Shape, Value
from .table import rule

# Numbers of a matrix.
LARGEST = 1 << 22


@rule("grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(lowering: Lowering, node: Any, x: Any, grid: Any, *options: Any) -> Value:
    op = node.target
    return _sampled(lowering, op, lowering.value(x), grid, options, lowering.shape(x), lowering.shape(node), False)


@rule("grid_sampler_2d_backward", "grid_sampler_3d_backward")
def _grid_sampler_backward(
    lowering: Lowering, node: fx.Node, grad: Any, x: Any, grid: Any, *arguments: Any
) -> list[Value]:
    *options, mask = arguments
    if mask[1]:
        raise LaneError("a grid of points that depends on the sample")
    op = getattr(torch.ops.aten, f"grid_sampler_{len(lowering.shape(x)) - 2}d").default
    given, shape = lowering.value(grad), lowering.shape(x)
    return [_sampled(lowering, op, given, grid, tuple(options), shape, shape, True), None]


def _sampled(
    lowering: Lowering, op: Any, value: Real, grid: Any, options: tuple[Any, ...], image: Shape, out: Shape, back: bool
) -> Value:
    """(N, C, pixels) times the matrix of each image's grid, or its transpose."""
    if lowering.of_sample(grid):
        raise LaneError("a grid of points that depends on the sample")
    samples, channels = image[:2]
    points = math.prod(lowering.shape(grid)[1:-1])
    sizes = (math.prod(image[2:]), points)
    if math.prod(sizes) > LARGEST:
        raise LaneError(f"an image of {sizes[0]} pixels at {points} points of a grid")
    parts = []
    for i in range(samples):
        rows = lowering.places(value).viewed(lambda a, i=i: a[i].reshape(channels, -1))  # type: ignore[misc]
        select = functools.partial(_matrix, op, options, image[2:], i, back)
        shape = sizes[::-1] if back else sizes
        parts.append(lowering.product(lowering.sums(rows), grid, shape, select, ("grid", i, back, image, options)))
    return lowering.reshaped(lowering.stack(parts), out)


def _matrix(op: Any, options: tuple[Any, ...], pixels: Shape, i: int, back: bool, grid: Tensor) -> Tensor:
    """What the operation makes of each single pixel, (pixels, points)."""
    count = math.prod(pixels)
    eye = torch.eye(count, dtype=torch.float64, device="cpu").reshape(1, count, *pixels)
    matrix = op(eye, grid[i : i + 1].to(torch.float64), *options).reshape(count, -1)
    return matrix.T if back else matrix
