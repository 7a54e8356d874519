"""An average pool after a convolution becomes part of it: one convolution with a larger kernel and a stride.

    avgpool_k(conv(h)) = conv'(h),  weight' = mean over the k x k shifts of the weight,  stride' = k * stride

A 3x3 convolution and a 2x2 pool become one 4x4 convolution with stride 2: 16 instead of 36 multiply-adds per output
pixel. This holds for zero padding, which stays the same, for windows that tile the image (both sides drop the rows and
columns that fill no window), and if only the pool reads the convolution's result.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import lazy
from fastebm.compiler.operations import AveragePool, Convolution, Pair
from fastebm.compiler.program import Program, Rewriter


def fuse_pooling(program: Program) -> Iterator[Program]:
    """Programs in which one pool becomes part of the convolution before it."""
    for node in program:
        pool = node.operation
        if not isinstance(pool, AveragePool) or not pool.simple:
            continue
        source = program[node.inputs[0]]
        inner = source.operation
        if not isinstance(inner, Convolution) or inner.transposed or inner.dilation != (1, 1):
            continue
        if program.only_user(source.name) is not node:
            continue
        stride = (inner.stride[0] * pool.kernel[0], inner.stride[1] * pool.kernel[1])
        weight = lazy(box_filter, inner.weight, pool.kernel, inner.stride)
        yield Rewriter(program, node).finish(replace(inner, weight=weight, stride=stride), *source.inputs)


def box_filter(weight: Tensor, window: Pair, stride: Pair) -> Tensor:
    """The mean of copies of the weight shifted by multiples of the stride, one copy for each pixel of the window."""
    out, channels, height, width = weight.shape
    rows, columns = (
        _shift_mean(length, window[axis], stride[axis]).to(weight) for axis, length in enumerate((height, width))
    )
    # One matrix product: for kernels this small, adding shifted copies takes ten times as long.
    filtered = weight.reshape(-1, height * width) @ torch.kron(rows, columns)
    return filtered.reshape(out, channels, rows.shape[1], columns.shape[1])


def _shift_mean(length: int, window: int, stride: int) -> Tensor:
    """(length, longer): row i has 1 / window at every position to which a shift moves pixel i."""
    matrix = torch.zeros(length, length + (window - 1) * stride, dtype=torch.float64, device="cpu")
    for i in range(window):
        matrix += torch.eye(length, matrix.shape[1], dtype=torch.float64, device="cpu").roll(i * stride, dims=1)
    return matrix / window
