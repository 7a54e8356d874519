"""What kernels compile to, by version of Triton and GPU: compiled once in a session, by a process for each version."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (80, 90, 120)
OLDEST, INSTALLED = "3.6.0", "installed"
# All pairs of them, a share of the launches each.
SHARES = 2 * len(CAPABILITIES)
both_versions = pytest.mark.parametrize("version", [OLDEST, INSTALLED])
all_capabilities = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")


def folder_of_the_oldest() -> Path:
    """Where `make test` installs the oldest Triton that is supported, beside the one of the environment."""
    return Path(os.environ.get("FASTEBM_OLDEST_TRITON") or Path(sys.prefix) / f"triton-{OLDEST}").absolute()


def lines_of(version: str, capability: int, kind: str, whole: bool = False) -> list[dict[str, Any]]:
    """What `compile_kernels` says of one kind; of a share of the launches, or the whole of them.

    Skips the test where that version is not there.
    """
    folder = folder_of_the_oldest()
    if version == OLDEST and not (folder / "triton").is_dir():
        pytest.skip(f"Triton {OLDEST} is not in {folder}, where `make test` installs it")
    for each in (OLDEST, INSTALLED):  # side by side
        if each == INSTALLED or (folder / "triton").is_dir():
            _started(each, whole)
    return [line for line in _said(version, whole) if (line["capability"], line["kind"]) == (capability, kind)]


@functools.cache
def _scratch() -> Path:
    """A folder of this session, for Triton's cache and what the processes say."""
    folder = tempfile.TemporaryDirectory(prefix="fastebm-compiled-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _started(version: str, whole: bool) -> subprocess.Popen[bytes]:
    """The process that compiles: without the interpreter, which this one may have in the compiler's place."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTEBM_BACKEND")}
    first = [str(folder_of_the_oldest())] if version == OLDEST else []
    path = [*first, str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    environment = {**kept, "TRITON_CACHE_DIR": str(_scratch() / "cache"), "PYTHONPATH": os.pathsep.join(path)}
    share = (0, 1) if whole else (0 if version == OLDEST else len(CAPABILITIES), SHARES)
    command = [sys.executable, "-m", "tests.gpu.compile_kernels", "--share", *map(str, (*share, *CAPABILITIES))]
    with open(_file(version, whole), "wb") as out, open(_file(version, whole).with_suffix(".err"), "wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=said)
    atexit.register(process.kill)
    return process


@functools.cache
def _said(version: str, whole: bool) -> list[dict[str, Any]]:
    code = _started(version, whole).wait()
    assert code == 0, _file(version, whole).with_suffix(".err").read_text()[-4000:]
    lines = [json.loads(line) for line in _file(version, whole).read_text().splitlines()]
    assert version == INSTALLED or {line["triton"] for line in lines} == {OLDEST}
    return lines


def _file(version: str, whole: bool) -> Path:
    return _scratch() / f"{version}-{'whole' if whole else 'share'}.json"
