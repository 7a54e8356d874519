"""Speed pages and plots are made of the rows that are there, and committed ones of the committed rows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.harness import plots, speed_pages
from benchmarks.harness.pages import ROOT
from fastebm.evaluation.speed import Row, Run, machine_facts, read_runs, write_runs

RESULTS = ROOT / "benchmarks" / "results"
SPEED = ROOT / "docs" / "results" / "speed"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_committed_rows_are_readable(path: Path) -> None:
    runs = read_runs(path)
    assert sum(len(run.rows) for run in runs) > 0
    assert speed_pages.markdown(runs).count("| ---") > 0


@pytest.mark.parametrize("machine", speed_pages.machines(RESULTS), ids=lambda path: path.name)
def test_committed_pages_are_made_of_the_committed_rows(machine: Path) -> None:
    page = speed_pages.machine_page(machine, sorted(SPEED.glob(f"{machine.name}.*.png")))
    assert (SPEED / f"{machine.name}.md").read_text() == page


def test_committed_summaries_are_made_of_the_committed_rows(tmp_path: Path) -> None:
    pages = ["README.md", "docs/index.md", "docs/results/speed/README.md"]
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / page, tmp_path / page)
    speed_pages.fill_summaries(RESULTS, tmp_path)
    assert all((tmp_path / page).read_text() == (ROOT / page).read_text() for page in pages)


def measured(suite: str, size: int, baselines: Sequence[str], quantity: str = "seconds") -> list[Row]:
    seconds = [0.01 * size, 0.011 * size]
    made = [
        Row(suite, "CF-EBM", baseline, "", (3, size, size), "bfloat16", 4, "step", quantity) for baseline in baselines
    ]
    return [row.with_values([value * (i + 1) for value in seconds], seconds) for i, row in enumerate(made)]


def test_pages_and_plots_are_made_of_what_is_there(tmp_path: Path) -> None:
    baselines = ["fastebm", "eager, research code", "eager, tuned", "torch.compile", "torchebm"]
    rows = [row for size in (8, 16) for row in measured("chains", size, baselines)]
    rows[-1] = Row("chains", "CF-EBM", "torchebm", "", (3, 16, 16), "bfloat16", 4, "step", note="skipped: not there")
    results, docs = tmp_path / "results", tmp_path / "docs"
    write_runs(results / "cpu-any" / "chains.json", [Run(machine_facts("cpu"), tuple(rows))])
    memory = measured("memory", 256, ["fastebm", "eager, tuned"], "bytes")
    write_runs(results / "cpu-any" / "memory.json", [Run(machine_facts("cpu"), tuple(memory))])
    (results / "cpu-none").mkdir()

    (machine,) = speed_pages.machines(results)
    drawn = plots.draw({machine.name: speed_pages.suite_files(machine)}, docs)
    assert [path.name for path in drawn] == [f"cpu-any.{kind}.png" for kind in ("ratios", "chains", "memory")]
    (page,) = speed_pages.write_machine_pages(results, docs)
    text = page.read_text()
    assert all(f"]({path.name})" in text for path in drawn)
    assert "skipped: not there" in text
    assert text.count("| baseline | median |") == 3
    assert [group[0].shape for group, _, _ in speed_pages.energy_comparisons(machine)] == [(3, 8, 8), (3, 16, 16)]
