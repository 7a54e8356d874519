"""Fills the speed tables of README.md and docs/results/speed, and draws plots, from the rows in benchmarks/results.

    python -m benchmarks.harness.speed_pages

README.md gets CF-EBM's chains, cascades and training in two lines, docs/index.md its chains at 32x32 with error and
memory, docs/results/speed/README.md all comparisons of whole energies, and docs/results/speed/MACHINE.md all rows of a
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import plots
from benchmarks.harness.pages import ROOT, fill_section
from fastebm.evaluation.speed import Row, markdown, read_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCH_COMPILE, TUNED
from fastebm.evaluation.speed.table import amount, comparisons, machine_line, markdown_table

SUITES = ("chains", "cascade", "training", "energy_gradient")
BEST = "best of tuned eager and torch.compile"
PLOTS = {
    "ratios": "slowdowns relative to fastebm, a group of bars for each comparison",
    "chains": "the time of a Langevin step over the resolution",
    "memory": "the peak memory of one gradient",
}
"""What the plots of a machine show, by the end of their names."""
READING = """\
Times are medians over rounds, with their 20 % and 80 % quantiles. `slowdown` is a baseline's time over that of fastebm,
the median of the rounds' ratios: above 1 fastebm is faster. `memory ratio` is the same for peak memory. `gradient
error` is relative to float64 autograd. `roofline` is the least time that our program's FLOPs and bytes can take, at the
rates of a large matrix product and of a large copy in the same run, over the time taken. Bytes are counted as if each
result went through memory, so a cache can make it more than 100 %."""


def machines(results: Path) -> list[Path]:
    """The folders of machines that have rows."""
    return sorted(path for path in results.iterdir() if path.is_dir() and list(suite_files(path)))


def suite_files(machine: Path) -> list[Path]:
    """A machine's files of rows, but for those that have pages of their own."""
    elsewhere = ("stages", "energies", "samplers", "effective_samples")
    return sorted(file for file in machine.glob("*.json") if not file.stem.startswith(elsewhere))


def slowdown(group: Sequence[Row], *baselines: str) -> float | None:
    """The least time of these baselines over that of fastebm; None where none of them was measured."""
    return min((row.ratio for row in group if row.baseline in baselines and row.ratio is not None), default=None)


def energy_comparisons(machine: Path) -> list[tuple[list[Row], float, float]]:
    """Comparisons of whole energies with their slowdowns, of the best baseline and of research code."""
    rows = [row for file in suite_files(machine) for run in read_runs(file) for row in run.rows if row.suite in SUITES]
    rows.sort(key=lambda row: (SUITES.index(row.suite), row.case != "CF-EBM", row.case, row.shape[-1], row.batch))
    found = []
    for group in comparisons(row for row in rows if row.quantity == "seconds").values():
        best, research = slowdown(group, TORCH_COMPILE, TUNED), slowdown(group, RESEARCH)
        if best is not None and research is not None:
            found.append((group, best, research))
    return found


def summary(machine: Path) -> str:
    """All comparisons of whole energies on one machine."""
    rows = []
    for (first, *_), best, research in energy_comparisons(machine):
        shape = "x".join(map(str, first.shape))
        what = f"{first.unit}, {first.case} {shape}, batch {first.batch}, {first.dtype}"
        rows.append((what, f"{best:.2f}", f"{research:.1f}"))
    return markdown_table((machine.name, BEST, RESEARCH), rows)


def compact_summary(machine: Path) -> str:
    """CF-EBM's chains, cascades and training in two lines, for README.md."""
    found = [entry for entry in energy_comparisons(machine) if _is_compact(entry[0][0])]
    firsts = [group[0] for group, _, _ in found]
    titles = [f"{row.suite} {'x'.join(map(str, row.shape[1:]))}, {row.batch}" for row in firsts]
    lines = [[BEST, *(f"{best:.1f}" for _, best, _ in found)], [RESEARCH, *(f"{slow:.0f}" for _, _, slow in found)]]
    return markdown_table((f"{machine.name}, bfloat16, batch", *titles), lines)


def chains_summary(machine: Path) -> str:
    """CF-EBM's chains at 32x32 by each implementation with error and memory, for docs/index.md."""
    runs = [run for file in suite_files(machine) for run in read_runs(file)]
    memory = {row.baseline: row for run in runs for row in run.rows if _case(row) == ("memory", (3, 256, 256), 4)}
    parts = []
    for run in runs:
        chains = [row for row in run.rows if _case(row) == ("chains", (3, 32, 32), 64)]
        if chains:
            head = ("64 chains of 3x32x32 images", "a step", "slowdown", "error", "memory")
            lines = [_chains_line(row, memory.get(row.baseline)) for row in chains]
            parts += [f"CF-EBM on {machine_line(run)}", markdown_table(head, lines)]
    return "\n\n".join(parts)


def _case(row: Row) -> tuple[str, tuple[int, ...], int] | None:
    return (row.suite, row.shape, row.batch) if (row.case, row.dtype) == ("CF-EBM", "bfloat16") else None


def _chains_line(row: Row, memory: Row | None) -> Sequence[str]:
    ratio = "-" if row.ratio is None else f"{row.ratio:.1f}"
    error = "-" if row.gradient_error is None else f"{row.gradient_error:.0e}"
    used = "-" if memory is None else amount(memory.median, memory.quantity)
    return row.baseline, amount(row.median, row.quantity), ratio, error, used


def _is_compact(first: Row) -> bool:
    return first.suite != "energy_gradient" and (first.case, first.dtype) == ("CF-EBM", "bfloat16")


def _count_of_chains(machine: Path) -> int:
    return sum(first.suite == "chains" for (first, *_), _, _ in energy_comparisons(machine))


def machine_page(machine: Path, plots_of_it: Sequence[Path]) -> str:
    """All rows of one machine as Markdown, with its plots."""
    parts = [f"# Speed: {machine.name}", f"Made by `make bench` from `benchmarks/results/{machine.name}`.", READING]
    parts += [f"![{PLOTS[plot.stem.rpartition('.')[2]]}]({plot.name})" for plot in plots_of_it]
    parts += [f"## {file.stem}\n\n{markdown(read_runs(file)).rstrip()}" for file in suite_files(machine)]
    return "\n\n".join(parts) + "\n"


def write_machine_pages(results: Path, folder: Path) -> list[Path]:
    """Writes the page of each machine into `folder`, with the plots of it that are there."""
    written = []
    for machine in machines(results):
        written.append(folder / f"{machine.name}.md")
        written[-1].write_text(machine_page(machine, sorted(folder.glob(f"{machine.name}.*.png"))))
    return written


def fill_summaries(results: Path, root: Path) -> list[Path]:
    """Fills the tables of docs/index.md and both README.md under `root`.

    The shorter ones are of the machine with the most chains.
    """
    compared = [machine for machine in machines(results) if energy_comparisons(machine)]
    whole, short = root / "docs" / "results" / "speed" / "README.md", root / "README.md"
    front, one = root / "docs" / "index.md", [max(compared, key=_count_of_chains)] if compared else []
    for path, form, shown in ((whole, summary, compared), (short, compact_summary, one), (front, chains_summary, one)):
        path.write_text(fill_section(path.read_text(), "speed", "\n\n".join(map(form, shown))))
    return [short, front, whole]


def main() -> None:
    results, folder = ROOT / "benchmarks" / "results", ROOT / "docs" / "results" / "speed"
    drawn = plots.draw({machine.name: suite_files(machine) for machine in machines(results)}, folder)
    for path in (*drawn, *write_machine_pages(results, folder), *fill_summaries(results, ROOT)):
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
