"""A polite stop: SIGTERM lets the update at hand end and its result be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StoppedError(RuntimeError):
    """A run was asked to stop by SIGTERM. Its newest checkpoint is of the last update; it can be taken up."""


class StopRequest:
    """`asked` becomes True with the first SIGTERM."""

    def __init__(self) -> None:
        self.asked = False

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator[StopRequest]:
        """Takes SIGTERM over for the block. Only a process's main thread can; elsewhere nothing is changed."""
        request = cls()

        def ask(number: int, frame: Any) -> None:
            request.asked = True

        if threading.current_thread() is not threading.main_thread():
            yield request
            return
        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield request
        finally:
            signal.signal(signal.SIGTERM, before)
