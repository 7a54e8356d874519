"""Faults: where the compiler itself fails, instead of refusing an energy, a warning says so, or an error does."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastebm.compiler.import_aten import UnsupportedError

__all__ = ["CompilerFaultError", "FaultWarning", "Faults", "as_faults", "described", "users_level", "warn_of_fault"]

_PACKAGE = Path(__file__).parents[1]
_INSIDE = (f"{_PACKAGE}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", contextlib.__file__)


class FaultWarning(RuntimeWarning):
    """Something of fastebm failed that should work, and something slower runs in its place.

    An energy that has no program is none: that is a plain RuntimeWarning. Benchmarks turn this one into an error.
    """


class CompilerFaultError(UnsupportedError):
    """There is no program because the compiler failed, by an exception that is no refusal; its cause is `__cause__`."""

    def __init__(self, stage: str, error: Exception) -> None:
        super().__init__(stage, located(error))
        self.__cause__ = error


class Faults:
    """What becomes of faults: an error where a program was asked for, else one warning for each.

    Args:
        what: runs in another way after a fault, for messages.
        strict: whether a fault is an error.
    """

    def __init__(self, what: str, strict: bool) -> None:
        self.what = what
        self.strict = strict
        self._said: set[str] = set()

    def reported(self, refusal: UnsupportedError) -> bool:
        """Whether a warning of this one was given already."""
        return str(refusal) in self._said

    def report(self, fault: CompilerFaultError) -> None:
        """Raises RuntimeError if strict; else warns of a fault that was not reported before."""
        if self.strict:
            raise RuntimeError(
                f"engine is 'fused', but the compiler failed for {self.what}: {fault}; engine 'auto' goes on without "
                "what failed, and a warning"
            ) from fault.__cause__
        if str(fault) not in self._said:
            warn_of_fault(f"the compiler failed for {self.what}, which may be slower for it: {fault}")
            self._said.add(str(fault))  # not where the warning was an error: the next call must not be silent


def warn_of_fault(text: str) -> None:
    """A `FaultWarning` at the first line outside of fastebm and PyTorch."""
    warnings.warn(text, FaultWarning, stacklevel=users_level())


def users_level() -> int:
    """How far up the first frame outside of fastebm and PyTorch is, as `warnings.warn` counts in the caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def described(error: BaseException) -> str:
    """An exception in one line: its type, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def located(error: BaseException) -> str:
    """`described`, and the innermost line of fastebm that it passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_PACKAGE)]
    if not frames:
        return described(error)
    place = frames[-1]
    file = Path(place.filename).relative_to(_PACKAGE.parent).as_posix()
    return f"{described(error)} ({place.name}, {file}:{place.lineno})"


@contextmanager
def as_faults(stage: str) -> Iterator[None]:
    """Inside, an exception that is no refusal is raised as CompilerFaultError."""
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:
        raise CompilerFaultError(stage, error) from error
