"""What an energy decides by, apart from the numbers in its tensors: a program is valid while this is the same."""

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_SIMPLE = (int, float, bool, str, bytes, type(None))

# PyTorch's own state of a module, or what its other state follows from.
_PASSED_OVER = ("training", "_parameters", "_buffers", "_modules")


def fingerprint(energy: Any, module: nn.Module | None) -> tuple[Any, ...]:
    """Settings of all modules, what functions close over, and the kinds of all tensors; equal where nothing changed.

    Tensors of `module` are known by name, so only their shape and type count; others are held by reference, so that
    their memory counts as well. Objects of other kinds are told apart by identity.
    """
    found: list[Any] = []
    if module is not None:
        found += _of_module(module, by_name=True)
    found += _of_object(energy, known=module, seen=set())
    return tuple(found)


def _of_module(module: nn.Module, by_name: bool) -> Iterator[Any]:
    for name, part in module.named_modules():
        yield name, type(part).__qualname__
        for attribute, value in vars(part).items():
            if attribute not in _PASSED_OVER:
                yield attribute, _of_value(value, by_name)
        for tensors in (part._parameters, part._buffers):
            for attribute, tensor in tensors.items():
                yield attribute, _of_value(tensor, by_name)


def _of_value(value: Any, by_name: bool) -> Any:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, list | tuple):
        return tuple(_of_value(part, by_name) for part in value)
    if isinstance(value, dict):
        return tuple((str(key), _of_value(part, by_name)) for key, part in value.items())
    if isinstance(value, Tensor):
        kind = (tuple(value.shape), value.dtype, value.device)
        return kind if by_name else (*kind, _Identity(value), value.data_ptr())
    return _Identity(value)


@dataclass(frozen=True, eq=False)
class _Identity:
    """Equal to another one of the same object, which it keeps, so that no later object can have its address."""

    object: Any

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Identity) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)


def _of_object(value: Any, known: nn.Module | None, seen: set[int]) -> Iterator[Any]:
    """What a callable refers to."""
    if value is known or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.items()]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__, value.__func__.__qualname__]
    elif isinstance(value, types.FunctionType):
        parts = list(_referred(value))
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, dict):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, nn.Module):
        yield from _of_module(value, by_name=False)
        return
    else:
        yield _of_value(value, by_name=False)
        if isinstance(value, Tensor | type) or not callable(value):
            return
        parts = list(getattr(value, "__dict__", {}).values())  # an object that is called as a function
    for part in parts:
        yield from _of_object(part, known, seen)


def _referred(function: types.FunctionType) -> Iterator[Any]:
    """What a function has closed over, its defaults, and the global tensors, modules and numbers that it names."""
    yield function.__code__
    yield from (cell.cell_contents for cell in function.__closure__ or () if not _empty(cell))
    yield from function.__defaults__ or ()
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (*_SIMPLE, Tensor, nn.Module, types.FunctionType)):
            yield value


def _empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (reading it is the question)
    except ValueError:
        return True
    return False
