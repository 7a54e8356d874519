"""Pictures of a detection: histograms of scores, ROC curves, the most and the least typical images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fastebm.data import Images
from fastebm.plotting import tile
from fastebm.runs.files import replacing
from fastebm.tasks.detection.scores import DetectionMetrics, Scores, roc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 80
PANELS_WIDE = 3
ROWS, COLUMNS = 2, 12


def save_histogram(path: Path, scores: Mapping[str, Scores]) -> None:
    """A PNG with a panel for each score: how it is distributed in each set, the first of which is filled."""
    first, *_ = scores
    figure, panels = _panels(list(scores[first]))
    for name, axes in panels.items():
        edges, shares = histogram({label: by_score[name] for label, by_score in scores.items()})
        for index, (label, heights) in enumerate(shares.items()):
            filled = label == first
            color = "0.75" if filled else f"C{index - 1}"
            axes.stairs(heights, edges, fill=filled, color=color, label=_words(label), linewidth=1.4)
        axes.set_xlabel(_words(name))
        axes.set_ylabel("% of images")
    _legend(figure, next(iter(panels.values())))
    _save(figure, path)


def histogram(
    values: Mapping[str, NDArray[np.float32]],
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Edges of bins that are common to all sets, and the share of each set in each bin, in percent.

    Bins lie where the first set does, and so far as others lie near it; what is beyond is counted in the outermost.
    """
    edges = _edges(list(values.values()))
    shares = {}
    for label, scores in values.items():
        counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
        shares[label] = 100 * counts / len(scores)
    return edges, shares


def save_roc(path: Path, scores: Mapping[str, Scores], metrics: Mapping[str, Mapping[str, DetectionMetrics]]) -> None:
    """A PNG with a panel for each score: the ROC curves of all sets against the first."""
    first, *others = scores
    figure, panels = _panels(list(scores[first]), width=3.6, height=4.4)
    for name, axes in panels.items():
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
        for index, label in enumerate(others):
            false_positives, true_positives = roc(scores[first][name], scores[label][name])
            auroc = metrics[label][name].auroc
            axes.plot(false_positives, true_positives, color=f"C{index}", label=f"{_words(label)}: {auroc:.3f}")
        axes.set_title(_words(name))
        axes.set_xlabel("in-distribution taken for outliers")
        axes.set_ylabel("outliers found")
        axes.set_aspect("equal")
        # Beneath, because curves may go anywhere inside.
        beneath = (0.5, -0.18)
        axes.legend(fontsize=8, title="AUROC", title_fontsize=8, loc="upper center", bbox_to_anchor=beneath, ncols=2)
    _save(figure, path)


def save_typical(path: Path, sets: Mapping[str, Images], scores: Mapping[str, Scores]) -> None:
    """A PNG with a row for each set: its most typical images on the left, its least typical ones on the right."""
    figure = _figure(12, 1.45 * len(sets) + 0.4)
    grid = figure.subplots(len(sets), 2, squeeze=False)
    for row, (name, images) in zip(grid, sets.items(), strict=True):
        distances = scores[name]["level_typicality"]
        order = np.argsort(distances, kind="stable")
        shown = min(ROWS * COLUMNS, len(order))
        for axes, indices, title in zip(row, (order[:shown], order[::-1][:shown]), ("most", "least"), strict=True):
            picture = tile(images.batch(torch.from_numpy(indices.copy())), COLUMNS, border=0.35)
            axes.imshow(picture.numpy(), interpolation="nearest")
            axes.axis("off")
            low, high = distances[indices].min(), distances[indices].max()
            axes.set_title(f"{_words(name)}: {title} typical, {low:.2g} to {high:.2g}", fontsize=9)
    _save(figure, path)


def _edges(values: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Edges of bins over the first set and the middle of the others, unless those lie far away."""
    inner = np.quantile(values[0], (0.001, 0.999))
    spread = max(float(inner[1] - inner[0]), 1e-6 * max(1.0, abs(float(inner[0]))))
    others = np.quantile(np.concatenate(values), (0.005, 0.995))
    low = max(min(inner[0], others[0]), inner[0] - 3 * spread)
    high = min(max(inner[1], others[1]), inner[1] + 3 * spread)
    if high - low < spread:  # all scores are equal: bins still need a width
        low, high = low - spread, high + spread
    return np.linspace(low, high, BINS + 1)


def _panels(names: list[str], width: float = 4.0, height: float = 3.2) -> tuple[Figure, dict[str, Axes]]:
    wide = min(PANELS_WIDE, len(names))
    high = -(-len(names) // wide)
    figure = _figure(width * wide, height * high)
    axes = figure.subplots(high, wide, squeeze=False).flatten()
    for unused in axes[len(names) :]:
        unused.axis("off")
    return figure, dict(zip(names, axes, strict=False))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=9)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # a second to import, hence not at the top

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
