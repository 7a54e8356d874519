"""Denoising: Langevin chains that start at the noisy image, or at the noisy image averaged down to a lower resolution.

Under noise of a known standard deviation, `y = x + noise * N(0, I)`, and for a prior `exp(-E(x) / T)`, the posterior is
`exp(-(E(x) + T ||x - y||^2 / (2 noise^2)) / T)`. Chains follow the gradient of the energy plus that of the data term,
`T / noise^2 * (x - y)`, both in the same kernel. The authors of CF-EBM leave the data term out (T = 0) and stop after
ten steps. The temperature of an energy that was trained with short chains is not known beforehand: `tune_denoising`
searches for it.
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

from fastebm.distributed import shared_rows
from fastebm.ops import normal
from fastebm.rng import Stream
from fastebm.sampling import Cascade, data_term_weight, linear
from fastebm.tasks.arguments import (
    MAX_STEPS,
    check_batch_size,
    check_flag,
    check_layout,
    check_memory,
    check_number,
    check_seed,
    check_values,
    check_whole,
    settle,
)
from fastebm.tasks.classical_denoisers import ClassicalDenoiser
from fastebm.tasks.image_quality import Quality, import_skimage, quality
from fastebm.tasks.inputs import Model, TaskEnergy, open_energy


@dataclass(frozen=True)
class DenoiseOptions:
    """The settings of denoising.

    Attributes:
        num_steps: the number of updates at each level.
        step_size: the step size of the updates; that of a run's training is `run.config.step_size`.
        temperature: the temperature T of the posterior, which weighs the data term; 0 leaves it out. The updates are
            implicit in the data term, so that they are stable at any weight.
        noise_std: the noise of the first update; it falls to 0 linearly.
        start_size: the resolution at which chains start, from the noisy image averaged down. Averaging removes noise;
            the energy adds the details. None starts at full size. Other sizes need a run of variant "cascade".
        num_chains: chains for each image. The result is their mean, which has a smaller squared error than one of them,
            as the mean of a posterior has, and is smoother.
        shifts: whether the image is rolled by 0 or 1 pixel in each direction before a chain, and the chain's end is
            rolled back ("cycle spinning": Coifman and Donoho, "Translation-Invariant De-Noising", 1995). Chains from
            the same image end nearly alike; an energy that halves its resolution errs differently on the rolled image,
            so that the mean over chains cancels part of the error.

    Raises ValueError or TypeError for numbers out of range.
    """

    num_steps: int = 10
    step_size: float = 1.0
    temperature: float = 0.0
    noise_std: float = 0.0
    start_size: int | None = None
    num_chains: int = 1
    shifts: bool = True

    def __post_init__(self) -> None:
        settle(self, num_steps=check_whole("num_steps", self.num_steps, most=MAX_STEPS))
        settle(self, num_chains=check_whole("num_chains", self.num_chains))
        settle(self, step_size=check_number("step_size", self.step_size, above=0))
        settle(self, temperature=check_number("temperature", self.temperature, 0))
        settle(self, noise_std=check_number("noise_std", self.noise_std, 0))
        if self.start_size is not None:
            settle(self, start_size=check_whole("start_size", self.start_size))
        settle(self, shifts=check_flag("shifts", self.shifts))


@dataclass(frozen=True, eq=False)
class DenoisingResult:
    """Noisy images and the results of denoising them, all (N, C, H, W).

    Attributes:
        noise: the standard deviation of the noise.
        restored: the images restored by the model, in [-1, 1].
        energy_before, energy_after: the energies (N,) of the noisy and of the restored images.
        clean: the images without noise, if they are known.
        baselines: the results of classical denoisers, by their names.
        quality: PSNR and SSIM of "noisy", "restored" and the baselines, if the clean images are known.
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
    """`images` (N, C, H, W) plus normal noise of standard deviation `noise` on every pixel, not clamped.

    Image i gets the noise of chain id `first + i`, so that images may be split into batches. Raises ValueError or
    TypeError for images that are not float32, finite and in [-1, 1], and for numbers out of range.
    """
    noise = check_number("noise", noise, above=0)
    check_layout("images", images)
    check_values("images", images)
    check_seed(seed)
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
        model: a run, the folder of one, or an energy of images. Of a coarse-to-fine run, chains use the highest level,
            and the levels from `options.start_size` up.
        noisy: float32 (N, C, H, W), finite; values may lie outside of [-1, 1]. Images without noise would lie in
            [-1, 1], not in [0, 1], which can't be told from the values: `2 * images - 1` converts them.
        noise: the standard deviation of the noise.
        options: by default those of the authors of CF-EBM: 10 steps of size 1, without data term.
        clean: the images without noise, in [-1, 1], for PSNR and SSIM.
        baselines: classical denoisers to run on the same images.
        seed: of the chains' noise; image i has the chain ids from `i * options.num_chains` on.
        batch_size: chains at a time; the result does not depend on it.

    Raises ValueError or TypeError for images that don't fit, ModuleNotFoundError (before any chain) where `clean` or
    `baselines` need scikit-image and it is missing, FloatingPointError where energies are not finite.

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
    noise = check_number("noise", noise, above=0)
    check_seed(seed)
    check_batch_size(batch_size)
    energy = open_energy(model)
    noisy = energy.check_images("noisy images", noisy, bounded=False)
    if clean is not None or baselines:
        import_skimage("metrics")  # a missing package is reported before the chains run
    if clean is not None:
        clean = energy.check_images("clean images", clean)
        if clean.shape != noisy.shape:
            raise ValueError(f"noisy and clean images differ in shape: {tuple(noisy.shape)}, {tuple(clean.shape)}")
    check_memory(f"{options.num_chains:,} chains of each image", noisy.numel() * options.num_chains, noisy.device)
    restored = _restore(energy, noisy, noise, options, seed, batch_size)
    classical: dict[str, Tensor] = {denoiser.name: _by_rows(denoiser, noisy) for denoiser in baselines}
    results: dict[str, Tensor] = {"noisy": noisy, "restored": restored, **classical}
    return DenoisingResult(
        options,
        noise,
        noisy,
        restored,
        energy.energies(noisy, batch_size),
        energy.energies(restored, batch_size),
        clean,
        classical,
        {} if clean is None else {name: quality(images, clean) for name, images in results.items()},
    )


