"""The figures of image tasks: which tensors of a result `fastebm.plotting` draws, under which headings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastebm import plotting
from fastebm.tasks.denoise import DenoisingResult
from fastebm.tasks.inpaint import InpaintingResult
from fastebm.tasks.interpolate import ChainPath, ImagePath
from fastebm.tasks.translate import TranslationResult

ROWS = 10
HOLE_COLOUR = (-0.6, -0.2, 0.5)  # blue


def save_denoised(path: Path, result: DenoisingResult, rows: int = ROWS) -> None:
    """A PNG: original, noisy, restored, and the baselines' results, with mean PSNR and SSIM over all images."""
    columns = {} if result.clean is None else {"original": result.clean[:rows]}
    for name, images in {"noisy": result.noisy, "restored": result.restored, **result.baselines}.items():
        heading = name.replace(" ", "\n", 1)
        if name in result.quality:
            mean = result.quality[name].to_json()
            heading += f"\n{mean['psnr']:.1f} dB, {mean['ssim']:.2f}"
        columns[heading] = images[:rows]
    plotting.save_columns(path, columns)


def save_inpainted(path: Path, result: InpaintingResult, rows: int = ROWS, samples: int = 4) -> None:
    """A PNG: original, what was known (the hole in blue), mean of the chains, that of lowest energy, and others."""
    images, hole = plotting.as_rgb(result.images[:rows]), result.hole[:rows].any(1, keepdim=True)
    blue = images.new_tensor(HOLE_COLOUR).reshape(1, 3, 1, 1)
    columns = {"original": images, "known": torch.where(hole.to(images.device), blue, images)}
    columns["mean of\nchains"] = result.mean[:rows]
    columns["chain of\nlowest energy"] = result.filled[:rows, 0]
    others = min(samples, result.filled.shape[1] - 1)
    # Evenly spaced in the order of energies, so that the worst chain is shown as well.
    for place in torch.linspace(1, result.filled.shape[1] - 1, others, device="cpu").round().int().tolist():
        columns[f"chain of\nrank {place + 1}"] = result.filled[:rows, place]
    plotting.save_columns(path, columns)


def save_translated(path: Path, result: TranslationResult, rows: int = ROWS, *, source: bool = True) -> None:
    """A PNG: source, snapshots on the way, the end, and a map of how much each pixel was changed.

    With `source=False` the first column is left out, for images that may not be published. Early snapshots still look
    like them.
    """
    columns = {"source": result.source[:rows]} if source else {}
    for step, images in zip(result.snapshot_steps[1:], result.snapshots[1:], strict=True):
        columns[f"step {step}"] = images[:rows]
    largest = max(float(result.change.max()), 1e-6)
    columns[f"change\n0 to {largest:.1f}"] = plotting.heatmap(result.change[:rows] / largest)
    plotting.save_columns(path, columns)


def save_chain_path(path: Path, result: ChainPath, rows: int = ROWS) -> None:
    """A PNG with a path of samples in each row, from one chain's to another's."""
    points = result.images.shape[1]
    names = ["chain A", *(f"{place / (points - 1):.0%}" for place in range(1, points - 1)), "chain B"]
    plotting.save_columns(path, {name: result.images[:rows, place] for place, name in enumerate(names)})


def save_image_path(path: Path, result: ImagePath, rows: int = 6) -> None:
    """A PNG: for each pair the straight path and below it the relaxed one, and beside them the energies along both."""
    images = {"straight": result.straight[:rows], "relaxed": result.relaxed[:rows]}
    plotting.save_paths(path, images, {"straight": result.energy_straight, "relaxed": result.energy_relaxed})


def save_nearest(path: Path, samples: Tensor, nearest: Tensor, distances: Tensor, rows: int = ROWS) -> None:
    """A PNG: samples (N, C, S, S), and to the right of each the training images (N, k, C, S, S) nearest to it."""
    columns = {"sample": samples[:rows]}
    for place in range(nearest.shape[1]):
        columns[f"nearest {place + 1}\nmean {float(distances[:, place].mean()):.1f}"] = nearest[:rows, place]
    plotting.save_columns(path, columns)
