"""Errors about image data. Each message begins with the name of the file or data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """A file, folder or data set cannot be read as images. The message names it and says what is wrong with it.

    Control characters in text quoted from a file are escaped, because a terminal would obey them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class NoSplitError(DataError):
    """An image set has no split of the requested name."""


class NoPicturesError(DataError):
    """A folder holds no picture."""


class MixedSizesError(DataError):
    """The pictures of a folder differ in size, and no common size was requested."""


@contextmanager
def raise_as_data_error(name: str, problem: str = "cannot be read") -> Iterator[None]:
    """Turns any exception of the block into a DataError about `name`.

    Use it only around calls of parsers that are not ours: hostile bytes make those raise nearly everything, from
    struct.error over RecursionError to MemoryError.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file or folder") from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{name}: {problem}: {reason[:300]}") from error
