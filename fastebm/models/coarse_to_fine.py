"""The coarse-to-fine energy net (CF-EBM): one net for images from 4x4 to 512x512, which grows at its input.

Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR 2021; layers
and widths are those of the authors' repository YangNaruto/ProEBM, which trains `f = -E`.
"""

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.models.layers import equalize_learning_rate, normalized
from fastebm.ops import activation as activate
from fastebm.ops import block_tail
from fastebm.runs.fields import checked_arguments

# Channels at each resolution, in units of the base width. The block that takes size s maps width(s) to width(s / 2).
WIDTHS: dict[int, Fraction] = {
    4: Fraction(4),
    8: Fraction(4),
    16: Fraction(4),
    32: Fraction(4),
    64: Fraction(2),
    128: Fraction(1),
    256: Fraction(1, 2),
    512: Fraction(1, 4),
}


class Block(nn.Module):
    """One halving of the resolution: `(act(avgpool2(conv3x3(act(conv3x3(h))))) + avgpool2(conv1x1(h))) / sqrt(2)`."""

    def __init__(self, width_in: int, width_out: int, *, activation: str, spectral_norm: bool):
        super().__init__()
        self.activation = activation
        self.conv1 = normalized(nn.Conv2d(width_in, width_in, 3, padding=1), spectral_norm)
        self.conv2 = normalized(nn.Conv2d(width_in, width_out, 3, padding=1), spectral_norm)
        self.skip = equalize_learning_rate(nn.Conv2d(width_in, width_out, 1))

    def forward(self, h: Tensor, fade: Tensor | None = None, beta: float | Tensor = 1.0) -> Tensor:
        """h (B, width_in, s, s) to (B, width_out, s/2, s/2), blended with `fade` of that shape where it is given."""
        main = self.conv2(activate(self.conv1(h), self.activation))
        return block_tail(main, self.skip(h), fade=fade, beta=beta, activation=self.activation)


class Head(nn.Module):
    """Features on a 4x4 map to one number: conv3x3, act, conv4x4 without padding, act, linear."""

    def __init__(self, width: int, *, activation: str, spectral_norm: bool):
        super().__init__()
        self.activation = activation
        self.conv1 = normalized(nn.Conv2d(width, width, 3, padding=1), spectral_norm)
        self.conv2 = normalized(nn.Conv2d(width, width, 4), spectral_norm)
        self.linear = equalize_learning_rate(nn.Linear(width, 1))

    def forward(self, h: Tensor) -> Tensor:
        """h (B, width, 4, 4) to (B,)."""
        h = activate(self.conv1(h), self.activation)
        h = activate(self.conv2(h), self.activation)
        return self.linear(h.flatten(1)).squeeze(1)


