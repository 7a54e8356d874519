"""The owner of what belongs to the whole process: who may change it, and a Ctrl-C that waits until that is done.

A chain changes flags of modules that other threads may use too, and `torch.export` patches `nn.Module`, sets modes of
the whole process, and puts fake tensors in the place of the weights of the module that it exports. So

    exclusive()      one thread at a time: flags, constants, the registry of what is frozen, captures
    exporting()      moreover no other thread is in `evaluating()`
    evaluating()     an energy's own code runs, in any number of threads

All of them nest. Threads never wait in a circle: there is one lock, and a thread that waits for it counts as not
evaluating. Chains on compiled programs need none of this between their two ends.
"""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

__all__ = ["DeferredInterrupt", "collecting_garbage", "evaluating", "exclusive", "exporting"]

_lock = threading.RLock()
# Guards the next two: the thread that exports, and those that evaluate, by their ident.
_gate = threading.Condition()
_exporter: int | None = None
_evaluators: set[int] = set()
# Exporters that wait until the others are done; only one holds the lock, but a set needs no `global`.
_waits: set[int] = set()


class DeferredInterrupt:
    """Inside, SIGINT only takes a note; the handler that was found is called at the end, also after an exception.

    A KeyboardInterrupt within a callback of a weak reference or a `__del__` is printed and dropped by Python, and
    `torch.export` runs thousands of them; another one would leave a module half frozen. A second SIGINT reaches the
    handler at once, so that work that hangs can be stopped. Nothing is deferred outside of the main thread, which gets
    all signals, and where the handler isn't a Python function.
    """

    _active = False

    def __init__(self) -> None:
        self._handler: Any = None
        self._noted: list[FrameType | None] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and not DeferredInterrupt._active:
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                DeferredInterrupt._active = True
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handler is None:
            return
        found = signal.signal(signal.SIGINT, self._handler)
        DeferredInterrupt._active = False
        if found != self._note:  # what ran inside has set another handler, which stays
            signal.signal(signal.SIGINT, found)
        if len(self._noted) == 1:
            self._handler(signal.SIGINT, self._noted[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append(frame)
        if len(self._noted) > 1:
            self._handler(number, frame)


class _Exclusive(DeferredInterrupt):
    def __init__(self, defer: bool) -> None:
        super().__init__()
        self._defer = defer

    def __enter__(self) -> Self:
        if self._defer:
            super().__enter__()
        try:
            if not _lock.acquire(blocking=False):
                _acquire()
        except BaseException:  # a second Ctrl-C, while another thread captures
            super().__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        _lock.release()
        super().__exit__()


def exclusive(defer: bool = True) -> _Exclusive:
    """Inside, no other thread changes the state of the process, and Ctrl-C waits unless `defer` is False.

    To defer costs 7 microseconds.
    """
    return _Exclusive(defer)


@contextmanager
def collecting_garbage() -> Iterator[None]:
    """Nothing that is made inside, and unreachable at the end, is left for the garbage collector to find later.

    A capture leaves thousands of weak references in cycles. Their callbacks would run in whatever code makes the
    collector start next, and an interrupt within one is lost there too. Without collections in between, all of them are
    in the youngest generation, which is quick to collect.
    """
    found = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if found:
            gc.collect(0)
            gc.enable()


def _acquire() -> None:
    """Wait for the lock, and let an exporter that holds it go on if this thread is within an energy's code."""
    me = threading.get_ident()
    with _gate:
        inside = me in _evaluators
        _evaluators.discard(me)
        _gate.notify_all()
    try:
        _lock.acquire()
    finally:
        if inside:
            with _gate:
                _evaluators.add(me)


def _before_fork() -> None:
    """Wait until no other thread is within: the child would inherit locks that nobody can release."""
    _acquire()
    _gate.acquire()


def _after_fork() -> None:
    _gate.release()
    _lock.release()


def _in_child() -> None:
    _evaluators.intersection_update({threading.get_ident()})
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


@contextmanager
def exporting() -> Iterator[None]:
    """Inside, moreover, no other thread runs an energy's own code."""
    global _exporter
    with exclusive():
        outermost = _exporter is None  # within the lock, it is this thread or none
        try:
            with _gate:
                _exporter = me = threading.get_ident()
                _waits.add(me)
                try:
                    _gate.wait_for(lambda: _evaluators <= {me})
                finally:
                    _waits.discard(me)
            yield
        finally:
            if outermost:
                with _gate:
                    _exporter = None
                    _gate.notify_all()


class evaluating:  # noqa: N801  (a function to its users; a generator would cost twice as much in every update)
    """Inside, an energy's own code may run: no other thread exports."""

    __slots__ = ("_me",)

    def __enter__(self) -> None:
        me = threading.get_ident()
        self._me = None if me in _evaluators else me
        if self._me is not None:
            with _gate:
                if _exporter is not None and _exporter != me:
                    _gate.wait_for(lambda: _exporter in (None, me))
                _evaluators.add(me)

    def __exit__(self, *exception: object) -> None:
        if self._me is not None:
            with _gate:
                _evaluators.discard(self._me)
                if _waits:
                    _gate.notify_all()
