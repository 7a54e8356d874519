"""Progress bars: seldom redrawn where nobody watches, silent where there is no stderr."""

import sys

import pytest

from fastebm.progress import progress_bar


def test_few_lines_go_to_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(500, "samples", "image", shown=True) as bar:
        for _ in range(500):
            bar.update()
    said = capsys.readouterr().err
    assert "samples" in said
    assert 1 <= said.count("\n") <= 3
    assert "\r" not in said
    assert said.endswith("\n")


def test_nothing_is_drawn_where_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(5, "samples", "image", shown=False) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""


def test_a_process_without_stderr_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(5, "samples", "image", shown=True) as bar:
        bar.update(5)
