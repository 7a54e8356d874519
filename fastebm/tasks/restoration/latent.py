"""Restoration by a decoder: searches for the latent vector whose image agrees with the measurement at low energy.

For a decoder G the image of z is x̂(z) = A⁺y + (I - A⁺A) G(z), the range-null space decomposition (Luo, Qiu, Tao, Cai,
Tang, "Energy-Calibrated VAE with Test Time Free Lunch", ECCV 2024). The search minimises, or samples, E(x̂(z)) + ½‖z‖²
and a term for the decoder's own disagreement with the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastebm.compiler import EnergyGradient, energy_gradient
from fastebm.ops import normal
from fastebm.rng import Stream, make_chain_ids
from fastebm.sampling import Langevin, cosine
from fastebm.sampling.cascade import module_of
from fastebm.sampling.schedules import evaluate
from fastebm.tasks.arguments import MAX_STEPS, check_memory, check_number, check_whole, settle
from fastebm.tasks.restoration.consistency import DataConsistency
from fastebm.tasks.restoration.degradations import Degradation, Shape
from fastebm.tasks.restoration.result import Refinement, RestorationResult, in_batches, refine

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LatentSearch:
    """The settings of a search for latent vectors.

    Attributes:
        method: "adam" minimises, with a learning rate that falls to 0 as half a cosine; "langevin" samples.
        num_steps: the number of steps of either.
        restarts: starts from the prior for each image; the result is the one that ends at the lowest energy.
        learning_rate: of Adam, at the start.
        step_size, noise_std: of Langevin.
        energy_weight: the factor w in w E(x̂(z)) + ½‖z‖². An energy that was trained at a small temperature is large
            against the prior; a smaller factor corrects that.
        decoder_weight: the factor v of a further term ½ v ‖A⁺(y - A G(z))‖², by which the decoder's own image has to
            agree with the measurement before the projection. 1 / v is the variance of a pixel about the decoder's
            image; the default is for the variance 0.05, as EC-VAE trains it. 0 leaves the term out.

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
        settle(self, num_steps=check_whole("num_steps", self.num_steps, 0, MAX_STEPS))
        settle(self, restarts=check_whole("restarts", self.restarts))
        for name in ("noise_std", "energy_weight", "decoder_weight"):
            settle(self, **{name: check_number(name, getattr(self, name), 0)})
        for name in ("learning_rate", "step_size"):
            settle(self, **{name: check_number(name, getattr(self, name), above=0)})


class LatentEnergy(nn.Module):
    """w E(x̂(z)) + ½‖z‖² + ½ v ‖A⁺(y - A G(z))‖² of joint states (B, latent + C H W), which are z followed by A⁺y.

    With the measurements as a part of the state, one compiled gradient of decoder, projection and energy serves all
    of them. Searches do not change that part of the state.
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
        # Modules behind functions become parts of this one, so that they are in eval mode during the search as well.
        functions = (function for function in (decoder, energy) if not isinstance(function, nn.Module))
        self.behind = nn.ModuleList(filter(None, map(module_of, functions)))
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
def restore_by_decoder(
    y: Tensor,
    degradation: Degradation,
    decoder: Function,
    energy: Function,
    latent: int,
    search: LatentSearch,
    engine: str,
    *,
    noise: float,
    refinement: Refinement | None,
    seed: int,
    first_chain_id: int,
    batch_size: int | None,
) -> RestorationResult:
    """`restore` by a search for latent vectors of a decoder. Arguments and errors are those of `restore`."""
    base = degradation.pinv(y)
    shape: Shape = (base.shape[1], base.shape[2], base.shape[3])
    consistent = DataConsistency(degradation, shape, noise)
    joint = LatentEnergy(decoder, energy, consistent, latent, shape, search)
    gradient = energy_gradient(joint, engine=engine)
    try:
        with gradient.chain():
            made = decoder(torch.zeros(1, latent, dtype=base.dtype, device=base.device))
    except RuntimeError as error:
        raise ValueError(
            f"the decoder can't take {base.dtype} latent vectors of length {latent} on {base.device}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(made, Tensor) or made.shape[1:] != shape:
        found = tuple(made.shape[1:]) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"the decoder makes images of the shape {found}, but y measures images of {tuple(shape)}")
    numbers = len(y) * search.restarts * (latent + math.prod(shape))
    check_memory(f"{search.restarts:,} searches for each of {len(y):,} images", numbers, base.device)
    image_gradient = None if refinement is None else energy_gradient(energy, engine=engine)

    def restored(first: int, last: int) -> RestorationResult:
        rows, chain_id = base[first:last], first_chain_id + first
        part = _search(gradient, joint, rows, search, seed, chain_id)
        if image_gradient is not None and refinement is not None:
            part = refine(part, rows, consistent, image_gradient, refinement, seed, chain_id)
        return part

    return in_batches(len(y), batch_size, restored)


def _search(
    gradient: EnergyGradient, joint: LatentEnergy, base: Tensor, search: LatentSearch, seed: int, first_chain_id: int
) -> RestorationResult:
    """The result of a search for images with A⁺y = `base`; `gradient` is that of `joint`."""
    count, restarts, latent = len(base), search.restarts, joint.latent
    ids = (make_chain_ids(first_chain_id, 1) * restarts + torch.arange(count * restarts, device="cpu")).to(base.device)
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
                "finite: try a smaller learning_rate, step_size or energy_weight"
            )
        lowest = torch.arange(count, device=base.device), energies.argmin(1)
        candidates = joint.images(state).unflatten(0, (count, restarts))
        z = state[:, :latent].unflatten(0, (count, restarts))[lowest]
    images = candidates[lowest]
    residual_rms = joint.consistent.residual_rms(images, base)
    return RestorationResult(images, energies.amin(1), residual_rms, energies, candidates.mean(1), z)


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
    measured = torch.arange(state.shape[1], device=state.device) >= latent
    sampler = Langevin(gradient, search.step_size, search.noise_std)
    return sampler.sample(state, search.num_steps, seed, ids, mask=measured, known=state)


def _flat(energies: Tensor) -> Tensor:
    """Energies (B,), from (B,) or (B, 1). More numbers would be summed, which nobody asked for."""
    if not isinstance(energies, Tensor):
        raise TypeError(f"an energy must be a tensor, one number per image, got {type(energies).__name__}")
    if energies.ndim == 0 or energies.shape[1:].numel() != 1:
        raise ValueError(f"an energy must be one number per image, (B,), got shape {tuple(energies.shape)}")
    return energies.flatten()