def _by_rows(denoiser: ClassicalDenoiser, noisy: Tensor) -> Tensor:
    return shared_rows(len(noisy), lambda rows: denoiser(noisy[rows.start : rows.stop]))


def tune_denoising(
    model: Model, clean: Tensor, noise: float, options: DenoiseOptions | None = None, *, seed: int = 0
) -> DenoiseOptions:
    """`options` with the step size, temperature and start size that give the highest mean PSNR on `clean` plus noise.

    Searches a small grid, step sizes relative to that of the run's training; a few images are enough. Their noise is
    that of the chain ids from 2^32 on, which no image with a lower number shares. `model` is as in `denoise`.
    """
    options = DenoiseOptions() if options is None else options
    noise = check_number("noise", noise, above=0)
    check_seed(seed)
    energy = open_energy(model)
    clean = energy.check_images("clean images", clean)
    noisy = add_noise(clean, noise, seed, first=2**32)
    starts = [None, *sorted(energy.gradients)[:-1]]
    best, highest = options, -torch.inf
    for start, temperature, step_size in itertools.product(starts, _TEMPERATURES, _STEP_SIZES):
        tried = dataclasses.replace(
            options,
            start_size=start,
            temperature=temperature / energy.step_size,
            step_size=step_size * energy.step_size,
        )
        restored = _restore(energy, noisy, noise, tried, seed, None)
        reached = -float((restored - clean).square().flatten(1).mean(1).log10().mean())
        if reached > highest:
            best, highest = tried, reached
    return best


# In units in which the step size of training is 1.
_TEMPERATURES = (0.0, 0.0015, 0.003, 0.006, 0.012)
_STEP_SIZES = (0.75, 1.0, 1.25)


def _restore(
    energy: TaskEnergy, noisy: Tensor, noise: float, options: DenoiseOptions, seed: int, batch_size: int | None
) -> Tensor:
    size = noisy.shape[3]
    levels = energy.levels_from(options.start_size, size)
    noisy = _roll(noisy[:, None].expand(-1, options.num_chains, -1, -1, -1), 1 if options.shifts else 0).flatten(0, 1)
    data_term = {}
    for level, growth in energy.growths(levels).items():
        factor = size // level
        # A mean of factor^2 pixels has a factor-th of the noise. An energy with a larger step size is smaller.
        weight = data_term_weight(options.temperature / growth, noise / factor)
        data_term[level] = F.avg_pool2d(noisy, factor), weight
    noise_std = linear(options.noise_std, 0.0)
    step_size = energy.step_sizes(levels, options.step_size)
    cascade = Cascade(levels, num_steps=options.num_steps, step_size=step_size, noise_std=noise_std, clamp=(-1, 1))
    start = data_term[min(levels)][0].clamp(-1, 1)
    ends = cascade.sample(None, seed, x0=start, data_term=data_term, batch_size=batch_size)
    return _roll(ends.unflatten(0, (-1, options.num_chains)), -1 if options.shifts else 0).mean(1)


def _roll(images: Tensor, by: int) -> Tensor:
    """Images (N, chains, C, H, W), rolled by `by` pixels: down for odd chains, right in every second pair of chains."""
    rolled = [torch.roll(chain, (k % 2 * by, k // 2 % 2 * by), (2, 3)) for k, chain in enumerate(images.unbind(1))]
    return torch.stack(rolled, 1)
