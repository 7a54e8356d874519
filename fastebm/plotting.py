"""Pictures of a run: samples beside real images, the way from noise to image, and curves of the log."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.runs.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = 10
STRIP_ROWS = 8
STRIP_COLUMNS = 13

Curves = tuple[tuple[str, dict[str, str]], ...]
"""Panels of curves: a title, and the label of each quantity of the log."""
ENERGY_CURVES: Curves = (
    ("mean energy (low: real)", {"energy_data": "data", "energy_samples": "samples"}),
    ("loss = E(data) - E(samples)", {"loss": "loss"}),
    ("gradient norm", {"gradient_norm": "weights"}),
    ("pixels of samples", {"displacement": "mean way at full size", "clamped": "share at or beyond ±1"}),
)


def tile(images: Tensor, columns: int, border: float = 0.0) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] as one picture (height, width, 3) in [0, 1], row by row, with lines between them.

    C is 1 (gray) or 3; of other numbers of colours the mean is shown in gray. Values outside of [-1, 1] are clamped.
    Lines have the brightness `border`.
    """
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, C, H, W), none of them 0, got {tuple(images.shape)}")
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    bright = images.detach().cpu().float().clamp(-1, 1).add(1).div(2).expand(-1, 3, -1, -1)
    bright = F.pad(bright, (0, 1, 0, 1), value=border)
    columns = min(columns, len(bright))
    missing = -len(bright) % columns
    bright = torch.cat((bright, bright.new_full((missing, *bright.shape[1:]), border)))
    height, width = bright.shape[2:]
    rows = bright.reshape(-1, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return F.pad(rows.reshape(-1, columns * width, 3), (0, 0, 1, 0, 1, 0), value=border)


def save_grid(path: Path, images: Tensor, columns: int = GRID) -> None:
    """A PNG of nothing but images (N, C, S, S) in [-1, 1], enlarged to at least 32 pixels each."""
    from matplotlib.image import imsave

    picture = tile(images, columns, border=0.35)
    scale = max(1, -(-32 // images.shape[3]))
    enlarged = picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    with replacing(path) as temporary:
        imsave(temporary, enlarged.numpy(), format="png")


def save_samples(path: Path, samples: Tensor, real: Tensor) -> None:
    """A PNG of samples on the left and as many real images on the right, both (N, C, S, S) in [-1, 1]."""
    save_panels(path, [("samples", samples), ("real images", real)])


def save_panels(path: Path, panels: Sequence[tuple[str, Tensor]]) -> None:
    """A PNG of grids of images (N, C, S, S) in [-1, 1], two side by side, each under its title."""
    rows = -(-len(panels) // 2)
    figure = _figure(10, 5.3 * rows)
    for axes, (title, images) in zip(figure.subplots(rows, 2).flat, panels, strict=True):
        axes.imshow(tile(images, GRID, border=0.35).numpy(), interpolation="nearest")
        axes.set_title(f"{title} ({images.shape[3]}x{images.shape[2]})")
        axes.axis("off")
    _save(figure, path)


def save_strip(path: Path, snapshots: Sequence[Tensor]) -> None:
    """A PNG of chains on their way: a row for each, from its start to its end, at about equal distances.

    `snapshots` holds the chains (B, C, s, s) before the first and after each update; the size may grow on the way.
    """
    chosen = torch.linspace(0, len(snapshots) - 1, min(STRIP_COLUMNS, len(snapshots))).round().int().tolist()
    size = snapshots[-1].shape[3]
    columns = [F.interpolate(snapshots[k].float(), (size, size), mode="nearest") for k in chosen]
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    height = len(snapshots[0])
    figure = _figure(0.8 * len(chosen), 0.8 * height + 0.6)
    axes = figure.subplots()
    axes.imshow(tile(rows, len(chosen), border=0.35).numpy(), interpolation="nearest")
    names = ["noise" if k == 0 else f"step {k}" for k in chosen]
    sizes = [f"{snapshots[k].shape[3]}x{snapshots[k].shape[2]}" for k in chosen]
    centres = [(size + 1) * column + (size + 1) / 2 for column in range(len(chosen))]
    axes.set_xticks(centres, [f"{name}\n{shape}" for name, shape in zip(names, sizes, strict=True)], fontsize=8)
    axes.set_yticks([])
    axes.tick_params(length=0, top=False)
    _save(figure, path)


def save_curves(path: Path, log: Sequence[Mapping[str, Any]], panels: Curves = ENERGY_CURVES) -> None:
    """A PNG of the quantities of `panels`, by default of energies, over the iterations of a run's log.

    Stages are marked, and where the guard had gone back.
    """
    iterations = [line["iteration"] for line in log]
    figure = _figure(9, 2.5 * len(panels))
    for axes, (title, curves) in zip(figure.subplots(len(panels), 1, sharex=True), panels, strict=True):
        for key, label in curves.items():
            # Runs from before a quantity was logged have none.
            axes.plot(iterations, [line.get(key, math.nan) for line in log], label=label, linewidth=1)
        for before, after in itertools.pairwise(log):
            if before["size"] != after["size"]:
                growth = f"to {after['size']}x{after['size']}"
                axes.axvline(before["iteration"], color="gray", linestyle=":", label=growth)
            if before.get("attempt", 0) != after.get("attempt", 0):
                axes.axvline(before["iteration"], color="red", linestyle="--", linewidth=1, label="guard went back")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    axes.set_xlabel("iteration")
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it would choose a window system and keep every figure. A second to import, hence not at the top.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
