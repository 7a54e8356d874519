"""A process that trains, for tests that stop it from outside.

It forks a child for each order that it reads, so that torch is imported once and not for each of a dozen kills. An
order is one JSON line, {"path": ..., "config": {...}, "limit": bytes or null}; the child's id goes to stdout, and so
does a line for each line of its log, and its end.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

import torch

from fastebm.data import digits
from fastebm.training import CoarseToFineConfig, RunError, StoppedError, train


def say(**content: Any) -> None:
    # One write a line: a kill can't leave half of one to be joined with the next child's.
    os.write(1, (json.dumps(content) + "\n").encode())


def train_quietly(order: dict[str, Any], images: torch.Tensor) -> None:
    say(pid=os.getpid())
    if order["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    config = CoarseToFineConfig.from_json(order["config"])
    try:
        train(
            config,
            images,
            order["path"],
            progress=False,
            save_pictures=False,
            on_log=lambda line: say(iteration=line["iteration"]),
        )
        say(ended="finished")
    except (RunError, StoppedError) as error:
        say(ended=type(error).__name__, message=str(error))


def main() -> None:
    torch.set_num_threads(1)
    images = digits("train")[0]
    torch.optim.Adam([torch.zeros(1)])  # its first use imports for a second, which each child would have to wait for
    for text in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                train_quietly(json.loads(text), images)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        say(status=status)


if __name__ == "__main__":
    main()
