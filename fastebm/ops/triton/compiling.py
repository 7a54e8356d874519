"""Kernels of one call compiled side by side, where each would be compiled alone at its first launch."""

from __future__ import annotations

import contextvars
import gc
import os
import sys
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import triton
from triton.compiler import CompiledKernel

from .philox import INTERPRETED

__all__ = ["Launcher", "launch_together"]

Launcher = Callable[..., Any]
"""Called as launcher(kernel, blocks, *arguments, **options)."""

# Threads of the compiler. Most of its work, and all of the assembler's, leaves Python's lock.
MOST_THREADS = 16
# Kinds of calls whose kernels are known to be compiled.
KEPT = 256
_known: dict[Hashable, None] = {}
# CPython's parser may fail where threads share it, in these versions (see `_compiled`), and is asked again this often.
PARSER_FAILS = sys.version_info < (3, 12)
PARSES = 4


def launch_together(kind: Hashable, launch_all: Callable[[Launcher], None]) -> None:
    """`launch_all` makes its launches by what it is given. At the first call of a kind, they are compiled in threads.

    A kernel that doesn't compile says so when it is launched.
    """
    if not INTERPRETED and kind not in _known:
        # In a context of its own: Triton 3.6 forgets to leave the mode where Ctrl-C ends it.
        contextvars.copy_context().run(_compile_together, launch_all)
        while len(_known) >= KEPT:
            _known.pop(next(iter(_known)), None)
        _known[kind] = None
    launch_all(_launched)


class _Threads(ThreadPoolExecutor):
    """Threads that a `triton.AsyncCompileMode` hands its compilations to."""

    def submit(self, compilation: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(_compiled, compilation)


def _compiled(compilation: Callable[[], Any]) -> Any:
    """The kernel. CPython's parser is asked again where it says SystemError.

    Up to 3.11 it counts its depth for all threads together (python/cpython#106905), and finds the count wrong
    where a garbage collection within it lets another thread parse. `_compile_together` holds collections back; a
    program's own `gc.collect()` may still come.
    """
    for _ in range(PARSES - 1):
        try:
            return compilation()
        except Exception as error:
            if not _parser_failed(error):
                raise
    return compilation()


def _parser_failed(error: BaseException | None) -> bool:
    """Whether a SystemError is among what the error followed from. Triton raises its own from what a call met."""
    while error is not None:
        if isinstance(error, SystemError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _compile_together(launch_all: Callable[[Launcher], None]) -> None:
    asked: list[Any] = []

    def compiled(kernel: Any, *launch: Any, **options: Any) -> None:
        asked.append(kernel)
        _only_compiled(kernel, *launch, **options)

    threads = min(MOST_THREADS, os.cpu_count() or 1)
    held_back = PARSER_FAILS and gc.isenabled()
    try:
        if held_back:
            gc.disable()
        with _Threads(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            launch_all(compiled)
    finally:
        if held_back:
            gc.enable()
        for kernel in asked:
            _forget_what_failed(kernel)


def _forget_what_failed(kernel: Any) -> None:
    """A launch then compiles it anew. Triton 3.6 would raise the thread's error at every launch to come."""
    for kernels, *_ in kernel.device_caches.values():
        for key in [key for key, found in kernels.items() if not isinstance(found, CompiledKernel)]:
            del kernels[key]


def _launched(kernel: Any, blocks: int, *arguments: Any, **options: Any) -> None:
    kernel[(blocks,)](*arguments, **options)


def _only_compiled(kernel: Any, blocks: int, *arguments: Any, **options: Any) -> None:
    kernel.warmup(*arguments, grid=(blocks,), **options)
