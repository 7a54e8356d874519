"""Convolutions of images of any number of axes, as products of windows with the kernel."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from torch import Tensor, fx

from fastebm.ops.lanes import Op

from ..lowering import Lowering
from ..recording import LaneError
from ..values import Constant, Places, Real, Shape, Sums, Value
from .table import rule


@rule("convolution")
def _convolution(
    lowering: Lowering,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Value:
    if not lowering.of_sample(x):
        raise LaneError("a convolution of an image that does not depend on the sample, with a kernel that does")
    shape = lowering.shape(node)
    added = None if bias is None else lowering.value(bias)
    start = int(added.places[0]) if isinstance(added, Constant) else -1
    result = _convolve(lowering, lowering.value(x), weight, stride, padding, dilation, transposed, groups, shape, start)
    if added is None or start >= 0:
        return result
    per_channel = (1, shape[1], *[1] * (len(shape) - 2))
    return lowering.binary(Op.ADD, result, lowering.reshaped(added, per_channel))


@rule("convolution_backward")
def _convolution_backward(
    lowering: Lowering,
    node: fx.Node,
    grad: Any,
    x: Any,
    weight: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Any,
) -> list[Any]:
    if mask[1] or mask[2]:
        raise LaneError("a convolution with weights that depend on the sample")
    given, shape = lowering.value(grad), lowering.shape(x)
    return [
        _convolve(lowering, given, weight, stride, padding, dilation, not transposed, groups, shape),
        None,
        None,
    ]


def _convolve(
    lowering: Lowering,
    x: Real,
    weight: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    groups: int,
    shape: Shape,
    bias: int = -1,
) -> Value:
    """A convolution as one product for each group: windows of the padded image times the kernel.

    A transposed one is a convolution of the image with zeros between its pixels by the turned kernel.
    """
    if lowering.of_sample(weight):
        raise LaneError("a convolution with weights that depend on the sample")
    kernel = lowering.shape(weight)
    size, pixels_out = kernel[2:], shape[2:]
    image = lowering.places(x)
    if transposed:
        low = [d * (k - 1) - p for k, p, d in zip(size, padding, dilation, strict=True)]
        total = tuple(n + d * (k - 1) for n, k, d in zip(pixels_out, size, dilation, strict=True))
        padded = _spread(lowering, image, stride, low, total)
        step = (1,) * len(size)
    else:
        total = tuple(n + 2 * p for n, p in zip(image.shape[2:], padding, strict=True))
        around = [(0, 0), (0, 0), *((p, p) for p in padding)]
        padded = lowering.padded(image, around) if any(padding) else image
        step = tuple(stride)
    padded = _contiguous(lowering, padded)
    samples, channels = padded.shape[:2]
    strides = [math.prod(total[axis + 1 :]) for axis in range(len(total))]
    row = _outer_sum(
        [np.arange(samples) * channels * math.prod(total)],
        [s * n * np.arange(o) for s, n, o in zip(step, strides, pixels_out, strict=True)],
    )
    window = _outer_sum([d * n * np.arange(k) for d, n, k in zip(dilation, strides, size, strict=True)])
    ours, outputs = channels // groups, shape[1] // groups
    start = int(padded.codes.flat[0])
    parts = []
    for g in range(groups):
        first = g * ours * math.prod(total)
        depth = _outer_sum([np.arange(ours) * math.prod(total)], [window])
        select = functools.partial(_transposed_kernel if transposed else _kernel, g, ours, outputs)
        sums = Sums(start + first + row, depth, padded.buffers)
        added = bias + g * outputs if bias >= 0 else -1
        parts.append(lowering.product(sums, weight, (len(depth), outputs), select, ("kernel", g, transposed), added))
    joined = parts[0] if groups == 1 else Places.joined(parts, lambda arrays: np.concatenate(arrays, 1))
    arranged = (samples, *pixels_out, shape[1])
    return joined.viewed(lambda a: np.moveaxis(a.reshape(arranged), -1, 1))


def _kernel(g: int, ours: int, outputs: int, weight: Tensor) -> Tensor:
    """The (K, C) matrix of a group: the weight of a convolution is (out, in / groups, ...)."""
    return weight[g * outputs : (g + 1) * outputs].reshape(outputs, -1).T


def _transposed_kernel(g: int, ours: int, outputs: int, weight: Tensor) -> Tensor:
    """The weight of a transposed convolution is (in, out / groups, ...), and its kernel is turned."""
    part = weight[g * ours : (g + 1) * ours].flip(list(range(2, weight.ndim)))
    return part.transpose(0, 1).reshape(outputs, -1).T


def _spread(lowering: Lowering, image: Places, stride: Any, low: list[int], total: Shape) -> Places:
    """The image with its pixels `stride` apart among zeros, from `low` on; what lies beside `total` is cut off."""
    zero = lowering.filler(0.0)
    codes = np.full((*image.shape[:2], *total), int(zero.codes))
    into, source = [], []
    for axis, n in enumerate(total):
        positions = low[axis] + stride[axis] * np.arange(image.shape[2 + axis])
        keep = (positions >= 0) & (positions < n)
        into.append(positions[keep])
        source.append(np.nonzero(keep)[0])
    lead = [np.arange(n) for n in image.shape[:2]]
    codes[np.ix_(*lead, *into)] = image.codes[np.ix_(*lead, *source)]
    return Places(codes, image.buffers | zero.buffers)


def _contiguous(lowering: Lowering, value: Places) -> Places:
    flat = value.codes.reshape(-1)
    if len(value.buffers) == 1 and flat[-1] - flat[0] == len(flat) - 1 and bool((np.diff(flat) == 1).all()):
        return value
    return lowering.stored(value)


def _outer_sum(*lists: list[Any]) -> Any:
    """All sums of one number of each array, the last one fastest."""
    total = np.zeros(1, np.int64)
    for array in (array for arrays in lists for array in arrays):
        total = (total[:, None] + array).reshape(-1)
    return total
