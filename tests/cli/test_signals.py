"""Ctrl-C and SIGTERM: exit codes at any moment, and interrupts that are never lost."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.cli.tiny_runs import ROOT, start

PROGRAM = """
    import gc, os, signal, sys, time
    import fastebm.cli
    from fastebm.cli import main

    def press(number=signal.{name}): os.kill(os.getpid(), number)
    class Command:
        def __call__(self):
            {body}
            print("went on")
            return 0
    fastebm.cli._parse = lambda arguments: Command()
    sys.exit(main())
"""


def run(body: str, name: str = "SIGINT") -> subprocess.CompletedProcess[str]:
    """A program whose work is `body`; `press()` is the signal called `name`."""
    text = textwrap.dedent(PROGRAM).format(name=name, body=textwrap.dedent(body).strip().replace("\n", "\n        "))
    return subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_one_signal_cleans_up_and_stops(name: str) -> None:
    done = run(
        """
        try:
            press(); time.sleep(60)
        finally:
            print("cleaned up")
        """,
        name,
    )
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stdout == "cleaned up\n"
    assert done.stderr.strip() == (
        "fastebm: stopped; given again, the same command goes on from the last checkpoint, or from what is drawn"
    )


@pytest.mark.parametrize(
    "body",
    [
        # An exception in a destructor, or in a callback of C, is dropped by Python.
        """
        class Destroyed:
            def __del__(self): press(); time.sleep(0.1)
        Destroyed()
        time.sleep(60)
        """,
        # Libraries clear errors.
        """
        try:
            press(); time.sleep(60)
        except BaseException:
            pass
        time.sleep(60)
        """,
        # Libraries make another error of it.
        """
        try:
            press(); time.sleep(60)
        except BaseException:
            raise ImportError("numpy can't be imported") from None
        """,
        # The work ends before anything could be raised again.
        """
        try:
            press(); time.sleep(60)
        except BaseException:
            pass
        """,
    ],
    ids=["destructor", "cleared", "converted", "at the end"],
)
def test_an_interrupt_is_never_lost(body: str) -> None:
    done = run(body)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_a_clean_up_is_not_interrupted_by_the_same_signal() -> None:
    done = run(
        """
        try:
            press(); time.sleep(60)
        finally:
            time.sleep(2); print("cleaned up")
        """
    )
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")


def test_the_second_signal_ends_a_clean_up_and_the_third_everything() -> None:
    body = """
        try:
            press(); time.sleep(60)
        finally:
            try:
                press(); time.sleep(60)
            finally:
                {last}
                print("cleaned up", flush=True)
        """
    done = run(body.format(last="pass"))
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")
    done = run(body.format(last="press(); time.sleep(60)"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_signals_that_the_parent_ignores_stay_ignored() -> None:
    child = textwrap.dedent(PROGRAM).format(name="SIGINT", body="press()")
    program = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    program += f"sys.exit(subprocess.call([sys.executable, '-c', {child!r}]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_it_still_imports(tmp_path: Path, number: int, code: int) -> None:
    process = start("info", cwd=tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch_cpu" not in maps.read_text():  # handlers are there before torch is
        time.sleep(0.001)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed, errors) == (code, "", "")
