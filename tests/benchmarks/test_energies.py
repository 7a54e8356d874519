"""The benchmark of the gallery: rows of a run, the page's tables, and its options."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from benchmarks.energies import bench_energies, page
from benchmarks.harness.pages import fill_section
from fastebm.evaluation.speed import Run, read_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCHEBM, TUNED


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    out = tmp_path_factory.mktemp("rows") / "energies.json"
    options = ["--batches", "1,64", "--threads", "1", "--cpu-time", "--seconds", "0.01", "--out", str(out)]
    bench_energies.main(["--names", "rings;quadratic", *options])
    return read_runs(out)


def test_each_energy_and_batch_has_a_row_for_fastebm_and_for_each_peer(runs: list[Run]) -> None:
    (run,) = runs
    cells = {(row.case, row.batch) for row in run.rows}
    assert cells == {(name, batch) for name in ("rings", "quadratic") for batch in (1, 64)}
    for name, batch in cells:
        rows = [row for row in run.rows if (row.case, row.batch) == (name, batch)]
        assert [row.baseline for row in rows] == ["fastebm", RESEARCH, TUNED, TORCHEBM]
        assert all(row.ratio is not None for row in rows[:3])
        assert rows[3].ratio is not None or rows[3].note
        assert rows[0].gradient_error is not None
        assert rows[0].gradient_error <= 1e-5
    assert run.machine["threads"] == 1


def test_the_page_has_a_line_for_each_energy_and_marks_what_is_lost(runs: list[Run]) -> None:
    rows = [
        dataclasses.replace(row, ratio=0.5) if (row.case, row.batch, row.baseline) == ("rings", 64, TUNED) else row
        for row in runs[0].rows
    ]
    text = page.section(Path("cpu-any/energies.json"), [Run(runs[0].machine, tuple(rows))])
    assert "### cpu-any, energies" in text
    assert "1 threads" in text
    assert "Processor time." in text
    (line,) = [line for line in text.splitlines() if line.startswith("| rings |")]
    assert line.endswith("/ **0.50** |")
    assert line.count("|") == 8
    assert f"| {TUNED} | 64 | 2 |" in text
    fill_section(page.PAGE.read_text(), bench_energies.SUITE, text)  # the page has the marks


def test_a_row_of_an_energy_that_fails_stays(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataclasses.replace(bench_energies.GALLERY[0], build=lambda: lambda x: x)  # not one number a sample
    settings = bench_energies.Settings(0.01, compile=False)
    (row,) = bench_energies.run([entry], {64}, settings, None, busy=False)
    assert row.note
    assert row.median is None
    assert page.cell([row]) == "fails"


def test_unknown_names_and_batches_are_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match="--names: there is no ring; there are"):
        bench_energies.main(["--names", "ring"])
    with pytest.raises(SystemExit, match="--batches must be numbers with commas between, got 'many'"):
        bench_energies.main(["--batches", "many"])


def test_busy_processes_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1]
    )
    with bench_energies.busy_cores(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)
