"""Zero-shot restoration with a decoder: the latent whose image, made consistent with the measurement, is most likely.

The range-null space decomposition x̂(z) = A⁺y + (I - A⁺A) G(z) of an energy-calibrated decoder G (Luo, Qiu, Tao, Cai,
Tang, "Energy-Calibrated VAE with Test Time Free Lunch", ECCV 2024): z is searched under E(x̂(z)) + ½‖z‖² and a
term for what the decoder itself makes of the measurement.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.ops import normal
from fastebm.rng import Stream, make_chain_ids
from fastebm.sampling import Langevin, cosine, linear
from fastebm.sampling.langevin import batch_slices
from fastebm.sampling.schedules import evaluate
from fastebm.tasks.restoration.consistency import DataConsistency
from fastebm.tasks.restoration.degradations import Degradation, Shape
from fastebm.tasks.restoration.projected import ProjectedLangevin

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LatentSearch:
    """How latents are searched.

    Attributes:
        method: "adam" descends, with a rate that falls to 0 as half a cosine; "langevin" samples.
        num_steps: of either.
        restarts: how many starts from the prior each image gets; the one that ends at the lowest energy is taken.
        learning_rate: of Adam.
        step_size, noise_std: of Langevin.
        energy_weight: factor w of E in w E(x̂(z)) + ½‖z‖². An energy in units of a small temperature drowns the prior;
            a smaller factor holds against that.
        decoder_weight: factor v of a further term ½ v ‖A⁺(y - A G(z))‖², that asks the decoder's own image to agree
            with the measurement, before it is made to. 1 / v is the variance of a pixel about the decoder's image; the
            default is that of a VAE with the variance 0.05, as EC-VAE trains it. 0 searches by energy and prior alone.

    Raises ValueError for numbers out of range.
    """

    method: Literal["adam", "langevin"] = "adam"
    num_steps: int = 200
    restarts: int = 4
    learning_rate: float = 0.05
    step_size: float = 0.01
    noise_std: float = 0.01
    energy_weight: float = 1.0
    decoder_weight: float = 20.0

    def __post_init__(self) -> None:
        if self.method not in ("adam", "langevin"):
            raise ValueError(f'method is "adam" or "langevin", got {self.method!r}')
        for name, least in (("num_steps", 0), ("restarts", 1), ("energy_weight", 0), ("decoder_weight", 0)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= least):
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class Refinement:
    """Langevin steps on the image itself, made consistent with the measurement after each.

    The noise falls to 0 along a straight line.
    """

    num_steps: int
    step_size: float
    noise_std: float = 0.0


@dataclass(frozen=True, eq=False)
class RestorationResult:
    """What restoration gave for measurements of B images.

    Attributes:
        images: (B, C, H, W), float32. They are not clamped, which would undo what was measured.
        energies: (B,) what was minimised, of the chosen start.
        residual_rms: (B,) root mean square of A x̂ - A A⁺y over the numbers that were measured: rounding without noise, and
            at most its std with noise.
        starts: (B, restarts) energies at which all starts ended.
        mean: (B, C, H, W), over all starts, which agrees with the measurement as they do. It is nearer to what is right
            by squared error, as the mean of a posterior is, and blurred where they differ.
        latents: (B, latent), of the chosen start; None without a decoder.
    """

    images: Tensor
    energies: Tensor
    residual_rms: Tensor
    starts: Tensor
    mean: Tensor
    latents: Tensor | None = None


class LatentEnergy(nn.Module):
    """w E(x̂(z)) + ½‖z‖² + ½ v ‖A⁺(y - A G(z))‖² of joint states (B, latent + C H W): z, then A⁺y as it is for that row.

    With measurements as a part of the state, one function serves all of them, and whatever can be captured of decoder,
    consistency and energy runs as one fused gradient. Searches leave that part of the state alone.
    """

    def __init__(
        self,
        decoder: Function,
        energy: Function,
        consistent: DataConsistency,
        latent: int,
        shape: Shape,
        search: LatentSearch,
    ):
        super().__init__()
        self.decoder, self.energy, self.consistent = decoder, energy, consistent
        # Modules behind functions are made parts of this one, so that they are held in eval mode as well.
        self.behind = nn.ModuleList(filter(None, (_module_behind(decoder), _module_behind(energy))))
        self.latent, self.shape = latent, shape
        self.energy_weight, self.decoder_weight = search.energy_weight, search.decoder_weight

    def forward(self, state: Tensor) -> Tensor:
        z, base = state[:, : self.latent], state[:, self.latent :].unflatten(1, self.shape)
        image = self.decoder(z)
        total = 0.5 * z.square().sum(1) + self.energy_weight * _flat(self.energy(self.consistent(image, base)))
        if self.decoder_weight > 0:
            lacking = base - (image - self.consistent.degradation.null(image))
            total = total + 0.5 * self.decoder_weight * lacking.square().flatten(1).sum(1)
        return total

    def images(self, state: Tensor) -> Tensor:
        """x̂(z) of each row."""
        z, base = state[:, : self.latent], state[:, self.latent :].unflatten(1, self.shape)
        return self.consistent(self.decoder(z), base)


@torch.no_grad()
def restore(
    y: Tensor,
    degradation: Degradation,
    *,
    decoder: Function,
    energy: Function,
    latent: int,
    noise: float = 0.0,
    search: LatentSearch | None = None,
    refinement: Refinement | None = None,
    seed: int = 0,
    first_chain_id: int = 0,
    batch_size: int | None = None,
    engine: str = "auto",
) -> RestorationResult:
    """Images from measurements `y = A x + noise`, by a decoder and an energy that have not seen the degradation.

    Args:
        y: (B, ...) as `degradation.A` gives it, on the device of the nets.
        degradation: A; it must be on that device too.
        decoder: z (B, latent) -> images (B, C, H, W) in [-1, 1], in eval mode unless it is a module.
        energy: images -> (B,), low meaning real.
        noise: std of the measurement's noise, in its units. See `DataConsistency` for what it does.
        search, refinement: by default `LatentSearch()`, and no steps on the image.
        seed, first_chain_id: what the starts and the noise are functions of; image i is chain `first_chain_id + i`, however the batch
            is split.
        batch_size: how many images are restored at a time, each with all its starts.
        engine: as in `energy_gradient`: "auto" fuses decoder, projection and energy where they can be captured.

    Raises ValueError for measurements or settings that don't fit, FloatingPointError where a search ends at energies
    that are not finite.

    Example:
        >>> import torch
        >>> from fastebm.tasks.restoration import SuperResolution, restore
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 8, 8)))
        >>> half = SuperResolution(2)
        >>> y = half.A(torch.zeros(3, 1, 8, 8))
        >>> def energy(x):
        ...     return x.square().sum((1, 2, 3))
        >>> restored = restore(y, half, decoder=decoder, energy=energy, latent=2)
        >>> restored.images.shape, bool(restored.residual_rms.max() < 1e-6)
        (torch.Size([3, 1, 8, 8]), True)
    """
    search = LatentSearch() if search is None else search
    base = degradation.pinv(y)
    shape: Shape = (base.shape[1], base.shape[2], base.shape[3])
    consistent = DataConsistency(degradation, shape, noise)
    composed = LatentEnergy(decoder, energy, consistent, latent, shape, search)
    gradient = energy_gradient(composed, engine=engine)
    in_image = None if refinement is None else energy_gradient(energy, engine=engine)
    parts = []
    for first, last in batch_slices(len(y), batch_size):
        found = _searched(gradient, base[first:last], latent, search, seed, first_chain_id + first)
        if in_image is not None and refinement is not None:
            found = refined(found, base[first:last], consistent, in_image, refinement, seed, first_chain_id + first)
        parts.append(found)
    return joined(parts)


def refined(
    found: RestorationResult,
    base: Tensor,
    consistent: DataConsistency,
    energy: EnergyGradient | Function,
    refinement: Refinement,
    seed: int,
    first_chain_id: int,
) -> RestorationResult:
    """`found` after Langevin steps on its images, each made consistent with A⁺y = `base`; energies stay."""

    def project(x: Tensor) -> Tensor:
        return consistent(x, base)

    noise = linear(refinement.noise_std, 0.0) if refinement.noise_std else 0.0
    sampler = ProjectedLangevin(energy, refinement.step_size, noise, project=project)
    images = sampler.sample(found.images, refinement.num_steps, seed, first_chain_id, start_step=_REFINEMENT_STEP)
    return replace(found, images=images, residual_rms=consistent.residual_rms(images, base))


def joined(parts: list[RestorationResult]) -> RestorationResult:
    """What was restored in batches as one."""
    latents = [part.latents for part in parts if part.latents is not None]
    return RestorationResult(
        torch.cat([part.images for part in parts]),
        torch.cat([part.energies for part in parts]),
        torch.cat([part.residual_rms for part in parts]),
        torch.cat([part.starts for part in parts]),
        torch.cat([part.mean for part in parts]),
        torch.cat(latents) if latents else None,
    )


# Beyond the steps of any search: the two draw from one stream.
_REFINEMENT_STEP = 2**31


def _searched(
    gradient: EnergyGradient, base: Tensor, latent: int, search: LatentSearch, seed: int, first_chain_id: int
) -> RestorationResult:
    composed: Any = gradient.energy
    count, restarts = len(base), search.restarts
    ids = (make_chain_ids(first_chain_id, 1) * restarts + torch.arange(count * restarts)).to(base.device)
    z = normal((count * restarts, latent), seed=seed, stream=Stream.PRIOR, chain_ids=ids, dtype=base.dtype)
    state = torch.cat((z, base.flatten(1).repeat_interleave(restarts, 0)), 1)
    if search.method == "adam":
        state = _by_adam(gradient, state, latent, search)
    else:
        state = _by_langevin(gradient, state, latent, search, seed, ids)
    with gradient.chain():
        energies = gradient(state)[0].reshape(count, restarts)
        if not energies.isfinite().all():
            raise FloatingPointError(
                f"{int((~energies.isfinite()).sum())} of {energies.numel()} searches ended at an energy that is not "
                "finite: a smaller learning_rate, step_size or energy_weight may hold them"
            )
        places = torch.arange(count, device=base.device), energies.argmin(1)
        found = composed.images(state).unflatten(0, (count, restarts))
        z = state[:, :latent].unflatten(0, (count, restarts))[places]
    images = found[places]
    residual_rms = composed.consistent.residual_rms(images, base)
    return RestorationResult(images, energies.amin(1), residual_rms, energies, found.mean(1), z)


def _by_adam(gradient: EnergyGradient, state: Tensor, latent: int, search: LatentSearch) -> Tensor:
    if search.num_steps == 0:
        return state
    z, fixed = state[:, :latent].clone(), state[:, latent:]
    optimizer = torch.optim.Adam([z], lr=search.learning_rate)
    with gradient.chain():
        for rate in evaluate(cosine(search.learning_rate, 0.0), search.num_steps).tolist():
            optimizer.param_groups[0]["lr"] = rate
            z.grad = gradient(torch.cat((z, fixed), 1))[1][:, :latent]
            optimizer.step()
    return torch.cat((z, fixed), 1)


def _by_langevin(
    gradient: EnergyGradient, state: Tensor, latent: int, search: LatentSearch, seed: int, ids: Tensor
) -> Tensor:
    pinned = torch.arange(state.shape[1], device=state.device) >= latent
    sampler = Langevin(gradient, search.step_size, search.noise_std)
    return sampler.sample(state, search.num_steps, seed, ids, mask=pinned, known=state)


def _flat(energies: Tensor) -> Tensor:
    return energies if energies.ndim == 1 else energies.flatten(1).sum(1)


def _module_behind(function: Function) -> nn.Module | None:
    """The module of a `functools.partial` or of a bound method; None for others, and for modules themselves."""
    origin: Any = function
    while isinstance(origin, functools.partial):
        origin = origin.func
    origin = getattr(origin, "__self__", origin)
    return origin if isinstance(origin, nn.Module) and origin is not function else None
