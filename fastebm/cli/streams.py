"""Standard output and error of the program: text that nobody can read any more never stops the work.

A reader that has gone (`fastebm detect run | head`), a terminal that was closed, and streams that were closed before
the start (`2>&-`) drop the text, and the command goes on to its end. Where text is lost for another reason, such as a
full disk, the command goes on too, and its exit code is 1.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a reader that went away, of a terminal that did, and of a file that is only open for reading, which a shell
script has in place of a stream that was closed before it began."""


class _Descriptor(io.FileIO):
    """A standard stream without a buffer. Writing to it never raises; `failure` is the first error that lost text."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that is full, and set not to wait
                select.select([], [self], [])
            return written
        except OSError as error:
            if error.errno in GONE:
                _open_null(self.fileno())
            else:
                self.failure = self.failure or error
            return memoryview(data).nbytes


class StandardStreams:
    """Puts streams in the place of `sys.stdout` and `sys.stderr`, for a block of the program."""

    def __init__(self) -> None:
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:  # closed: else the next file that is opened would get this number, and our text
                _open_null(descriptor)
        self._descriptors = [_Descriptor(1), _Descriptor(2)]

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replaces both within the block."""
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(_text_stream, self._descriptors, before)
        try:
            yield
        finally:
            self.flush()
            sys.stdout, sys.stderr = before

    def flush(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    def exit_code(self) -> int:
        """1 where text was lost, which is said on stderr if that can be written; else 0."""
        self.flush()
        for name, descriptor in zip(("standard output", "standard error"), self._descriptors, strict=True):
            if descriptor.failure is not None:
                reason = descriptor.failure.strerror or descriptor.failure
                print(f"fastebm: {name} could not be written: {reason}", file=sys.stderr, flush=True)
                return 1
        return 0


def _text_stream(descriptor: _Descriptor, like: Any) -> io.TextIOWrapper:
    """A text stream with the encoding of `like`, in which characters that it does not have are escaped.

    `like` is None where Python found the stream closed.
    """
    errors = getattr(like, "errors", "strict")
    return io.TextIOWrapper(
        io.BufferedWriter(descriptor),
        encoding=getattr(like, "encoding", "utf-8"),
        errors="backslashreplace" if errors in ("strict", "surrogateescape") else errors,
        line_buffering=getattr(like, "line_buffering", False),
        write_through=getattr(like, "write_through", False),
    )


def _open_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)
