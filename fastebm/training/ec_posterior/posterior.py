"""The posterior of a VAE's latent vectors, refined by short Langevin chains, and a bound on the likelihood.

Luo et al., "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071, name the calibrated posterior as an
extension of their method; the design is ours, after Hoffman, "Learning deep latent Gaussian models with Markov chain
Monte Carlo" (ICML 2017), who starts such chains at the encoder's draws too.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm import rng
from fastebm.models import VAE
from fastebm.models.modes import in_eval_mode
from fastebm.models.vae import squared_error
from fastebm.ops.normal import normal
from fastebm.rng import Stream
from fastebm.sampling import Langevin

Engine = Literal["auto", "fused", "autograd"]


class PosteriorEnergy(nn.Module):
    """`U(z; x) = ||x - G(z)||^2 / (2 variance) + ||z||^2 / 2`: minus `log p(x | z) + log p(z)`, but for a constant.

    It takes states (B, channels, size + rows, size), an image with its latent vector in as many rows below it as that
    fills, so that each has an energy of its own: chains can be split into batches, and a captured program serves all
    images. What the latent vector leaves of the last row is zero.
    """

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.latent, self.size, self.channels = vae.latent, vae.size, vae.channels
        self.rows = math.ceil(vae.latent / (vae.channels * vae.size))
        self.decoder = vae.decoder
        self.log_variance = vae.log_variance
        weight = next(vae.decoder.parameters())
        # A map with weights, because a fused program has none of a vector that lies as an image to one that doesn't.
        unpacking = torch.eye(self.latent, self.channels * self.rows * self.size, device=weight.device)
        self.unpacking: Tensor
        self.register_buffer("unpacking", unpacking.to(weight.dtype), persistent=False)

    def forward(self, state: Tensor) -> Tensor:
        x, below = state[:, :, : self.size], state[:, :, self.size :]
        z = F.linear(below.flatten(1), self.unpacking)
        error = (self.decoder(z) - x).square().sum((1, 2, 3))
        return 0.5 * (-self.log_variance).exp() * error + 0.5 * below.square().sum((1, 2, 3))

    def pack(self, images: Tensor, z: Tensor, rest: float = 0.0) -> Tensor:
        """States of images (B, channels, size, size) and latent vectors (B, latent), with the `rest` of a row so."""
        below = F.pad(z, (0, self.unpacking.shape[1] - self.latent), value=rest)
        return torch.cat((images.to(z.dtype), below.unflatten(1, (self.channels, self.rows, self.size))), dim=2)

    def unpack(self, state: Tensor) -> Tensor:
        """The latent vectors (B, latent) of states."""
        return state[:, :, self.size :].flatten(1)[:, : self.latent].contiguous()


class PosteriorSampler:
    """Langevin chains on a VAE's latent vectors, whose stationary density is `p(z | x)` as the step size goes to 0.

    An update is `z' = z - step_size * grad U(z; x) + sqrt(2 * step_size * temperature) * noise`. For a Gaussian
    posterior, of precision P, chains at temperature 1 end in N(mean, (P - step_size * P^2 / 2)^-1): the right mean, and
    a covariance that is too large by about `step_size / 2`. They are stable below a step size of 2 over the largest
    eigenvalue of P, which lies at the order of 1 / (smallest posterior variance).

    The decoder is in eval mode inside: batch norm's own statistics of a batch would let the images of a batch change
    each other's posterior, so that no energy of one latent vector would exist. In training these are running means
    over the refined latent vectors of the batches before, hence those that the posterior's decoder is about to see.
    The state is float32 whatever `dtype` the decoder runs in, and by the fused engine the same bits in any split of a
    batch.

    Args:
        vae: its weights are read anew for each call of `refine`.
        step_size: of an update, positive.
        temperature: of the noise; 1 samples the posterior, 0 walks down to its nearest mode.
        dtype, engine: of the gradients, as in `fastebm.energy_gradient`.
    """

    def __init__(
        self,
        vae: VAE,
        step_size: float,
        *,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
        engine: Engine = "auto",
    ) -> None:
        if not 0 < step_size < math.inf:
            raise ValueError(f"step_size must be positive and finite, got {step_size}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        self.energy = PosteriorEnergy(vae)
        noise_std = math.sqrt(2 * step_size * temperature)
        self.langevin = Langevin(self.energy, step_size, noise_std, dtype=dtype, engine=engine)

    def refine(
        self,
        images: Tensor,
        z: Tensor,
        num_steps: int,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        *,
        start_step: int = 0,
        batch_size: int | None = None,
        check: bool = True,
    ) -> Tensor:
        """Where chains of `num_steps` updates end that start at `z`; arguments and errors as of `refine_posterior`."""
        latent = self.energy.latent
        if z.ndim != 2 or z.shape[1] != latent:
            raise ValueError(f"z has shape {tuple(z.shape)}; latent vectors of this VAE are (batch, {latent})")
        shape = (len(z), self.energy.channels, self.energy.size, self.energy.size)
        if images.shape != shape:
            raise ValueError(f"images must be {shape}, one for each of {len(z)} z; got {tuple(images.shape)}")
        state = self.energy.pack(images.detach(), z.detach())
        pinned = self.energy.pack(torch.ones_like(images[:1]), torch.zeros_like(z[:1]), rest=1.0) > 0
        ends = self.langevin.sample(
            state,
            num_steps,
            seed,
            chain_ids,
            start_step=start_step,
            batch_size=batch_size,
            mask=pinned,
            known=state,
            check=check,
        )
        return self.energy.unpack(ends)

    @torch.no_grad()
    def energies(self, images: Tensor, z: Tensor) -> Tensor:
        """`U(z; x)` of each pair, (B,), in eval mode, as chains see it."""
        return self.langevin.gradient(self.energy.pack(images, z))[0]


def refine_posterior(
    vae: VAE,
    images: Tensor,
    z: Tensor,
    num_steps: int,
    step_size: float,
    seed: int | None = None,
    chain_ids: int | Tensor = 0,
    *,
    start_step: int = 0,
    temperature: float = 1.0,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    engine: Engine = "auto",
    check: bool = True,
) -> Tensor:
    """Latent vectors nearer to draws from `p(z | x)` than `z`: where short Langevin chains from there end.

    What it computes, and for which step sizes, `PosteriorSampler` says, which is also the thing to keep where many
    calls follow each other: it examines and captures the decoder once.

    Args:
        images: float32 or float64 (B, channels, size, size) in [-1, 1], on `z`'s device.
        z: where chains start, (B, latent), float32 or float64; usually draws from the encoder, `vae.posterior`. Left
            as they are, and no gradient flows.
        num_steps: updates, 0 or more.
        seed, chain_ids, start_step, batch_size, check: as in `Langevin.sample`.

    Raises ValueError for shapes that don't belong together or numbers out of range, and FloatingPointError where
    chains are not finite, as with a step size too large.

    Example:
        >>> import torch
        >>> from fastebm.models import VAE
        >>> from fastebm.training import refine_posterior
        >>> vae = VAE(8, 1, latent=4, width=4)
        >>> images = torch.zeros(3, 1, 8, 8)
        >>> z, _, _ = vae.eval().posterior(images, seed=0)
        >>> refine_posterior(vae, images, z, num_steps=5, step_size=1e-3, seed=0, engine="autograd").shape
        torch.Size([3, 4])
    """
    sampler = PosteriorSampler(vae, step_size, temperature=temperature, dtype=dtype, engine=engine)
    return sampler.refine(
        images, z, num_steps, seed, chain_ids, start_step=start_step, batch_size=batch_size, check=check
    )


@torch.no_grad()
def iwae_bound(
    vae: VAE, images: Tensor, samples: int = 64, seed: int | None = None, first: int = 0, *, batch_size: int = 1000
) -> Tensor:
    """`log mean_k p(x | z_k) p(z_k) / q(z_k | x)` of each image, (B,), in nats, over draws z_k from the encoder.

    A lower bound on `log p(x)` in expectation, tighter with more `samples` (Burda, Grosse, Salakhutdinov, "Importance
    Weighted Autoencoders", arXiv 1509.00519); one sample gives the ELBO. It is fairer than the ELBO to a decoder that
    was trained on better draws than the encoder's. Nets are in eval mode inside.

    Args:
        seed, first: noise is that of chain `first + position` and step k, so that no split changes it.
        batch_size: images in the nets at a time.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples and batch_size must be at least 1, got {samples} and {batch_size}")
    seed = rng.draw_seed() if seed is None else seed
    parts = images.split(batch_size)
    with in_eval_mode(vae):
        bounds = [_bound(vae, part, samples, seed, first + k * batch_size) for k, part in enumerate(parts)]
    return torch.cat(bounds)


def _bound(vae: VAE, images: Tensor, samples: int, seed: int, first: int) -> Tensor:
    mean, log_variance = vae.encode(images)
    constant = 0.5 * images[0].numel() * (math.log(2 * math.pi) + vae.log_variance)
    weights = []
    for k in range(samples):
        shape = tuple(mean.shape)
        noise = normal(shape, seed=seed, step=k, stream=Stream.POSTERIOR, chain_ids=first, device=mean.device)
        z = mean + (0.5 * log_variance).exp() * noise
        likelihood = -0.5 * squared_error(images, vae.decode(z)) * (-vae.log_variance).exp() - constant
        # log p(z) - log q(z | x), of which the constants cancel
        prior = 0.5 * (noise.square() + log_variance - z.square()).sum(1)
        weights.append(likelihood + prior)
    return torch.stack(weights).logsumexp(0) - math.log(samples)


def gaussian_nll(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """`-log N(z; mean, exp(log_variance))` of each row, in nats, (B,)."""
    scaled = (z - mean).square() * (-log_variance).exp()
    return 0.5 * (scaled + log_variance + math.log(2 * math.pi)).sum(1)
