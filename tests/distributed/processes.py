"""Processes that work together, for tests: forks of one that has imported everything, with torchrun's variables.

Only rank 0 may change anything in the folder in which it works; the others fail where they try.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

LIMIT = 120
"""Seconds that any of these may take, on a busy machine."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.distributed.tasks"])


@dataclass(frozen=True)
class Outcome:
    """What a process came to: the result of its task, or the traceback of its error, and what it printed."""

    result: Any
    error: str
    printed: str
    errors: str


def run(size: int, task: Callable[..., Any], *arguments: Any, **environment: str) -> list[Any]:
    """The results of `task(*arguments)` in `size` processes, none of which may fail."""
    outcomes = outcomes_of(size, task, *arguments, **environment)
    for outcome in outcomes:
        assert not outcome.error, outcome.error
    return [outcome.result for outcome in outcomes]


def outcomes_of(size: int, task: Callable[..., Any], *arguments: Any, **environment: str) -> list[Outcome]:
    """What each of `size` processes comes to that calls a task; those that take too long are killed."""
    store = meeting_place()
    started = []
    for rank in range(size):
        place = places(size, rank, store.port) | {"FASTEBM_TIMEOUT": "60"} | environment
        receiver, sender = _forks.Pipe(duplex=False)
        process = _forks.Process(target=_work, args=(place, task, arguments, sender))
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        end = time.monotonic() + LIMIT
        return [_received(receiver, end - time.monotonic()) for _, receiver in started]
    finally:
        for process, _ in started:
            process.join(2)
            process.kill()
            process.join()


def meeting_place() -> Any:
    """A store on a free port, as torchrun's own; it is there as long as it is kept."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LIMIT))


def places(size: int, rank: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun gives a process."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    own_store = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in place.items()} | own_store


def _forbid_changes(event: str, arguments: Any) -> None:
    """An audit hook that raises where a file or folder below the working folder is made, changed or removed."""
    if event == "open":
        path, mode, flags = arguments
        changes = isinstance(mode, str) and set(mode) & set("wax+")
        changes = changes or (mode is None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        path, changes = arguments[0], True
    else:
        return
    if changes and isinstance(path, str | bytes) and os.path.realpath(os.fsdecode(path)).startswith(os.getcwd() + "/"):
        raise PermissionError(f"{event} of {os.fsdecode(path)} by another rank than the first")


def _received(receiver: Connection, seconds: float) -> Outcome:
    if not receiver.poll(max(0.0, seconds)):
        return Outcome(None, f"it took longer than {LIMIT} s", "", "")
    try:
        outcome: Outcome = pickle.loads(receiver.recv_bytes())
    except EOFError:
        return Outcome(None, "the process died", "", "")
    return outcome


def _work(place: dict[str, str], task: Callable[..., Any], arguments: Sequence[Any], sender: Connection) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LIMIT - 5, exit=True)
    if place["RANK"] != "0":
        sys.addaudithook(_forbid_changes)
    printed, errors = io.StringIO(), io.StringIO()
    result, error = None, ""
    with redirect_stdout(printed), redirect_stderr(errors):
        try:
            result = task(*arguments)
        except BaseException:
            error = traceback.format_exc()
    # Not `send`, by which tensors would stay in the memory of a process that ends.
    sender.send_bytes(pickle.dumps(Outcome(result, error, printed.getvalue(), errors.getvalue())))
