"""Stops by a signal: SIGTERM, after the current update and its checkpoint, and Ctrl-C, at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StoppedError(RuntimeError):
    """A run was stopped by SIGTERM. Its newest checkpoint is of the last update, and it can be resumed."""


class StopRequest:
    """`received` becomes True with the first SIGTERM, `interrupted` with the first Ctrl-C."""

    def __init__(self) -> None:
        self.received = False
        self.interrupted = False

    @classmethod
    @contextmanager
    def handle_signals(cls) -> Iterator[StopRequest]:
        """Handles both within the block. Only the main thread of a process can; elsewhere nothing changes.

        Ctrl-C also does what it did before, which is to raise KeyboardInterrupt. A process that ignores it, as one in
        the background does, still ignores it.
        """
        request = cls()
        if threading.current_thread() is not threading.main_thread():
            yield request
            return
        interrupt = signal.getsignal(signal.SIGINT)

        def terminated(number: int, frame: Any) -> None:
            request.received = True

        def interrupted(number: int, frame: Any) -> None:
            request.interrupted = True
            if callable(interrupt):
                interrupt(number, frame)

        before = signal.signal(signal.SIGTERM, terminated)
        try:
            if callable(interrupt):
                signal.signal(signal.SIGINT, interrupted)
            yield request
        finally:
            if callable(interrupt):
                signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, before)

    def raise_if_interrupted(self) -> None:
        """Raises KeyboardInterrupt after a Ctrl-C whose own KeyboardInterrupt was swallowed.

        It may come while Python runs a destructor or a callback of PyTorch, where exceptions end.
        """
        if self.interrupted:
            raise KeyboardInterrupt
