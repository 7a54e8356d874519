"""A normalising flow of the Glow family: exact likelihoods, exact inverses, samples in one pass.

A step is an activation norm, an invertible 1x1 convolution and an affine coupling (Kingma, Dhariwal, "Glow", NeurIPS
2018). Steps are grouped in levels; each halves the resolution, and half of the channels become latents after it (Dinh,
Sohl-Dickstein, Bengio, "Density Estimation Using Real NVP", ICLR 2017). The latents of all levels are standard normal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.ops.normal import normal
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream
from fastebm.runs.fields import checked_arguments

_LOG_TWO_PI = math.log(2 * math.pi)


class ActivationNorm(nn.Module):
    """`exp(log_scale) * (x + shift)` of each channel; `initialize` gives a batch mean 0 and variance 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        self.shift.copy_(-x.mean((0, 2, 3), keepdim=True))
        # The scale of a constant channel, as at the edge of digits, would be infinite.
        std = x.var((0, 2, 3), keepdim=True, correction=0).sqrt().clamp_min(1e-3)
        self.log_scale.copy_(-std.log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + self.shift) * self.log_scale.exp(), self._log_determinant(x)

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp() - self.shift

    def _log_determinant(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * (x.shape[2] * x.shape[3])).expand(len(x))


class InvertibleConvolution(nn.Module):
    """A 1x1 convolution by `W = P L (U + diag(s))`, with a fixed permutation P and fixed signs of s: never singular.

    L has ones on its diagonal and U zeros; the log-determinant is the sum of log |s|. W starts as a random rotation.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, channels: int):
        super().__init__()
        for name, tensor in zip(("permutation", "signs"), parts := _rotation(channels), strict=False):
            self.register_buffer(name, tensor)
        self.lower, self.upper, self.log_diagonal = map(nn.Parameter, parts[2:])

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(s); values of the parameters outside of the triangles are ignored."""
        unit = torch.eye(len(self.signs), dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.signs * self.log_diagonal.exp())
        return self.lower.tril(-1) + unit, upper

    def weight(self) -> Tensor:
        """W, (channels, channels)."""
        lower, upper = self.factors()
        return self.permutation @ lower @ upper

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_determinant = self.log_diagonal.sum() * (x.shape[2] * x.shape[3])
        return F.conv2d(x, self.weight()[:, :, None, None]), log_determinant.expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        lower, upper = self.factors()
        # Two triangular systems lose fewer digits than a product with an inverse matrix.
        columns = self.permutation.mT @ y.flatten(2)
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, columns, upper=True).unflatten(2, y.shape[2:])


