"""Translation: chains of an energy of the target domain that start at images of another one.

Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR 2021:
neither a generator nor pairs nor a cycle loss, only the target's energy. Settings are those of the authors' code.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastebm.ops import normal
from fastebm.rng import Stream
from fastebm.sampling import Langevin
from fastebm.tasks.climb import energies_of
from fastebm.tasks.images import checked_images
from fastebm.tasks.model import Model, top_gradient


@dataclass(frozen=True)
class TranslateOptions:
    """How chains translate.

    Attributes:
        steps: updates.
        step_size: of each.
        noise_std: of the chains.
        start_noise: standard deviation of the noise that the source images get.
        moments: images that are kept of the way, after the start, at about equal distances.
    """

    steps: int = 50
    step_size: float = 1.0
    noise_std: float = 0.0
    start_noise: float = 0.01
    moments: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.moments <= self.steps:
            raise ValueError(f"moments must be from 1 to the {self.steps} steps, got {self.moments}")
        if not self.start_noise >= 0:
            raise ValueError(f"start_noise must not be negative, got {self.start_noise}")


@dataclass(frozen=True, eq=False)
class Translated:
    """Source images and what became of them.

    Attributes:
        source: (N, C, H, W).
        steps: the updates after which `moments` were taken.
        moments: (T, N, C, H, W), in [-1, 1]; the first one is the start, the last one the end.
        energy: (T, N), of the moments.
    """

    options: TranslateOptions
    source: Tensor
    steps: tuple[int, ...]
    moments: Tensor
    energy: Tensor

    @property
    def images(self) -> Tensor:
        """The translated images (N, C, H, W)."""
        return self.moments[-1]

    @property
    def change(self) -> Tensor:
        """How much each pixel was changed: the mean over colours of abs(end - source), (N, H, W), in [0, 2]."""
        return (self.images - self.source).abs().mean(1)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": len(self.source),
            "options": dataclasses.asdict(self.options),
            "steps": list(self.steps),
            "energy": [float(energies.mean()) for energies in self.energy],
            "change": float(self.change.mean()),
        }


@torch.no_grad()
def translate(
    model: Model,
    source: Tensor,
    options: TranslateOptions | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = 256,
) -> Translated:
    """Carries images over into the domain that `model` has learned.

    Args:
        model: an energy of the target domain, or a run, of which the highest level serves.
        source: float32 (N, C, H, W) in [-1, 1], of another domain.
        options: by default the authors': 50 steps of size 1 without noise, from images with noise of 0.01.
        seed: of all noise; image i has chain i.
        batch_size: chains at a time; the result does not depend on it.

    Raises ValueError or TypeError for images that don't fit, FloatingPointError where energies are not finite.

    Example:
        >>> import torch
        >>> from fastebm.tasks import translate
        >>> def energy(x):  # of dark images
        ...     return 0.05 * (x + 0.9).square().sum((1, 2, 3))
        >>> translate(energy, torch.full((2, 1, 8, 8), 0.5)).images.mean().item() < -0.8
        True
    """
    options = TranslateOptions() if options is None else options
    source = checked_images("source images", source, model)
    gradient = top_gradient(model)
    sampler = Langevin(gradient, options.step_size, options.noise_std)
    noise = normal(source.shape, seed=seed, stream=Stream.INITIAL, device=source.device)
    x = source + options.start_noise * noise
    taken = torch.linspace(0, options.steps, options.moments + 1).round().int().tolist()
    moments = [x]
    for before, after in itertools.pairwise(taken):
        x = sampler.sample(x, after - before, seed, step=before, batch_size=batch_size)
        moments.append(x)
    frames = torch.stack(moments).clamp(-1, 1)
    energy = torch.stack([energies_of(gradient, frame, batch_size) for frame in frames])
    return Translated(options, source, tuple(taken), frames, energy)
