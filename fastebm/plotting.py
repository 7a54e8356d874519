"""Every figure of the library as a PNG: image grids, chains, curves, traces, histograms, densities, ROC curves.

Functions take tensors, arrays and plain numbers. Images are (N, C, H, W) in [-1, 1]; with another number of channels
than 1 or 3 their mean over channels is shown in gray. Files are written completely or not at all.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastebm.runs.files import replacing
from fastebm.runs.interrupts import uninterrupted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = 10
BORDER = 0.35
STRIP_COLUMNS = 13
STRIP_ROWS = 8
BINS = 80
PANELS_PER_ROW = 3
RANKED_COLUMNS = 12
SINGLE_CHAINS = 5
FLIGHT_CHAINS = 20
MAX_PIXELS = 10**8
"""Of one picture, as of pictures that are read."""
DPI = 120
_LONGEST = 32  # characters of a heading
_COLOURS = ("#2f81f7", "#e8710a", "#2da44e", "#a475f9")  # on light and on dark backgrounds
_OWN_COLOUR = "#0a0b0c"  # what an SVG has where the colour of its page is to be
_STRETCHES = 600
_LARGEST_VALUE = 1e30

P = ParamSpec("P")

Curves = tuple[tuple[str, dict[str, str]], ...]
"""Panels of curves: a title, and the label of each quantity of the log."""
ENERGY_CURVES: Curves = (
    ("mean energy (low: real)", {"energy_data": "data", "energy_samples": "samples"}),
    ("loss = E(data) - E(samples)", {"loss": "loss"}),
    ("gradient norm", {"gradient_norm": "weights"}),
    ("pixels of samples", {"displacement": "mean way at full size", "clamped": "share at or beyond ±1"}),
)


def _picture(draw: Callable[Concatenate[Path, P], None]) -> Callable[Concatenate[Path, P], None]:
    """A function that draws a figure and writes it to a path: stopped only at its end, with plain text as text."""

    @functools.wraps(draw)
    def drawn(path: Path, *arguments: P.args, **options: P.kwargs) -> None:
        with uninterrupted(), warnings.catch_warnings():
            from matplotlib import rc_context

            warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in scripts that the font lacks
            with rc_context({"text.parse_math": False, "text.usetex": False}):  # names may contain $
                draw(Path(path), *arguments, **options)

    return drawn


def tile(images: Tensor, columns: int, border: float = 0.0) -> Tensor:
    """Images (N, C, H, W) as one picture (height, width, 3) in [0, 1], row by row, with lines between them.

    Values outside of [-1, 1] are clamped. Lines have the brightness `border`.

    Raises ValueError for other shapes, values that are not finite, fewer than 1 column and more than 10^8 pixels,
    TypeError for images that are not floating point.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    _check_images(images, columns)
    columns = min(columns, len(images))
    bright = as_rgb(images.detach()).clamp(-1, 1).add(1).div(2)
    bright = F.pad(bright, (0, 1, 0, 1), value=border)
    missing = -len(bright) % columns
    bright = torch.cat((bright, bright.new_full((missing, *bright.shape[1:]), border)))
    height, width = bright.shape[2:]
    rows = bright.reshape(-1, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return F.pad(rows.reshape(-1, columns * width, 3), (0, 0, 1, 0, 1, 0), value=border)


def _check_images(images: Tensor, columns: int = 1) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of floats in [-1, 1], got {kind}; fastebm.data.to_float takes bytes")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, C, H, W), none of them 0, got {tuple(images.shape)}")
    columns = min(columns, len(images))
    _check_pixels(-(-len(images) // columns) * (images.shape[2] + 1), columns * (images.shape[3] + 1))
    if not images.isfinite().all():
        raise ValueError("images must be finite, and some pixels are infinite or not a number")


def _check_pixels(height: float, width: float) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"a picture of {height:,.0f} x {width:,.0f} pixels is too large: at most {MAX_PIXELS:,} are drawn; show "
            "fewer images, or write arrays"
        )


def as_rgb(images: Tensor) -> Tensor:
    """Images (N, C, H, W) as float32 (N, 3, H, W) on the CPU."""
    images = images.cpu().float()
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    return images.expand(-1, 3, -1, -1)


def heatmap(values: Tensor) -> Tensor:
    """Values (N, H, W) in [0, 1] as images (N, 3, H, W) in [-1, 1], from black over red to light yellow.

    Values outside are clamped. Raises ValueError for values that are not finite.
    """
    if not values.isfinite().all():
        raise ValueError("values must be finite, and some are infinite or not a number")
    with uninterrupted():
        from matplotlib import colormaps

        colours = torch.from_numpy(colormaps["inferno"](values.detach().cpu().float().numpy())[..., :3])
    return colours.permute(0, 3, 1, 2).float() * 2 - 1


# Images ---------------------------------------------------------------------------------------------------------------


@_picture
def save_grid(path: Path, images: Tensor, columns: int = GRID) -> None:
    """A PNG of nothing but images, each enlarged to at least 32 pixels."""
    from matplotlib.image import imsave

    picture = tile(images, columns, BORDER)
    scale = max(1, -(-32 // images.shape[3]))
    _check_pixels(scale * picture.shape[0], scale * picture.shape[1])
    enlarged = picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    with replacing(path) as temporary:
        imsave(temporary, enlarged.numpy(), format="png")


@_picture
def save_samples(path: Path, samples: Tensor, real: Tensor) -> None:
    """A PNG of samples on the left and as many real images on the right."""
    save_panels(path, [("samples", samples), ("real images", real)])


@_picture
def save_panels(path: Path, panels: Sequence[tuple[str, Tensor]]) -> None:
    """A PNG of image grids, two side by side, each under its title."""
    if not panels:
        raise ValueError("panels must not be empty")
    rows = -(-len(panels) // 2)
    figure = new_figure(10, 5.3 * rows)
    places = figure.subplots(rows, 2).flatten()
    for axes in places:
        axes.axis("off")
    for axes, (title, images) in zip(places, panels, strict=False):
        _show(axes, images, GRID)
        axes.set_title(f"{_words(title)} ({images.shape[3]}x{images.shape[2]})")
    save_figure(figure, path)


@_picture
def save_strip(path: Path, snapshots: Sequence[Tensor]) -> None:
    """A PNG with a row for each chain, from its start to its end in about equal numbers of steps.

    `snapshots` holds the chains (B, C, s, s) before the first and after each update; s may grow between them. Raises
    ValueError for none, and for others.
    """
    for images in snapshots:
        _check_images(images)
    if len({(len(images), images.shape[1]) for images in snapshots}) != 1:
        raise ValueError("snapshots must not be empty, and all of the same chains")
    chosen = (
        torch.linspace(0, len(snapshots) - 1, min(STRIP_COLUMNS, len(snapshots)), device="cpu").round().int().tolist()
    )
    size = snapshots[-1].shape[3]
    columns = [F.interpolate(snapshots[k].float(), (size, size), mode="nearest") for k in chosen]
    figure = new_figure(0.8 * len(chosen), 0.8 * len(snapshots[0]) + 0.6)
    axes = figure.subplots()
    _show(axes, torch.stack(columns, dim=1).flatten(0, 1), len(chosen))
    steps = ["noise" if k == 0 else f"step {k}" for k in chosen]
    sizes = [f"{snapshots[k].shape[3]}x{snapshots[k].shape[2]}" for k in chosen]
    labels = [f"{step}\n{shape}" for step, shape in zip(steps, sizes, strict=True)]
    axes.set_xticks(_centres(len(chosen), size), labels, fontsize=8)
    axes.set_yticks([])
    axes.tick_params(length=0, top=False)
    save_figure(figure, path)


@_picture
def save_columns(path: Path, columns: Mapping[str, Tensor]) -> None:
    """A PNG with a column of images (N, C, S, S) under each heading; image i of every column is in row i.

    Columns of 1 and of 3 channels may stand side by side. Raises ValueError for columns of different lengths or
    sizes.
    """
    lengths = {len(images) for images in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns must be of one length, got {sorted(lengths)}")
    for images in columns.values():
        _check_images(images)
    if len({images.shape[2:] for images in columns.values()}) != 1:
        raise ValueError(f"columns must be of one size, got {[tuple(images.shape[2:]) for images in columns.values()]}")
    count, size = lengths.pop(), next(iter(columns.values())).shape[3]
    longest = max(len(line) for heading in columns for line in heading.split("\n"))
    width = max(1.0, 0.08 * longest)  # inches, so that headings do not overlap
    figure = new_figure(width * len(columns) + 0.1, width * count + 0.6)
    axes = figure.subplots()
    _show(axes, torch.stack([as_rgb(images) for images in columns.values()], dim=1).flatten(0, 1), len(columns))
    axes.set_xticks(_centres(len(columns), size), list(columns), fontsize=8)
    axes.set_yticks([])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    save_figure(figure, path)


@_picture
def save_paths(path: Path, images: Mapping[str, Tensor], energies: Mapping[str, Tensor]) -> None:
    """A PNG of paths between images, with a row for each pair of ends: the paths on the left, their energies beside.

    Args:
        images: (N, points, C, S, S) for each kind of path, such as "straight".
        energies: (N, points), likewise.

    Raises ValueError for shapes that don't fit.
    """
    shapes = {values.shape for values in images.values()}
    if (
        len(shapes) != 1
        or len(shape := shapes.pop()) != 5
        or {values.shape for values in energies.values()} != {shape[:2]}
    ):
        raise ValueError(
            "paths must be (N, points, C, S, S) and energies (N, points), got "
            f"{[(*x.shape,) for x in images.values()]} and {[(*x.shape,) for x in energies.values()]}"
        )
    count, points, _, size, _ = shape
    figure = new_figure(0.75 * points + 3.4, 1.75 * count + 0.4)
    grid = figure.subplots(count, 2, squeeze=False, width_ratios=(0.75 * points, 3))
    for number, (left, right) in enumerate(grid):
        _show(left, torch.cat([path_images[number] for path_images in images.values()]), points)
        left.set_yticks(_centres(len(images), size), list(images), fontsize=8)
        left.set_xticks([])
        left.tick_params(length=0)
        for name, values in energies.items():
            right.plot(values[number].detach().cpu().float().numpy(), marker=".", label=name)
        right.set_ylabel("energy", fontsize=8)
        right.tick_params(labelsize=7)
        right.grid(alpha=0.3)
        if number == 0:
            right.legend(fontsize=8)
    save_figure(figure, path)


@_picture
def save_ranked(path: Path, rows: Mapping[str, Sequence[tuple[str, Tensor]]]) -> None:
    """A PNG with a row for each set and in it image grids under their titles, such as the best and the worst images."""
    if len({len(panels) for panels in rows.values()}) != 1 or not all(rows.values()):
        raise ValueError("rows must not be empty, and have as many panels each")
    figure = new_figure(12, 1.45 * len(rows) + 0.4)
    grid = figure.subplots(len(rows), len(next(iter(rows.values()))), squeeze=False)
    for line, (name, panels) in zip(grid, rows.items(), strict=True):
        for axes, (title, images) in zip(line, panels, strict=True):
            _show(axes, images, RANKED_COLUMNS)
            axes.axis("off")
            axes.set_title(f"{_words(name)}: {title}", fontsize=9)
    save_figure(figure, path)


# Curves ---------------------------------------------------------------------------------------------------------------


@_picture
def save_curves(path: Path, log: Sequence[Mapping[str, Any]], panels: Curves = ENERGY_CURVES) -> None:
    """A PNG of the quantities of `panels`, by default of energies, over the iterations of a run's log.

    Vertical lines mark where a stage began, and where the guard returned to an earlier checkpoint.
    """
    if not panels:
        raise ValueError("panels must not be empty")
    for line in log:
        if missing := {"iteration", "size"} - line.keys():
            raise ValueError(f"a line of the log lacks {' and '.join(sorted(missing))}")
    iterations = [line["iteration"] for line in log]
    figure = new_figure(9, 2.5 * len(panels))
    for axes, (title, curves) in zip(figure.subplots(len(panels), 1, sharex=True), panels, strict=True):
        for key, label in curves.items():
            # Logs of older versions lack some quantities.
            axes.plot(iterations, [line.get(key, math.nan) for line in log], label=label, linewidth=1)
        _mark_events(axes, log)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    axes.set_xlabel("iteration")
    save_figure(figure, path)


def svg_curves(log: Sequence[Mapping[str, Any]], curves: Mapping[str, str]) -> str:
    """The text of an SVG with quantities of a run's log over its iterations, marked as by `save_curves`.

    Text and axes are dark on light pages and light on dark ones, and the background is that of the page. The same log
    gives the same text. Long logs are thinned to the extremes of each of 600 stretches, so that the text stays short.

    Args:
        curves: the label of each quantity. Values that are missing, not finite or beyond ±1e30 are not drawn.
    """
    settings: Any = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "fastebm"}
    settings |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _OWN_COLOUR)
    settings |= {"xtick.color": _OWN_COLOUR, "ytick.color": _OWN_COLOUR, "grid.color": _OWN_COLOUR}
    settings |= {"legend.facecolor": "none", "legend.framealpha": 1.0, "legend.edgecolor": "none"}
    with uninterrupted(), warnings.catch_warnings():
        from matplotlib import rc_context

        warnings.filterwarnings("ignore", "Glyph .* missing")
        with rc_context(settings):
            figure = new_figure(5.4, 2.9)
            axes = figure.subplots()
            for (key, label), colour in zip(curves.items(), itertools.cycle(_COLOURS)):
                axes.plot(*_thinned(log, key), label=label, color=colour, linewidth=1.3)
            _mark_events(axes, log)
            axes.set_xlabel("updates")
            axes.set_facecolor("none")
            axes.grid(alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(fontsize=8)
            text = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    _, opening, rest = text.getvalue().partition("<svg")
    rest = re.sub('font-family: [^;"]*', "font-family: system-ui, sans-serif", rest)
    tag, end, rest = rest.replace(_OWN_COLOUR, "currentColor").partition(">")
    style = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d8dee4}}</style>"
    return f"{opening}{tag}{end}{style}{rest}"


@_picture
def save_traces(
    path: Path, traces: Mapping[str, Mapping[str, Tensor]], places: Mapping[str, Sequence[float]] | None = None
) -> None:
    """A PNG of chains in time: a column for each level or sampler, and in it a panel for each scalar summary.

    A panel shows the median over the chains, the band that holds 90% of them, and single chains.

    Args:
        traces: (n, B) values of B chains after n updates, by level and by name; the same names in each level.
        places: the n numbers of these updates by level, by default 1 to n.

    Raises ValueError for no traces, other shapes and names, and values that are not finite.
    """
    names = {tuple(by_name) for by_name in traces.values()}
    if len(names) != 1 or not (rows := names.pop()):
        raise ValueError("traces must hold at least one level, and the same summaries of each")
    figure = new_figure(3.2 * len(traces) + 1, 1.7 * len(rows) + 0.5)
    grid = figure.subplots(len(rows), len(traces), squeeze=False, sharex="col")
    for column, (level, by_name) in zip(grid.T, traces.items(), strict=True):
        column[0].set_title(_words(level))
        column[-1].set_xlabel("update")
        for axes, (name, values) in zip(column, by_name.items(), strict=True):
            if values.ndim != 2 or not values.numel() or not values.isfinite().all():
                raise ValueError(f"the traces of {name} must be (n, B), none of them 0, and finite")
            chains = values.detach().cpu().double().numpy()
            updates = range(1, len(chains) + 1) if places is None else places[level]
            low, middle, high = np.quantile(chains, (0.05, 0.5, 0.95), axis=1)
            axes.fill_between(updates, low, high, alpha=0.2, linewidth=0)
            axes.plot(updates, chains[:, :SINGLE_CHAINS], color="0.5", linewidth=0.5)
            axes.plot(updates, middle, linewidth=1.4)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=7)
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(_words(name), fontsize=8)
    save_figure(figure, path)


@_picture
def save_flight(
    path: Path,
    updates: Sequence[Mapping[str, Any]],
    chains: Mapping[str, NDArray[np.float32]],
    texts: Sequence[str],
) -> None:
    """A PNG of the last updates of a run: energies, gap, steepness, steps that rise, norms, and chains step by step.

    Args:
        updates: the numbers of each update by name, as in a flight record; whatever is missing is not drawn.
        chains: energies of chains by kind of start, (U, n, B) of U updates; the last ones are drawn, and the first of
            them in gray.
        texts: lines above the panels.
    """
    kinds = list(chains)
    panels: list[tuple[str, str, dict[str, str]]] = [
        ("mean energies", "linear", {"energy_data": "images", "energy_samples": "chain ends"}),
        ("largest energies", "log", {"largest_energy_data": "images", "largest_energy_samples": "chain ends"}),
        ("gap", "symlog", {"gap": "chain ends - images"}),
        ("step size x curvature (median)", "log", {f"{kind}_step_curvature": f"from {kind}" for kind in kinds}),
        ("steps that raise the energy", "linear", {f"{kind}_rising": f"from {kind}" for kind in kinds}),
        ("Metropolis acceptance", "linear", {f"{kind}_acceptance": f"from {kind}" for kind in kinds}),
        ("gradient of the energy (median norm)", "log", {f"{kind}_gradient_norm": f"from {kind}" for kind in kinds}),
        ("norms of the weights", "log", {"weight_norm": "weights", "gradient_norm": "their gradient"}),
    ]
    lines = [line for text in texts for line in textwrap.wrap(text, 130)]
    figure = new_figure(11, 12.5 + 0.2 * len(lines))
    figure.suptitle("\n".join(map(_printable, lines)), fontsize=9, x=0.01, ha="left")
    grid = list(figure.subplots(5, 2).flat)
    for axes, (title, scale, curves) in zip(grid, panels, strict=False):
        for key, label in curves.items():
            points = [(line["iteration"], line[key]) for line in updates if math.isfinite(line.get(key, math.nan))]
            if scale == "log":
                points = [(at, value) for at, value in points if value > 0]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", markersize=3, linewidth=1, label=label)
        if "curvature" in title:
            axes.axhline(2, color="red", linestyle="--", linewidth=1, label="overshoots")
        if scale != "linear":
            axes.set_yscale(scale)
            axes.yaxis.set_major_formatter("{x:.3g}")  # by default a formula, which would be shown as its source
            axes.yaxis.set_minor_formatter("")
        axes.set_title(title, fontsize=9)
    last = grid[len(panels)]
    for number, (kind, energies) in enumerate(chains.items()):
        there = np.flatnonzero(np.isfinite(energies).any(axis=(1, 2)))
        for update, color, label in ((0, "0.7", "_"), (-1, f"C{number}", f"from {kind}")):
            if len(there):
                curves_of = np.where(np.isfinite(energies[there[update]]), energies[there[update]], np.nan)
                steps = np.arange(1, len(curves_of) + 1)
                drawn = last.plot(steps, curves_of[:, :FLIGHT_CHAINS], color=color, linewidth=0.6, zorder=2 - update)
                drawn[0].set_label(label)
    last.set_title("energies along the chains of the last update (gray: of the first)", fontsize=9)
    last.set_xlabel("step", fontsize=8)
    grid[-1].axis("off")
    for axes in grid[: len(panels) + 1]:
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    save_figure(figure, path)


@_picture
def save_histograms(path: Path, scores: Mapping[str, Mapping[str, NDArray[np.float32]]]) -> None:
    """A PNG with a panel for each score: its distribution in each set, the first of which is filled.

    `scores` holds (N,) arrays by set and by name of the score.
    """
    names = {tuple(sorted(by_score)) for by_score in scores.values()}
    if len(names) != 1 or not names.pop():
        raise ValueError("scores must hold at least one set, and the same scores of each")
    first, *_ = scores
    figure, panels = _panels(list(scores[first]), width=4.0, height=3.2)
    for name, axes in panels.items():
        edges, shares = histogram({label: by_score[name] for label, by_score in scores.items()})
        for index, (label, heights) in enumerate(shares.items()):
            filled = label == first
            color = "0.75" if filled else f"C{index - 1}"
            axes.stairs(heights, edges, fill=filled, color=color, label=_words(label), linewidth=1.4)
        axes.set_xlabel(_words(name))
        axes.set_ylabel("% of images")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=9)
    save_figure(figure, path)


