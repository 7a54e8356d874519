"""Operations that only move numbers are carried out on their addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..lowering import Lowering
from ..values import Complex, Value
from .table import COMPLEX_RULES, RULES, rule

_VIEWS = (
    "permute",
    "transpose",
    "t",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "flip",
    "roll",
    "diagonal",
    "unfold",
    "movedim",
    "narrow",
    "repeat",
    "squeeze_copy",
    "diagonal_copy",
)
_SEVERAL = ("split", "split_with_sizes", "unbind", "chunk")


def _view(lowering: Lowering, node: Any, x: Any, *arguments: Any, **options: Any) -> Value:
    def move(places: torch.Tensor) -> torch.Tensor:
        return node.target(places, *arguments, **options)

    return lowering.moved(lowering.value(x), move, lowering.shape(node))


def _several(lowering: Lowering, node: Any, x: Any, *arguments: Any, **options: Any) -> Value:
    value = lowering.value(x)

    def part(i: int) -> Value:
        return lowering.moved(
            value, lambda places: node.target(places, *arguments, **options)[i], tuple(node.meta["val"][i].shape)
        )

    return [part(i) for i in range(len(node.meta["val"]))]


for _table in (RULES, COMPLEX_RULES):
    _table |= dict.fromkeys(_VIEWS, _view)
    _table |= dict.fromkeys(_SEVERAL, _several)


@rule("view", "reshape", "_unsafe_view")
@rule("view", "reshape", "_unsafe_view", table=COMPLEX_RULES)
def _reshape(lowering: Lowering, node: fx.Node, x: Any, *_: Any) -> Value:
    value, shape = lowering.value(x), lowering.shape(node)
    if isinstance(value, Complex):
        return Complex(lowering.reshaped(value.real, shape), lowering.reshaped(value.imag, shape))
    return lowering.reshaped(value, shape)


@rule("as_strided")
def _as_strided(lowering: Lowering, node: Any, x: Any, *arguments: Any, **options: Any) -> Value:
    """Strides count numbers in memory: those of the tensor as it was traced."""
    meta = x.meta["val"]
    dense = torch.empty_strided(meta.shape, meta.stride(), dtype=torch.int64, device="cpu")

    def move(places: torch.Tensor) -> torch.Tensor:
        return node.target(dense.copy_(places), *arguments, **options).clone()

    return lowering.moved(lowering.value(x), move, lowering.shape(node))


@rule("cat")
@rule("cat", table=COMPLEX_RULES)
def _cat(lowering: Lowering, node: fx.Node, tensors: Any, dim: int = 0) -> Value:
    return lowering.cat([lowering.value(tensor) for tensor in tensors], dim)


@rule("stack")
@rule("stack", table=COMPLEX_RULES)
def _stack(lowering: Lowering, node: fx.Node, tensors: Any, dim: int = 0) -> Value:
    return lowering.stack([lowering.value(tensor) for tensor in tensors], dim)


@rule("constant_pad_nd")
@rule("constant_pad_nd", table=COMPLEX_RULES)
def _pad(lowering: Lowering, node: fx.Node, x: Any, pad: Any, number: float = 0) -> Value:
    value = lowering.value(x)
    padding = [(0, 0)] * len(value.shape)
    for i in range(len(pad) // 2):
        padding[-1 - i] = (pad[2 * i], pad[2 * i + 1])
    if isinstance(value, Complex):
        real = lowering.padded(value.real, padding, complex(number).real)
        return Complex(real, lowering.padded(value.imag, padding, complex(number).imag))
    return lowering.padded(value, padding, float(number))
