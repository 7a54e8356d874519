"""The fingerprint of an energy: what its code refers to, except the numbers in the weights of its module.

It covers what can be found by looking: attributes, closures, defaults, globals, and what plain objects hold. Code can
read other things too, such as a file or the clock. So an equal fingerprint means an equal energy only where `covers`
says so; elsewhere programs are compared with the energy's own code (`compiled_gradient.py`).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import module as _modules
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

_SIMPLE = (int, float, complex, bool, str, bytes, type(None))

# Attributes of every module that `named_modules`, parameters and buffers cover.
_SKIPPED = ("training", "_parameters", "_buffers", "_modules")

# Values that are looked at in all: an energy may refer to a whole trainer, and this is done in every chain.
MAX_VALUES = 2000
# Tuples of numbers as short as this, such as strides, are looked at in any case.
SHORT = 8
# Bytes of an array whose numbers are compared.
MAX_BYTES = 1 << 20


Fingerprint = dict[tuple[str, ...], tuple[Any, ...]]


def fingerprint(energy: Any, module: nn.Module | None) -> Fingerprint:
    """Settings of all modules, closures of all functions, what objects hold, and shape and dtype of all tensors.

    Each entry is a name with its values: of an attribute of a module, or of something that the energy refers to.

    The tensors of `module` are looked up by name, so only their shape, dtype and device count. Of other tensors, the
    identity and the address count too. Whether the module is frozen doesn't matter.
    """
    walk = _Walk(module)
    entries = {} if module is None else dict(walk.entries(module, by_name=True))
    return entries | dict(walk.entries_of(energy))


def changed(before: Fingerprint | None, now: Fingerprint | None) -> frozenset[tuple[str, ...]]:
    """The names of the entries that differ."""
    before, now = before or {}, now or {}
    return frozenset(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def structure(energy: Any, module: nn.Module | None) -> tuple[Any, ...]:
    """The code of an energy: the classes of all modules, and what is called. Numbers and settings don't count."""
    while isinstance(energy, functools.partial):
        energy = energy.func
    function = getattr(energy, "__func__", energy)
    parts = () if module is None else tuple((name, _own_class(part)) for name, part in module.named_modules())
    return (getattr(function, "__code__", type(function)), *parts)


def covers(energy: Any, module: nn.Module | None) -> bool:
    """Whether `energy` can only read what its fingerprint and the weights of `module` hold.

    That is so where it is a module that PyTorch's and fastebm's own modules make up, or a partial of it.
    """
    while isinstance(energy, functools.partial):
        arguments = (*energy.args, *energy.keywords.values())
        if not all(isinstance(argument, (*_SIMPLE, Tensor)) for argument in arguments):
            return False
        energy = energy.func
    if module is None or energy is not module:
        return False
    if _modules._global_forward_hooks or _modules._global_forward_pre_hooks:
        return False
    for part in module.modules():
        kind = _own_class(part)
        made = (kind, inspect.getattr_static(kind, "forward", kind))
        if not all(str(getattr(each, "__module__", "")).partition(".")[0] in ("torch", "fastebm") for each in made):
            return False
        if part._forward_hooks or part._forward_pre_hooks or not all(map(_is_plain, vars(part).values())):
            return False
    return True


def _own_class(part: nn.Module) -> type:
    """A module's class, from before parametrisation."""
    parametrized = "parametrizations" in part._modules and is_parametrized(part)
    return type_before_parametrizations(part) if parametrized else type(part)


def _is_plain(value: Any) -> bool:
    """Whether the fingerprint holds all of a value."""
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (*_SIMPLE, Tensor, nn.Module)) or type(value).__module__.startswith("torch")


@dataclass(frozen=True, eq=False)
class _Identity:
    """Compares an object by identity, and keeps it alive, so that no later object can get its address."""

    object: Any

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Identity) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)


