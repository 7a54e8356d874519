"""Signals that wait until a block ends."""

import signal
import threading
from collections.abc import Iterator

import pytest

from fastebm.runs.interrupts import uninterrupted


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


def interrupt(times: int, done: list[int]) -> None:
    with uninterrupted(), uninterrupted():
        for number in range(times):
            signal.raise_signal(signal.SIGINT)
            done.append(number)


def fail_interrupted() -> None:
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("wrong")


def test_an_interrupt_comes_after_the_block() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(1, done)
    assert done == [0]


def test_it_comes_after_an_error_too() -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        fail_interrupted()
    assert isinstance(stopped.value.__context__, ValueError)


def test_a_second_one_does_not_wait() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(4, done)
    assert len(done) < 4


def test_the_handler_of_a_program_is_called_once() -> None:
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    with uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        assert not called
    assert called == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    found = []

    def work() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
