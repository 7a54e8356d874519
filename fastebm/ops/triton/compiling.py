"""Kernels of one call compiled side by side, where each would be compiled alone at its first launch."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

from .philox import INTERPRETED

__all__ = ["Launcher", "launch_together"]

Launcher = Callable[..., Any]
"""Called as launcher(kernel, blocks, *arguments, **options)."""

# Threads of the compiler. Most of its work, and all of the assembler's, leaves Python's lock.
MOST_THREADS = 16
# Kinds of calls whose kernels are known to be compiled.
KEPT = 256
_known: dict[Hashable, None] = {}


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


def _compile_together(launch_all: Callable[[Launcher], None]) -> None:
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        launch_all(_only_compiled)


def _launched(kernel: Any, blocks: int, *arguments: Any, **options: Any) -> None:
    kernel[(blocks,)](*arguments, **options)


def _only_compiled(kernel: Any, blocks: int, *arguments: Any, **options: Any) -> None:
    kernel.warmup(*arguments, grid=(blocks,), **options)
