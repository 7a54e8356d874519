"""Two convolutions with no activation between are one, where one of them is 1x1.

    conv(conv1x1(h)) = conv'(h, 1)         conv1x1(conv(h)) = conv'(h)

The first has a subtlety: the bias of the inner convolution ends at the border of the image, where the outer one pads
with zeros. A channel of ones behind the input channels ends there too and carries the bias. So a first layer from 3
colours to 128 features becomes part of the 3x3 convolution after it, which then reads 4 channels instead of 128.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import LazyTensor, lazy
from fastebm.compiler.operations import AppendOnes, Convolution
from fastebm.compiler.program import Node, Program, Rewriter


def compose_convolutions(program: Program) -> Iterator[Program]:
    """Programs in which one convolution contains the one before it."""
    for node in program:
        outer = node.operation
        if not isinstance(outer, Convolution) or not outer.plain:
            continue
        source = program[node.inputs[0]]
        inner = source.operation
        if not isinstance(inner, Convolution) or not inner.plain:
            continue
        if inner.pointwise:
            yield _after_pointwise(program, node, outer, source, inner)
        elif outer.pointwise:
            weight = lazy(_pointwise_after, outer.weight, inner.weight)
            bias = lazy(_mapped_bias, outer.weight, inner.bias) if inner.bias is not None else None
            operation = replace(inner, weight=weight, bias=_added(bias, outer.bias))
            yield Rewriter(program, node).finish(operation, *source.inputs)


def _after_pointwise(program: Program, node: Node, outer: Convolution, source: Node, inner: Convolution) -> Program:
    weight = lazy(_after_matrix, outer.weight, inner.weight)
    edit = Rewriter(program, node)
    if inner.bias is None or outer.padding == (0, 0):
        bias = None if inner.bias is None else lazy(_mapped_bias, outer.weight, inner.bias)
        return edit.finish(replace(outer, weight=weight, bias=_added(bias, outer.bias)), *source.inputs)
    if isinstance(program[source.inputs[0]].operation, AppendOnes):
        weight = lazy(_with_bias_on_ones, weight, outer.weight, inner.bias)
        return edit.finish(replace(outer, weight=weight), *source.inputs)
    weight = lazy(_with_bias_channel, weight, outer.weight, inner.bias)
    return edit.finish(replace(outer, weight=weight), edit.add(AppendOnes(), *source.inputs))


def _added(a: LazyTensor | None, b: LazyTensor | None) -> LazyTensor | None:
    if a is None or b is None:
        return a or b
    return lazy(torch.add, a, b)


def _after_matrix(outer: Tensor, inner: Tensor) -> Tensor:
    """The kernel of the outer convolution after the matrix of the inner."""
    return torch.einsum("omhw,mc->ochw", outer, inner[:, :, 0, 0])


def _pointwise_after(outer: Tensor, inner: Tensor) -> Tensor:
    """The kernel of the inner convolution before the matrix of the outer."""
    return torch.einsum("om,mchw->ochw", outer[:, :, 0, 0], inner)


def _mapped_bias(outer: Tensor, bias: Tensor) -> Tensor:
    """What the outer convolution makes of the inner's bias, away from a border."""
    return torch.einsum("omhw,m->o", outer, bias)


def _bias_channel(outer: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("omhw,m->ohw", outer, bias)[:, None]


def _with_bias_channel(weight: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
    """The weight with one more input channel, which carries the inner's bias."""
    return torch.cat([weight, _bias_channel(outer, bias)], dim=1)


def _with_bias_on_ones(weight: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
    """The weight whose last input channel is one already, and carries the inner's bias as well."""
    return torch.cat([weight[:, :-1], weight[:, -1:] + _bias_channel(outer, bias)], dim=1)
