"""Fills docs/results/energies/README.md ("will mine be fast?") from the rows in benchmarks/results/*/energies*.json.

The number of the README's own example comes from them too.

    python -m benchmarks.energies.page

A line for each energy and file of rows: its engine, the error of its gradient, and the time of eager loops over that of
fastebm at each batch. Cells below 1 are bold.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.energies import GALLERY
from benchmarks.energies.bench_energies import SUITE
from benchmarks.harness.pages import ROOT, fill_section
from fastebm.evaluation.speed import Row, Run, read_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCH_COMPILE, TORCHEBM, TUNED
from fastebm.evaluation.speed.rows import OURS
from fastebm.evaluation.speed.table import machine_line, markdown_table

PAGE = ROOT / "docs" / "results" / "energies" / "README.md"
README = ROOT / "README.md"
README_EXAMPLE = "MLP 3072-256-1"
PEERS = (RESEARCH, TUNED, TORCH_COMPILE, TORCHEBM)


def ratio(value: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return text if value >= 1 else f"**{text}**"


def cell(rows: Sequence[Row]) -> str:
    """The times of both eager loops over that of fastebm at one batch: research code / tuned."""
    ours = next((row for row in rows if row.baseline == OURS), None)
    if ours is None:
        return ""
    if ours.median is None:
        return "fails"
    return " / ".join(
        ratio(next((row.ratio for row in rows if row.baseline == peer), None)) for peer in (RESEARCH, TUNED)
    )


def energies_table(rows: Sequence[Row]) -> str:
    """A line for each energy that was measured, in the gallery's order."""
    batches = sorted({row.batch for row in rows})
    lines = []
    for entry in GALLERY:
        of_entry = [row for row in rows if row.case == entry.name]
        ours = [row for row in of_entry if row.baseline == OURS]
        if not ours:
            continue
        errors = [row.gradient_error for row in ours if row.gradient_error is not None]
        lines.append(
            (
                entry.name,
                entry.kind,
                entry.source,
                ", ".join(dict.fromkeys(row.variant for row in ours)),
                f"{max(errors):.0e}" if errors else "-",
                *(cell([row for row in of_entry if row.batch == batch]) for batch in batches),
            )
        )
    head = ("energy", "kind", "source", "engine", "error", *(f"{batch:,}" for batch in batches))
    return markdown_table(head, lines, words=4)


def notes(rows: Sequence[Row]) -> str:
    """Why energies run by autograd or on single operations of PyTorch, or fail: one line each."""
    reasons = {row.case: row.note for row in rows if row.baseline == OURS and row.variant not in ("lanes", "fused")}
    return "\n".join(f"- {name}: `{reason}`" for name, reason in reasons.items()) or "None."


def summary(rows: Sequence[Row]) -> str:
    """For each peer the geometric mean, the cells below 1x and the worst, by batch and over all."""
    lines = []
    batches = sorted({row.batch for row in rows})
    for peer in PEERS:
        for title, chosen in (*((f"{batch:,}", {batch}) for batch in batches), ("all", {*batches})):
            of_batch = [row for row in rows if row.baseline == peer and row.batch in chosen and row.ratio is not None]
            if of_batch:
                worst = min(of_batch, key=lambda row: row.ratio or 0)
                ratios = [row.ratio for row in of_batch if row.ratio is not None]
                lines.append(
                    (
                        peer,
                        title,
                        len(ratios),
                        f"{statistics.geometric_mean(ratios):.2f}",
                        sum(value < 1 for value in ratios),
                        f"{worst.ratio:.2f} ({worst.case})",
                    )
                )
    return markdown_table(("peer", "batch", "cells", "geometric mean", "below 1x", "worst"), lines, words=2)


def circumstances(run: Run) -> str:
    """Machine, versions and commit, whose time was measured, and whether the cores were busy."""
    clock = "Processor time" if run.machine["clock"] == "processor" else "Wall time"
    return f"{machine_line(run)} {clock}{', beside a busy process on each core' if run.machine['busy'] else ''}."


def section(path: Path, runs: Sequence[Run]) -> str:
    """Everything that a file of rows says."""
    rows = [row for run in runs for row in run.rows if row.suite == SUITE]
    engines: dict[str, set[str]] = {}
    for row in rows:
        if row.baseline == OURS:
            engines.setdefault(row.variant, set()).add(row.case)
    counts = ", ".join(f"{len(names)} {engine}" for engine, names in sorted(engines.items()))
    return "\n\n".join(
        [
            f"### {path.parent.name}, {path.stem}",
            "\n".join(dict.fromkeys(map(circumstances, runs))),
            f"Engines: {counts}.",
            summary(rows),
            energies_table(rows),
            "Not on our kernels:",
            notes(rows),
        ]
    )


def readme_example(files: Sequence[Path]) -> str:
    """How fast the README's own example is, on each idle machine that measured it."""
    found = {}
    for path in files:
        for run in read_runs(path):
            cells = {row.baseline: row.ratio for row in run.rows if (row.case, row.batch) == (README_EXAMPLE, 64)}
            research, tuned = cells.get(RESEARCH), cells.get(TUNED)
            if not run.machine["busy"] and research and tuned:
                threads = run.machine["threads"]
                found[path.parent.name] = (
                    f"on {path.parent.name} with {threads} threads {research:.2f} times as fast as the eager loop of "
                    f"research code, and {tuned:.2f} times as fast as a tuned one"
                )
    if not found:
        raise SystemExit(f"no file has {README_EXAMPLE} at batch 64")
    return f"Its chains are {'; '.join(found.values())}."


def main() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*/energies*.json"))
    if not files:
        raise SystemExit("there are no rows: `python -m benchmarks.energies.bench_energies --out FILE` writes them")
    tables = "\n\n".join(section(path, read_runs(path)) for path in files)
    PAGE.write_text(fill_section(PAGE.read_text(), SUITE, tables))
    # Without the blank lines of a table: the README fits a screen.
    filled = fill_section(README.read_text(), "example", readme_example(files))
    README.write_text(re.sub(r"(<!-- example: filled[^\n]*\n)\n(.*)\n\n(<!-- example: end)", r"\1\2\n\3", filled))
    print(f"written: {PAGE.relative_to(ROOT)}, {README.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
