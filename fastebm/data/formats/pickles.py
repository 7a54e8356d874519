"""Pickles of arrays and plain containers, read without running anything.

A pickle is a program, and the standard unpickler runs it: it imports what is named and calls it. Here the program is
only parsed (`pickletools.genops`) and its few harmless instructions are carried out on a stack of our own. Nothing is
imported and nothing of the file's choosing is called: the names that numpy writes are recognised and stand for
arrays that are built here, every other name is refused. What is understood is what the CIFAR archives hold, written by
Python 2 or 3: dicts, lists, tuples, numbers, text and bytes in any protocol, and arrays of numbers in 2 to 5.
"""

from __future__ import annotations

import math
import pickletools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastebm.data.errors import DataError, explaining

_NAMES = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy.core.numeric _frombuffer": "buffer",
    "numpy._core.numeric _frombuffer": "buffer",
    "numpy ndarray": "array type",
    "numpy dtype": "dtype",
    "_codecs encode": "text as bytes",
}
_NUMBERS = re.compile(r"[ui][1248]|f[248]|b1")
_LARGEST = 2**63
_MOST_INSTRUCTIONS = 2_000_000  # CIFAR-100 has 300,000; each takes a microsecond or two


def read_pickle(name: str, content: bytes) -> Any:
    """The object in a pickle: text of Python 2 and bytes as str (latin-1), arrays as numpy arrays, the rest as itself.

    Raises DataError, with `name`, for anything else.
    """
    machine = _Machine(len(content))
    with explaining(name, "is no pickle of arrays and plain containers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in text, which is not used
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count == _MOST_INSTRUCTIONS:
                raise ValueError(f"it has more than {_MOST_INSTRUCTIONS:,} instructions")
            if opcode.name == "STOP":
                return machine.result()
            machine.carry_out(opcode.name, argument)
    raise DataError(f"{name}: ends within its pickle")


@dataclass(frozen=True)
class _Name:
    """A name of numpy's that the file mentions; what it means here."""

    meaning: str


class _Type:
    """A dtype: its code, such as "u1", and the byte order that comes later."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise ValueError(f"an array of type {str(code)[:40]!r} is not one of numbers")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def build(self, state: tuple[Any, ...]) -> None:
        """Takes the state that numpy writes, (version, byte order, ...), of which only the order matters."""
        if len(state) < 2 or state[1] not in ("|", "<", ">", "="):
            raise ValueError("a byte order is unknown")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array of which only the type has been named; its state brings the rest."""

    value: NDArray[Any] | None = None


_MARK = object()
_PLAIN = (str, int, float, bool, type(None), np.ndarray, dict, list, tuple)


class _Machine:
    """The stack and the memory of a pickle's program."""

    def __init__(self, length: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # What arrays may take together. Each has its bytes in the file once; a hostile program would copy them often.
        self.budget = 2 * length

    def result(self) -> Any:
        """The only object on the stack, with arrays in place: its own or, of a dict, those under its keys."""
        if len(self.stack) != 1:
            raise ValueError("it does not end with a single object")
        value = _in_place(self.stack[0])
        if isinstance(value, dict):
            value = {key: _in_place(item) for key, item in value.items()}
        if not isinstance(value, _PLAIN):
            raise ValueError("it ends with what is no plain data")
        return value

    def carry_out(self, opcode: str, argument: Any) -> None:
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _LITERALS:
            self.stack.append(_literal(argument))
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {opcode} is not one of plain data")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark is where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise ValueError("a mark is missing")

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise ValueError(f"a {kind.__name__} is missing")
        return value

    # Instructions; each takes its argument, which most don't have.

    def put(self, index: Any) -> None:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark can't be remembered")
        self.memo[int(index)] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.put(len(self.memo))

    def get(self, index: Any) -> None:
        self.stack.append(self.memo[int(index)])

    def append(self, _: Any) -> None:
        value = self.pop()
        self.top(list).append(value)

    def appends(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.top(list).extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._update([key, value])

    def set_items(self, _: Any) -> None:
        self._update(self.pop_to_mark())

    def dict_of_mark(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self._update(values)

    def list_of_mark(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def tuple_of_mark(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def tuple_of_1(self, _: Any) -> None:
        self.stack.append((self.pop(),))

    def tuple_of_2(self, _: Any) -> None:
        second, first = self.pop(), self.pop()
        self.stack.append((first, second))

    def tuple_of_3(self, _: Any) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.stack.append((first, second, third))

    def name(self, mentioned: Any) -> None:
        """Where the standard unpickler imports."""
        if mentioned not in _NAMES:
            raise ValueError(f"it asks for {'.'.join(str(mentioned).split(' '))[:80]!r}, which is no array")
        self.stack.append(_Name(_NAMES[mentioned]))

    def name_on_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("it asks for what is no name")
        self.name(f"{module} {name}")

    def reduce(self, _: Any) -> None:
        """Where the standard unpickler calls what the file names, with arguments of the file."""
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no array")
        self.stack.append(self._made(name.meaning, arguments))

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, _Type) and isinstance(state, tuple):
            target.build(state)
        elif isinstance(target, _Array) and isinstance(state, tuple) and len(state) == 5 and target.value is None:
            target.value = self._array(state[1], state[2], bool(state[3]), state[4])
        else:
            raise ValueError("it sets a state of what is no array")

    def _update(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2:
            raise ValueError("a key has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):  # the hash of a deeply nested tuple would overflow the stack
                raise ValueError("a key of a dict is neither text nor number")
            target[key] = value

    def _made(self, meaning: str, arguments: tuple[Any, ...]) -> Any:
        if meaning == "array" and arguments[:1] == (_Name("array type"),):
            return _Array()
        if meaning == "dtype" and arguments:
            return _Type(arguments[0])
        if meaning == "text as bytes" and len(arguments) == 2 and arguments[1] in ("latin1", "latin-1"):
            return _text(arguments[0])
        if meaning == "buffer" and len(arguments) == 4:
            content, kind, shape, order = arguments
            return self._array(shape, kind, order == "F", content)
        raise ValueError(f"it makes {meaning} in an unknown way")

    def _array(self, shape: Any, kind: Any, fortran_order: bool, content: Any) -> NDArray[Any]:
        if not isinstance(kind, _Type) or not isinstance(shape, tuple):
            raise ValueError("an array has no type or no shape")
        if len(shape) > 8 or not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError("an array has an impossible shape")
        self.budget -= len(_text(content))
        if self.budget < 0:
            raise ValueError("its arrays are larger than the file")
        if len(content) != math.prod(shape) * kind.dtype.itemsize:
            raise ValueError(f"an array {kind.dtype} {shape} comes with {len(content):,} bytes")
        order = "F" if fortran_order else "C"
        return np.frombuffer(content.encode("latin-1"), kind.dtype).reshape(shape, order=order)  # type: ignore


def _literal(argument: Any) -> Any:
    if isinstance(argument, bytes | bytearray):
        return argument.decode("latin-1")
    if isinstance(argument, int) and abs(argument) >= _LARGEST:
        raise ValueError("a number is too large")
    return argument


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("bytes are missing")
    return value


def _in_place(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}

# Instructions that put their own argument on the stack.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}

_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "DICT": _Machine.dict_of_mark,
    "LIST": _Machine.list_of_mark,
    "TUPLE": _Machine.tuple_of_mark,
    "TUPLE1": _Machine.tuple_of_1,
    "TUPLE2": _Machine.tuple_of_2,
    "TUPLE3": _Machine.tuple_of_3,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
