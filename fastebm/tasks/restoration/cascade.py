"""Restoration by a coarse-to-fine cascade whose images are projected onto the measurement after every update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastebm.compiler import require_energy
from fastebm.data.masks import HOLE_NOISE
from fastebm.ops import uniform
from fastebm.rng import Stream, make_chain_ids
from fastebm.sampling.cascade import LevelSampler
from fastebm.sampling.sampler import Projection
from fastebm.tasks.arguments import check_batch_size, check_memory, check_seed, check_whole
from fastebm.tasks.restoration.consistency import DataConsistency
from fastebm.tasks.restoration.degradations import Degradation
from fastebm.tasks.restoration.measurements import measured_images
from fastebm.tasks.restoration.result import Refinement, RestorationResult, in_batches, refine


@torch.no_grad()
def restore_by_cascade(
    y: Tensor,
    degradation: Degradation,
    *,
    cascade: LevelSampler,
    noise: float = 0.0,
    restarts: int = 4,
    coarse: bool | None = None,
    refinement: Refinement | None = None,
    seed: int = 0,
    first_chain_id: int = 0,
    batch_size: int | None = None,
) -> RestorationResult:
    """Images from measurements `y = A x + noise`, by chains of `cascade` that are made consistent with y.

    After each update of the last level, images are projected by `degradation`; at lower levels by the degradation that
    y implies for images of their size (`Degradation.coarsen`), if there is one. Chains start at the cascade's noise, or
    at full size at `degradation.initial_estimate`.

    Args:
        y, degradation, noise, refinement, seed, batch_size: as in `restore`. A `refinement` uses the energy of the last
            level.
        cascade: the sampler of images of the size that y measures.
        restarts: chains for each image; the result is the one that ends at the lowest energy of the last level.
        coarse: whether chains start at the lowest level. By default they do, unless y determines less than half as
            large a share of an image of half the size as of a full image; then they start at full size. Images that
            are not square need False.
        first_chain_id: image i has the chain ids from `(first_chain_id + i) * restarts` on.

    Raises ValueError or TypeError where y, sizes or numbers don't fit, FloatingPointError where a chain is not finite.

    Example:
        >>> import torch, fastebm
        >>> from fastebm.tasks.restoration import SuperResolution, restore_by_cascade
        >>> def energy(x):
        ...     return 0.5 * x.square().sum((1, 2, 3))
        >>> half = SuperResolution(2)
        >>> y = half.A(torch.full((3, 1, 8, 8), 0.5))
        >>> restored = restore_by_cascade(y, half, cascade=fastebm.Cascade({4: energy, 8: energy}, step_size=0.1))
        >>> restored.images.shape, bool(restored.residual_rms.max() < 1e-6)
        (torch.Size([3, 1, 8, 8]), True)
    """
    restarts = check_whole("restarts", restarts)
    check_seed(seed)
    check_batch_size(batch_size)
    top = cascade.levels[-1]
    base = measured_images(y, degradation)
    if base.dtype != torch.float32:
        raise TypeError(f"chains need measurements in float32, got {y.dtype}")
    channels, height, width = base.shape[1:]
    # An energy may take images of any height where chains stay at full size.
    if width != top.size or (coarse is not False and height != width):
        raise ValueError(f"the cascade ends at {top.size}x{top.size}, but y measures images of {height}x{width}")
    check_memory(f"{restarts:,} chains for each of {len(y):,} images", base.numel() * restarts, base.device)
    coarse = _determines_coarse(degradation, y) if coarse is None else coarse
    consistent = DataConsistency(degradation, (channels, height, width), noise)

    def restored(first: int, last: int) -> RestorationResult:
        rows, count = y[first:last], last - first
        project = _projections(cascade, degradation, rows, noise, restarts)
        ids = (
            make_chain_ids((first_chain_id + first) * restarts, 1) + torch.arange(count * restarts, device="cpu")
        ).to(y.device)
        if coarse:
            images = cascade.sample(len(ids), seed, ids, channels=channels, project=project, device=y.device)
        else:
            start = _full_size_start(degradation, consistent, rows, restarts, seed, ids)
            images = cascade.sample(None, seed, ids, x0=start, project=project)
        energies = require_energy(top.sampler.gradient, "restoration")(images)[0].reshape(count, restarts)
        images = images.unflatten(0, (count, restarts))
        chosen = images[torch.arange(count, device=y.device), energies.argmin(1)]
        residual_rms = consistent.residual_rms(chosen, base[first:last])
        part = RestorationResult(chosen, energies.amin(1), residual_rms, energies, images.mean(1))
        if refinement is not None:
            gradient = require_energy(top.sampler.gradient, "restoration")
            part = refine(part, base[first:last], consistent, gradient, refinement, seed, first_chain_id + first)
        return part

    return in_batches(len(y), batch_size, restored)


def _determines_coarse(degradation: Degradation, y: Tensor) -> bool:
    """Whether y determines at least half as large a share of an image of half the size as of a full image."""
    half = degradation.coarsen(y)
    if half is None:
        return False
    shares = []
    for operator, measurement in ((degradation, y), (half.degradation, half.y)):
        image = operator.pinv(measurement)
        shape = (image.shape[1], image.shape[2], image.shape[3])
        shares.append(operator.rank(shape) / math.prod(shape))
    return shares[1] >= 0.5 * shares[0]


def _full_size_start(
    degradation: Degradation, consistent: DataConsistency, y: Tensor, restarts: int, seed: int, ids: Tensor
) -> Tensor:
    """The degradation's initial estimate for each chain, with a little noise in what y does not determine."""
    initial_estimate = degradation.initial_estimate(y).repeat_interleave(restarts, 0)
    draws = uniform(initial_estimate.shape, seed=seed, stream=Stream.INITIAL, chain_ids=ids, device=y.device)
    base = degradation.pinv(y).repeat_interleave(restarts, 0)
    return consistent(initial_estimate + HOLE_NOISE * (2 * draws - 1), base)


def _projections(
    cascade: LevelSampler, degradation: Degradation, y: Tensor, noise: float, restarts: int
) -> dict[int, Projection]:
    """The projections of the levels by size, from the last level down, as far as y implies measurements of them."""
    projections: dict[int, Projection] = {}
    for level in reversed(cascade.levels):
        base = degradation.pinv(y).repeat_interleave(restarts, 0)
        shape = (base.shape[1], base.shape[2], base.shape[3])
        projections[level.size] = _projection(DataConsistency(degradation, shape, noise), base)
        half = degradation.coarsen(y)
        if half is None:
            break
        degradation, y, noise = half.degradation, half.y, noise * half.noise_scale
    return projections


def _projection(consistent: DataConsistency, base: Tensor) -> Projection:
    return lambda x: consistent(x, base)
