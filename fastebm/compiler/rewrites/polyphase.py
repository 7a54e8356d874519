"""A transposed convolution with a stride becomes one without, whose output channels are interleaved into pixels.

With y counted from the start of the padding and y = s * m + r, a transposed convolution of stride s and kernel K is

    out[y] = sum over t of g[m - t] * weight[s * t + r],  t = 0 ... ceil(K / s) - 1

Every phase r is a plain convolution with the taps r, r + s, ... of the kernel in reverse order. One convolution with
s * s times the output channels computes all phases. For a 4x4 kernel and stride 2 its kernel is 2x2 and has the same
FLOPs; a kernel that is no multiple of the stride is padded with zeros. This pays on machines whose library runs strided
transposed convolutions slowly.
"""

import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from fastebm.compiler.lazy_tensors import lazy
from fastebm.compiler.operations import Convolution, Interleave, Pair
from fastebm.compiler.program import Program, Rewriter


def split_polyphase(program: Program) -> Iterator[Program]:
    """Programs in which a plain convolution replaces one transposed convolution with a stride."""
    for node in program:
        adjoint = node.operation
        if not isinstance(adjoint, Convolution) or not adjoint.transposed or adjoint.stride == (1, 1):
            continue
        if adjoint.dilation != (1, 1) or adjoint.groups != 1:
            continue
        source = program[node.inputs[0]]
        rows, columns = (_border(adjoint, axis, source.shape[1 + axis], node.shape[1 + axis]) for axis in (0, 1))
        weight = lazy(polyphase_weight, adjoint.weight, adjoint.stride)
        bias = None if adjoint.bias is None else lazy(Tensor.repeat, adjoint.bias, math.prod(adjoint.stride))
        rewriter = Rewriter(program, node)
        plain = rewriter.add(Convolution(weight, bias, padding=(rows[0], columns[0])), source.name)
        size = (node.shape[1], node.shape[2])
        yield rewriter.finish(Interleave(adjoint.stride, (rows[1], columns[1]), size), plain)


def _border(adjoint: Convolution, axis: int, length: int, size: int) -> Pair:
    """The padding on both sides of the plain convolution's input, and the pixels of the output to cut off in front."""
    stride, padding = adjoint.stride[axis], adjoint.padding[axis]
    taps = -(-adjoint.kernel[axis] // stride)
    first, last = padding // stride, (padding + size - 1) // stride
    if adjoint.bias is None:
        # Pixels further out are zero, so no convolution has to compute them.
        last = min(last, length + taps - 2)
    border = max(0, taps - 1 - first, last - (length - 1))
    return border, padding - stride * (taps - 1 - border)


def polyphase_weight(weight: Tensor, stride: Pair) -> Tensor:
    """(in, out, K, K) of a transposed convolution to (rows * columns * out, in, taps, taps) of a plain one."""
    inner, outer, height, width = weight.shape
    rows, columns = -(-height // stride[0]), -(-width // stride[1])
    filled = F.pad(weight, (0, columns * stride[1] - width, 0, rows * stride[0] - height))
    split = filled.reshape(inner, outer, rows, stride[0], columns, stride[1])
    return split.permute(3, 5, 1, 0, 2, 4).reshape(-1, inner, rows, columns).flip(2, 3)
