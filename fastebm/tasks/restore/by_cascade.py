"""Zero-shot restoration without a decoder: a coarse-to-fine cascade that is held to the measurement on its way up."""

from __future__ import annotations

import torch
from torch import Tensor

from fastebm.rng import chain_ids
from fastebm.sampling.cascade import LevelSampler
from fastebm.sampling.langevin import batch_rows
from fastebm.tasks.restore.consistency import Consistent
from fastebm.tasks.restore.degradations import Degradation
from fastebm.tasks.restore.latent import Refinement, Restored, joined, refined
from fastebm.tasks.restore.projected import ProjectedCascade, Projection


@torch.no_grad()
def restore_by_cascade(
    y: Tensor,
    degradation: Degradation,
    *,
    cascade: LevelSampler,
    noise: float = 0.0,
    restarts: int = 4,
    refinement: Refinement | None = None,
    seed: int = 0,
    chains: int = 0,
    batch_size: int | None = None,
) -> Restored:
    """Images from measurements `y = A x + noise`, by the chains of `cascade` made consistent with y after each update.

    In the last level by `degradation`; in the levels below by what it says of images of their size (`halved`), where it
    says anything. The start is the cascade's own noise, so that x̂ = A⁺y + (I - A⁺A) x from the first update on.

    Args:
        y, degradation, noise, refinement, seed, batch_size: as in `restore`. Steps of `refinement` are under the energy
            of the last level.
        cascade: sampler of images of the size that y is a measurement of.
        restarts: chains for each image; the one that ends at the lowest energy of the last level is taken.
        chains: image i has the chains `(chains + i) * restarts` and on.

    Raises ValueError where the sizes don't fit, FloatingPointError where a chain is not finite.

    Example:
        >>> import torch, fastebm
        >>> from fastebm.tasks.restore import SuperResolution, restore_by_cascade
        >>> def energy(x):
        ...     return 0.5 * x.square().sum((1, 2, 3))
        >>> half = SuperResolution(2)
        >>> y = half.A(torch.full((3, 1, 8, 8), 0.5))
        >>> restored = restore_by_cascade(y, half, cascade=fastebm.Cascade({4: energy, 8: energy}, step_size=0.1))
        >>> restored.images.shape, bool(restored.misfit.max() < 1e-6)
        (torch.Size([3, 1, 8, 8]), True)
    """
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    top = cascade.levels[-1]
    base = degradation.pinv(y)
    channels, height, width = base.shape[1:]
    if (height, width) != (top.size, top.size):
        raise ValueError(f"the cascade ends at {top.size}x{top.size}, but y measures images of {height}x{width}")
    consistent = Consistent(degradation, (channels, height, width), noise)
    parts = []
    for first, last in batch_rows(len(y), batch_size):
        projections = _projections(cascade, degradation, y[first:last], noise, restarts)
        count = last - first
        ids = chain_ids((chains + first) * restarts, 1) + torch.arange(count * restarts)
        images = ProjectedCascade(cascade, projections).sample(
            count * restarts, seed, ids.to(y.device), channels=channels, device=y.device
        )
        energies = top.sampler.gradient(images)[0].reshape(count, restarts)
        chosen = images.unflatten(0, (count, restarts))[torch.arange(count, device=y.device), energies.argmin(1)]
        misfit = consistent.misfit(chosen, base[first:last])
        found = Restored(chosen, energies.amin(1), misfit, energies)
        if refinement is not None:
            gradient = top.sampler.gradient
            found = refined(found, base[first:last], consistent, gradient, refinement, seed, chains + first)
        parts.append(found)
    return joined(parts)


def _projections(
    cascade: LevelSampler, degradation: Degradation, y: Tensor, noise: float, restarts: int
) -> dict[int, Projection]:
    """The projection of each level, by size, down to the first of which the measurement says nothing."""
    projections: dict[int, Projection] = {}
    for level in reversed(cascade.levels):
        base = degradation.pinv(y).repeat_interleave(restarts, 0)
        shape = (base.shape[1], base.shape[2], base.shape[3])
        projections[level.size] = _onto(Consistent(degradation, shape, noise), base)
        half = degradation.halved(y)
        if half is None:
            break
        degradation, y, noise = half.degradation, half.y, noise * half.noise_scale
    return projections


def _onto(consistent: Consistent, base: Tensor) -> Projection:
    return lambda x: consistent(x, base)
