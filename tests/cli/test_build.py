"""`fastebm build`; that it compiles is a test of packaging."""

import pytest

from fastebm.cli import main


def test_build_that_can_not_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert main(["build"]) == 1
    assert "no C++ compiler was found" in capsys.readouterr().err
