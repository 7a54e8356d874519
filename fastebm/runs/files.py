"""Atomic writes: after a crash or a kill, a file is either complete or absent."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"
"""The end of the name of a file that is still being written; the name begins with a dot."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for the block to write to; at its end the file is synced and renamed to `path`.

    After an exception, in the block or while syncing (a full disk), `path` is as it was before.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)  # without it a power cut may undo the rename


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, completely or not at all. Raises ValueError for not-a-number."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text)


def finite_json(content: Any) -> Any:
    """The same content for `write_json`, with None for numbers that are infinite or NaN."""
    if isinstance(content, Mapping):
        return {name: finite_json(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
