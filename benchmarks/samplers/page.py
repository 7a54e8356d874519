"""Fills docs/results/samplers/README.md from the rows in benchmarks/results/*/samplers.json and effective_samples.json.

    python -m benchmarks.samplers.page

Ratios below 1 are bold; a ratio that misses its aim says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.energies.page import ratio
from benchmarks.harness.pages import ROOT, fill_section
from benchmarks.samplers import bench_effective_samples, bench_samplers
from benchmarks.samplers.bench_samplers import CASES, LANGEVIN_OF_OURS, SAMPLERS, UPDATE_OF_CHAINS
from fastebm.evaluation.speed import Row, Run, read_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCHEBM
from fastebm.evaluation.speed.rows import OURS
from fastebm.evaluation.speed.table import amount, machine_line, markdown_table

PAGE = ROOT / "docs" / "results" / "samplers" / "README.md"
NOT_MEASURED = "Not measured."
# What a step of MALA may take of a step of our own Langevin, and a draw and write back of an update of the chains.
MALA_AT_MOST, BUFFER_AT_MOST = 1.05, 0.05


def of(rows: Sequence[Row], baseline: str) -> Row | None:
    return next((row for row in rows if row.baseline == baseline), None)


def against(rows: Sequence[Row], baseline: str, aim: float) -> str:
    """A peer's time over ours, and what was aimed at where that is missed; "-" where the peer has no such sampler."""
    row = of(rows, baseline)
    if row is None or row.ratio is None:
        return "-"
    return ratio(row.ratio) + ("" if row.ratio >= aim else f" (aim {aim:g})")


# Steps ----------------------------------------------------------------------------------------------------------------


def steps_table(rows: Sequence[Row]) -> str:
    """A line for each energy, sampler and number of chains."""
    lines = []
    for case in CASES:
        for sampler in SAMPLERS:
            of_case = [row for row in rows if row.case == f"{sampler}: {case.name}"]
            for chains in sorted({row.batch for row in of_case}):
                cell = [row for row in of_case if row.batch == chains]
                mine = of(cell, OURS)
                time = "fails" if mine is None or mine.median is None else amount(mine.median, "seconds")
                over_torchebm, over_eager = case.aims
                lines.append(
                    (
                        case.name,
                        sampler,
                        f"{chains:,}",
                        time,
                        against(cell, RESEARCH, over_eager),
                        against(cell, TORCHEBM, over_torchebm),
                    )
                )
    head = ("energy", "sampler", "chains", "a step of fastebm", RESEARCH, "torchebm")
    return markdown_table(head, lines, words=2) if lines else NOT_MEASURED


def ourselves_table(rows: Sequence[Row]) -> str:
    """MALA over our own Langevin, and a replay buffer's cycle over an update of its chains."""
    lines = []
    for base, at_most in ((LANGEVIN_OF_OURS, MALA_AT_MOST), (UPDATE_OF_CHAINS, BUFFER_AT_MOST)):
        for other in (row for row in rows if row.baseline == base):
            mine = next(row for row in rows if row.baseline == OURS and row.comparison == other.comparison)
            if other.ratio is None or mine.median is None or other.median is None:
                continue
            share = 1 / other.ratio
            missed = "" if share <= at_most else " (missed)"
            lines.append(
                (
                    f"{mine.case}, {mine.batch} of {'x'.join(map(str, mine.shape))}, {mine.dtype}",
                    base,
                    amount(mine.median, "seconds"),
                    amount(other.median, "seconds"),
                    f"{share:.3f}{missed}",
                    f"{at_most:g}",
                )
            )
    head = ("what", "against", "time", "time of that", "share", "at most")
    return markdown_table(head, lines, words=2) if lines else NOT_MEASURED


# Effective samples ----------------------------------------------------------------------------------------------------


def biased(row: Row) -> bool:
    return "biased: " in row.note


def named(row: Row) -> str:
    """The sampler of a row."""
    return f"{row.baseline} {row.variant}"


def rate(row: Row) -> float:
    """Effective samples a second."""
    assert row.median is not None
    return 1 / row.median


def best_table(rows: Sequence[Row]) -> str:
    """Our fastest sampler without bias, that of the peers, and the ratio, for each target and number of chains."""
    lines = []
    measured = [row for row in rows if row.quantity == "seconds" and row.median is not None and not biased(row)]
    for target, chains in dict.fromkeys((row.case, row.batch) for row in measured):
        cell = [row for row in measured if (row.case, row.batch) == (target, chains)]
        mine = max((row for row in cell if row.baseline == OURS), key=rate, default=None)
        theirs = max((row for row in cell if row.baseline != OURS), key=rate, default=None)
        if mine is None:
            continue
        line = [target, f"{chains:,}", f"{mine.variant}, {rate(mine):,.0f}"]
        # The rounds' ratios are taken to our fastest sampler.
        line += ["-", "-"] if theirs is None else [f"{named(theirs)}, {rate(theirs):,.0f}", ratio(theirs.ratio)]
        lines.append(line)
    head = ("target", "chains", "our best, samples a second", "best peer, samples a second", "ratio")
    return markdown_table(head, lines, words=1) if lines else NOT_MEASURED


def effective_table(rows: Sequence[Row]) -> str:
    """A line for each target and sampler: effective samples a gradient, and a second at each number of chains."""
    counts = sorted({row.batch for row in rows})
    lines = []
    for target, baseline, variant in dict.fromkeys((row.case, row.baseline, row.variant) for row in rows):
        mine = [row for row in rows if (row.case, row.baseline, row.variant) == (target, baseline, variant)]
        a_gradient = next((row for row in mine if row.quantity == "gradients" and row.median is not None), None)
        a_second = {row.batch: row for row in mine if row.quantity == "seconds" and row.median is not None}
        star = " *" if any(map(biased, mine)) else ""
        lines.append(
            (
                target,
                f"{baseline} {variant}{star}",
                next((row.note for row in mine), ""),
                "-" if a_gradient is None else f"{rate(a_gradient):.3g}",
                *(f"{rate(a_second[count]):,.0f}" if count in a_second else "-" for count in counts),
            )
        )
    head = ("target", "sampler", "options", "a gradient", *(f"a second, {count:,} chains" for count in counts))
    return markdown_table(head, lines, words=3) if lines else NOT_MEASURED


# Page -----------------------------------------------------------------------------------------------------------------


def circumstances(run: Run) -> str:
    """Machine, versions and commit, and the peers' versions."""
    peers = run.machine.get("peers") or {}
    others = f" Peers: {', '.join(f'{name} {version}' for name, version in peers.items())}." if peers else ""
    return machine_line(run) + others


def section(files: Sequence[Path], suite: str, table: Callable[[Sequence[Row]], str]) -> str:
    """A table for each machine that has rows of a suite."""
    parts = []
    for path in files:
        runs = read_runs(path)
        rows = [row for run in runs for row in run.rows if row.suite == suite]
        parts += [f"### {path.parent.name}", "\n".join(dict.fromkeys(map(circumstances, runs))), table(rows)]
    return "\n\n".join(parts) or NOT_MEASURED


def filled(text: str, results: Path) -> str:
    """The page with its tables."""
    for suite, tables in (
        (bench_samplers.SUITE, {"steps": steps_table, "ourselves": ourselves_table}),
        (bench_effective_samples.SUITE, {"best": best_table, "effective": effective_table}),
    ):
        files = sorted(results.glob(f"*/{suite}.json"))
        for name, table in tables.items():
            text = fill_section(text, name, section(files, suite, table))
    return text


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(), ROOT / "benchmarks" / "results"))
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
