"""Pictures of tasks: columns of images under headings, paths with the energies along them, maps of change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastebm.plotting import _figure, _save, tile
from fastebm.tasks.denoise import DenoisingResult
from fastebm.tasks.inpaint import InpaintingResult
from fastebm.tasks.interpolate import ChainPath, ImagePath
from fastebm.tasks.translate import TranslationResult

ROWS = 10
BORDER = 0.35


def save_columns(path: Path, columns: Mapping[str, Tensor], *, rows: Sequence[str] = ()) -> None:
    """A PNG with a column for each heading, of images (N, C, S, S) in [-1, 1]; the first of each are side by side.

    C is 1 or 3, also in one picture. `rows` names the lines. Raises ValueError for columns of several lengths.
    """
    lengths = {len(images) for images in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns must be of one length, got {sorted(lengths)}")
    count, side = lengths.pop(), next(iter(columns.values())).shape[3]
    lines = torch.stack([_coloured(images) for images in columns.values()], dim=1).flatten(0, 1)
    longest = max(len(line) for heading in columns for line in heading.split("\n"))
    width = max(1.0, 0.08 * longest)  # inches, so that headings stay apart
    figure = _figure(width * len(columns) + (0.8 if rows else 0.1), width * count + 0.6)
    axes = figure.subplots()
    axes.imshow(tile(lines, len(columns), border=BORDER).numpy(), interpolation="nearest")
    centres = [(side + 1) * place + (side + 1) / 2 for place in range(max(len(columns), count))]
    axes.set_xticks(centres[: len(columns)], list(columns), fontsize=8)
    axes.set_yticks(centres[: len(rows)], list(rows), fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _save(figure, path)


def save_denoised(path: Path, result: DenoisingResult, rows: int = ROWS) -> None:
    """A PNG: original, noisy, restored, and what the baselines made of it, with PSNR and SSIM over all images."""
    shown = {"noisy": result.noisy, "restored": result.restored, **result.baselines}
    columns = {} if result.clean is None else {"original": result.clean[:rows]}
    for name, images in shown.items():
        heading = name.replace(" ", "\n", 1)
        if name in result.quality:
            mean = result.quality[name].to_json()
            heading += f"\n{mean['psnr']:.1f} dB, {mean['ssim']:.2f}"
        columns[heading] = images[:rows]
    save_columns(path, columns)


def save_inpainted(path: Path, result: InpaintingResult, rows: int = ROWS, samples: int = 4) -> None:
    """A PNG: original, what was known (the hole in colour), mean of the chains, that of lowest energy, and others."""
    images, hole = _coloured(result.images[:rows]), result.hole[:rows].any(1, keepdim=True)
    blue = images.new_tensor([-0.6, -0.2, 0.5]).reshape(1, 3, 1, 1)
    columns = {"original": images, "known": torch.where(hole.to(images.device), blue, images)}
    columns["mean of\nchains"] = result.mean[:rows]
    columns["chain of\nlowest energy"] = result.filled[:rows, 0]
    others = min(samples, result.filled.shape[1] - 1)
    # By equal steps down the order of energies, so that the worst is among those shown.
    for place in torch.linspace(1, result.filled.shape[1] - 1, others).round().int().tolist():
        columns[f"chain of\nrank {place + 1}"] = result.filled[:rows, place]
    save_columns(path, columns)


def save_translated(path: Path, result: TranslationResult, rows: int = ROWS, *, source: bool = True) -> None:
    """A PNG: source, snapshots of the way, the end, and a map of how much each pixel was changed.

    Without `source` the first is left out, where it may not be shown to others. What comes after it is made of it, and
    early snapshots look like it.
    """
    columns = {"source": result.source[:rows]} if source else {}
    for step, images in zip(result.snapshot_steps[1:], result.snapshots[1:], strict=True):
        columns[f"step {step}"] = images[:rows]
    largest = max(float(result.change.max()), 1e-6)
    columns[f"change\n0 to {largest:.1f}"] = heat(result.change[:rows] / largest)
    save_columns(path, columns)


def save_chain_path(path: Path, result: ChainPath, rows: int = ROWS) -> None:
    """A PNG: each line a path of samples from one chain's to another's."""
    points = result.images.shape[1]
    names = ["chain A", *(f"{place / (points - 1):.0%}" for place in range(1, points - 1)), "chain B"]
    save_columns(path, {name: result.images[:rows, place] for place, name in enumerate(names)})


def save_image_path(path: Path, result: ImagePath, rows: int = 6) -> None:
    """A PNG: of each pair the straight path and below it the relaxed one, and beside them the energies along both."""
    count, points = min(rows, len(result.straight)), result.straight.shape[1]
    figure = _figure(0.75 * points + 3.4, 1.75 * count + 0.4)
    for number, (left, right) in enumerate(figure.subplots(count, 2, squeeze=False, width_ratios=(0.75 * points, 3))):
        both = torch.cat((result.straight[number], result.relaxed[number]))
        left.imshow(tile(both, points, border=BORDER).numpy(), interpolation="nearest")
        side = both.shape[2] + 1
        left.set_yticks([side / 2, 1.5 * side], ["straight", "relaxed"], fontsize=8)
        left.set_xticks([])
        left.tick_params(length=0)
        for name, energy in (("straight", result.energy_straight), ("relaxed", result.energy_relaxed)):
            right.plot(energy[number].cpu().numpy(), marker=".", label=name)
        right.set_ylabel("energy", fontsize=8)
        right.tick_params(labelsize=7)
        right.grid(alpha=0.3)
        if number == 0:
            right.legend(fontsize=8)
    _save(figure, path)


def save_neighbours(path: Path, samples: Tensor, nearest: Tensor, distances: Tensor, rows: int = ROWS) -> None:
    """A PNG: samples (N, C, S, S), and to the right of each the training images (N, k, C, S, S) next to it."""
    columns = {"sample": samples[:rows]}
    for place in range(nearest.shape[1]):
        columns[f"nearest {place + 1}\nmean {float(distances[:, place].mean()):.1f}"] = nearest[:rows, place]
    save_columns(path, columns)


def heat(values: Tensor) -> Tensor:
    """Values (N, H, W) in [0, 1] as images (N, 3, H, W) in [-1, 1], from black over red to light yellow."""
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps["inferno"](values.cpu().numpy())[..., :3])
    return colours.permute(0, 3, 1, 2).float() * 2 - 1


def _coloured(images: Tensor) -> Tensor:
    """Images (N, C, H, W) with three colours, on the CPU."""
    images = images.cpu().float()
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    return images.expand(-1, 3, -1, -1)
