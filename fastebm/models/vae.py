"""A variational autoencoder of images: one latent vector per image, and one pass of the decoder per sample."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastebm import rng
from fastebm.distributed import shared_rows
from fastebm.models.frozen_decoder import FrozenDecoder
from fastebm.models.modes import in_eval_mode
from fastebm.models.vae_nets import SIZES, Decoder, Encoder
from fastebm.ops.normal import normal
from fastebm.rng import Stream
from fastebm.runs.fields import checked_arguments


class ELBO(NamedTuple):
    """The evidence lower bound of each image and its two parts, `(B,)` each, in nats: `elbo = log_likelihood - kl`.

    Attributes:
        squared_error: `||x - G(z)||^2`, from which `log_likelihood` follows.
    """

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor
    squared_error: Tensor


class VAE(nn.Module):
    """A variational autoencoder with a Gaussian decoder: `p(x | z) = N(G(z), variance)`, `z ~ N(0, I)`.

    Args:
        size: resolution of the square images, a power of two in 4..256.
        channels: number of colour channels of an image.
        latent: number of dimensions of a latent vector.
        width: number of channels of both nets at full resolution; it doubles with every halving of the resolution.
        max_width: largest width of a layer, in channels.
        variance: variance of each pixel given the latent vector. It gives the KL term the weight `2 * variance` beside
            a sum of squared errors, so that the demo's weight of 0.1 is a variance of 0.05.
        learned_variance: make the variance a parameter, one number for all pixels.
        spectral_norm: put spectral norm on the 3x3 convolutions of the decoder.

    Both nets have batch norm: samples of a batch influence each other in train mode, and do not in eval mode.

    Raises ValueError for a size that is no such power of two, and for numbers that are not positive; TypeError for what
    are no numbers.

        >>> vae = VAE(8, channels=1, latent=4, width=8).eval()
        >>> mean, log_variance = vae.encode(torch.zeros(2, 1, 8, 8))
        >>> vae.decode(mean).shape, vae.sample(5, seed=1).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([5, 1, 8, 8]))
    """

    @checked_arguments
    def __init__(
        self,
        size: int,
        channels: int = 3,
        *,
        latent: int = 128,
        width: int = 64,
        max_width: int = 512,
        variance: float = 0.05,
        learned_variance: bool = False,
        spectral_norm: bool = True,
    ):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size is {size}; it must be a power of two in {SIZES[0]}..{SIZES[-1]}")
        for name, value in {"channels": channels, "latent": latent, "width": width, "max_width": max_width}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 < variance < math.inf:
            raise ValueError(f"variance is {variance}; it must be positive and finite")
        self.size = size
        self.channels = channels
        self.latent = latent
        self.width = width
        self.max_width = max_width
        self.learned_variance = learned_variance
        self.spectral_norm = spectral_norm
        self.encoder = Encoder(size, channels, latent, width, max_width)
        self.decoder = Decoder(size, channels, latent, width, max_width, spectral_norm)
        self.log_variance = nn.Parameter(torch.tensor(math.log(variance)), requires_grad=learned_variance)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, with the current variance: `VAE(**vae.config)` has the shape of this VAE."""
        return {
            "size": self.size,
            "channels": self.channels,
            "latent": self.latent,
            "width": self.width,
            "max_width": self.max_width,
            "variance": float(self.log_variance.exp()),
            "learned_variance": self.learned_variance,
            "spectral_norm": self.spectral_norm,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of `q(z | x)`, (B, latent) each, of images x (B, channels, size, size) in [-1, 1]."""
        if x.ndim != 4 or x.shape[1:] != (self.channels, self.size, self.size):
            wanted = f"(batch, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"x has shape {tuple(x.shape)}; this encoder takes {wanted}")
        mean, log_variance = self.encoder(x)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, channels, size, size) in (-1, 1), the means of `p(x | z)`, of latent vectors z (B, latent)."""
        if z.ndim != 2 or z.shape[1] != self.latent:
            raise ValueError(f"z has shape {tuple(z.shape)}; this decoder takes (batch, {self.latent})")
        return self.decoder(z)

    def prior(self, count: int, seed: int | None = None, first_chain_id: int = 0) -> Tensor:
        """Latent vectors (count, latent) from the prior, with chain ids from `first_chain_id` on, under `seed`."""
        seed = rng.draw_seed() if seed is None else seed
        device = self.log_variance.device
        return normal((count, self.latent), seed=seed, stream=Stream.PRIOR, chain_ids=first_chain_id, device=device)

    def posterior(self, x: Tensor, seed: int | None = None, first_chain_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """A draw z from `q(z | x)` for each image, with the mean and log-variance of that Gaussian.

        The noise has chain ids from `first_chain_id` on, under `seed`. Gradients flow through the draw.
        """
        mean, log_variance = self.encode(x)
        seed = rng.draw_seed() if seed is None else seed
        noise = normal(tuple(mean.shape), seed=seed, stream=Stream.POSTERIOR, chain_ids=first_chain_id, device=x.device)
        return mean + (0.5 * log_variance).exp() * noise, mean, log_variance

    @torch.no_grad()
    def sample(
        self,
        count: int,
        seed: int | None = None,
        first_chain_id: int = 0,
        *,
        batch_size: int = 1000,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Images (count, channels, size, size) in [-1, 1], float32: one pass of the decoder at draws from the prior.

        The decoder runs in eval mode, so that no sample depends on its batch, and in a faster form (`FrozenDecoder`),
        which differs from `decode` by rounding. On CPUs with matrix units and on GPUs `dtype` bfloat16 is several times
        as fast, at a relative error around 1%.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        z = self.prior(count, seed, first_chain_id)
        decode = FrozenDecoder(self.decoder, dtype)

        def decoded(rows: range) -> Tensor:
            return torch.cat([decode(part) for part in z[rows.start : rows.stop].split(batch_size)])

        return shared_rows(count, decoded, batch_size)

    def elbo(self, x: Tensor, seed: int | None = None, first_chain_id: int = 0) -> ELBO:
        """The evidence lower bound of images x by one draw from the posterior, and its terms."""
        z, mean, log_variance = self.posterior(x, seed, first_chain_id)
        return self.bound(squared_error(x, self.decode(z)), kl_to_prior(mean, log_variance), x[0].numel())

    def bound(self, error: Tensor, kl: Tensor, pixels: int) -> ELBO:
        """The bound from squared errors and KL terms (B,) of images with `pixels` values each, counting channels."""
        constant = 0.5 * pixels * (math.log(2 * math.pi) + self.log_variance)
        log_likelihood = -0.5 * error * (-self.log_variance).exp() - constant
        return ELBO(log_likelihood - kl, log_likelihood, kl, error)

    @torch.no_grad()
    def update_bn(
        self,
        images: Tensor | None = None,
        *,
        batches: int = 16,
        batch_size: int = 128,
        seed: int = 0,
        first_chain_id: int = 0,
    ) -> None:
        """Measures the running statistics of all batch norms with the current weights, as means over batches.

        Averaged weights were never run in training, so that the statistics they come with are those of other weights.

        Args:
            images: real images, on which the encoder's statistics are measured. The decoder's are measured on as many
                draws from their posteriors as from the prior, in one pass. Without images, only the decoder's
                statistics are measured, on draws from the prior.
            batches, batch_size: the number of batches, and of draws in each; fewer where there are fewer images.
            seed, first_chain_id: the seed and the first chain id of the draws.
        """
        part = self.decoder if images is None else self
        norms = [module for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        with in_eval_mode(part):
            try:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a plain mean over all batches
                    norm.training = True
                for number in range(batches):
                    start = number * batch_size
                    shown = None if images is None else images[start : start + batch_size]
                    if shown is not None and len(shown) < (batch_size if number else 1):
                        break
                    z = self.prior(batch_size if shown is None else len(shown), seed, first_chain_id + start)
                    self.decode(
                        z if shown is None else torch.cat((self.posterior(shown, seed, first_chain_id + start)[0], z))
                    )
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """`KL(N(mean, exp(log_variance)) || N(0, I))` of each row, in nats, (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def squared_error(x: Tensor, other: Tensor) -> Tensor:
    """`||x - other||^2` of each sample, (B,)."""
    return (x - other).square().flatten(1).sum(1)
