"""`make release-check` tells what is wrong: its rows, without the builds and installations that they are about."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import release_check
from .cuda_stand_ins import make_stand_ins
from .release_check import FAILED, PASSED, SKIPPED, Table


def test_files_beside_the_rule_are_told(tmp_path: Path) -> None:
    archive = tmp_path / "fastebm.whl"
    archive.write_bytes(b"")
    table = Table()
    release_check.compare(table, "wheel", {"a", "b"}, {"a", "b"}, archive)
    assert (table.rows[0][2], table.failures()) == (PASSED, 0)
    release_check.compare(table, "wheel", {"a", "surplus"}, {"a", "missing"}, archive)
    assert (table.rows[1][2], table.failures()) == (FAILED, 1)
    assert table.rows[1][3] == "missing: missing"
    assert table.text().splitlines()[1].split() == [
        "wheel",
        "holds",
        "what",
        "it",
        "should",
        FAILED,
        "missing:",
        "missing",
    ]


@pytest.mark.parametrize(
    ("libraries", "outcome"),
    [({"libc10.so": None, "libtorch_cpu.so": None}, PASSED), ({"libc10.so": None, "libjpeg.so.62": None}, FAILED)],
)
def test_a_library_that_nobody_brings_is_told(libraries: dict, outcome: str, tmp_path: Path) -> None:
    versions = {"libc.so.6": ["GLIBC_2.9", "GLIBC_2.27"], "libm.so.6": ["GLIBC_2.14"]}
    said = {"sym_tag": "manylinux_2_27_x86_64", "versioned_symbols": versions, "external_libs": libraries}
    tool = tmp_path / "auditwheel"
    tool.write_text(f"#!/bin/sh\necho INFO: first\ncat <<'END'\n{json.dumps(said)}\nEND\n")
    tool.chmod(0o755)
    table = Table()
    release_check.audit(table, tool, [tmp_path / "fastebm.whl"], tmp_path)
    assert table.rows[0][2] == outcome
    assert ("libjpeg" in table.rows[0][3]) == (outcome == FAILED)


def test_versions_are_ordered_by_number() -> None:
    assert max(["GLIBC_2.9", "GLIBC_2.27", "GLIBC_2.2.5"], key=release_check.by_number) == "GLIBC_2.27"


def test_builds_for_cuda_are_installed_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = {
        "torch": "torch==2.11.0",
        "nvidia-cublas": "nvidia-cublas==13",
        "fastebm": "fastebm==0",
        "numpy": "numpy==2",
    }
    ran: list[tuple[str, ...]] = []

    def run(*command: str | Path, **_: object) -> tuple[bool, str]:
        ran.append(tuple(map(str, command)))
        return True, ""

    monkeypatch.setattr(release_check, "new_environment", lambda folder: ("pip",))
    monkeypatch.setattr(release_check, "planned", lambda *_: (plan, ""))
    monkeypatch.setattr(release_check, "run", run)
    monkeypatch.setattr(release_check, "make_stand_ins", lambda libraries, folder: None)
    arguments = ("oldest", Path("fastebm.whl"), "torch==2.11.0", "triton==3.6.0")
    table = Table()
    assert release_check.install(table, *arguments, "skip", tmp_path) is None
    assert ran == []
    assert (table.rows[0][2], "only for CUDA" in table.rows[0][3]) == (SKIPPED, True)

    (tmp_path / "oldest" / "lib" / "python3" / "site-packages" / "torch" / "lib").mkdir(parents=True)
    variables = release_check.install(table, *arguments, "stand-ins", tmp_path)
    assert variables == {"LD_LIBRARY_PATH": str(tmp_path / "stand-ins-oldest")}
    assert ran == [("pip", "install", "--quiet", "--no-deps", "fastebm.whl", "torch==2.11.0", "numpy==2")]

    assert release_check.install(table, *arguments, "take", tmp_path) == {}
    assert ran[1][1:] == ("install", "--quiet", "torch==2.11.0", "triton==3.6.0", "fastebm.whl")


def test_what_is_not_to_be_had_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(release_check, "new_environment", lambda folder: ("pip",))
    monkeypatch.setattr(release_check, "planned", lambda *_: ({}, "No matching distribution found"))
    table = Table()
    assert release_check.install(table, "oldest", Path("a.whl"), "torch==0", "triton", "skip", tmp_path) is None
    assert [outcome for _, _, outcome, _ in table.rows] == [SKIPPED, SKIPPED]
    assert "No matching distribution" in table.rows[1][3]


def test_examples_that_need_more_are_skipped_and_faults_are_told(tmp_path: Path) -> None:
    home, play = tmp_path / "home", tmp_path / "play"
    (home / "bin").mkdir(parents=True)
    play.mkdir()
    (home / "bin" / "python").symlink_to(sys.executable)
    programs = {"good": "print('fine')", "broken": "raise SystemExit('broken here')", "more": "import no_such_package"}
    table = Table()
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(program)
        release_check.check_example(table, "newest", home, play, dict(os.environ), tmp_path / f"{name}.py")
    assert [outcome for _, _, outcome, _ in table.rows] == [PASSED, FAILED, SKIPPED]
    assert table.rows[1][3] == "broken here"
    assert table.rows[2][3].endswith("no_such_package")


def test_stand_ins_let_a_library_load_without_cuda(tmp_path: Path) -> None:
    """A library that asks for a version of libcudart and for a function without one finds both."""
    missing = [name for name in ("cc", "nm", "readelf") if shutil.which(name) is None]
    if missing or sys.platform != "linux":
        pytest.skip(f"not on Linux, or not installed: {missing}")
    files = {
        "cudart.c": "int cudaGetDeviceCount(void) { return 0; }",
        "cudart.map": "libcudart.so.99 { global: *; };",
        "nccl.c": "int ncclCommInit(void) { return 0; }",
        "user.c": "int cudaGetDeviceCount(void); int ncclCommInit(void);"
        "int both(void) { return cudaGetDeviceCount() + ncclCommInit(); }",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "lib").mkdir()
    shared = ("cc", "-shared", "-fPIC", "-o")
    cudart = ("-Wl,-soname,libcudart.so.99", "-Wl,--version-script,cudart.map")
    for command in (
        (*shared, "libcudart.so.99", *cudart, "cudart.c"),
        (*shared, "libnccl.so.99", "-Wl,-soname,libnccl.so.99", "nccl.c"),
        (*shared, "lib/libuser.so", "user.c", "./libcudart.so.99", "./libnccl.so.99"),
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    for name in ("libcudart.so.99", "libnccl.so.99"):
        (tmp_path / name).unlink()
    make_stand_ins(tmp_path / "lib", tmp_path / "stand-ins")
    program = f"import ctypes; print(ctypes.CDLL({str(tmp_path / 'lib' / 'libuser.so')!r}).both())"

    def loaded(**variables: str) -> subprocess.CompletedProcess:
        env = {**os.environ, **variables}
        return subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)

    assert "cannot open shared object file" in loaded().stderr
    assert loaded(LD_LIBRARY_PATH=str(tmp_path / "stand-ins")).stdout == "200\n"