class AffineCoupling(nn.Module):
    """Scales and shifts the second half of the channels by a small net of the first half; it starts as the identity.

    Log-scales are `bound * tanh(raw / bound)`, so that no step scales by more than exp(bound) up or down.
    """

    def __init__(self, channels: int, width: int, kernel: int, bound: float):
        super().__init__()
        self.kept, self.bound = channels // 2, bound
        last = nn.Conv2d(width, 2 * (channels - self.kept), kernel, padding=kernel // 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.net = nn.Sequential(
            nn.Conv2d(self.kept, width, kernel, padding=kernel // 2),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
            nn.SiLU(),
            last,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x[:, : self.kept], x[:, self.kept :]
        log_scale, shift = self._scale_and_shift(kept)
        return torch.cat((kept, changed * log_scale.exp() + shift), 1), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        kept, changed = y[:, : self.kept], y[:, self.kept :]
        log_scale, shift = self._scale_and_shift(kept)
        return torch.cat((kept, (changed - shift) * (-log_scale).exp()), 1)

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(kept).chunk(2, 1)
        return self.bound * torch.tanh(raw / self.bound), shift


class Flow(nn.Module):
    """An invertible map between images and standard normal latents (B, C H W), and the density that it gives.

    Args:
        shape: (C, H, W) of the images; vectors are images of 1x1 pixel with `levels` 0.
        levels: number of times that the resolution is halved. Each level has `flow_steps` steps at four times the
            channels, half of which become latents before the next level. 0 keeps the resolution, for at least two
            channels.
        flow_steps: number of steps in a level, or in the whole flow with `levels` 0.
        width: number of channels of the hidden layers in a coupling's net.
        bound: largest magnitude of a coupling's log-scale.

    Initial weights come from torch's default generator. Call `initialize` with a batch before the first update, which
    sets the activation norms.

    Raises ValueError for shapes and numbers that make no flow, TypeError for what are no numbers.

    Example:
        >>> import torch
        >>> from fastebm.models import Flow
        >>> flow = Flow((1, 8, 8), levels=2, flow_steps=2, width=16)
        >>> images = torch.rand(16, 1, 8, 8) * 2 - 1
        >>> flow.initialize(images)
        >>> latents, _ = flow.encode(images)
        >>> latents.shape, bool((flow.decode(latents) - images).abs().max() < 1e-5)
        (torch.Size([16, 64]), True)
        >>> flow.bits_per_dimension(images, seed=0).shape, flow.sample(4, seed=0).shape
        (torch.Size([16]), torch.Size([4, 1, 8, 8]))
    """

    @checked_arguments
    def __init__(
        self, shape: tuple[int, int, int], *, levels: int = 2, flow_steps: int = 8, width: int = 64, bound: float = 1.5
    ):
        super().__init__()
        _check_sizes(shape, levels, flow_steps, width, bound)
        self.shape, self.levels = shape, levels
        self.config: dict[str, Any] = {
            "shape": tuple(shape),
            "levels": levels,
            "flow_steps": flow_steps,
            "width": width,
            "bound": bound,
        }
        self.blocks = nn.ModuleList()
        channels, side = shape[0], min(shape[1:])
        for level in range(max(levels, 1)):
            if levels:
                channels, side = 4 * channels, side // 2
            kernel = 3 if side > 1 else 1
            self.blocks.append(nn.ModuleList(_step(channels, width, kernel, bound) for _ in range(flow_steps)))
            if level + 1 < levels:
                channels //= 2

    @property
    def dimensions(self) -> int:
        """C H W."""
        return math.prod(self.shape)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Sets each activation norm to give the features of `images` (B, C, H, W) mean 0 and variance 1.

        Raises ValueError for images of another shape or fewer than two.
        """
        self._check(images)
        if len(images) < 2:
            raise ValueError(f"a flow is initialized by at least two images, got {len(images)}")
        self._encode(images, initialize=True)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C H W) of images (B, C, H, W), and the log-determinants (B,) of the Jacobian there."""
        self._check(images)
        return self._encode(images, initialize=False)

    def decode(self, latents: Tensor) -> Tensor:
        """The images (B, C, H, W) of latents (B, C H W): the inverse of `encode`, up to rounding."""
        if latents.ndim != 2 or latents.shape[1] != self.dimensions:
            raise ValueError(f"latents must be (B, {self.dimensions}), got {tuple(latents.shape)}")
        shapes = self._latent_shapes()
        parts = latents.split([math.prod(shape) for shape in shapes], 1)
        x = parts[-1].unflatten(1, shapes[-1])
        for level in reversed(range(len(self.blocks))):
            if level + 1 < len(self.blocks):
                x = torch.cat((x, parts[level].unflatten(1, shapes[level])), 1)
            for step in reversed(list(self.blocks[level].children())):
                for layer in reversed(list(step.children())):
                    x = layer.inverse(x)  # type: ignore[operator]
            x = F.pixel_shuffle(x, 2) if self.levels else x
        return x

    def log_prob(self, images: Tensor) -> Tensor:
        """The log-density in nats, (B,), at images (B, C, H, W), which are treated as continuous."""
        latents, log_determinant = self.encode(images)
        return log_determinant - 0.5 * (latents.square().sum(1) + self.dimensions * _LOG_TWO_PI)

    def forward(self, images: Tensor) -> Tensor:
        return self.log_prob(images)

    def bits_per_dimension(
        self, images: Tensor, *, seed: int, step: int = 0, chain_ids: int | Tensor = 0, brightnesses: int = 256
    ) -> Tensor:
        """Bits per dimension of discrete images, (B,), with noise by `dequantize` with the same arguments.

        The mean over the noise is an upper bound on the true number of bits (Theis, van den Oord, Bethge, "A note on
        the evaluation of generative models", ICLR 2016).
        """
        spread = dequantize(images, seed=seed, step=step, chain_ids=chain_ids, brightnesses=brightnesses)
        return self.bits_per_dimension_of_dequantized(spread, brightnesses)

    def bits_per_dimension_of_dequantized(self, images: Tensor, brightnesses: int = 256) -> Tensor:
        """Bits per dimension of images that are `dequantize` already, (B,)."""
        nats = -self.log_prob(images) / self.dimensions - math.log(2 / (brightnesses - 1))
        return nats / math.log(2)

    def prior(
        self, count: int, seed: int, *, step: int = 0, chain_ids: int | Tensor = 0, temperature: float = 1.0
    ) -> Tensor:
        """Latents (count, C H W) from N(0, temperature²), a function of seed, step and chain ids."""
        parameter = next(self.parameters())
        latents = normal(
            (count, self.dimensions),
            seed=seed,
            step=step,
            stream=Stream.PRIOR,
            chain_ids=chain_ids,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        return temperature * latents

    @torch.no_grad()
    def sample(
        self, count: int, seed: int, *, step: int = 0, chain_ids: int | Tensor = 0, temperature: float = 1.0
    ) -> Tensor:
        """Images (count, C, H, W) of the latents of `prior`, not clamped and not rounded."""
        return self.decode(self.prior(count, seed, step=step, chain_ids=chain_ids, temperature=temperature))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items())

    def _encode(self, x: Tensor, *, initialize: bool) -> tuple[Tensor, Tensor]:
        latents = []
        total = x.new_zeros(len(x))
        for level, flow_steps in enumerate(self.blocks):
            x = F.pixel_unshuffle(x, 2) if self.levels else x
            for step in flow_steps.children():
                for layer in step.children():
                    if initialize and isinstance(layer, ActivationNorm):
                        layer.initialize(x)
                    x, log_determinant = layer(x)
                    total = total + log_determinant
            if level + 1 < len(self.blocks):
                x, leaving = x.chunk(2, 1)
                latents.append(leaving.flatten(1))
        return torch.cat((*latents, x.flatten(1)), 1), total

    def _latent_shapes(self) -> list[tuple[int, int, int]]:
        """The shapes of the latents of each level."""
        channels, height, width = self.shape
        shapes = []
        for level in range(len(self.blocks)):
            if self.levels:
                channels, height, width = 4 * channels, height // 2, width // 2
            if level + 1 < len(self.blocks):
                channels //= 2
            shapes.append((channels, height, width))
        return shapes

    def _check(self, images: Tensor) -> None:
        if images.shape[1:] != self.shape:
            raise ValueError(f"the flow is of images (B, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}")


def dequantize(
    images: Tensor, *, seed: int, step: int = 0, chain_ids: int | Tensor = 0, brightnesses: int = 256
) -> Tensor:
    """Discrete images (B, C, H, W) plus centred uniform noise as wide as the distance between two brightnesses.

    Args:
        images: images whose values are `brightnesses` equidistant ones from -1 to 1.
        seed, step, chain_ids: the address of the noise, in stream DATA_NOISE.

    Raises ValueError for fewer than two brightnesses.
    """
    if brightnesses < 2:
        raise ValueError(f"discrete images have at least two brightnesses, got {brightnesses}")
    noise = uniform(
        images.shape,
        seed=seed,
        step=step,
        stream=Stream.DATA_NOISE,
        chain_ids=chain_ids,
        device=images.device,
        dtype=images.dtype,
    )
    return images + (noise - 0.5) * (2 / (brightnesses - 1))


def quantize(images: Tensor, brightnesses: int = 256) -> Tensor:
    """Rounds each value of images to the nearest of `brightnesses` equidistant ones from -1 to 1.

    It inverts `dequantize`. Raises ValueError for fewer than two brightnesses.
    """
    if brightnesses < 2:
        raise ValueError(f"discrete images have at least two brightnesses, got {brightnesses}")
    half = (brightnesses - 1) / 2
    return ((images.clamp(-1, 1) + 1) * half).round() / half - 1


def _rotation(channels: int) -> tuple[Tensor, ...]:
    """A random rotation as P, the signs of s, L without its diagonal, U, and log |s|."""
    rotation, dtype = torch.empty(channels, channels, dtype=torch.float64), torch.get_default_dtype()
    if rotation.is_meta:  # shapes alone: operations on the meta device import for seconds
        square = rotation.to(dtype)
        return square, square[0], square, square, square[0]
    nn.init.orthogonal_(rotation)
    permutation, lower, upper = torch.linalg.lu(rotation)
    diagonal = upper.diagonal()
    parts = permutation, diagonal.sign(), lower.tril(-1), upper.triu(1), diagonal.abs().log()
    return tuple(part.to(dtype) for part in parts)


def _step(channels: int, width: int, kernel: int, bound: float) -> nn.Sequential:
    return nn.Sequential(
        ActivationNorm(channels), InvertibleConvolution(channels), AffineCoupling(channels, width, kernel, bound)
    )


def _check_sizes(shape: tuple[int, int, int], levels: int, flow_steps: int, width: int, bound: float) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"the shape of images must be (C, H, W), each at least 1, got {tuple(shape)}")
    if levels < 0 or flow_steps < 1 or width < 1 or not 0 < bound < math.inf:
        raise ValueError(
            f"a flow needs levels >= 0, steps >= 1, width >= 1 and a finite bound > 0, "
            f"got levels={levels}, flow_steps={flow_steps}, width={width}, bound={bound}"
        )
    if shape[1] % 2**levels or shape[2] % 2**levels:
        raise ValueError(f"images of {shape[1]}x{shape[2]} can't be halved {levels} times")
    if levels == 0 and shape[0] < 2:
        raise ValueError("a flow without levels needs at least two channels, got 1")
