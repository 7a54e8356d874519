"""Atomic writes: after a crash or a kill, a file is either complete or absent; and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"
"""The end of the name of a file that is still being written; the name begins with a dot."""

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]+\.part", re.DOTALL)
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class NoLocksError(OSError):
    """The file system has no locks, as NFS without lockd or Lustre without the option flock."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for the block to write to; at its end the file is synced and renamed to `path`.

    After an exception, in the block or while syncing (a full disk), `path` is as it was before. The temporary file of
    an earlier process that was killed while it wrote `path` is removed: its lock is gone.
    """
    stem = _stem(path)
    for leftover in _leftovers_in(os.path.abspath(path.parent)).get(stem, ()):
        _remove_if_left(path.parent / leftover)
    handle, temporary = _locked_temporary(path.parent, stem)
    try:
        try:
            yield temporary
            sync(temporary)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    finally:
        os.close(handle)
    sync(path.parent)  # without it a power cut may undo the rename


def remove_leftovers(folder: Path) -> None:
    """Removes the files that killed processes have half written in a folder.

    A file stays where a process still writes it, where the file system has no locks to tell, and where it doesn't have
    the name of a temporary file of `replacing`.
    """
    _leftovers_in.cache_clear()
    for names in _leftovers_in(os.path.abspath(folder)).values():
        for name in names:
            _remove_if_left(folder / name)


def is_leftover(name: str, of: str) -> bool:
    """Whether `name` is that of a temporary file of `replacing` for a file called `of`."""
    match = _LEFTOVER.fullmatch(name)
    return match is not None and match["name"] == _stem(Path(of))


def lock(handle: int, *, wait: bool = False) -> bool:
    """Locks an open file for this process, until it is closed. False where another process has locked it.

    Raises NoLocksError where the file system has no locks, and other OSErrors of flock.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            raise NoLocksError(error.errno, error.strerror) from error
        raise
    return True


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
        probe(path.parent)
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}") from error
    return path


def probe(folder: Path) -> None:
    """Writes a byte to a temporary file in `folder`. Raises OSError where that is not possible."""
    handle, name = tempfile.mkstemp(prefix=".probe.", suffix=PART, dir=folder)
    try:
        os.write(handle, bytes(1))
    finally:
        os.close(handle)
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, completely or not at all. Raises ValueError for not-a-number."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises ValueError for anything else: another encoding than UTF-8, NaN, a name that occurs twice, lists nested too
    deep; OSError where the file can't be read.
    """
    return parse_json(path.read_bytes())


def parse_json(text: bytes, *, nan: bool = False) -> dict[str, Any]:
    """The JSON object that a text holds, with `nan` also NaN and Infinity; errors as of `read_json`."""
    constant = None if nan else _no_constant
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=constant)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is not a text in UTF-8") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object, which is { ... }")
    return content


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


def _stem(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:200])  # a name may be 255 bytes long


def _locked_temporary(folder: Path, stem: str) -> tuple[int, Path]:
    """A new temporary file, open and locked, as long as the file system has locks."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{stem}.", suffix=PART, dir=folder)
        try:
            lock(handle, wait=True)
        except OSError:
            return handle, Path(name)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover, in the moment before it was locked


@functools.lru_cache(maxsize=64)
def _leftovers_in(folder: str) -> dict[str, list[str]]:
    """The names of temporary files in a folder by the names that they were to get.

    A process lists a folder once, as one that writes many files there would list ever more of them.
    """
    found: dict[str, list[str]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if (match := _LEFTOVER.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                    found.setdefault(match["name"], []).append(entry.name)
    except OSError:
        pass  # writing there will say why
    return found


def _remove_if_left(path: Path) -> None:
    """Removes a temporary file unless a process holds its lock, or there are no locks."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        if stat.S_ISREG(os.fstat(handle).st_mode) and lock(handle):
            path.unlink(missing_ok=True)
    except OSError:
        return
    finally:
        os.close(handle)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _umask() -> int:
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
