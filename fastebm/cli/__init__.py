"""The command `fastebm`.

What a user gave wrongly is one line on stderr and exit code 2; a run that diverged, chains that are not finite, or a
build that failed are exit code 1.
A run that SIGTERM stopped, with its last update saved, is exit code 143, and one that Ctrl-C stopped 130.
FASTEBM_TRACEBACK=1 shows the traceback behind such a line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from fastebm.cli.arguments import print_error
from fastebm.cli.bench import Bench
from fastebm.cli.demo import Demo
from fastebm.cli.detect import Detect
from fastebm.cli.evaluate import Evaluate
from fastebm.cli.generate import Generate
from fastebm.cli.info import Build, Info
from fastebm.cli.restoration import Denoise, Inpaint
from fastebm.cli.restore import Restore
from fastebm.cli.sample import Sample
from fastebm.cli.train import Resume, train_command
from fastebm.cli.translation import Interpolate, Translate
from fastebm.training import DivergedError, RunError, StoppedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        command = _parse(sys.argv[1:] if arguments is None else list(arguments))
        return command()
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RunError, OSError, ModuleNotFoundError) as error:
        print_error(error)
        return 2
    except (DivergedError, FloatingPointError) as error:
        print_error(error)
        return 1
    except StoppedError as error:
        print_error(error)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("\nstopped; a run goes on from its last checkpoint when its command is given again", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> Any:
    training = train_command(arguments) | Resume
    tasks = Sample | Generate | Denoise | Inpaint | Translate | Interpolate | Detect | Restore
    commands = Demo | training | tasks | Evaluate | Bench | Info | Build
    description = "Energy-based image models: train, sample, measure, and see what runs here."
    return tyro.cli(commands, prog="fastebm", description=description, args=arguments)  # type: ignore
