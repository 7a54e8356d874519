"""Runs the command line in forks of one warm process, where a fresh interpreter would take seconds for each try.

The process imports everything, computes nothing (a fork after threads would hang), and reads a line of JSON for each
try: {"folder": ..., "arguments": [...], "seconds": ...}. It answers with the exit code, or null if a try did not end.
Output and errors of a try are in the files `stdout` and `stderr` of its folder's parent.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

IMPORTED_LATER = (
    *("fastebm.training", "fastebm.tasks", "fastebm.evaluation.speed", "fastebm.plotting"),
    *("torch._dynamo", "torch.export", "torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes"),
    *("sklearn.datasets", "sklearn.svm", "matplotlib.pyplot", "matplotlib.backends.backend_agg"),
)
MEMORY, FILE = 16 * 2**30, 2**28
"""Bytes of address space, and of a file, that a try may take."""


def serve() -> None:
    from fastebm.cli import COMMANDS

    for name in COMMANDS:
        importlib.import_module(f"fastebm.cli.{name}")
    for name in IMPORTED_LATER:
        importlib.import_module(name)

    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            _try(Path(order["folder"]), order["arguments"])
        print(json.dumps(_exit_code(child, order["seconds"])), flush=True)


def _exit_code(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _try(folder: Path, arguments: list[str]) -> None:
    from fastebm.cli import main

    code = 1
    try:
        os.setsid()  # its own processes end with it
        os.chdir(folder)
        for descriptor, name in ((0, os.devnull), (1, "../stdout"), (2, "../stderr")):
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(file, descriptor)
            os.close(file)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        sys.argv = ["fastebm", *arguments]
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
