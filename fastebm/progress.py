"""Progress bars: the one way that every loop of the library draws one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastebm.distributed import ranks

REDRAW = 10.0
"""Seconds between two lines where nobody watches: in the log of a job."""


class _Lines:
    """A stream for a bar where nobody watches: each redrawing becomes a line."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n").rstrip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def progress_bar(
    total: int | None, description: str | None, unit: str, *, shown: bool, initial: int = 0
) -> Iterator[Any]:
    """A tqdm bar on stderr, for `update(count)`, at `initial` of `total`; silent if not `shown`.

    It is redrawn five times a second on a terminal and in a notebook. Elsewhere it adds a line every 10 seconds. A
    process without stderr draws none, and of several that work together only rank 0 draws.
    """
    from tqdm.auto import tqdm

    there = sys.stderr is not None and not sys.stderr.closed
    terminal = there and sys.stderr.isatty()
    watched = terminal or "ipykernel" in sys.modules
    with tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        file=None if watched else _Lines(),
        disable=not (shown and there and ranks().first),
        mininterval=0.2 if watched else REDRAW,
        ncols=None if watched else 110,
        dynamic_ncols=terminal,
    ) as bar:
        yield bar
