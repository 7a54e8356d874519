"""Fills the tables of docs/scaling.md on chains: measured, from benchmarks/results/*/scaling.json, and modelled.

python -m benchmarks.scaling.page
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.pages import ROOT, fill_section
from benchmarks.scaling import model
from benchmarks.scaling.bench_chains import EXCHANGE, ONE_THREAD, SUITE, TWO_THREADS, WAITING
from fastebm.evaluation.speed import Row, Run, read_runs
from fastebm.evaluation.speed.rows import OURS
from fastebm.evaluation.speed.table import amount, machine_line, markdown_table

PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"


def measured(run: Run) -> str:
    """A line for each case, and the machine."""
    lines = []
    rows = [row for row in run.rows if row.suite == SUITE]
    for mine in (row for row in rows if row.baseline == OURS):
        of = {row.baseline: row for row in rows if row.comparison == mine.comparison}
        lines.append(
            (
                f"{mine.case}, {mine.batch} of {'x'.join(map(str, mine.shape))}, {mine.dtype}",
                *(amount(of[name].median, "seconds") for name in (ONE_THREAD, TWO_THREADS, OURS)),
                *(times(of[name]) for name in (ONE_THREAD, TWO_THREADS)),
                *(share(of[name]) for name in (WAITING, EXCHANGE)),
            )
        )
    head = ("chains", ONE_THREAD, TWO_THREADS, "2 processes, 1 thread each", "over 1 thread", "over 2 threads")
    table = markdown_table((*head, "of it waiting", "of it exchange"), lines, words=1)
    notes = "; ".join(f"{row.case} {row.dtype}: {row.note}" for row in rows if row.baseline == OURS)
    return f"{table}\n\n{machine_line(run)} {notes}."


def times(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f}x ({row.ratio_low:.2f} to {row.ratio_high:.2f})"


def share(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2%}"


def main() -> None:
    files: list[Path] = sorted(RESULTS.glob("*/scaling.json"))
    runs = [run for file in files for run in read_runs(file) if any(row.suite == SUITE for row in run.rows)]
    text = PAGE.read_text()
    text = fill_section(text, "measured", "\n\n".join(map(measured, runs)) or "Not measured.")
    modelled = "\n\n".join((model.assumptions(), model.training_table(), model.sampling_table()))
    PAGE.write_text(fill_section(text, "modelled", modelled))


if __name__ == "__main__":
    main()
