"""The progress bar."""

import pytest

from fastebm.training.trainer.progress import ProgressBar


def test_the_bar_starts_where_the_run_stands_and_shows_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressBar.over(10, 4, shown=True) as bar:
        bar.advance("8x8", gap=0.25)
    shown = capfd.readouterr().err
    assert "5/10" in shown
    assert "gap=+0.250" in shown
    with ProgressBar.over(10, 4, shown=False) as bar:
        bar.advance("8x8", gap=0.25)
    assert capfd.readouterr().err == ""
