"""A variational autoencoder of images: one latent vector, one pass of the decoder for a sample.

The shape of both nets is that of the demo of EC-VAE (Luo et al., "Energy-Calibrated VAE with Test Time Free Lunch",
arXiv 2311.04071): the decoder a transposed convolution to 4x4 and then, for each doubling, nearest upsampling, a
convolution with spectral norm, batch norm and a gated linear unit, with tanh at its end; the encoder a small residual
net. Widths, the linear layer on the encoder's 4x4 map and all that concerns other sizes than 32x32 are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm import rng
from fastebm.models.frozen_decoder import FrozenDecoder
from fastebm.models.layers import normalized
from fastebm.models.modes import in_eval_mode
from fastebm.ops.normal import normal
from fastebm.rng import Stream

LOWEST = 4
SIZES = (4, 8, 16, 32, 64, 128, 256)
# Beyond these the variance of the posterior is as good as that of the prior times e**10, or as good as zero.
LOG_VARIANCE_BOUND = 10.0


class ELBO(NamedTuple):
    """The evidence lower bound of each image and its two parts, `(B,)` each, in nats: `elbo = likelihood - kl`.

    Attributes:
        squared_error: `||x - G(z)||^2`, from which `likelihood` follows.
    """

    elbo: Tensor
    likelihood: Tensor
    kl: Tensor
    squared_error: Tensor


class GatedUpBlock(nn.Module):
    """Twice the resolution: nearest upsampling, conv3x3, batch norm, gated linear unit."""

    def __init__(self, width_in: int, width_out: int, spectral_norm: bool):
        super().__init__()
        # Without a bias, which the batch norm would take away again.
        self.conv = nn.Conv2d(width_in, 2 * width_out, 3, padding=1, bias=False)
        normalized(self.conv, spectral_norm)
        self.norm = nn.BatchNorm2d(2 * width_out)

    def forward(self, h: Tensor) -> Tensor:
        """h (B, width_in, s, s) to (B, width_out, 2s, 2s)."""
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        return F.glu(self.norm(self.conv(h)), dim=1)


class Decoder(nn.Module):
    """Latent vectors (B, latent) to images (B, channels, size, size) in (-1, 1)."""

    def __init__(self, size: int, channels: int, latent: int, width: int, max_width: int, spectral_norm: bool):
        super().__init__()
        widths = _widths(size, width, max_width)
        self.start = nn.ConvTranspose2d(latent, 2 * widths[LOWEST], LOWEST, bias=False)
        self.norm = nn.BatchNorm2d(2 * widths[LOWEST])
        self.blocks = nn.Sequential(
            *(GatedUpBlock(widths[s], widths[2 * s], spectral_norm) for s in widths if 2 * s in widths)
        )
        self.to_image = nn.Conv2d(widths[size], channels, 3, padding=1)

    def doublings(self) -> Iterator[GatedUpBlock]:
        """The blocks, from 4x4 up."""
        for block in self.blocks:
            assert isinstance(block, GatedUpBlock)
            yield block

    def forward(self, z: Tensor) -> Tensor:
        h = F.glu(self.norm(self.start(z[:, :, None, None])), dim=1)
        return torch.tanh(self.to_image(self.blocks(h)))


class ResidualDownBlock(nn.Module):
    """Half the resolution: two conv3x3 with batch norm, the first with stride 2, beside a strided 1x1 shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, h: Tensor) -> Tensor:
        main = F.leaky_relu(self.norm1(self.conv1(h)), 0.2)
        return F.leaky_relu(self.norm2(self.conv2(main)) + self.shortcut(h), 0.2)


