"""The progress bar of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastebm.progress import progress_bar


class ProgressBar:
    """A bar over all iterations of a run, with the rate, the time left and a few numbers."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    @classmethod
    @contextmanager
    def over(cls, total: int, done: int, shown: bool) -> Iterator[ProgressBar]:
        """A bar at `done` of `total`, silent if not `shown`."""
        with progress_bar(total, None, "it", shown=shown, initial=done) as bar:
            yield cls(bar)

    def go_back(self, iteration: int) -> None:
        # The rate and the time left are those since then.
        self._bar.n = self._bar.initial = self._bar.last_print_n = iteration
        self._bar.start_t = self._bar.last_print_t = time.time()
        self._bar.refresh()

    def advance(self, title: str, **numbers: float) -> None:
        self._bar.set_description(title, refresh=False)
        self._bar.set_postfix({name: f"{value:+.3f}" for name, value in numbers.items()}, refresh=False)
        self._bar.update()
