"""Pooling over windows of images of any number of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fastebm.ops.lanes import Op, Reduction

from ..lowering import Lowering
from ..values import Array, Number, Places, Real, Shape, Value
from .table import rule


def _each(value: Any, axes: int, otherwise: Any = None) -> tuple[int, ...]:
    """An argument for each axis."""
    if value is None or value == []:
        value = otherwise
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes if len(value) == 1 else 1)


class _Windows:
    """Where the windows of a pooling lie in an image of shape (..., *pixels)."""

    def __init__(self, shape: Shape, out: Shape, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> None:
        self.shape, self.out = shape, out
        # Two or three pixel axes: one more in front is the channels, and maybe the samples.
        self.axes = len(_each(kernel, 1)) if not isinstance(kernel, int) else 2
        self.kernel = _each(kernel, self.axes)
        self.stride = _each(stride, self.axes, self.kernel)
        self.padding = _each(padding, self.axes)
        self.dilation = _each(dilation, self.axes)

    def of(self, array: Array, fill: int) -> Array:
        """The numbers of each window: (*out, numbers of a window), with `fill` beside the image."""
        lead = self.shape[: -self.axes]
        pixels, out = self.shape[-self.axes :], self.out[-self.axes :]
        grown = [(0, 0)] * len(lead)
        indices = []
        for n, o, k, s, p, d in zip(pixels, out, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            grown.append((p, max((o - 1) * s + (k - 1) * d + 1 - n - p, 0)))
            indices.append(s * np.arange(o)[:, None] + d * np.arange(k))
        padded = np.pad(array, grown, constant_values=fill)
        if len(indices) == 1:
            return padded[..., indices[0]]
        if len(indices) == 2:
            found = padded[..., indices[0][:, None, :, None], indices[1][None, :, None, :]]
        else:
            found = padded[
                ...,
                indices[0][:, None, None, :, None, None],
                indices[1][None, :, None, None, :, None],
                indices[2][None, None, :, None, None, :],
            ]
        return found.reshape(*self.out, math.prod(self.kernel))

    def values(self, lowering: Lowering, x: Real, fill: float) -> Places:
        given, filler = lowering.places(x), lowering.filler(fill)
        return Places(self.of(given.codes, int(filler.codes)), given.buffers | filler.buffers)

    def spread(self, lowering: Lowering, parts: Real) -> Real:
        """(*out, numbers of a window) added up where they lie in the image."""
        number = np.arange(math.prod(self.shape)).reshape(self.shape)
        index = self.of(number, -1)
        inside = index >= 0
        given = lowering.places(parts)
        return lowering.scatter(
            Number(0.0, self.shape), index[inside], Places(given.codes[inside], given.buffers), True
        )


@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool(
    lowering: Lowering,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> list[Any]:
    windows = _Windows(lowering.shape(x), tuple(node.meta["val"][0].shape), kernel, stride, padding, dilation)
    values = windows.values(lowering, lowering.value(x), -math.inf)
    largest = lowering.reduce(values, Reduction.MAXIMUM, [-1])
    return [largest, (windows, values, largest)]


@rule("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward")
def _max_pool_backward(lowering: Lowering, node: fx.Node, grad: Any, x: Any, *arguments: Any) -> Value:
    """The gradient goes to the first of the largest numbers of a window."""
    windows, values, largest = lowering.values[arguments[-1]]
    count = values.shape[-1]
    numbers = lowering.literal(torch.arange(count, dtype=torch.float32))
    wide = lowering.view(largest, lambda a: a[..., None], (*largest.shape, 1))
    equal = lowering.pointwise(Op.EQUAL, values, wide)
    first = lowering.reduce(
        lowering.pointwise(Op.SELECT, equal, numbers, Number(float(count))), Reduction.MINIMUM, [-1]
    )
    chosen = lowering.pointwise(
        Op.EQUAL, lowering.broadcast(lowering.reshaped(first, (*largest.shape, 1)), values.shape), numbers
    )
    given = lowering.reshaped(lowering.value(grad), (*largest.shape, 1))
    return windows.spread(lowering, lowering.pointwise(Op.SELECT, chosen, given, Number(0.0)))


@rule("avg_pool2d", "avg_pool3d")
def _avg_pool(
    lowering: Lowering,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Value:
    windows = _Windows(lowering.shape(x), lowering.shape(node), kernel, stride, padding)
    total = lowering.reduce(windows.values(lowering, lowering.value(x), 0.0), Reduction.SUM, [-1])
    return lowering.binary(Op.MULTIPLY, total, _shares(lowering, windows, ceil_mode, count_include_pad, divisor))


@rule("avg_pool2d_backward", "avg_pool3d_backward")
def _avg_pool_backward(
    lowering: Lowering,
    node: fx.Node,
    grad: Any,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Value:
    windows = _Windows(lowering.shape(x), lowering.shape(grad), kernel, stride, padding)
    share = _shares(lowering, windows, ceil_mode, count_include_pad, divisor)
    given = lowering.binary(Op.MULTIPLY, lowering.value(grad), share)
    shape = (*given.shape, math.prod(windows.kernel))
    wide = lowering.places(given).viewed(lambda a: np.broadcast_to(a[..., None], shape))
    return windows.spread(lowering, wide)


def _shares(
    lowering: Lowering, windows: _Windows, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> Real:
    """1 / how many numbers are averaged, for each window."""
    pool: Any = torch.nn.functional.avg_pool2d if windows.axes == 2 else torch.nn.functional.avg_pool3d
    ones = torch.ones(1, 1, *windows.shape[-windows.axes :], dtype=torch.float64)
    sizes: Sequence[Any] = (list(windows.kernel), list(windows.stride), list(windows.padding), ceil_mode)
    share = pool(ones, *sizes, count_include_pad, divisor) / pool(ones, *sizes, True, 1)
    return lowering.literal(share.expand(1, 1, *share.shape[2:]).reshape(share.shape[2:]).expand(windows.out))
