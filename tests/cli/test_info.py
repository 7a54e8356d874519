"""`fastebm info`: of this machine, and of a run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastebm import build_extension
from fastebm.cli import main
from fastebm.ops import backends


def test_info_says_what_runs_and_tests_the_random_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "known answer given" in printed
    assert "operators on the CPU" in printed


def test_info_says_what_was_set_and_why_there_is_no_cuda_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTEBM_GRAPHS", "0")
    monkeypatch.setattr(backends, "_cuda_library", None)
    monkeypatch.setattr(build_extension, "cuda_unavailable_reason", lambda: None)
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^settings +.*FASTEBM_GRAPHS=0", said, re.M)
    assert re.search(r"^cuda extension +none: fastebm's CUDA library is missing: it was not built$", said, re.M)
    monkeypatch.setattr(build_extension, "cuda_unavailable_reason", lambda: "no CUDA toolkit (nvcc) was found")
    assert main(["info"]) == 0
    assert re.search(r"^cuda extension +none: no CUDA toolkit \(nvcc\) was found$", capsys.readouterr().out, re.M)


def test_info_describes_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert "7 of 7 iterations" in printed
    assert "(4, 8)" in printed


def test_a_folder_without_a_run(refusal: Callable[[list[str]], str]) -> None:
    assert "no config.json" in refusal(["info", "missing"])
