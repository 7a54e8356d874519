"""What doesn't depend on x: weights, and all that is made of them, as expressions that are evaluated once a chain."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


class LazyTensor:
    """A tensor (or a tuple of some) that is known once the weights are: `function(*arguments, **keywords)`.

    Arguments may hold other values, also in lists and tuples. Two values are equal only if they are one object.
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
    """The value `function(*arguments)`, whose shape is found by a run on tensors without memory."""
    shape = function(*(_without_memory(argument) for argument in arguments)).shape
    return LazyTensor(function, arguments, tuple(shape))


def evaluate(wanted: Iterable[LazyTensor]) -> dict[LazyTensor, Any]:
    """Every value that was asked for, each computed once."""
    known: dict[LazyTensor, Any] = {}
    for value in wanted:
        _evaluate(value, known)
    return known


def _evaluate(argument: Any, known: dict[LazyTensor, Any]) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_evaluate(part, known) for part in argument)
    if not isinstance(argument, LazyTensor):
        return argument
    if argument not in known:
        arguments = [_evaluate(part, known) for part in argument.arguments]
        keywords = {name: _evaluate(part, known) for name, part in argument.keywords.items()}
        known[argument] = argument.function(*arguments, **keywords)
    return known[argument]


def _without_memory(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_without_memory(part) for part in argument)
    return torch.empty(argument.shape, device="meta") if isinstance(argument, LazyTensor) else argument


# ---- coefficients: numbers, or values of one element

Coefficient = float | LazyTensor


def product(a: Coefficient, b: Coefficient) -> Coefficient:
    """a * b, as a number if both are."""
    if isinstance(a, LazyTensor) or isinstance(b, LazyTensor):
        if a == 1:
            return b
        if b == 1:
            return a
        return lazy(_multiplied, a, b)
    return a * b


def scaled(value: LazyTensor, coefficient: Coefficient) -> LazyTensor:
    """coefficient * value, of value's shape."""
    return value if coefficient == 1 else lazy(_multiplied, value, coefficient)


def total(values: Iterable[LazyTensor | None]) -> LazyTensor | None:
    """The sum of those that are there, None where none is."""
    present = [value for value in values if value is not None]
    return lazy(_sum, present) if len(present) > 1 else (present[0] if present else None)


def _multiplied(a: Any, b: Any) -> Tensor:
    return a * b


def _sum(tensors: list[Tensor]) -> Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result
