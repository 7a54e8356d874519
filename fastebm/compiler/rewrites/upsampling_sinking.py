"""Enlargement moves behind what works on every pixel alike, and into convolutions: the mirror image of pooling.

    conv1x1(upsample(h)) = upsample(conv1x1(h)),  and so for activations and for scale * h + shift
    conv(upsample_k(h)) = transposed'(h),  weight' = sum over the k x k shifts of the reversed weight,  stride' = k

The second is the adjoint of a pool inside of a convolution: a 3x3 convolution behind a doubling is a transposed 4x4
convolution with stride 2, of 16 instead of 36 multiply-adds for each pixel that is doubled. It holds for zero padding
that is smaller than the kernel.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import lazy
from fastebm.compiler.operations import Activation, Affine, Convolution, Operation, Pair, Upsample
from fastebm.compiler.program import Program, Rewriter
from fastebm.compiler.rewrites.pooling_fusion import box_filtered


def sink_upsampling(program: Program) -> Iterator[Program]:
    """Programs in which one enlargement comes later, or is part of a convolution."""
    for node in program:
        if not node.inputs:
            continue
        source = program[node.inputs[0]]
        enlarge = source.operation
        if not isinstance(enlarge, Upsample):
            continue
        if _same_on_every_pixel(node.operation):
            edit = Rewriter(program, node)
            yield edit.finish(enlarge, edit.add(node.operation, *source.inputs))
        elif isinstance(node.operation, Convolution) and _can_take(node.operation):
            yield Rewriter(program, node).finish(_enlarging(node.operation, enlarge.factor), *source.inputs)


def _same_on_every_pixel(operation: Operation) -> bool:
    if isinstance(operation, Affine):
        return all(value.shape in ((), (1,)) or value.shape[-2:] == (1, 1) for value in operation.weights())
    return isinstance(operation, Activation) or (isinstance(operation, Convolution) and operation.pointwise)


def _can_take(convolution: Convolution) -> bool:
    inside = all(p < k for p, k in zip(convolution.padding, convolution.kernel, strict=True))
    return convolution.plain and convolution.stride == (1, 1) and inside


def _enlarging(convolution: Convolution, factor: Pair) -> Convolution:
    """The convolution of an enlarged image, from the small one."""
    (height, width), (rows, columns) = convolution.kernel, convolution.padding
    weight = lazy(_adjoint_of_pooled, convolution.weight, factor)
    padding = (height - 1 - rows, width - 1 - columns)
    return Convolution(weight, convolution.bias, stride=factor, padding=padding, transposed=True)


def _adjoint_of_pooled(weight: Tensor, factor: Pair) -> Tensor:
    """(O, C, K, K) of a convolution to (C, O, K + k - 1, K + k - 1) of a transposed one."""
    reversed_weight = torch.flip(weight, (2, 3)).transpose(0, 1)
    return box_filtered(reversed_weight, factor, (1, 1)) * (factor[0] * factor[1])
