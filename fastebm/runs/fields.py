"""Checks of values against type hints: settings from a file, the command line and Python obey the same rules.

The schema of a file is a dataclass: `check_fields` checks an instance of it, whoever made it, and `checked` one value.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_WANTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def check_fields(instance: Any) -> None:
    """Checks each field of a dataclass, a frozen one too, against its type hint, and gives it that very type.

    Raises TypeError, ValueError: as `checked`.
    """
    for name, hint in _hints(instance.__class__).items():
        object.__setattr__(instance, name, checked(name, getattr(instance, name), hint))


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value` in the type of `hint`: bool, int, float, str, Path, Any, None, a Literal, a union, tuple, list or dict.

    Scalars of NumPy and tensors without dimensions are numbers too. A list is taken for a tuple, as JSON has no tuples.
    A whole number is a float, but no float is a whole number, and True is none.

    Raises TypeError, which names `name`, for a value of another type; ValueError for a text that is none of a Literal,
    for another number of entries, and for a number that is too large.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return checked(name, value, next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        value = _scalar(value)
        for allowed in arguments:
            if type(allowed) is type(value) and allowed == value:
                return allowed
        raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, got {shown(value)}")
    if origin in (tuple, list):
        return _sequence(name, value, origin, arguments)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be an object with named entries, got {shown(value)}")
        return {checked(f"a name in {name}", key, arguments[0]): checked(f"{name}[{shown(key)}]", entry, arguments[1])
                for key, entry in value.items()}  # fmt: skip
    return _plain(name, value, hint)


def checked_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function with its arguments `checked` against their type hints, and in their very types."""
    signature = inspect.signature(function)
    hints = functools.cache(lambda: typing.get_type_hints(function))

    @functools.wraps(function)
    def checking(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        bound = signature.bind(*arguments, **named)
        for name, value in bound.arguments.items():
            if name in hints():
                bound.arguments[name] = checked(name, value, hints()[name])
        return function(*bound.args, **bound.kwargs)

    return checking


def shown(value: Any) -> str:
    """The value for an error message, on one line and shortened."""
    try:
        return " ".join(_REPR.repr(value).split())
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def _sequence(name: str, value: Any, kind: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a list, got {shown(value)}")
    if kind is list or arguments[1:] == (...,):
        return kind(checked(name, entry, arguments[0]) for entry in value)
    if len(value) != len(arguments):
        raise ValueError(f"{name} must have {len(arguments)} entries, got {shown(value)}")
    return tuple(checked(name, entry, hint) for entry, hint in zip(value, arguments, strict=True))


def _plain(name: str, value: Any, kind: type) -> Any:
    given, value = value, _scalar(value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        if kind is int and isinstance(value, numbers.Integral):
            return int(value)
        if kind is float and isinstance(value, numbers.Real):
            try:
                return float(value)
            except OverflowError:
                raise ValueError(f"{name} is too large: {shown(value)}") from None
    raise TypeError(f"{name} must be {_WANTED[kind]}, got {shown(given)}")


def _scalar(value: Any) -> Any:
    """The Python number of a scalar of NumPy or a tensor without dimensions; any other value as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not getattr(value, "is_meta", False):
        return value.item()
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
