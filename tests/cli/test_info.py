"""`fastebm info`: of this machine, and of a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastebm.cli import main


def test_info_says_what_runs_and_tests_the_random_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "known answer given" in printed
    assert "operators on the CPU" in printed


def test_info_describes_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert "7 of 7 iterations" in printed
    assert "(4, 8)" in printed


def test_a_folder_without_a_run(refusal: Callable[[list[str]], str]) -> None:
    assert "no config.json" in refusal(["info", "missing"])
