"""The recipe of EC-VAE's published demo: short chains that calibrate a VAE's decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from fastebm import ops
from fastebm.recipes.recipe import (
    ContrastiveLoss,
    Negatives,
    Optimizer,
    Overrides,
    Recipe,
    address,
    check_real,
    make_sampler,
)
from fastebm.rng import Stream
from fastebm.sampling import Langevin, ReplayBuffer
from fastebm.sampling.sampler import Energy
from fastebm.scalars import as_count
from fastebm.training import DataTerm, DualUpdate, calibrate, calibration_loss

__all__ = ["ECVAE", "CalibratedNegatives", "ec_vae"]

_EPSILON, _TAU, _HINGE = 1e-6, 1e-5, 0.07


@dataclass(frozen=True, eq=False)
class CalibratedNegatives(Negatives):
    """Ends of chains from a decoder's samples; `latents` `(B, D)` are what those were decoded from."""

    latents: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ECVAE(Recipe):
    """The recipe `ec_vae`.

    Attributes (besides those of `Recipe`; `loss` is the energy's):
        decoder: from latents `(B, D)` to images.
        latent: the number of dimensions D.
        decoder_optimizer: the constants of the VAE's optimiser.
        kl_weight: of the KL term beside the squared error.
        lambda_start: the weight of the calibration loss at the start.
        dual: the update of that weight from the calibration loss.
    """

    decoder: Callable[[Tensor], Tensor]
    latent: int
    decoder_optimizer: Optimizer
    kl_weight: float
    lambda_start: float
    dual: DualUpdate

    @torch.no_grad()
    def negatives(  # type: ignore[override]
        self,
        real: Tensor,
        buffer: ReplayBuffer | None = None,
        *,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        start_step: int = 0,
        latents: Tensor | None = None,
        check: bool = True,
    ) -> CalibratedNegatives:
        """The ends of chains that start at what the decoder makes of new latents, or of `latents`.

        The authors update the VAE first, then decode the same latents again and run a second chain for the energy:
        `recipe.negatives(real, latents=first.latents, start_step=first_start_step + recipe.num_steps)`.
        """
        check_real(real)
        if buffer is not None or not isinstance(self.sampler, Langevin):
            raise ValueError(f"{self.name} has no replay buffer and runs Langevin chains")
        seed, ids = address(real, seed, chain_ids)
        if latents is None:
            latents = ops.normal(
                (len(real), self.latent), seed=seed, step=start_step, stream=Stream.PRIOR, chain_ids=ids
            ).to(real)
        samples = self.decoder(latents)
        if samples.shape != real.shape:
            raise ValueError(f"the decoder must give images {tuple(real.shape)}, got {tuple(samples.shape)}")
        count = math.prod(real.shape[1:])
        pull = DataTerm(2 * _TAU * (self.num_steps - 1) / self.num_steps, _HINGE / count)
        options: dict[str, Any] = {"start_step": start_step, "data_term": pull, "check": check}
        ends = calibrate(samples, self.sampler, self.num_steps, seed, ids, **options)
        return CalibratedNegatives(ends, real, samples, latents=latents)

    def decoder_loss(
        self,
        real: Tensor,
        reconstruction: Tensor,
        mean: Tensor,
        log_variance: Tensor,
        negatives: CalibratedNegatives,
        weight: float,
    ) -> Tensor:
        """`||real - reconstruction||**2 + kl_weight KL + weight ||ends - G(z)||**2`, means over the batch.

        Args:
            real, reconstruction: `(B, ...)`.
            mean, log_variance: of the latents of `real`, `(B, D)`.
            negatives: whose latents are decoded again, with a graph.
            weight: of the calibration loss; `self.dual(weight, calibration_loss)` is the next one.
        """
        if negatives.latents is None:
            raise ValueError("the calibration loss needs the latents of the chains' starts")
        squares = (real - reconstruction).square().flatten(1).sum(1).mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        calibration = calibration_loss(self.decoder(negatives.latents), negatives.x)
        return squares + self.kl_weight * divergence + weight * calibration


def ec_vae(
    energy: Energy, decoder: Callable[[Tensor], Tensor], *, latent: int = 128, **overrides: Unpack[Overrides]
) -> ECVAE:
    """The published demo of EC-VAE at 32x32: chains from a decoder's samples, which calibrate the decoder.

    With `E = f / τ` and τ = 1e-5: `x' = x - ½ε (∇f(x) / τ + ∇c(x)) + √ε ξ`, ε = 1e-6, 15 times from x₀ = G(z), z ~ N(0,
    I), where the anchor `c = w max(||x - x₀||**2, 0.07)` has a weight w that falls from 14/15 to 0. The energy that the
    recipe takes is f, so that a step has the size `½ε / τ` = 0.05 and noise of 1e-3.

    The energy's loss is `f⁺ - f⁻`. The VAE's (`decoder_loss`) is `||x - G(z_q)||**2 + 0.1 KL + λ ||x_K - G(z)||**2`; λ
    starts at 30 and follows `λ + 0.01 (loss - 0.05)` in [0, 100]. Adam has the rates of decay (0, 0.9), and a learning
    rate of 1e-4 for the energy and 2e-4 for the VAE. In these units the anchor is almost inert and 0.05 is at the
    chain's own noise floor, so that `fastebm.train(ECVAEConfig(...))` chooses others.

    Args:
        energy: f, which gives `(B,)` for images; low means real.
        decoder: gives images `(B, ...)` for latents `(B, latent)`.
        latent: the number of dimensions of a latent.
        overrides: `num_steps`, `step_size` and options of `Langevin`, in place of the published ones.

    Source: Luo et al., "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071; Luo-Yihong/EC-VAE
    `train_demo.py`.

    Example:
        >>> import torch, fastebm
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(4, 48), torch.nn.Tanh(), torch.nn.Unflatten(1, (3, 4, 4)))
        >>> energy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1))
        >>> recipe = fastebm.recipes.ec_vae(energy, decoder, latent=4)
        >>> real = torch.rand(8, 3, 4, 4)
        >>> negatives = recipe.negatives(real)
        >>> bool((negatives.x - negatives.start).abs().max() < 0.5)
        True
    """
    constants = {"num_steps": 15, "step_size": _EPSILON / 2 / _TAU, "noise_std": math.sqrt(_EPSILON)}
    sampler, num_steps = make_sampler("ec_vae", energy, constants, overrides)
    return ECVAE(
        name="ec_vae",
        source="Luo et al., arXiv 2311.04071; Luo-Yihong/EC-VAE train_demo.py",
        sampler=sampler,
        num_steps=num_steps,
        start=None,
        loss=ContrastiveLoss(),
        optimizer=Optimizer(learning_rate=1e-4, betas=(0.0, 0.9), batch_size=128),
        decoder=decoder,
        latent=as_count("latent", latent, 1),
        decoder_optimizer=Optimizer(learning_rate=2e-4, betas=(0.0, 0.9), batch_size=128),
        kl_weight=0.1,
        lambda_start=30.0,
        dual=DualUpdate(rate=0.01, threshold=0.05, largest=100.0),
    )
