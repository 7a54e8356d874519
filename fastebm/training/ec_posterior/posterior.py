"""Short Langevin chains that refine draws from a VAE's posterior, and a bound on its likelihood.

Luo et al., "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071, name the calibrated posterior as an
extension of their method and publish no code for it. The design is ours, after Hoffman, "Learning deep latent Gaussian
models with Markov chain Monte Carlo" (ICML 2017), where such chains start at the encoder's draws too.
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
    """`U(z; x) = ||x - G(z)||^2 / (2 variance) + ||z||^2 / 2`, which is `-log p(x | z) - log p(z)` up to a constant.

    A state (B, channels, size + rows, size) is an image with its latent vector in rows below it; the rest of the last
    row is zero. As the image is part of the state, chains of different images can be split into any batches, and one
    compiled program serves all images.
    """

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.latent, self.size, self.channels = vae.latent, vae.size, vae.channels
        self.rows = math.ceil(vae.latent / (vae.channels * vae.size))
        self.decoder = vae.decoder
        self.log_variance = vae.log_variance
        weight = next(vae.decoder.parameters())
        # A linear map, because a fused program can't reshape rows of an image to a vector.
        unpacking = torch.eye(self.latent, self.channels * self.rows * self.size, device=weight.device)
        self.unpacking: Tensor
        self.register_buffer("unpacking", unpacking.to(weight.dtype), persistent=False)

    def forward(self, state: Tensor) -> Tensor:
        x, below = state[:, :, : self.size], state[:, :, self.size :]
        z = F.linear(below.flatten(1), self.unpacking)
        error = (self.decoder(z) - x).square().sum((1, 2, 3))
        return 0.5 * (-self.log_variance).exp() * error + 0.5 * below.square().sum((1, 2, 3))

    def pack(self, images: Tensor, z: Tensor, rest: float = 0.0) -> Tensor:
        """States of images (B, channels, size, size) and latent vectors (B, latent); `rest` fills the last row."""
        below = F.pad(z, (0, self.unpacking.shape[1] - self.latent), value=rest)
        return torch.cat((images.to(z.dtype), below.unflatten(1, (self.channels, self.rows, self.size))), dim=2)

    def unpack(self, state: Tensor) -> Tensor:
        """The latent vectors (B, latent) of states."""
        return state[:, :, self.size :].flatten(1)[:, : self.latent].contiguous()


class PosteriorSampler:
    """Langevin chains on a VAE's latent vectors, whose stationary density is `p(z | x)` as the step size goes to 0.

    An update is `z' = z - step_size * grad U(z; x) + sqrt(2 * step_size * temperature) * noise`. For a Gaussian
    posterior of precision P, chains at temperature 1 end in N(mean, (P - step_size * P^2 / 2)^-1): the mean is right,
    and the covariance is too large by about `step_size / 2`. Chains are stable below a step size of 2 over the largest
    eigenvalue of P, which is about 1 / (smallest posterior variance).

    The decoder is in eval mode inside: with batch statistics, the images of a batch would change each other's
    posterior, and a single latent vector would have no energy. In training the running statistics are means over the
    refined latent vectors of earlier batches, which are like those that the decoder will see. The state is float32
    whatever `dtype` the decoder has; with the fused engine its bits do not depend on how a batch is split.

    Args:
        vae: the VAE; its weights are read anew in each call of `refine`.
        step_size: step size of a Langevin step, positive.
        temperature: temperature of the noise; 1 samples the posterior, 0 walks down to its nearest mode.
        dtype, engine: as in `fastebm.energy_gradient`.
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
        """The ends of chains of `num_steps` steps that start at `z`; arguments and errors as of `refine_posterior`."""
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
        """`U(z; x)` of each pair, (B,), with the decoder in eval mode, as in chains."""
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
    """The ends of short Langevin chains from `z`: latent vectors that are nearer to draws from `p(z | x)`.

    `PosteriorSampler` documents the chain and the step sizes at which it is stable. For many calls keep one of those,
    which compiles the decoder once.

    Args:
        images: float32 or float64 (B, channels, size, size) in [-1, 1], on `z`'s device.
        z: the starts of the chains, (B, latent), float32 or float64; usually draws from the encoder, `vae.posterior`.
            They are not changed, and no gradient flows into them.
        num_steps: number of Langevin steps, 0 or more.
        seed, chain_ids, start_step, batch_size, check: as in `Langevin.sample`.

    Raises ValueError for shapes that don't fit together or numbers out of range, and FloatingPointError where chains
    are not finite, for instance because the step size is too large.

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
    vae: VAE,
    images: Tensor,
    samples: int = 64,
    seed: int | None = None,
    first_chain_id: int = 0,
    *,
    batch_size: int = 1000,
) -> Tensor:
    """`log mean_k p(x | z_k) p(z_k) / q(z_k | x)` of each image, (B,), in nats, over draws z_k from the encoder.

    Its mean is a lower bound on `log p(x)`, tighter with more `samples` (Burda, Grosse, Salakhutdinov, "Importance
    Weighted Autoencoders", arXiv 1509.00519); one sample gives the ELBO. For a decoder that was trained on better draws
    than the encoder's it is a fairer measure than the ELBO. Nets are in eval mode inside.

    Args:
        samples: number of draws per image.
        seed, first_chain_id: draw k of an image has the noise of chain `first_chain_id + position` at step k.
        batch_size: number of images in the nets at a time.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples and batch_size must be at least 1, got {samples} and {batch_size}")
    seed = rng.draw_seed() if seed is None else seed
    parts = images.split(batch_size)
    with in_eval_mode(vae):
        bounds = [_bound(vae, part, samples, seed, first_chain_id + k * batch_size) for k, part in enumerate(parts)]
    return torch.cat(bounds)


def _bound(vae: VAE, images: Tensor, samples: int, seed: int, first_chain_id: int) -> Tensor:
    mean, log_variance = vae.encode(images)
    constant = 0.5 * images[0].numel() * (math.log(2 * math.pi) + vae.log_variance)
    weights = []
    for k in range(samples):
        shape = tuple(mean.shape)
        noise = normal(shape, seed=seed, step=k, stream=Stream.POSTERIOR, chain_ids=first_chain_id, device=mean.device)
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
