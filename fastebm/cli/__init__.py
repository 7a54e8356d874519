"""The command line `fastebm`: parses the name of the command, runs it, and turns errors into exit codes.

docs/command-line.md documents exit codes and streams. Only the file of the command that is asked for is imported, so
that `fastebm --help` does not need PyTorch.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import fastebm
from fastebm import distributed
from fastebm.cli.arguments import lacks_memory, one_line_warnings, print_error
from fastebm.cli.parser import ArgumentsError, Parser, closest, parse
from fastebm.cli.signals import StopSignals
from fastebm.cli.streams import StandardStreams

COMMANDS = {
    "demo": "train on handwritten digits, sample, and judge the samples, in minutes",
    "train": "train a model on your images",
    "resume": "continue a run that was stopped",
    "sample": "draw samples from a run",
    "generate": "write any number of samples of a coarse-to-fine run to files; continues after a kill",
    "denoise": "remove noise from images",
    "inpaint": "fill in missing parts of images",
    "translate": "carry images of another domain over into the domain of a run",
    "interpolate": "show paths between samples and between images",
    "diagnose": "say whether the chains of a run mix, drift, or disagree",
    "flight": "show why the guard of a run went back",
    "detect": "tell images like the training images from others",
    "restore": "restore degraded images: super-resolution, colorization, deblurring and others",
    "evaluate": "compare samples with real images",
    "report": "write one HTML page of a run: samples, judgement, curves, settings",
    "bench": "measure how fast the Langevin chains of an energy are",
    "info": "show versions, devices and backends, or describe a run",
    "build": "compile the operators of an installed package",
}
"""What each command does. Command NAME is the class Name in fastebm/cli/NAME.py, called without arguments."""
METHODS = {
    "coarse-to-fine": "CF-EBM: one energy per resolution, each grown out of the one below",
    "ec-vae": "EC-VAE: a variational autoencoder that an energy calibrates",
    "ec-posterior": "a variational autoencoder whose latent vectors short chains refine",
    "ec-flow": "a normalising flow that an energy calibrates",
}
"""What each method of `fastebm train` trains."""
LINGER = 3.0
"""Seconds that a process waits after an error that another one tells of: torchrun ends all when the first has ended,
and the other one may have files to clean up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Without `arguments` it is the program: it takes them from `sys.argv`, handles Ctrl-C and SIGTERM, and holds on where
    standard output or error are gone. With them it leaves the process as it is.

    >>> from fastebm.cli import main
    >>> main(["info", "no-such-folder"])
    2
    """
    signals = StopSignals()
    if arguments is not None:
        return _run(list(arguments), signals)
    with signals.handled():
        streams = StandardStreams()
        with streams.replaced(), _quiet_unless_first():
            code = _run(sys.argv[1:], signals) or signals.exit_code or streams.exit_code()
            if signals.number is not None:
                streams.flush()
                os._exit(code)  # everything is cleaned up: no thread of a library may keep the process
    if code and not distributed.told():
        time.sleep(LINGER)
    return code


def _run(arguments: list[str], signals: StopSignals) -> int:
    """Parses a command and runs it, on rank 0 if there are several; a command that trains runs on all of them."""

    def work() -> int:
        command = _parse(arguments)
        _check_working_folder()
        importlib.import_module("torch")  # the seconds in which a signal has nothing to clean up
        with one_line_warnings(), distributed.launched() as ranks:
            if getattr(command, "on_every_rank", False):
                signals.working = True
                return _code_of(command, signals)
            signals.working = ranks.first
            if not ranks.first:
                signals.end_at_once()  # they have nothing to clean up
            return _code_of(lambda: distributed.led(lambda: _code_of(command, signals)), signals)

    return _code_of(work, signals)


def _code_of(work: Callable[[], int], signals: StopSignals) -> int:
    """The exit code of a piece of work; its error is one line, which one of several processes prints."""
    try:
        return int(work())
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt as interrupt:
        return _stopped(interrupt, signals)
    except Exception as error:
        if signals.number is not None:  # a library made another error of the interrupt
            return _stopped(error, signals)
        code = _exit_code(error)
        if code is None:
            raise
        if distributed.speaks(error):
            print_error(error)
        return code


@contextmanager
def _quiet_unless_first() -> Iterator[None]:
    """A block in which only the first of several processes writes to standard output."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as null, redirect_stdout(null):
        yield


def _check_working_folder() -> None:
    """Raises ValueError where the working folder was deleted: libraries below torch would end the process."""
    try:
        os.getcwd()
    except OSError:
        raise ValueError("the working folder does not exist any more: change to another one") from None


def _stopped(error: BaseException, signals: StopSignals) -> int:
    if distributed.speaks(error):
        print(
            "\nfastebm: stopped; given again, the same command goes on from the last checkpoint, or from what is drawn",
            file=sys.stderr,
        )
    return signals.exit_code or 128 + signal.SIGINT


def _parse(arguments: list[str]) -> Any:
    """The command that the arguments ask for, ready to be called."""
    name = _choose("fastebm", "command", "Energy-based image models: train, sample, restore.", COMMANDS, arguments)
    if name == "train":
        method = _choose("fastebm train", "method", "Train a model on your images.", METHODS, arguments[1:])
        from fastebm.cli.train import parse_train

        return parse_train(method, arguments[2:])
    command = getattr(importlib.import_module(f"fastebm.cli.{name}"), name.capitalize())
    return parse(command, f"fastebm {name}", arguments[1:])


def _choose(prog: str, kind: str, description: str, choices: Mapping[str, str], arguments: list[str]) -> str:
    """The choice that the first argument names. Prints and exits where it is --help or --version.

    Raises ArgumentsError where it is none of the choices.
    """
    given = arguments[0] if arguments else ""
    if given in choices:
        return given
    parser = Parser(prog, description=description)
    parser.add_argument("--version", action="version", version=f"fastebm {fastebm.__version__}")
    subparsers = parser.add_subparsers(metavar=kind.upper(), title=f"{prog} {kind.upper()} --help explains each")
    for name, text in choices.items():
        subparsers.add_parser(name, help=text, add_help=False, prog=name)
    if given in ("-h", "--help", "--version"):
        parser.parse_args([given])
    said = f"{prog} has no {kind} {given!r}" if arguments else f"{prog} needs a {kind}"
    raise ArgumentsError(f"{said}; there are {', '.join(choices)}{closest(given, choices)}")


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that one line explains; None for a bug, which has to show its traceback."""
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return 2
    if isinstance(error, FloatingPointError | distributed.LostRankError) or lacks_memory(error):
        return 1
    if not isinstance(error, RuntimeError):
        return None
    from fastebm.training import DivergedError, RunError, StoppedError

    if isinstance(error, StoppedError):
        return 128 + signal.SIGTERM
    return 2 if isinstance(error, RunError) else 1 if isinstance(error, DivergedError) else None