def histogram(
    values: Mapping[str, NDArray[np.float32]],
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Edges of bins that all sets share, and the percentage of each set in each bin.

    The bins cover the first set and what of the others is near it; values beyond count in the outermost bins. Raises
    ValueError for a set that is empty or has values that are not finite.
    """
    for label, scores in values.items():
        if np.ndim(scores) != 1 or not np.size(scores) or not np.isfinite(scores).all():
            raise ValueError(f"scores of {label} must be (N,), N >= 1, and finite")
    edges = _edges(list(values.values()))
    shares = {}
    for label, scores in values.items():
        counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
        shares[label] = 100 * counts / len(scores)
    return edges, shares


@_picture
def save_density(path: Path, x: NDArray[np.float64], density: NDArray[np.float64], samples: Mapping[str, Any]) -> None:
    """A small PNG of histograms over a known density: values `(M,)` of it at points x `(M,)`, ascending.

    `samples` holds `(N,)` samples by label; the first are filled. Bins span x, and heights count samples outside too.
    Raises ValueError for points that don't ascend, another shape, and samples that are empty or not finite.
    """
    if np.ndim(x) != 1 or len(x) < 2 or np.shape(density) != np.shape(x) or not (np.diff(x) > 0).all():
        raise ValueError("x must be (M,), M >= 2, ascending, and density as many")
    for label, values in samples.items():
        if np.ndim(values) != 1 or not np.size(values) or not np.isfinite(values).all():
            raise ValueError(f"samples of {label} must be (N,), N >= 1, and finite")
    figure = new_figure(4.6, 2.4)
    axes = figure.subplots()
    edges = np.linspace(x[0], x[-1], BINS + 1)
    for index, (label, values) in enumerate(samples.items()):
        counts, _ = np.histogram(values, edges)
        heights = counts / (np.size(values) * (edges[1] - edges[0]))
        color = "0.8" if index == 0 else f"C{index - 1}"
        axes.stairs(heights, edges, fill=index == 0, color=color, label=_words(label), linewidth=1.2)
    axes.plot(x, density, color="black", linewidth=1, label="exact density")
    axes.set_xlabel("x")
    axes.set_yticks([])
    axes.legend(fontsize=7, frameon=False)
    save_figure(figure, path)


@_picture
def save_roc(
    path: Path, curves: Mapping[str, Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64], float]]]
) -> None:
    """A PNG with a panel for each score and in it a ROC curve for each set of outliers.

    `curves` holds, by score and by set, false positive rates, true positive rates and the area under the curve.
    """
    if not curves:
        raise ValueError("curves must hold at least one score")
    figure, panels = _panels(list(curves), width=3.6, height=4.4)
    for name, axes in panels.items():
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
        for index, (label, (false_positives, true_positives, auroc)) in enumerate(curves[name].items()):
            axes.plot(false_positives, true_positives, color=f"C{index}", label=f"{_words(label)}: {auroc:.3f}")
        axes.set_title(_words(name))
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        axes.set_aspect("equal")
        # Below the panel, because curves may cover any place inside.
        below = (0.5, -0.18)
        axes.legend(fontsize=8, title="AUROC", title_fontsize=8, loc="upper center", bbox_to_anchor=below, ncols=2)
    save_figure(figure, path)


# Figures --------------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Raises ValueError for more than 10^8 pixels."""
    _check_pixels(DPI * height, DPI * width)
    # Not pyplot, which would choose a window system and keep every figure. Imported here because it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG with 120 pixels an inch."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _mark_events(axes: Axes, log: Sequence[Mapping[str, Any]]) -> None:
    """Vertical lines where a stage began, and where the guard went back; each kind is in the legend once."""
    for before, after in itertools.pairwise(log):
        sizes, attempts = ([line.get(name, 0) for line in (before, after)] for name in ("size", "attempt"))
        if sizes[0] != sizes[1]:
            growth = f"to {sizes[1]}x{sizes[1]}"
            axes.axvline(before["iteration"], color="gray", linestyle=":", label=growth)
        if attempts[0] != attempts[1]:
            known = axes.get_legend_handles_labels()[1]
            label = "_" if "guard went back" in known else "guard went back"
            axes.axvline(before["iteration"], color="red", linestyle="--", linewidth=1, label=label)


def _thinned(log: Sequence[Mapping[str, Any]], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The iterations of a log and the values of a quantity in it; of long logs the extremes of each stretch."""
    iterations = np.array([line["iteration"] for line in log], np.float64)
    values = np.array([line.get(key, math.nan) for line in log], np.float64)
    values[~(np.abs(values) <= _LARGEST_VALUE)] = np.nan
    if len(values) > 4 * _STRETCHES:
        pieces = np.array_split(np.arange(len(values)), _STRETCHES)
        filled = np.nan_to_num(values, nan=0.0)
        kept = [{int(piece[np.argmin(filled[piece])]), int(piece[np.argmax(filled[piece])])} for piece in pieces]
        chosen = [place for places in kept for place in sorted(places)]
        return iterations[chosen], values[chosen]
    return iterations, values


def _panels(names: list[str], width: float, height: float) -> tuple[Figure, dict[str, Axes]]:
    columns = min(PANELS_PER_ROW, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[len(names) :]:
        unused.axis("off")
    return figure, dict(zip(names, axes, strict=False))


def _show(axes: Axes, images: Tensor, columns: int) -> None:
    axes.imshow(tile(images, columns, BORDER).numpy(), interpolation="nearest")


def _centres(count: int, size: int) -> list[float]:
    """Where the middles of `count` images of a tiled picture are, in pixels."""
    return [(size + 1) * (place + 0.5) for place in range(count)]


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


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _words(name: str) -> str:
    """A name as a heading: on one short line, without characters that can't be drawn."""
    words = _printable(name.replace("_", " "))
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 3]}..."