class CoarseToFineEnergy(nn.Module):
    """An energy E(x) of images, low where they look real, that takes every resolution from `lowest` to `image_size`.

    The sub-net of size s is `fromRGB_s` (a 1x1 convolution without activation), then the blocks that take s, s/2,
    ..., 8, then the head on the 4x4 map. A new resolution fades in with `beta` from 0 to 1: the features at s/2 are
    `beta * Block_s(fromRGB_s(x)) + (1 - beta) * fromRGB_{s/2}(avgpool2(x))`, so that at `beta = 0` the energy of x is
    exactly that of the half-size image.

    The 3x3 and 4x4 convolutions have spectral norm (its power iterations run in train mode only); fromRGB, skip and
    linear have an equalised learning rate. Weights have He's initialisation, which is our choice, as the paper does not
    name one.

    Args:
        image_size: the highest resolution, a power of two in 4..512.
        channels: number of colour channels of an image.
        base_width: b in the numbers of channels by resolution: 4b up to 32x32, 2b at 64, b at 128, b/2 at 256, b/4 at
            512.
        lowest: the lowest resolution, a power of two in 4..image_size. 8 in the paper.
        activation: a name that `fastebm.ops.activation` knows; "scaled_swish" is `x * sigmoid(x) / 1.1`.
        spectral_norm: put spectral norm on the 3x3 and 4x4 convolutions.

    Raises ValueError for sizes out of range and for a base width that makes a fraction of a channel; TypeError for what
    are no numbers.

        >>> net = CoarseToFineEnergy(16, channels=1, base_width=8)
        >>> net(torch.zeros(2, 1, 16, 16), beta=0.3).shape
        torch.Size([2])
    """

    @checked_arguments
    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        *,
        base_width: int = 32,
        lowest: int = 8,
        activation: str = "scaled_swish",
        spectral_norm: bool = True,
    ):
        super().__init__()
        _check_sizes(image_size, lowest)
        if channels < 1:
            raise ValueError(f"channels is {channels}; an image needs at least 1")
        activate(torch.zeros(1, device="cpu"), activation)  # so that an unknown name is an error here
        self.image_size = image_size
        self.channels = channels
        self.base_width = base_width
        self.lowest = lowest
        self.activation = activation
        self.spectral_norm = spectral_norm

        style: dict[str, Any] = {"activation": activation, "spectral_norm": spectral_norm}
        widths = _widths(image_size, base_width)
        self.head = Head(widths[4], **style)
        self.blocks = nn.ModuleDict(
            {str(size): Block(width, widths[size // 2], **style) for size, width in widths.items() if size > 4}
        )
        self.from_rgb = nn.ModuleDict(
            {
                str(size): equalize_learning_rate(nn.Conv2d(channels, widths[size], 1))
                for size in widths
                if size >= lowest
            }
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The resolutions that `forward` takes, from `lowest` to `image_size`."""
        return tuple(size for size in WIDTHS if self.lowest <= size <= self.image_size)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `CoarseToFineEnergy(**net.config)` has this net's shape."""
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "base_width": self.base_width,
            "lowest": self.lowest,
            "activation": self.activation,
            "spectral_norm": self.spectral_norm,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def forward(self, x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
        """The energies (B,) of images x (B, channels, s, s), usually in [-1, 1], for any s in `sizes`.

        `beta` in [0, 1] is the weight of the block that takes s against the fade path; below 1 it needs s > `lowest`,
        and 0 skips the block. A tensor of one element stays on its device, so that it can change in a captured graph:
        its value is not checked, and it always needs s > `lowest`.

        Raises ValueError for a shape that this net does not take, or a `beta` out of range.
        """
        size = self._size_of(x)
        self._check_beta(beta, size)
        if not isinstance(beta, Tensor) and beta == 0:
            return self.forward(F.avg_pool2d(x, 2))
        fading = isinstance(beta, Tensor) or beta < 1
        h = self.from_rgb[str(size)](x)
        if size > 4:
            fade = self.from_rgb[str(size // 2)](F.avg_pool2d(x, 2)) if fading else None
            h = self.blocks[str(size)](h, fade, beta)
        for lower in _block_sizes(size // 2):
            h = self.blocks[str(lower)](h)
        return self.head(h)

    def parameters_at(self, size: int) -> list[nn.Parameter]:
        """The parameters of the sub-net of `size`, each once, including its fade path.

        At `beta = 1` the fade path gets no gradient; at `beta = 0` the block that takes `size` gets none.
        """
        self._check_size(size)
        blocks = [self.blocks[str(s)] for s in _block_sizes(size)]
        entries = [self.from_rgb[str(s)] for s in (size, size // 2) if s >= self.lowest]
        return [parameter for part in [self.head, *blocks, *entries] for parameter in part.parameters()]

    def frozen(self, size: int) -> "CoarseToFineEnergy":
        """An independent copy of the sub-net of `size` and below, in eval mode, its parameters without gradients."""
        self._check_size(size)
        with torch.device("meta"):  # these weights are replaced
            net = CoarseToFineEnergy(**(self.config | {"image_size": size}))
        state = self.state_dict()
        net.load_state_dict({name: state[name].detach().clone() for name in net.state_dict()}, assign=True)
        return net.eval().requires_grad_(False)

    def grown(self) -> "CoarseToFineEnergy":
        """A new trainable net of twice the `image_size`, with this net's weights and a new block and fromRGB added.

        The new weights come from torch's default generator. At `beta = 0` the new net computes the old net's energy of
        the half-size image. Raises ValueError beyond 512.
        """
        net = CoarseToFineEnergy(**(self.config | {"image_size": 2 * self.image_size}))
        weight = next(self.parameters())
        net.to(device=weight.device, dtype=weight.dtype)
        net.load_state_dict(net.state_dict() | self.state_dict())
        return net.train(self.training)

    def _size_of(self, x: Tensor) -> int:
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] != x.shape[3] or x.shape[3] not in self.sizes:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this net takes (batch, {self.channels}, s, s) with s in {self.sizes}"
            )
        return x.shape[3]

    def _check_size(self, size: int) -> None:
        if size not in self.sizes:
            raise ValueError(f"size is {size}; this net has {self.sizes}")

    def _check_beta(self, beta: float | Tensor, size: int) -> None:
        if isinstance(beta, Tensor):
            if beta.numel() != 1:
                raise ValueError(f"beta has shape {tuple(beta.shape)}; a tensor beta needs one element")
        elif not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta}; it must lie in [0, 1]")
        if size == self.lowest and (isinstance(beta, Tensor) or beta < 1):
            raise ValueError(f"size {size} is the lowest of this net and has nothing to fade from: beta must be 1.0")


def _block_sizes(size: int) -> tuple[int, ...]:
    """The sizes of the blocks that an image of `size` passes through, in order: `size`, `size`/2, ..., 8."""
    return tuple(s for s in reversed(WIDTHS) if 4 < s <= size)


def _check_sizes(image_size: int, lowest: int) -> None:
    if image_size not in WIDTHS or lowest not in WIDTHS or lowest > image_size:
        raise ValueError(
            f"image_size is {image_size} and lowest {lowest}; "
            f"needed are powers of two with {min(WIDTHS)} <= lowest <= image_size <= {max(WIDTHS)}"
        )


def _widths(image_size: int, base_width: int) -> dict[int, int]:
    """The number of channels by resolution up to `image_size`; the layer there is the narrowest."""
    narrowest = WIDTHS[image_size] * Fraction(base_width)
    if narrowest < 1 or narrowest.denominator != 1:
        raise ValueError(
            f"base_width is {base_width}, which makes {float(narrowest):g} channels at {image_size}x{image_size}; "
            f"it must be a positive multiple of {WIDTHS[image_size].denominator}"
        )
    return {size: int(width * base_width) for size, width in WIDTHS.items() if size <= image_size}
