"""`fastebm build`, and that what it says about a compiler is what the build then finds; see tests/packaging, too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastebm import build_extension
from fastebm.cli import main

ROOT = Path(build_extension.__file__).parents[1]


def test_build_that_can_not_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert main(["build"]) == 1
    assert "no C++ compiler was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("", None),
        ("  ", None),
        ("env c++", None),
        ("c++ -pipe", None),
        ("/nonexistent/compiler", "no C++ compiler was found (CXX=/nonexistent/compiler)"),
        ("env /nonexistent/compiler", "the C++ compiler env /nonexistent/compiler does not run"),
        ("false", "the C++ compiler false does not run"),
        ("'c++", "can't be split into words: No closing quotation"),
    ],
)
def test_compilers_of_any_words(monkeypatch: pytest.MonkeyPatch, asked: str, reason: str | None) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed as c++")
    monkeypatch.setenv("CXX", asked)
    found = build_extension.unavailable_reason()
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert reason in found
        assert "\n" not in found


def test_no_compiler_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_extension.cpp_compiler() is None
    assert "looked for c++ and g++" in str(build_extension.unavailable_reason())


def test_a_folder_that_takes_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"new")
    (tmp_path / "package" / "_C.so").mkdir(parents=True)  # a folder where the library belongs
    monkeypatch.setattr(build_extension, "PACKAGE", tmp_path / "package")
    with pytest.raises(OSError, match=r"_C\.so"):
        build_extension._put_in_place(library)
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["_C.so"]


def test_output_of_processes_goes_into_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with build_extension._output_in(tmp_path / "log"):
        subprocess.run(["sh", "-c", "echo compiled; echo warned >&2"], check=True)
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("after\n", "")
    assert (tmp_path / "log").read_text() == "compiled\nwarned\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_a_build_that_fails_shows_what_compilers_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], verbose: bool
) -> None:
    if build_extension.unavailable_reason() is not None:
        pytest.skip(f"C++ can't be compiled here: {build_extension.unavailable_reason()}")

    def failing(self: object) -> None:
        subprocess.run(["sh", "-c", "echo no such header"], check=True)
        raise OSError("exit 1")

    monkeypatch.setattr("torch.utils.cpp_extension.BuildExtension.run", failing)
    with pytest.raises(RuntimeError, match="compiling fastebm's operators failed: exit 1"):
        build_extension.build(verbose=verbose)
    printed = capfd.readouterr()
    assert "no such header" in (printed.out if verbose else printed.err)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "folder"), [("env c++", "plain"), ("", "with two spaces")])
def test_it_compiles(tmp_path: Path, asked: str, folder: str) -> None:
    """One source of a copy, by a compiler of two words or in a folder with spaces in its name."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed as c++")
    for part in ("fastebm", "csrc"):
        shutil.copytree(ROOT / part, tmp_path / folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "from fastebm import build_extension as b; b.CPP_SOURCES = ('module.cpp',);"
        "assert b.unavailable_reason() is None; b.build()"
    )
    environment = {**os.environ, "CXX": asked, "MAX_JOBS": "1", "PYTHONPATH": str(tmp_path / folder)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "-O3" not in done.stdout + done.stderr
    assert list((tmp_path / folder / "fastebm").glob("_C*.so"))
