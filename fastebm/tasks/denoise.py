"""Denoising by Langevin chains that start from the noisy image, or from what is left of it at a lower resolution.

Under noise of a known level, `y = x + noise * N(0, I)`, the posterior of a model `exp(-E(x) / T)` is
`exp(-(E(x) + T ||x - y||^2 / (2 noise^2)) / T)`. Chains follow its gradient: that of the energy, and the pull of the
data term, `T / noise^2 * (x - y)`, inside of the same kernel. The authors of CF-EBM leave the data term out (T = 0) and
stop after ten steps. An energy that was trained with short chains has no temperature that can be known beforehand, so
that `tune_denoising` tries some.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastebm.ops import normal
from fastebm.rng import Stream
from fastebm.sampling import data_term_weight
from fastebm.tasks.classical_denoisers import ClassicalDenoiser
from fastebm.tasks.climb import Climb, climb, energies_of
from fastebm.tasks.energies import Model, level_gradients, levels_from, top_gradient
from fastebm.tasks.image_quality import Quality, quality
from fastebm.tasks.inputs import checked_images


@dataclass(frozen=True)
class DenoiseOptions:
    """How chains denoise.

    Attributes:
        num_steps: updates, at each level.
        step_size: of each.
        temperature: of the energy beside the data term; 0 is without data term, 1 takes the energy at its word. Updates
            take its pull implicitly, so that it may be of any strength.
        noise_std: of the chains, falling to 0 over them.
        start_size: the resolution at which chains start, from the noisy image averaged down: what is fine in the image
            comes from the energy, and noise is averaged away. None is full size, from the noisy image itself. A lower
            one needs a run of variant "cascade".
        num_chains: of each image; their mean is the result, which has a smaller squared error than one of them, as the mean
            of a posterior has, and is the smoother for it.
        shifts: whether chains of an image see it moved by 0 or 1 pixel each way, what leaves it coming in on the other
            side, and their ends are moved back: chains that begin at one noisy image end nearly alike, but an energy
            that halves its resolution errs otherwise on an image beside it ("cycle spinning": Coifman and Donoho,
            "Translation-Invariant De-Noising", 1995).
    """

    num_steps: int = 10
    step_size: float = 1.0
    temperature: float = 0.0
    noise_std: float = 0.0
    start_size: int | None = None
    num_chains: int = 1
    shifts: bool = True

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_chains < 1:
            raise ValueError(f"steps and chains must be at least 1, got {self.num_steps} and {self.num_chains}")
        if not self.temperature >= 0 or not self.noise_std >= 0:
            raise ValueError(
                f"temperature and noise_std must not be negative, got {self.temperature} and {self.noise_std}"
            )


@dataclass(frozen=True, eq=False)
class DenoisingResult:
    """Noisy images and what became of them, all (N, C, H, W).

    Attributes:
        clean: what should have come out, if it is known.
        noise: the standard deviation of the noise.
        restored: by the model, in [-1, 1].
        baselines: by classical denoisers, by their names.
        energy_before, energy_after: (N,), of the noisy and the restored images.
        quality: of "noisy", "restored" and the baselines, if it is known what is right.
    """

    options: DenoiseOptions
    noise: float
    noisy: Tensor
    restored: Tensor
    energy_before: Tensor
    energy_after: Tensor
    clean: Tensor | None = None
    baselines: dict[str, Tensor] = field(default_factory=dict)
    quality: dict[str, Quality] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": len(self.noisy),
            "noise": self.noise,
            "options": dataclasses.asdict(self.options),
            "energy_before": float(self.energy_before.mean()),
            "energy_after": float(self.energy_after.mean()),
            "quality": {name: of.to_json() for name, of in self.quality.items()},
        }


def add_noise(images: Tensor, noise: float, seed: int, first: int = 0) -> Tensor:
    """`images` (N, C, H, W) with normal noise of standard deviation `noise` on every pixel, not clamped.

    Image i has the noise of chain `first + i` of `seed`, however images are split.
    """
    if not noise > 0:
        raise ValueError(f"noise must be positive, got {noise}")
    draws = normal(images.shape, seed=seed, stream=Stream.DATA_NOISE, chain_ids=first, device=images.device)
    return images + noise * draws


def denoise(
    model: Model,
    noisy: Tensor,
    noise: float,
    options: DenoiseOptions | None = None,
    *,
    clean: Tensor | None = None,
    baselines: Sequence[ClassicalDenoiser] = (),
    seed: int = 0,
    batch_size: int | None = 256,
) -> DenoisingResult:
    """Restores images by Langevin chains of `model`.

    Args:
        model: an energy, or a run, of which the highest level serves (and lower ones for a `start_size`).
        noisy: float32 (N, C, H, W), finite; values beyond [-1, 1] are as noise made them.
        noise: its standard deviation.
        options: by default the authors' for CF-EBM: 10 steps of size 1, without data term.
        clean: what it was, for PSNR and SSIM.
        baselines: classical denoisers that are to work on the same images.
        seed: of the chains; image i has the chains from `i * options.num_chains` on.
        batch_size: chains at a time; the result does not depend on it.

    Raises ValueError or TypeError for images that don't fit, FloatingPointError where energies are not finite.

    Example:
        >>> import torch
        >>> from fastebm.tasks import DenoiseOptions, denoise, add_noise
        >>> def energy(x):  # of images around 0.5, with a standard deviation of 0.1
        ...     return (x - 0.5).square().sum((1, 2, 3)) / (2 * 0.1**2)
        >>> noisy = add_noise(torch.full((4, 1, 8, 8), 0.5), 0.2, seed=1)
        >>> options = DenoiseOptions(num_steps=50, step_size=0.005, temperature=1.0)
        >>> round(denoise(energy, noisy, 0.2, options).restored.std().item() / noisy.std().item(), 2)  # 1 / (1 + 4)
        0.2
    """
    options = DenoiseOptions() if options is None else options
    if not noise > 0:
        raise ValueError(f"noise must be positive, got {noise}")
    noisy = checked_images("noisy images", noisy, model, bounded=False)
    if clean is not None:
        clean = checked_images("clean images", clean, model)
        if clean.shape != noisy.shape:
            raise ValueError(f"noisy and clean images differ in shape: {tuple(noisy.shape)}, {tuple(clean.shape)}")
    gradient = top_gradient(model)
    restored = _restored(model, noisy, noise, options, seed, batch_size)
    by_others: dict[str, Tensor] = {denoiser.name: denoiser(noisy) for denoiser in baselines}
    results: dict[str, Tensor] = {"noisy": noisy, "restored": restored, **by_others}
    return DenoisingResult(
        options,
        noise,
        noisy,
        restored,
        energies_of(gradient, noisy, batch_size),
        energies_of(gradient, restored, batch_size),
        clean,
        by_others,
        {} if clean is None else {name: quality(images, clean) for name, images in results.items()},
    )


def tune_denoising(
    model: Model, clean: Tensor, noise: float, options: DenoiseOptions | None = None, *, seed: int = 0
) -> DenoiseOptions:
    """The options with the step size, temperature and start that restore `clean` with noise on it best, by mean PSNR.

    Tried are all of a small grid, on few images, whose noise is that of chains from 2^32 on: no image with a lower
    number has it. The other options are taken as they are given.
    """
    options = DenoiseOptions() if options is None else options
    clean = checked_images("clean images", clean, model)
    noisy = add_noise(clean, noise, seed, first=2**32)
    starts = [None, *_lower_sizes(model)]
    best, highest = options, -torch.inf
    for start, temperature, step_size in itertools.product(starts, _TEMPERATURES, _STEP_SIZES):
        tried = dataclasses.replace(options, start_size=start, temperature=temperature, step_size=step_size)
        restored = _restored(model, noisy, noise, tried, seed, None)
        reached = -float((restored - clean).square().flatten(1).mean(1).log10().mean())
        if reached > highest:
            best, highest = tried, reached
    return best


_TEMPERATURES = (0.0, 0.0015, 0.003, 0.006, 0.012)
_STEP_SIZES = (0.75, 1.0, 1.25)


def _lower_sizes(model: Model) -> list[int]:
    try:
        return sorted(level_gradients(model))[:-1]
    except ValueError:
        return []


def _restored(
    model: Model, noisy: Tensor, noise: float, options: DenoiseOptions, seed: int, batch_size: int | None
) -> Tensor:
    size = noisy.shape[3]
    levels = {size: top_gradient(model)} if options.start_size is None else levels_from(model, options.start_size)
    noisy = _moved(noisy[:, None].expand(-1, options.num_chains, -1, -1, -1), 1 if options.shifts else 0).flatten(0, 1)
    pulled = {}
    for level in levels:
        factor = size // level
        # A mean of factor^2 pixels has a factor-th of the noise.
        weight = data_term_weight(options.temperature, noise / factor)
        pulled[level] = F.avg_pool2d(noisy, factor), weight
    start = pulled[min(levels)][0].clamp(-1, 1)
    how = Climb(options.num_steps, options.step_size, options.noise_std, clamp=True)
    ends = climb(levels, start, how, seed=seed, pulled=pulled, batch_size=batch_size)[size]
    return _moved(ends.unflatten(0, (-1, options.num_chains)), -1 if options.shifts else 0).mean(1)


def _moved(images: Tensor, by: int) -> Tensor:
    """Images (N, chains, C, H, W), those of chain k moved by `by` pixels down where k is odd, and across in every
    second pair of chains."""
    moved = [torch.roll(of_one, (k % 2 * by, k // 2 % 2 * by), (2, 3)) for k, of_one in enumerate(images.unbind(1))]
    return torch.stack(moved, 1)
