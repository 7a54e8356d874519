"""Ctrl-C and SIGTERM at moments when their exceptions would be lost or would abort the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C and SIGTERM off until the block ends, for blocks of a second that draw figures or import libraries.

    Python raises the exception of a signal anywhere. Compiled code that calls Python then aborts the process or makes
    another error of it; callbacks of weak references drop it. A second signal is not put off. Signals that no Python
    function handles, and those outside of the main thread, act as ever.
    """
    held: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], object]] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)
        if len(held) > 1:
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, hold)
    try:
        yield
    finally:
        for handled, handler in before.items():
            signal.signal(handled, handler)
        if len(held) == 1:
            signal.raise_signal(held[0])
