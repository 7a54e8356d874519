"""Stops on SIGTERM: the current update is finished and saved before the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StoppedError(RuntimeError):
    """A run was stopped by SIGTERM. Its newest checkpoint is of the last update, and it can be resumed."""


class StopRequest:
    """`received` becomes True with the first SIGTERM."""

    def __init__(self) -> None:
        self.received = False

    @classmethod
    @contextmanager
    def handle_sigterm(cls) -> Iterator[StopRequest]:
        """Handles SIGTERM within the block. Only the main thread of a process can; elsewhere nothing changes."""
        request = cls()

        def receive(number: int, frame: Any) -> None:
            request.received = True

        if threading.current_thread() is not threading.main_thread():
            yield request
            return
        before = signal.signal(signal.SIGTERM, receive)
        try:
            yield request
        finally:
            signal.signal(signal.SIGTERM, before)
