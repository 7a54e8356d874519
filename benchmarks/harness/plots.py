"""Plots of a machine's rows: slowdowns of the baselines, the time of a Langevin update over the resolution, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastebm.evaluation.speed import Row, read_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCH_COMPILE, TORCHEBM, TUNED
from fastebm.evaluation.speed.rows import OURS
from fastebm.evaluation.speed.table import comparisons

COLOURS = {OURS: "tab:red", TORCH_COMPILE: "tab:blue", TUNED: "tab:green", TORCHEBM: "tab:orange", RESEARCH: "tab:gray"}
ENERGY_SUITES = ("energy_gradient", "chains", "cascade", "training")


def ratios(rows: Sequence[Row]) -> Figure | None:
    """A group of bars for each comparison of whole energies, a bar for each baseline."""
    groups = _groups(row for row in rows if row.suite in ENERGY_SUITES and row.quantity == "seconds")
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.75 * len(groups)), layout="constrained")
    names = [name for name in COLOURS if name != OURS]
    for place, group in enumerate(groups):
        for row in (row for row in group if row.baseline in names and row.ratio is not None):
            y, ratio = place + 0.2 * (names.index(row.baseline) - (len(names) - 1) / 2), row.ratio or 0
            axes.barh(y, ratio - 1, height=0.18, left=1, color=COLOURS[row.baseline], label=row.baseline)
            axes.text(ratio, y, f" {ratio:.2g} ", va="center", ha="left" if ratio >= 1 else "right", fontsize=7)
    axes.axvline(1, color=COLOURS[OURS], label=OURS)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1)
    _label_groups(axes, groups, 0)
    axes.set_xlabel("slowdown relative to fastebm")
    return figure


def chains(rows: Sequence[Row]) -> Figure | None:
    """The time of one update of one chain over the resolution, a line for each baseline."""
    found = [row for row in rows if row.suite == "chains" and row.dtype == "bfloat16" and row.median is not None]
    sizes = sorted({row.shape[-1] for row in found})
    if len(sizes) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, colour in COLOURS.items():
        # The largest batch of each size, at which all run best.
        best = {row.shape[-1]: row for row in sorted(found, key=lambda row: row.batch) if row.baseline == name}
        points = [(size, 1e3 * (best[size].median or 0) / best[size].batch) for size in sizes if size in best]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size}x{size}" for size in sizes])
    axes.set_ylabel("ms for one update of one image (bfloat16)")
    return figure


def memory(rows: Sequence[Row]) -> Figure | None:
    """Peak memory of a gradient, a group of bars for each comparison."""
    groups = _groups(row for row in rows if row.quantity == "bytes")
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(6, 1.2 + 0.6 * len(groups)), layout="constrained")
    for place, group in enumerate(groups):
        for offset, row in enumerate(group):
            mebibytes, colour = (row.median or 0) / 2**20, COLOURS[row.baseline]
            axes.barh(place + 0.3 * offset, mebibytes, 0.28, color=colour, label=row.baseline)
    _label_groups(axes, groups, 0.15)
    axes.set_xlabel("peak memory of one gradient, MiB")
    return figure


def draw(machines: Mapping[str, Sequence[Path]], folder: Path) -> list[Path]:
    """Writes FOLDER/MACHINE.KIND.png for each machine, given its files of rows, and each kind that its rows allow."""
    kinds: Sequence[Callable[[Sequence[Row]], Figure | None]] = (ratios, chains, memory)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for machine, files in machines.items():
        rows = [row for file in files for run in read_runs(file) for row in run.rows]
        for kind in kinds:
            figure = kind(rows)
            if figure is not None:
                handles, labels = figure.axes[0].get_legend_handles_labels()
                unique = dict(zip(labels, handles, strict=True))
                figure.axes[0].legend(unique.values(), unique.keys(), fontsize=8)
                written.append(folder / f"{machine}.{kind.__name__}.png")
                figure.savefig(written[-1], dpi=130)
                plt.close(figure)
    return written


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    return list(comparisons(rows).values())


def _label_groups(axes: Axes, groups: Sequence[Sequence[Row]], offset: float) -> None:
    labels = []
    for row, *_ in groups:
        shape = "x".join(map(str, (row.batch, *row.shape)))
        labels.append(f"{row.suite.replace('_', ' ')}: {row.case}\n{shape}, {row.dtype}")
    axes.set_yticks([place + offset for place in range(len(groups))], labels, fontsize=8)
    axes.invert_yaxis()
