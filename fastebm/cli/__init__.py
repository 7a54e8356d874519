"""The command line `fastebm`: parses the name of the command, runs it, and turns errors into exit codes.

A user error is one line on stderr and exit code 2. A run that diverged, chains that are not finite, and a build that
failed are one line and exit code 1. A run that SIGTERM stopped saves its last update and exits with 143; one that
Ctrl-C stopped exits with 130. FASTEBM_TRACEBACK=1 shows the traceback of an error in place of the line.

Only the file of the command that is asked for is imported, so that `fastebm --help` needs neither PyTorch nor tyro.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import fastebm
from fastebm.cli.arguments import print_error

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
    "detect": "tell images like the training images from others",
    "restore": "restore degraded images: super-resolution, colorization, deblurring and others",
    "evaluate": "compare samples with real images",
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    >>> from fastebm.cli import main
    >>> main(["info", "no-such-folder"])
    2
    """
    try:
        return int(_parse(sys.argv[1:] if arguments is None else list(arguments))())
    except BrokenPipeError:  # the reader of our output is gone, as `head` is after its lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command continues a training from its last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print_error(error)
        return code


def _parse(arguments: list[str]) -> Any:
    """The command that the arguments ask for, ready to be called."""
    name = _choose("fastebm", "Energy-based image models: train, sample, restore and measure.", COMMANDS, arguments)
    if name == "train":
        method = _choose("fastebm train", "Train a model on your images.", METHODS, arguments[1:])
        from fastebm.cli.train import parse_train

        return parse_train(method, arguments[2:])
    from fastebm.cli.parser import parse

    command = getattr(importlib.import_module(f"fastebm.cli.{name}"), name.capitalize())
    return parse(command, f"fastebm {name}", arguments[1:])


def _choose(prog: str, description: str, choices: Mapping[str, str], arguments: list[str]) -> str:
    """The choice that the first argument names. Prints and exits where it is --help, or none of the choices."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=f"fastebm {fastebm.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, title=f"{prog} COMMAND --help explains each")
    for name, text in choices.items():
        subparsers.add_parser(name, help=text, add_help=False)
    return str(parser.parse_known_args(arguments[:1])[0].command)


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that one line explains; None for a bug, which has to show its traceback."""
    from fastebm.training import DivergedError, RunError, StoppedError

    if isinstance(error, StoppedError):
        return 128 + signal.SIGTERM
    if isinstance(error, DivergedError | FloatingPointError):
        return 1
    return 2 if isinstance(error, ValueError | RunError | OSError | ModuleNotFoundError) else None
