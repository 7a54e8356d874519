"""Two convolutions without an activation between them become one, if one of them is 1x1.

    conv(conv1x1(h)) = conv'(h, 1)         conv1x1(conv(h)) = conv'(h)

In the first case, the inner bias is present only inside the image, whereas the outer convolution pads with zeros. A
channel of ones, appended to the input and padded with zeros as well, carries that bias exactly. So a first layer from
3 colours to 128 features becomes part of the 3x3 convolution after it, which then reads 4 channels instead of 128.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import LazyTensor, lazy, total
from fastebm.compiler.operations import AppendOnes, Convolution
from fastebm.compiler.program import Node, Program, Rewriter


def compose_convolutions(program: Program) -> Iterator[Program]:
    """Programs in which one convolution becomes part of the next."""
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
            weight = lazy(_weight_before_pointwise, outer.weight, inner.weight)
            composed = replace(inner, weight=weight, bias=total([_mapped_bias(outer, inner), outer.bias]))
            yield Rewriter(program, node).finish(composed, *source.inputs)


def _after_pointwise(program: Program, node: Node, outer: Convolution, source: Node, inner: Convolution) -> Program:
    weight = lazy(_weight_after_pointwise, outer.weight, inner.weight)
    rewriter = Rewriter(program, node)
    if inner.bias is None or outer.padding == (0, 0):
        composed = replace(outer, weight=weight, bias=total([_mapped_bias(outer, inner), outer.bias]))
        return rewriter.finish(composed, *source.inputs)
    if isinstance(program[source.inputs[0]].operation, AppendOnes):
        weight = lazy(_add_to_bias_channel, weight, outer.weight, inner.bias)
        return rewriter.finish(replace(outer, weight=weight), *source.inputs)
    weight = lazy(_append_bias_channel, weight, outer.weight, inner.bias)
    return rewriter.finish(replace(outer, weight=weight), rewriter.add(AppendOnes(), *source.inputs))


def _weight_after_pointwise(outer: Tensor, inner: Tensor) -> Tensor:
    return torch.einsum("omhw,mc->ochw", outer, inner[:, :, 0, 0])


def _weight_before_pointwise(outer: Tensor, inner: Tensor) -> Tensor:
    return torch.einsum("om,mchw->ochw", outer[:, :, 0, 0], inner)


def _mapped_bias(outer: Convolution, inner: Convolution) -> LazyTensor | None:
    """The outer convolution of the inner bias, away from a border."""
    return None if inner.bias is None else lazy(torch.einsum, "omhw,m->o", outer.weight, inner.bias)


def _bias_channel(outer: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("omhw,m->ohw", outer, bias)[:, None]


def _append_bias_channel(weight: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
    """The weight with one more input channel, which carries the inner bias."""
    return torch.cat([weight, _bias_channel(outer, bias)], dim=1)


def _add_to_bias_channel(weight: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
    """The weight, whose last input channel already is one of ones, with the inner bias added to that channel."""
    return torch.cat([weight[:, :-1], weight[:, -1:] + _bias_channel(outer, bias)], dim=1)
