"""What `fastebm train` and `fastebm resume` share: threads, warnings on one line, and the report at the end."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastebm.runs.folder import RunFolder
from fastebm.training import Run


def report_training(folder: RunFolder, train: Callable[[], Run]) -> int:
    """Trains with as many threads as the run in the folder began with, and says what came of it."""
    if RunFolder.is_run(folder.path) and (threads := folder.threads()):
        torch.set_num_threads(threads)  # with others, library convolutions may sum in another order
    before = folder.checkpoints.iterations()[-1:]
    with _one_line_warnings():
        run = train()
    if before == [run.iteration]:
        print(f"{run.path} was finished before: {run.iteration} iterations. `fastebm train --out` makes a new one.")
    else:
        print(
            f"{run.path}: trained {run.iteration} iterations. samples.png and curves.png in it show the result, "
            "log.jsonl has the numbers."
        )
    print(f"fastebm sample {run.path} draws more samples.")
    return 0


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Within the block each warning is one line on stderr, without its place in the code, and none is dropped."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"\nfastebm: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = show
        yield