class Encoder(nn.Module):
    """Images (B, channels, size, size) to mean and log-variance of the posterior, (B, latent) each.

    A residual net with two blocks at each resolution down to 4x4, as ResNet-18 has, and a linear layer on that map.
    """

    def __init__(self, size: int, channels: int, latent: int, width: int, max_width: int):
        super().__init__()
        widths = _widths(size, width, max_width)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[size], 3, padding=1, bias=False), nn.BatchNorm2d(widths[size]), nn.LeakyReLU(0.2)
        )
        blocks: list[nn.Module] = [
            ResidualDownBlock(widths[size], widths[size], 1),
            ResidualDownBlock(widths[size], widths[size], 1),
        ]
        for s in sorted(widths, reverse=True)[1:]:
            blocks += [ResidualDownBlock(widths[2 * s], widths[s], 2), ResidualDownBlock(widths[s], widths[s], 1)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[LOWEST] * LOWEST**2, 2 * latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.linear(self.blocks(self.stem(x)).flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)


class VAE(nn.Module):
    """A variational autoencoder with a Gaussian decoder: `p(x | z) = N(G(z), variance)`, `z ~ N(0, I)`.

    Args:
        size: of the square images, a power of two in 4..256.
        channels: colours of an image.
        latent: length of a latent vector.
        width: channels of both nets at full resolution; they double with every halving of it.
        max_width: where that ends.
        variance: of each pixel given the latent vector. As `variance` goes with a weight `2 * variance` of the KL term
            beside a sum of squared errors, the demo's 0.1 is a variance of 0.05.
        learned_variance: makes it a parameter, one number for all pixels.
        spectral_norm: on the 3x3 convolutions of the decoder.

    Both nets have batch norm: in train mode samples of a batch influence each other, in eval mode they don't.

    Raises ValueError for a size that is no such power of two, and for numbers that are not positive.

        >>> vae = VAE(8, channels=1, latent=4, width=8).eval()
        >>> mean, log_variance = vae.encode(torch.zeros(2, 1, 8, 8))
        >>> vae.decode(mean).shape, vae.sample(5, seed=1).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([5, 1, 8, 8]))
    """

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
        """The constructor's arguments, with the variance as it is now: `VAE(**vae.config)` has this one's shape."""
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

    def prior(self, count: int, seed: int | None = None, first: int = 0) -> Tensor:
        """Latent vectors (count, latent) from the prior, numbers `first` and on of those that `seed` has."""
        seed = rng.draw_seed() if seed is None else seed
        device = self.log_variance.device
        return normal((count, self.latent), seed=seed, stream=Stream.PRIOR, chain_ids=first, device=device)

    def posterior(self, x: Tensor, seed: int | None = None, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """A draw z from `q(z | x)` for each image, with the mean and log-variance that it came from.

        Noise is that of the images' positions, `first` and on, under `seed`. Gradients flow through the draw.
        """
        mean, log_variance = self.encode(x)
        seed = rng.draw_seed() if seed is None else seed
        noise = normal(tuple(mean.shape), seed=seed, stream=Stream.POSTERIOR, chain_ids=first, device=x.device)
        return mean + (0.5 * log_variance).exp() * noise, mean, log_variance

    @torch.no_grad()
    def sample(
        self,
        count: int,
        seed: int | None = None,
        first: int = 0,
        *,
        batch_size: int = 1000,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Images (count, channels, size, size) in [-1, 1], float32: one pass of the decoder at draws from the prior.

        As in eval mode, whatever mode the net is in, so that no sample depends on its batch, and in a faster form of
        the decoder (`FrozenDecoder`), which differs from `decode` by rounding. On CPUs with matrix units and on GPUs
        `dtype` bfloat16 is several times as fast, at a relative error around 1%.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        z = self.prior(count, seed, first)
        decode = FrozenDecoder(self.decoder, dtype)
        return torch.cat([decode(part) for part in z.split(batch_size)])

    def elbo(self, x: Tensor, seed: int | None = None, first: int = 0) -> ELBO:
        """The evidence lower bound of images x by one draw from the posterior, and its parts."""
        z, mean, log_variance = self.posterior(x, seed, first)
        return self.bound(squared_error(x, self.decode(z)), kl_to_prior(mean, log_variance), x[0].numel())

    def bound(self, error: Tensor, kl: Tensor, pixels: int) -> ELBO:
        """The bound from squared errors and KL terms (B,) of images with so many `pixels`, colours counted."""
        constant = 0.5 * pixels * (math.log(2 * math.pi) + self.log_variance)
        likelihood = -0.5 * error * (-self.log_variance).exp() - constant
        return ELBO(likelihood - kl, likelihood, kl, error)

    @torch.no_grad()
    def update_bn(
        self, images: Tensor | None = None, *, batches: int = 16, batch_size: int = 128, seed: int = 0, first: int = 0
    ) -> None:
        """Makes the running statistics of all batch norms those of the net as it is now: means over batches.

        Averaged weights were never run in training, so that the statistics they inherit are another net's.

        Args:
            images: real ones; the encoder's statistics become theirs, and the decoder's those of as many draws from
                their posteriors as from the prior, which it decodes side by side. Without any, only the decoder's are
                measured, on draws from the prior.
            batches, batch_size: how many draws; fewer where there are fewer images.
            seed, first: of the draws.
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
                    z = self.prior(batch_size if shown is None else len(shown), seed, first + start)
                    self.decode(z if shown is None else torch.cat((self.posterior(shown, seed, first + start)[0], z)))
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """`KL(N(mean, exp(log_variance)) || N(0, I))` of each row, in nats, (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def squared_error(x: Tensor, other: Tensor) -> Tensor:
    """`||x - other||^2` of each sample, (B,)."""
    return (x - other).square().flatten(1).sum(1)


def _widths(size: int, width: int, max_width: int) -> dict[int, int]:
    """Channels by resolution, from 4 to `size`."""
    return {s: min(max_width, width * (size // s)) for s in SIZES if s <= size}
