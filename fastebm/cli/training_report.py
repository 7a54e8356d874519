"""What `fastebm train` and `fastebm resume` share: threads, and the report at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastebm.runs.folder import RunFolder
from fastebm.training import Run


def report_training(folder: RunFolder, train: Callable[[], Run]) -> int:
    """Trains with as many threads as the run in the folder began with, and says what came of it."""
    if RunFolder.is_run(folder.path) and (threads := folder.threads()):
        torch.set_num_threads(threads)  # with others, library convolutions may sum in another order
    before = folder.checkpoints.iterations()[-1:]
    run = train()
    if before == [run.iteration]:
        print(f"{run.path} was finished before: {run.iteration} iterations. `fastebm train --out` makes a new one.")
    else:
        print(
            f"{run.path}: trained {run.iteration} iterations. samples.png and curves.png in it show the result, "
            "log.jsonl has the numbers."
        )
    print(f"fastebm sample {run.path} draws more samples; fastebm report {run.path} makes one page of all this.")
    return 0