class _Walk:
    """One look at everything that an energy refers to, each object once."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self.seen: dict[int, Any] = {}  # by id, and kept alive, so that no other object gets one
        self.left = MAX_VALUES

    def entries_of(self, energy: Any) -> Iterator[tuple[tuple[str, ...], tuple[Any, ...]]]:
        """Of an energy that isn't the module itself: what it refers to, one by one where that is known by name."""
        while isinstance(energy, functools.partial):
            yield ("arguments",), tuple(self.of((energy.args, energy.keywords)))
            energy = energy.func
        if isinstance(energy, types.MethodType):
            yield from self.entries_of(energy.__self__)
            energy = energy.__func__
        if isinstance(energy, types.FunctionType):
            yield ("code",), (energy.__code__,)
            for name, value in self.references(energy):
                yield ("function", name), tuple(self.of(value))
        elif energy is not self.module and isinstance(energy, nn.Module):
            yield from self.entries(energy, by_name=False)
        elif energy is not self.module and not _is_of_library(type(energy)) and hasattr(energy, "__dict__"):
            yield ("object",), (_Identity(energy), *self.of_class(type(energy)), *self.slots(energy))
            for name, value in vars(energy).items():
                yield ("object", name), tuple(self.of(value))
            call = type(energy).__call__ if callable(energy) else None
            if isinstance(call, types.FunctionType):
                for name, value in self.references(call):
                    yield ("call", name), tuple(self.of(value))
        elif energy is not self.module:
            yield ("energy",), tuple(self.of(energy))

    def of_module(self, module: nn.Module, by_name: bool) -> Iterator[Any]:
        for name, values in self.entries(module, by_name):
            yield name
            yield from values

    def entries(self, module: nn.Module, by_name: bool) -> Iterator[tuple[tuple[str, ...], tuple[Any, ...]]]:
        for name, part in module.named_modules():
            # A chain of another thread may hold the energy's own module frozen: the weights that it has evaluated lie
            # among the attributes then, and the class is the one from before parametrisation.
            parametrized = by_name and "parametrizations" in part._modules and is_parametrized(part)
            evaluated = set(part.parametrizations) if parametrized else set()
            of_parametrized = evaluated and not evaluated & vars(part).keys()
            kind = type_before_parametrizations(part) if of_parametrized else type(part)
            yield (name,), (kind.__qualname__, *self.of_class(kind))
            for attribute, value in vars(part).items():
                if attribute not in _SKIPPED and attribute not in evaluated:
                    yield (name, attribute), tuple(self.of(value))
            for tensors in (part._parameters, part._buffers):
                for attribute, tensor in tensors.items():
                    yield (name, attribute), (tensor if tensor is None else _of_tensor(tensor, by_name),)
            if not (
                _is_of_library(kind) or kind.__module__.startswith("fastebm.")
            ):  # what the code of a class of users names
                for function in (inspect.getattr_static(kind, name, None) for name in ("forward", "energy")):
                    if isinstance(function, types.FunctionType):
                        for given, value in self.references(function):
                            yield (name, "code", given), tuple(self.of(value))

    def of(self, value: Any) -> Iterator[Any]:
        if isinstance(value, _SIMPLE):
            yield type(value), value
            return
        if isinstance(value, tuple) and len(value) <= SHORT and all(isinstance(part, _SIMPLE) for part in value):
            # However many there are: torch.export puts equal ones in the place of those that it finds.
            yield from (type(value), *((type(part), part) for part in value))
            return
        if value is self.module or id(value) in self.seen or self.left <= 0:
            yield _Identity(value)
            return
        if isinstance(value, Tensor):
            yield _of_tensor(value, by_name=False)
            return
        self.left -= 1 + (len(value) if isinstance(value, list | tuple | set | frozenset | dict) else 0)
        self.seen[id(value)] = value
        if self.left < 0:
            yield _Identity(value)
        elif isinstance(value, np.ndarray):
            small = value.nbytes <= MAX_BYTES and not value.dtype.hasobject
            yield value.shape, value.dtype, value.tobytes() if small else _Identity(value)
        elif isinstance(value, list | tuple | set | frozenset):
            yield type(value), len(value)
            for part in value:
                yield from self.of(part)
        elif isinstance(value, dict):
            yield len(value)
            for key, part in value.items():
                yield str(key)
                yield from self.of(part)
        elif isinstance(value, functools.partial):
            yield from self.of((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield from self.of(value.__self__)
            yield from self.of(value.__func__)
        elif isinstance(value, types.FunctionType):
            yield from self.of_function(value)
        elif isinstance(value, nn.Module):
            yield from self.of_module(value, by_name=False)
        elif isinstance(value, type):
            yield _Identity(value)
            yield from self.of_class(value)
        else:
            yield _Identity(value)
            if not _is_of_library(type(value)):
                yield from self.of_class(type(value))
                yield from self.of(getattr(value, "__dict__", {}))
                yield from self.slots(value)

    def slots(self, value: Any) -> Iterator[Any]:
        for name in _slots(type(value)):
            yield from self.of(getattr(value, name, None))

    def of_class(self, kind: type) -> Iterator[Any]:
        """The values that a class and its bases hold."""
        for base in kind.__mro__:
            if _is_of_library(base) or id(base) in self.seen:
                continue
            self.seen[id(base)] = base
            for name, value in vars(base).items():
                if isinstance(value, (*_SIMPLE, Tensor, list, dict, np.ndarray)) and not name.startswith("__"):
                    yield name
                    yield from self.of(value)

    def of_function(self, function: types.FunctionType) -> Iterator[Any]:
        """A function's closure and defaults, and the globals that it names."""
        yield function.__code__
        for _, value in self.references(function):
            yield from self.of(value)

    def references(self, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if not _is_empty(cell):
                yield name, cell.cell_contents
        yield "defaults", (function.__defaults__, function.__kwdefaults__)
        if _is_of_library(function):
            return
        names = _names(function.__code__)
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType):
                if not _is_of_library(value):
                    for attribute in sorted(names & vars(value).keys()):
                        yield f"{name}.{attribute}", vars(value)[attribute]
            elif not (_is_of_library(value) and isinstance(value, types.FunctionType | type)):
                yield name, value


def _of_tensor(tensor: Tensor, by_name: bool) -> Any:
    kind = (tuple(tensor.shape), tensor.dtype, tensor.device)
    return kind if by_name else (*kind, _Identity(tensor), tensor.data_ptr())


def _names(code: types.CodeType) -> set[str]:
    """All names that a function and those inside of it use."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _is_of_library(value: Any) -> bool:
    """Whether something belongs to Python, PyTorch or NumPy, whose objects hold no settings of an energy."""
    module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or "builtins"
    return module.partition(".")[0] in ("torch", "numpy", "builtins", "math", "random", "functools", "collections")


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (raises if it is empty)
    except ValueError:
        return True
    return False
