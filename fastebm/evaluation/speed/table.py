"""Result rows as text: a table for the terminal, and one in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastebm.evaluation.speed.rows import AchievedRates, Row, Run


def _titles(row: Row) -> tuple[str, ...]:
    ratio = "memory ratio" if row.quantity == "bytes" else "slowdown"
    return "baseline", "median", "20 % to 80 %", ratio, "gradient error", "roofline"


def printed(rows: Iterable[Row]) -> str:
    """The rows in one table for a terminal, a line for each, under a heading for each comparison."""
    groups = comparisons(rows)
    cells = {key: [_cells(row) for row in group] for key, group in groups.items()}
    titles = {key: _titles(group[0]) for key, group in groups.items()}
    lines = [*titles.values(), *(line for group in cells.values() for line in group)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = []
    for key, group in groups.items():
        out += ["", heading(group[0]), _aligned(titles[key], widths)]
        out += [_aligned(line, widths) for line in cells[key]]
        out += [f"    {note}" for note in _notes(group)]
    return "\n".join(out[1:])


def markdown(runs: Sequence[Run]) -> str:
    """The rows of all runs as Markdown, a table for each comparison, with each run's machine above its own."""
    parts = []
    for run in runs:
        parts.append(machine_line(run))
        for group in comparisons(run.rows).values():
            parts += [f"**{heading(group[0])}**", markdown_table(_titles(group[0]), map(_cells, group))]
            parts += ["\n".join(f"- {note}" for note in _notes(group))] if _notes(group) else []
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """A Markdown table whose first `words` columns are words and whose others are numbers, aligned at the right."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def comparisons(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows grouped by comparison, in their order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.comparison, []).append(row)
    return groups


def heading(row: Row) -> str:
    """The heading of a comparison: suite, case, shape, precision, unit."""
    shape = "x".join(map(str, (row.batch, *row.shape)))
    what = "peak memory" if row.quantity == "bytes" else "time"
    return f"{row.suite}: {row.case}, {shape}, {row.dtype}, {what} of one {row.unit}"


def machine_line(run: Run) -> str:
    """The machine and commit of the figures, in a sentence."""
    facts = run.machine
    device = facts["gpu"] or f"{facts['cpu']} ({', '.join(facts['cpu_features'])})"
    changed = " with changes" if facts["dirty"] else ""
    commit = f"commit {facts['commit'][:12]}{changed}" if facts["commit"] else f"fastebm {facts['fastebm']}"
    return f"{device}, {facts['threads']} threads, torch {facts['torch']}, {commit}, {facts['date'][:10]}."


def amount(value: float | None, quantity: str) -> str:
    """A figure with a unit that suits its size."""
    if value is None:
        return "-"
    if quantity == "bytes":
        return f"{value / 2**20:.1f} MiB"
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _cells(row: Row) -> tuple[str, ...]:
    spread = "-" if row.median is None else f"{amount(row.low, row.quantity)} to {amount(row.high, row.quantity)}"
    return (
        f"{row.baseline}: {row.variant}" if row.variant else row.baseline,
        amount(row.median, row.quantity),
        spread,
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        "-" if row.gradient_error is None else f"{row.gradient_error:.1e}",
        "-" if row.achieved is None else f"{100 * row.achieved.roofline_share:.0f} %",
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [f"{row.baseline}: {row.note}" for row in rows if row.note]
    return notes + [f"{row.baseline}: {_rates(row.achieved)}" for row in rows if row.achieved is not None]


def _rates(done: AchievedRates) -> str:
    flops = ""
    if done.flops_per_second:
        flops = f"{done.flops_per_second / 1e9:.0f} of {done.gemm_flops_per_second / 1e9:.0f} GFLOP/s in products, "
    moved = f"{done.bytes_per_second / 1e9:.1f} GB/s against {done.copy_bytes_per_second / 1e9:.1f} in copies"
    return f"{flops}{moved}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    return "  ".join(["  " + line[0].ljust(len(first)), *others]).rstrip()
