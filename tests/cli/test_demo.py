"""`fastebm demo`: its files, its folders, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastebm.cli import main
from tests.report.html_check import Page


def test_the_demo_from_digits_to_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "demo"
    demo = ["demo", "--iterations", "2", "2", "--count", "30", "--out", str(out)]
    assert main(demo) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "The requirements are" in printed
    expected = {
        ".lock",
        "samples.png",
        "strip.png",
        "curves.png",
        "samples.npz",
        "verdict.json",
        "report.html",
        "config.json",
        "log.jsonl",
    }
    assert {path.name for path in out.iterdir()} == expected | {"checkpoints"}
    assert printed.endswith(f"All of it in a browser: {out / 'report.html'}\n")
    verdict = json.loads((out / "verdict.json").read_text())
    page = Page((out / "report.html").read_text())
    assert page.faults == []
    assert "Judged by fastebm demo" in page.text
    assert f'<data value="{verdict["nearest"]["median"]!r}">' in page.source
    assert sum(verdict["classes"]["counts"]) == 30
    assert np.load(out / "samples.npz")["images"].shape == (30, 1, 8, 8)

    # Finished, it stays as it is, and the next goes to a folder of its own.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (tmp_path / "runs" / "demo-2").mkdir()
    (tmp_path / "runs" / "demo-2" / "letter.txt").write_text("")
    assert main(demo) == 0
    assert f"goes to {out}-3" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert (tmp_path / "runs" / "demo-3" / "verdict.json").is_file()

    # Unfinished, it is taken up.
    (out / "verdict.json").unlink()
    assert main(demo) == 0
    assert (out / "verdict.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--count", "0"], "--count must be at least 1"),
        (["demo", "--threads", "0"], "--threads must be at least 1"),
        (["demo", "--count", str(10**9)], "1,000,000,000 samples would need 238.4 GiB of memory"),
        (["demo", "--threads", str(10**20)], "--threads must be at most"),
        (["demo", "--out", "."], "--out must name a folder, got ."),
        (["demo", "--iterations", "0", "0"], "iterations must lie in [1, 1e+09), got 0"),
        (["demo", "--iterations", "3"], "--iterations needs 2 values"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal(arguments)
