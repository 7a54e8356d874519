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
    stem = os.fsdecode(os.fsencode(path.name)[:200])  # a name may be 255 bytes long
    handle, name = tempfile.mkstemp(prefix=f".{stem}.", suffix=PART, dir=path.parent)
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


def check_writable(path: str | Path, *, overwrite: bool = False) -> Path:
    """`path` as a Path, if a file can be written there: asked before the work whose result it is to hold.

    Raises ValueError, with the reason and a remedy, where it can't: an existing file without `overwrite`, a folder of
    that name, a parent that is missing or no folder, a name too long, no permission, a disk without any room.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: a file is to be written, so name one in it")
        if not overwrite and os.path.lexists(path):
            raise ValueError(f"{path} exists: --overwrite replaces it, or choose another name")
        if not path.parent.exists():
            raise ValueError(f"the folder {path.parent} of {path.name} does not exist")
        path.lstat()  # for a name too long
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}") from error
    try:
        handle, name = tempfile.mkstemp(prefix=".", suffix=PART, dir=path.parent)
        try:
            os.write(handle, bytes(1))
        finally:
            os.close(handle)
            os.unlink(name)
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}") from error
    return path


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
