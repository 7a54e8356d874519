"""What goes wrong with data: one error, which begins with the name of the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """A file, folder or data set that can't be read as images. The message says which, and what is wrong with it.

    What the message quotes of a file is escaped: control characters are commands to a terminal.
    """

    def __init__(self, message: str) -> None:
        printable = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(printable))


class NoSplitError(DataError):
    """A set of images has no part of the wanted name."""


class MixedSizesError(DataError):
    """Pictures of one folder differ in size where no size is wanted."""


@contextmanager
def explaining(name: str, doing: str = "can't be read") -> Iterator[None]:
    """Turns whatever a parser of other people raises in the block into a DataError about `name`.

    For blocks that hand the bytes of a file to such a parser, and for no others: hostile bytes make parsers raise
    nearly everything, from struct.error over RecursionError to MemoryError.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file or folder") from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{name}: {doing}: {reason[:300]}") from error
