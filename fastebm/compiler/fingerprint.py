"""The fingerprint of an energy: everything that its captured program depends on, except the numbers in its tensors."""

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

_SIMPLE = (int, float, bool, str, bytes, type(None))

# Attributes of every module that `named_modules`, parameters and buffers cover.
_SKIPPED = ("training", "_parameters", "_buffers", "_modules")


def fingerprint(energy: Any, module: nn.Module | None) -> tuple[Any, ...]:
    """Settings of all modules, closures of all functions, and shape and dtype of all tensors.

    A captured program stays valid while the fingerprint is equal. It looks up the tensors of `module` by name, so only
    their shape, dtype and device count. It keeps references to other tensors, so their identity and address count too.
    Other objects are compared by identity. Whether the module is frozen doesn't matter.
    """
    own = () if module is None else _of_module(module, by_name=True)
    return (*own, *_of_object(energy, known=module, seen=set()))


def _of_module(module: nn.Module, by_name: bool) -> Iterator[Any]:
    for name, part in module.named_modules():
        # A chain of another thread may hold the energy's own module frozen: the weights that it has evaluated lie among
        # the attributes then, and the class is the one from before parametrisation. That makes no difference here.
        parametrized = by_name and "parametrizations" in part._modules and is_parametrized(part)
        evaluated = set(part.parametrizations) if parametrized else set()
        of_parametrized = evaluated and not evaluated & vars(part).keys()
        yield name, (type_before_parametrizations(part) if of_parametrized else type(part)).__qualname__
        for attribute, value in vars(part).items():
            if attribute not in _SKIPPED and attribute not in evaluated:
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
    """Compares an object by identity, and keeps it alive, so that no later object can get its address."""

    object: Any

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Identity) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)


def _of_object(value: Any, known: nn.Module | None, seen: set[int]) -> Iterator[Any]:
    """Everything that a callable refers to."""
    if value is known or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.items()]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__, value.__func__.__qualname__]
    elif isinstance(value, types.FunctionType):
        parts = list(_references(value))
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
        parts = list(getattr(value, "__dict__", {}).values())  # a callable object
    for part in parts:
        yield from _of_object(part, known, seen)


def _references(function: types.FunctionType) -> Iterator[Any]:
    """A function's closure and defaults, and the global tensors, modules, functions and numbers that it names."""
    yield function.__code__
    yield from (cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell))
    yield from function.__defaults__ or ()
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (*_SIMPLE, Tensor, nn.Module, types.FunctionType)):
            yield value


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (raises if it is empty)
    except ValueError:
        return True
    return False
