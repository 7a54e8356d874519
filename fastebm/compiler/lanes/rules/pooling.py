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
from ..values import Array, Deferred, Number, Places, Real, Shape, Value
from .table import rule


def _each(value: Any, axes: int, otherwise: Any = None) -> tuple[int, ...]:
    """An argument for each axis."""
    if value is None or value == []:
        value = otherwise
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes if len(value) == 1 else 1)


class _Windows:
    """Where the windows of a pooling lie in an image of shape (..., *pixels).

    `lines` has for each axis the pixels of every window, (windows, pixels of a window), and -1 beside the image.
    """

    def __init__(self, shape: Shape, out: Shape, lines: Sequence[Array]) -> None:
        self.shape, self.out = shape, out
        self.axes = len(lines)
        self.count = math.prod(line.shape[1] for line in lines)
        self._lines = lines

    @staticmethod
    def regular(shape: Shape, out: Shape, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> _Windows:
        axes = 2 if isinstance(kernel, int) else len(kernel)
        sizes = _each(kernel, axes)
        steps = _each(stride, axes, sizes)
        lines = []
        for n, o, k, s, p, d in zip(
            shape[-axes:], out[-axes:], sizes, steps, _each(padding, axes), _each(dilation, axes), strict=True
        ):
            line = s * np.arange(o)[:, None] + d * np.arange(k) - p
            lines.append(np.where((line < 0) | (line >= n), -1, line))
        return _Windows(shape, out, lines)

    @staticmethod
    def adaptive(shape: Shape, out: Shape, axes: int) -> _Windows:
        lines = []
        for n, o in zip(shape[-axes:], out[-axes:], strict=True):
            start = np.arange(o) * n // o
            end = -(-(np.arange(o) + 1) * n // o)
            line = start[:, None] + np.arange((end - start).max())
            lines.append(np.where(line < end[:, None], line, -1))
        return _Windows(shape, out, lines)

    def of(self, array: Array, fill: int) -> Array:
        """The numbers of each window: (*out, numbers of a window), with `fill` beside the image."""
        lead = len(self.shape) - self.axes
        padded = np.pad(array, [(0, 0)] * lead + [(0, 1)] * self.axes, constant_values=fill)  # -1 is the last one
        index: list[Any] = [...]
        for axis, line in enumerate(self._lines):
            shape = [1] * (2 * self.axes)
            shape[axis], shape[self.axes + axis] = line.shape
            index.append(line.reshape(shape))
        return padded[tuple(index)].reshape(*self.out, self.count)

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


class _Indices(Deferred):
    """Which number of each window is the first of the largest, also as a value: its place in the image."""

    def __init__(self, lowering: Lowering, windows: _Windows, values: Places, largest: Real) -> None:
        self.windows, self.shape = windows, tuple(largest.shape)
        self._lowering, self._values, self._largest = lowering, values, largest

    def first(self) -> Real:
        """True for one number of each window, (*out, numbers of a window)."""
        lowering, count = self._lowering, self._values.shape[-1]
        numbers = lowering.literal(torch.arange(count, dtype=torch.float32, device="cpu"))
        equal = lowering.pointwise(Op.EQUAL, self._values, lowering.reshaped(self._largest, (*self.shape, 1)))
        places = lowering.pointwise(Op.SELECT, equal, numbers, Number(float(count)))
        first = lowering.reduce(places, Reduction.MINIMUM, [-1], keep=True)
        return lowering.pointwise(Op.EQUAL, lowering.broadcast(first, self._values.shape), numbers)

    def value(self) -> Real:
        lowering, axes = self._lowering, self.windows.axes
        pixels = self.windows.shape[-axes:]
        number = np.broadcast_to(np.arange(math.prod(pixels)).reshape(pixels), self.windows.shape)
        places = torch.from_numpy(self.windows.of(number, 0)).to(torch.float32)
        chosen = lowering.pointwise(Op.SELECT, self.first(), lowering.literal(places), Number(0.0))
        return lowering.reduce(chosen, Reduction.SUM, [-1])


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
    windows = _Windows.regular(lowering.shape(x), tuple(node.meta["val"][0].shape), kernel, stride, padding, dilation)
    return _largest(lowering, x, windows)


@rule("adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max_pool(lowering: Lowering, node: fx.Node, x: Any, size: Any) -> list[Any]:
    return _largest(lowering, x, _Windows.adaptive(lowering.shape(x), tuple(node.meta["val"][0].shape), len(size)))


def _largest(lowering: Lowering, x: Any, windows: _Windows) -> list[Any]:
    """The largest number of each window, and what the gradient needs to know in the place of its index."""
    values = windows.values(lowering, lowering.value(x), -math.inf)
    largest = lowering.reduce(values, Reduction.MAXIMUM, [-1])
    return [largest, _Indices(lowering, windows, values, largest)]


@rule(
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices_backward",
    "adaptive_max_pool2d_backward",
    "adaptive_max_pool3d_backward",
)
def _max_pool_backward(lowering: Lowering, node: fx.Node, grad: Any, x: Any, *arguments: Any) -> Value:
    """The gradient goes to the first of the largest numbers of a window."""
    indices: _Indices = lowering.values[arguments[-1]]
    given = lowering.reshaped(lowering.value(grad), (*indices.shape, 1))
    return indices.windows.spread(lowering, lowering.pointwise(Op.SELECT, indices.first(), given, Number(0.0)))


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
    windows = _Windows.regular(lowering.shape(x), lowering.shape(node), kernel, stride, padding)
    total = lowering.reduce(windows.values(lowering, lowering.value(x), 0.0), Reduction.SUM, [-1])
    share = _shares(lowering, windows, (kernel, stride, padding, ceil_mode), count_include_pad, divisor)
    return lowering.binary(Op.MULTIPLY, total, share)


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
    windows = _Windows.regular(lowering.shape(x), lowering.shape(grad), kernel, stride, padding)
    share = _shares(lowering, windows, (kernel, stride, padding, ceil_mode), count_include_pad, divisor)
    given = lowering.binary(Op.MULTIPLY, lowering.value(grad), share)
    shape = (*given.shape, windows.count)
    wide = lowering.places(given).viewed(lambda a: np.broadcast_to(a[..., None], shape))
    return windows.spread(lowering, wide)


def _shares(
    lowering: Lowering, windows: _Windows, sizes: tuple[Any, ...], count_include_pad: bool, divisor: int | None
) -> Real:
    """1 / how many numbers are averaged, for each window."""
    kernel, stride, padding, ceil_mode = sizes
    pool: Any = torch.nn.functional.avg_pool2d if windows.axes == 2 else torch.nn.functional.avg_pool3d
    ones = torch.ones(1, *windows.shape[-windows.axes :], dtype=torch.float64, device="cpu")
    sizes = (kernel, stride or None, padding, ceil_mode)
    share = pool(ones, *sizes, count_include_pad, divisor) / pool(ones, *sizes, True, 1)
    return lowering.literal(share.expand(windows.out))
