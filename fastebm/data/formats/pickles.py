"""Reads pickles of numeric arrays and plain containers without running code from the file.

A pickle is a program: it names functions, and the unpickler imports and calls them. Here `find_class` resolves only the
names that numpy writes for its arrays, and resolves them to stand-ins of our own, because numpy's functions trust their
arguments: a hostile dtype state corrupts memory. Before the unpickler runs, `pickletools` parses the program and only
harmless instructions pass. The result can be what the CIFAR archives hold, written by Python 2 or 3: dicts, lists,
tuples, numbers, text and bytes in any protocol, and arrays of numbers in protocols 2 to 5.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastebm.data.errors import raise_as_data_error

_NUMBERS = re.compile(r"[ui][1248]|f[248]|b1")
_MAX_INTEGER = 2**63
_MAX_INSTRUCTIONS = 2_000_000  # CIFAR-100 has 300,000; also limits memo indices, for which the unpickler allocates
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_SETS_KEYS = {"SETITEM", "SETITEMS", "DICT"}
_ALLOWED = {
    *("PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS"),
    *("MEMOIZE", *_LITERALS, *_PUTS, *_GETS, *_SETS_KEYS),
}


def read_pickle(name: str, content: bytes) -> Any:
    """The object in a pickle.

    Bytes, which are also the text of Python 2, become text (latin-1), and arrays become numpy arrays, if they are the
    object itself, an item of it, or a key or value of it.

    Raises DataError, with `name`, for any other pickle.
    """
    with raise_as_data_error(name, "is no pickle of arrays and plain containers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in text, which is not used
        _check_instructions(content)
        value = _convert(_Unpickler(content).load())
        if isinstance(value, list):
            return [_convert(item) for item in value]
        if isinstance(value, dict):
            value = {_convert(key): _convert(item) for key, item in value.items()}
        if not isinstance(value, str | int | float | tuple | dict | np.ndarray | None):
            raise ValueError("it ends with what is no plain data")
        return value


def _check_instructions(content: bytes) -> None:
    """Raises ValueError for a program that could run code, or take much more memory, stack or time than its length.

    It follows the unpickler's stack, because a key of a dict is hashed when it is set. A deeply nested tuple would then
    overflow the interpreter's stack, and tuples that each contain the one before twice would take forever.
    """
    stack: list[bool] = []  # for each object whether it is known to be text, a number or a stand-in
    marks: list[int] = []
    memo: dict[Any, bool] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name, before = opcode.name, opcode.stack_before
        if count == _MAX_INSTRUCTIONS:
            raise ValueError(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")
        if name not in _ALLOWED:
            raise ValueError(f"the instruction {name} is not one of plain data")
        if isinstance(argument, int) and abs(argument) >= (_MAX_INSTRUCTIONS if name in _PUTS else _MAX_INTEGER):
            raise ValueError("a number is too large")
        if name in _PUTS or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if pickletools.markobject in before:
            if not marks:
                raise ValueError("a mark is missing")
            first = marks.pop()
            items, height = stack[first + 1 :], first - before.index(pickletools.markobject)
        else:
            items, height = stack[-2:], len(stack) - len(before)
        if name in _SETS_KEYS and not all(items[::2]):
            raise ValueError("a key of a dict is neither text nor number")
        del stack[max(0, height) :]
        if name == "MARK":
            marks.append(len(stack))
        is_literal = name in _LITERALS or name == "REDUCE" or (name in _GETS and memo.get(argument, False))
        stack += [is_literal] * len(opcode.stack_after)
    if stack:
        raise ValueError("it does not end with a single object")


class _Name:
    """Stands for a name of numpy's: it can be called like a function, and refuses every state set on it."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            raise ValueError("it calls what is no function")
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets a state of what is no array")


class _Type:
    """Stands for a dtype: its code, such as "u1", and the byte order, which its state brings."""

    def __init__(self, code: Any, *_: Any) -> None:
        code = _convert(code)
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            shown = repr(code[:40]) if isinstance(code, str) else type(code).__name__
            raise ValueError(f"an array of type {shown} is not one of numbers")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """Takes the state that numpy writes, (version, byte order, ...), of which only the order matters."""
        if not isinstance(state, tuple) or len(state) < 2 or _convert(state[1]) not in ("|", "<", ">", "="):
            raise ValueError("a byte order is unknown")
        self.dtype = self.dtype.newbyteorder(_convert(state[1]))


class _Array:
    """Stands for an array, which is made when its state is set."""

    def __init__(self, make: Callable[[Any, Any, bool, Any], NDArray[Any]]) -> None:
        self._make = make
        self.value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or self.value is not None:
            raise ValueError("it sets a state of what is no array")
        self.value = self._make(state[1], state[2], bool(state[3]), state[4])


class _ArrayMaker:
    """Makes the arrays of one pickle, of which all together may take `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.array_type = _Name()
        self.budget = budget

    def reconstruct(self, kind: Any = None, *_: Any) -> _Array:
        if kind is not self.array_type:
            raise ValueError("it makes an array in an unknown way")
        return _Array(self.make)

    def frombuffer(self, content: Any, kind: Any, shape: Any, order: Any) -> _Array:
        array = _Array(self.make)
        array.__setstate__((None, shape, kind, order == "F", content))
        return array

    def make(self, shape: Any, kind: Any, fortran_order: bool, content: Any) -> NDArray[Any]:
        if not isinstance(kind, _Type) or not isinstance(shape, tuple):
            raise ValueError("an array has no type or no shape")
        if len(shape) > 8 or not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError("an array has an impossible shape")
        if not isinstance(content, str | bytes | bytearray):
            raise ValueError("an array comes without bytes")
        self.budget -= len(content)
        if self.budget < 0:
            raise ValueError("its arrays are larger than the file")
        if len(content) != math.prod(shape) * kind.dtype.itemsize:
            raise ValueError(f"an array {kind.dtype} {shape} comes with {len(content):,} bytes")
        content = content.encode("latin-1") if isinstance(content, str) else content
        return np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran_order else "C")


class _Unpickler(pickle.Unpickler):
    """Python's unpickler with stand-ins for the few names that are resolved at all."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), fix_imports=False, encoding="bytes")
        # Each array has its bytes in the file once; a hostile program would copy the same bytes over and over.
        maker = _ArrayMaker(budget=2 * len(content))
        self._names = {
            "numpy.core.multiarray._reconstruct": _Name(maker.reconstruct),
            "numpy.core.numeric._frombuffer": _Name(maker.frombuffer),
            "numpy.ndarray": maker.array_type,
            "numpy.dtype": _Name(_Type),
            "_codecs.encode": _Name(_encode),
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)  # the module's name in numpy 2 and 1
        if full not in self._names:
            raise ValueError(f"it asks for {full[:80]!r}, which is no array")
        return self._names[full]


def _encode(text: Any, encoding: Any = None) -> str:
    """Stands for `_codecs.encode`, with which Python 3 writes bytes as latin-1 text in protocols 0 to 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("it encodes text in an unknown way")
    return text


def _convert(value: Any) -> Any:
    """The array of a stand-in, and bytes as text; anything else as it is."""
    if isinstance(value, _Array):
        return value.value
    return value.decode("latin-1") if isinstance(value, bytes | bytearray) else value
