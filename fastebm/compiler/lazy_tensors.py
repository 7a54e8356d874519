"""Lazy tensors: expressions of an energy's weights, evaluated once at the start of a chain."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


class LazyTensor:
    """The tensor (or tuple of tensors) `function(*arguments, **keywords)`, not evaluated yet.

    Arguments may contain other lazy tensors, also inside lists and tuples. Two lazy tensors are equal only if they are
    the same object.
    """

    __slots__ = ("arguments", "function", "keywords", "shape")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], shape: Shape, **keywords: Any):
        self.function = function
        self.arguments = arguments
        self.keywords = keywords
        self.shape = shape

    def __repr__(self) -> str:
        return f"LazyTensor{self.shape}"


def lazy(function: Callable[..., Tensor], *arguments: Any) -> LazyTensor:
    """The lazy tensor `function(*arguments)`; a run on meta tensors infers its shape."""
    return LazyTensor(function, arguments, tuple(function(*map(_as_meta, arguments)).shape))


def evaluate(wanted: Iterable[LazyTensor]) -> dict[LazyTensor, Any]:
    """The wanted tensors and every intermediate one, each evaluated once."""
    results: dict[LazyTensor, Any] = {}
    for tensor in wanted:
        _evaluate(tensor, results)
    return results


def _evaluate(argument: Any, results: dict[LazyTensor, Any]) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_evaluate(part, results) for part in argument)
    if not isinstance(argument, LazyTensor):
        return argument
    if argument not in results:
        arguments = [_evaluate(part, results) for part in argument.arguments]
        keywords = {name: _evaluate(part, results) for name, part in argument.keywords.items()}
        results[argument] = argument.function(*arguments, **keywords)
    return results[argument]


def _as_meta(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(map(_as_meta, argument))
    return torch.empty(argument.shape, device="meta") if isinstance(argument, LazyTensor) else argument


# ---- coefficients: plain numbers, or lazy tensors of one element

Coefficient = float | LazyTensor


def product(a: Coefficient, b: Coefficient) -> Coefficient:
    """a * b, as a plain number if both are plain numbers."""
    if isinstance(a, LazyTensor) or isinstance(b, LazyTensor):
        if a == 1 or b == 1:
            return b if a == 1 else a
        return lazy(operator.mul, a, b)
    return a * b


def scale(tensor: LazyTensor, coefficient: Coefficient) -> LazyTensor:
    """coefficient * tensor, of the tensor's shape."""
    return tensor if coefficient == 1 else lazy(operator.mul, tensor, coefficient)


def total(tensors: Iterable[LazyTensor | None]) -> LazyTensor | None:
    """The sum of all tensors that are not None; None if there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return lazy(_sum, present) if len(present) > 1 else (present[0] if present else None)


def _sum(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], start=tensors[0])
