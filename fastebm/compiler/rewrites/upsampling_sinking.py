"""Upsampling moves after operations that act on every pixel alike, and into convolutions.

    conv1x1(upsample(h)) = upsample(conv1x1(h)), and likewise for activations and for scale * h + shift
    conv(upsample_k(h)) = transposed'(h),  weight' = sum over the k x k shifts of the flipped weight,  stride' = k

The second identity is the adjoint of pooling fusion: a 3x3 convolution after upsampling by 2 is a transposed 4x4
convolution with stride 2, with 16 instead of 36 multiply-adds per input pixel. It holds for zero padding that is
smaller than the kernel.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import lazy
from fastebm.compiler.operations import Activation, Convolution, Pair, Upsample
from fastebm.compiler.program import Program, Rewriter
from fastebm.compiler.rewrites.pooling_fusion import box_filter
from fastebm.compiler.rewrites.pooling_hoisting import is_affine_per_pixel


def sink_upsampling(program: Program) -> Iterator[Program]:
    """Programs in which one upsampling moves after its user, or becomes part of a convolution."""
    for node in program:
        if not node.inputs:
            continue
        source = program[node.inputs[0]]
        upsample, operation = source.operation, node.operation
        if not isinstance(upsample, Upsample):
            continue
        if isinstance(operation, Activation) or is_affine_per_pixel(operation):
            rewriter = Rewriter(program, node)
            yield rewriter.finish(upsample, rewriter.add(operation, *source.inputs))
        elif isinstance(operation, Convolution) and _can_absorb(operation):
            yield Rewriter(program, node).finish(_absorb(operation, upsample.factor), *source.inputs)


def _can_absorb(convolution: Convolution) -> bool:
    inside = all(p < k for p, k in zip(convolution.padding, convolution.kernel, strict=True))
    return convolution.plain and convolution.stride == (1, 1) and inside


def _absorb(convolution: Convolution, factor: Pair) -> Convolution:
    """The convolution that computes, from the small image, what the given one computes from the upsampled one."""
    (height, width), (rows, columns) = convolution.kernel, convolution.padding
    weight = lazy(_upsampling_weight, convolution.weight, factor)
    padding = (height - 1 - rows, width - 1 - columns)
    return Convolution(weight, convolution.bias, stride=factor, padding=padding, transposed=True)


def _upsampling_weight(weight: Tensor, factor: Pair) -> Tensor:
    """(O, C, K, K) of a convolution to (C, O, K + k - 1, K + k - 1) of a transposed one."""
    flipped = torch.flip(weight, (2, 3)).transpose(0, 1)
    return box_filter(flipped, factor, (1, 1)) * (factor[0] * factor[1])
