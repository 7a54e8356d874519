"""What doesn't depend on x: weights, and all that is made of them, as expressions that are evaluated once a chain."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Value:
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
        return f"Value{self.shape}"


def computed(function: Callable[..., Tensor], *arguments: Any) -> Value:
    """The value `function(*arguments)`, whose shape is found by a run on tensors without memory."""
    shape = function(*(_without_memory(argument) for argument in arguments)).shape
    return Value(function, arguments, tuple(shape))


def evaluate(wanted: Iterable[Value]) -> dict[Value, Any]:
    """Every value that was asked for, each computed once."""
    known: dict[Value, Any] = {}
    for value in wanted:
        _evaluate(value, known)
    return known


def _evaluate(argument: Any, known: dict[Value, Any]) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_evaluate(part, known) for part in argument)
    if not isinstance(argument, Value):
        return argument
    if argument not in known:
        arguments = [_evaluate(part, known) for part in argument.arguments]
        keywords = {name: _evaluate(part, known) for name, part in argument.keywords.items()}
        known[argument] = argument.function(*arguments, **keywords)
    return known[argument]


def _without_memory(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_without_memory(part) for part in argument)
    return torch.empty(argument.shape, device="meta") if isinstance(argument, Value) else argument


# ---- coefficients: numbers, or values of one element

Coefficient = float | Value


def product(a: Coefficient, b: Coefficient) -> Coefficient:
    """a * b, as a number if both are."""
    if isinstance(a, Value) or isinstance(b, Value):
        if a == 1:
            return b
        if b == 1:
            return a
        return computed(_multiplied, a, b)
    return a * b


def scaled(value: Value, coefficient: Coefficient) -> Value:
    """coefficient * value, of value's shape."""
    return value if coefficient == 1 else computed(_multiplied, value, coefficient)


def total(values: Iterable[Value | None]) -> Value | None:
    """The sum of those that are there, None where none is."""
    present = [value for value in values if value is not None]
    return computed(_sum, present) if len(present) > 1 else (present[0] if present else None)


def _multiplied(a: Any, b: Any) -> Tensor:
    return a * b


def _sum(tensors: list[Tensor]) -> Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result
