"""Ctrl-C and SIGTERM in the program.

Before the work begins (imports take seconds) a signal ends the process at once. Later it raises KeyboardInterrupt in
the main thread, so that files and processes are cleaned up; a second one does so within the clean-up; the third ends
the process at once. Trainings handle SIGTERM themselves: see `fastebm.training.trainer.signals`.

An interrupt can be lost: Python drops an exception that is raised in a destructor or a callback, and libraries clear
errors. So a timer looks after each signal whether its exception is still on its way, and raises another if it is not.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOOK_AFTER = 0.3
"""Seconds after which an interrupt must be on its way out of the program."""
AT_ONCE = 3
"""The signal with this number ends the process at once."""


class StopSignals:
    """What the signals asked for.

    Attributes:
        number: that of the first signal; None before.
        working: to be set where there is work that needs a clean-up.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.working = False
        self._count = 0
        self._raised: BaseException | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of a program that the first signal stopped, as shells have it; 0 without a signal."""
        return 0 if self.number is None else 128 + self.number

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles the signals within the block, but for those that the parent had this process ignore."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, self._look)
        hook, sys.unraisablehook = sys.unraisablehook, self._hide
        self._show = hook
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            # What is left is the end of the interpreter, which has nothing to clean up.
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            sys.unraisablehook = hook

    def end_at_once(self) -> None:
        """From now on a signal ends the process as if nothing handled it, also while it waits in compiled code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == self._receive:
                signal.signal(number, signal.SIG_DFL)

    def _receive(self, number: int, frame: Any) -> None:
        self._count += 1
        self.number = self.number or number
        if not self.working or self._count >= AT_ONCE:
            os._exit(self.exit_code)
        self._interrupt()

    def _look(self, number: int, frame: Any) -> None:
        error = sys.exception()  # what the interrupted code is handling at this moment
        while error is not None and error is not self._raised:
            error = error.__context__
        if error is None:
            self._interrupt()
        signal.setitimer(signal.ITIMER_REAL, LOOK_AFTER)

    def _interrupt(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, LOOK_AFTER)
        self._raised = KeyboardInterrupt()
        raise self._raised

    def _hide(self, unraisable: Any) -> None:
        if unraisable.exc_value is not self._raised or self._raised is None:
            self._show(unraisable)
