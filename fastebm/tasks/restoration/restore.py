"""`restore`: images from linear measurements, by an energy of images with or without a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastebm.sampling import Cascade, linear
from fastebm.tasks.arguments import (
    MAX_STEPS,
    check_batch_size,
    check_flag,
    check_number,
    check_seed,
    check_whole,
    settle,
)
from fastebm.tasks.inputs import Model, open_energy
from fastebm.tasks.restoration.cascade import restore_by_cascade
from fastebm.tasks.restoration.degradations import Degradation
from fastebm.tasks.restoration.latent import LatentSearch, restore_by_decoder
from fastebm.tasks.restoration.measurements import measured_images
from fastebm.tasks.restoration.result import Refinement, RestorationResult
from fastebm.training import CoarseToFineRun


@dataclass(frozen=True)
class ImageSearch:
    """The settings of a restoration by Langevin chains of images, which is the way without a decoder.

    Attributes:
        restarts: chains for each image; the result is the one that ends at the lowest energy.
        coarse: whether the chains of a coarse-to-fine run start at its lowest level; see `restore_by_cascade`.
        num_steps, step_size, noise_std: the updates of a bare energy's chains: their number, their step size, and the
            noise of the first one, which falls to 0; by default 15, 1 and 0.015. The chains of a run have the settings
            of its training.

    Raises ValueError or TypeError for numbers out of range.
    """

    restarts: int = 4
    coarse: bool | None = None
    num_steps: int | None = None
    step_size: float | None = None
    noise_std: float | None = None

    def __post_init__(self) -> None:
        settle(self, restarts=check_whole("restarts", self.restarts))
        if self.num_steps is not None:
            settle(self, num_steps=check_whole("num_steps", self.num_steps, 0, MAX_STEPS))
        if self.step_size is not None:
            settle(self, step_size=check_number("step_size", self.step_size, above=0))
        if self.noise_std is not None:
            settle(self, noise_std=check_number("noise_std", self.noise_std, 0))
        if self.coarse is not None:
            settle(self, coarse=check_flag("coarse", self.coarse))


_UPDATES = {"num_steps": 15, "step_size": 1.0, "noise_std": 0.015}


@torch.no_grad()
def restore(
    y: Tensor,
    degradation: Degradation,
    *,
    energy: Model,
    decoder: Callable[[Tensor], Tensor] | None = None,
    latent: int | None = None,
    noise: float = 0.0,
    search: LatentSearch | ImageSearch | None = None,
    refinement: Refinement | None = None,
    seed: int = 0,
    first_chain_id: int = 0,
    batch_size: int | None = None,
    engine: str = "auto",
) -> RestorationResult:
    """Images from measurements `y = A x + noise`, by an energy that was trained without the degradation A.

    With a decoder, its latent vectors are searched (`LatentSearch`). Without one, Langevin chains of images are
    made consistent with y after each update (`ImageSearch`): those of a coarse-to-fine run's cascade, or, of a bare
    energy, chains at full size that start at the degradation's initial estimate.

    Args:
        y: (B, ...), B >= 1, finite where it measures, exactly as `degradation.A` returns it for images of the energy
            in [-1, 1]; float32, or float64 where a decoder is in float64 too. It lies on the device of the nets.
        degradation: A; it must be on that device too.
        energy: a run, the folder of one, or an energy of images (B, C, H, W) -> (B,), low meaning real. A run of an
            EC-VAE brings its decoder. Images of a bare energy need not be square.
        decoder: latent vectors z (B, latent) -> images (B, C, H, W) in [-1, 1], in eval mode unless it is a module.
        latent: the length of a latent vector, for a `decoder`.
        noise: the standard deviation of the measurement's noise, in the units of y; see `DataConsistency`.
        search: a `LatentSearch` with a decoder, an `ImageSearch` without; by default one with its default settings.
        refinement: steps on the restored images; by default none.
        seed, first_chain_id: all starts and noise are functions of them; image i has the chain id `first_chain_id + i`,
            so that images may be split into batches.
        batch_size: the number of images restored at a time, each with all its starts.
        engine: as in `energy_gradient`. "auto" fuses decoder, projection and energy where they can be captured; chains
            of a run then have the engine of its config.

    Raises ValueError or TypeError for measurements or settings that don't fit or have no effect, FloatingPointError
    where a search ends at energies that are not finite.

    Example:
        >>> import torch
        >>> from fastebm.tasks.restoration import ImageSearch, SuperResolution, restore
        >>> half = SuperResolution(2)
        >>> y = half.A(torch.zeros(3, 1, 8, 8))
        >>> def energy(x):
        ...     return x.square().sum((1, 2, 3))
        >>> restored = restore(y, half, energy=energy, search=ImageSearch(step_size=0.1))
        >>> restored.images.shape, bool(restored.residual_rms.max() < 1e-6)
        (torch.Size([3, 1, 8, 8]), True)
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 8, 8)))
        >>> restore(y, half, energy=energy, decoder=decoder, latent=2).latents.shape
        torch.Size([3, 2])
    """
    check_seed(seed)
    check_batch_size(batch_size)
    check_number("noise", noise, 0)
    opened = open_energy(energy, engine if decoder is None else "auto")
    if opened.run is not None and decoder is None and (vae := getattr(opened.run, "vae", None)) is not None:
        decoder, latent = vae.decode, vae.latent
    if (decoder is None) is not (latent is None):
        raise ValueError(f"decoder and latent come together, got only {'latent' if decoder is None else 'decoder'}")
    base = measured_images(y, degradation)
    if base.device != opened.device and opened.run is not None:
        raise ValueError(f"y is on {base.device}, and the run on {opened.device}")
    shape = base.shape[1:]
    if opened.shape is not None and shape != opened.shape:
        raise ValueError(f"y measures images of the shape {tuple(shape)}, but the run's are {opened.shape}")
    wanted = ImageSearch if decoder is None else LatentSearch
    if search is not None and not isinstance(search, wanted):
        kind = "without" if decoder is None else "with"
        raise ValueError(f"restoration {kind} a decoder takes search={wanted.__name__}, got {type(search).__name__}")
    options: dict[str, Any] = {"noise": noise, "refinement": refinement, "seed": seed}
    options |= {"first_chain_id": first_chain_id, "batch_size": batch_size}
    if decoder is not None and latent is not None:
        latent = check_whole("latent", latent)
        latents = search if isinstance(search, LatentSearch) else LatentSearch()
        image_energy = opened.gradient.energy
        return restore_by_decoder(y, degradation, decoder, image_energy, latent, latents, engine, **options)
    chains = search if isinstance(search, ImageSearch) else ImageSearch()
    given = {name: getattr(chains, name) for name in _UPDATES if getattr(chains, name) is not None}
    if given and opened.run is not None:
        raise ValueError(f"{', '.join(given)}: the chains of a run have the settings of its training")
    if isinstance(opened.run, CoarseToFineRun):
        cascade, coarse = opened.run.cascade(), chains.coarse
    else:
        if chains.coarse:
            raise ValueError("coarse=True needs a coarse-to-fine run: a bare energy has no lower level")
        config = opened.run and opened.run.config
        updates = {name: getattr(config, name) for name in _UPDATES} if config else {**_UPDATES, **given}
        updates["noise_std"] = linear(updates["noise_std"], 0.0)
        cascade, coarse = Cascade({shape[2]: opened.gradient}, **updates), False
    return restore_by_cascade(y, degradation, cascade=cascade, restarts=chains.restarts, coarse=coarse, **options)
