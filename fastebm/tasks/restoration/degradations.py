"""Linear degradations `y = A x` of images, the operators of zero-shot restoration, with their exact pseudo-inverses.

Each is a module with `A`, `pinv` and `null`, x -> x - pinv(A(x)), on batches of images. To rounding, A pinv A = A and
pinv A is a symmetric projection. Of all images with the measurement y, `pinv(y)` is the one of least norm, and
`pinv(y) + null(x)` is the one nearest to x (Wang, Yu, Zhang, "Zero-Shot Image Restoration Using Denoising Diffusion
Null-Space Model", ICLR 2023).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.data import neighbour_mean
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream
from fastebm.tasks.arguments import check_number, check_seed, check_whole

Shape = tuple[int, int, int]
_LARGEST = 2**14  # pixels a side, whose blur has matrices of 2 GiB


class Degradation(nn.Module, ABC):
    """The common base of degradations. Constants are stored in float64 and used in the dtype of the images.

    Attributes:
        orthogonal_rows: whether A Aᵀ = c I. The pseudo-inverse of any operator after such a one is the product of both
            pseudo-inverses (see `Composition`).
    """

    orthogonal_rows = False

    @abstractmethod
    def A(self, x: Tensor) -> Tensor:  # noqa: N802  (the field's own name)
        """The measurement of images x (B, C, H, W), float. Raises ValueError or TypeError for images that don't fit."""

    @abstractmethod
    def pinv(self, y: Tensor) -> Tensor:
        """The images (B, C, H, W) of least norm among those with the measurement nearest to y.

        Raises ValueError or TypeError for a y that is no measurement of this degradation.
        """

    def null(self, x: Tensor) -> Tensor:
        """The part of images x that A does not measure: x - pinv(A(x))."""
        return x - self.pinv(self.A(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.A(x)

    @abstractmethod
    def rank(self, shape: Shape) -> int:
        """The number of independent numbers that A measures of an image of `shape` (C, H, W)."""

    def initial_estimate(self, y: Tensor) -> Tensor:
        """Images (B, C, H, W) at which chains at full size start: `pinv(y)`, or smoother ones with the same y."""
        return self.pinv(y)

    def coarsen(self, y: Tensor) -> CoarseMeasurement | None:
        """The measurement of the images averaged to half their size that y implies.

        None if there is no such measurement; then the lower levels of a cascade are not constrained.
        """
        return None


@dataclass(frozen=True, eq=False)
class CoarseMeasurement:
    """A measurement `y` of images of half the size; its noise has `noise_scale` times the standard deviation."""

    degradation: Degradation
    y: Tensor
    noise_scale: float


class SuperResolution(Degradation):
    """Images averaged over blocks of `factor` x `factor` pixels; the pseudo-inverse repeats each pixel.

    A `factor` of 1 changes nothing. Raises ValueError for a factor below 1, and in `A` for sides that it doesn't
    divide.

    Example:
        >>> import torch
        >>> quarter = SuperResolution(4)
        >>> y = quarter.A(torch.rand(2, 3, 32, 32))
        >>> y.shape, quarter.pinv(y).shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 3, 32, 32]))
    """

    orthogonal_rows = True

    def __init__(self, factor: int):
        super().__init__()
        self.factor = check_whole("the factor of super-resolution", factor)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        _check_batch("images", x)
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"super-resolution by {self.factor} needs sides that are multiples of it, got {_size(x.shape)}"
            )
        return x if self.factor == 1 else F.avg_pool2d(x, self.factor)

    def pinv(self, y: Tensor) -> Tensor:
        _check_batch("measurements", y)
        return y if self.factor == 1 else F.interpolate(y, scale_factor=self.factor, mode="nearest")

    def rank(self, shape: Shape) -> int:
        return math.prod(shape) // self.factor**2

    def coarsen(self, y: Tensor) -> CoarseMeasurement | None:
        if self.factor % 2 == 0:
            return CoarseMeasurement(SuperResolution(self.factor // 2), y, 1.0)
        if self.factor == 1 and y.shape[2] % 2 == y.shape[3] % 2 == 0:
            return CoarseMeasurement(self, F.avg_pool2d(y, 2), 0.5)
        return None

    def extra_repr(self) -> str:
        return f"{self.factor}"


class Colorization(Degradation):
    """The mean of the channels, (B, 1, H, W); the pseudo-inverse repeats it in each of `channels` channels."""

    orthogonal_rows = True

    def __init__(self, channels: int = 3):
        super().__init__()
        self.channels = check_whole("channels", channels)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        _check_batch("images", x)
        if x.shape[1] != self.channels:
            raise ValueError(f"colorization needs images of {self.channels} channels, got {x.shape[1]}")
        return x.mean(1, keepdim=True)

    def pinv(self, y: Tensor) -> Tensor:
        _check_batch("measurements", y)
        if y.shape[1] != 1:
            raise ValueError(f"a measurement of colorization has 1 channel, got {y.shape[1]}")
        return y.expand(-1, self.channels, -1, -1)

    def rank(self, shape: Shape) -> int:
        return shape[1] * shape[2]

    def coarsen(self, y: Tensor) -> CoarseMeasurement | None:
        return CoarseMeasurement(self, F.avg_pool2d(y, 2), 0.5) if y.shape[2] % 2 == y.shape[3] % 2 == 0 else None

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class Inpainting(Degradation):
    """Images with 0 where `known` is False; A is its own pseudo-inverse.

    Args:
        known: bool (H, W), (1, H, W) or (C, H, W), True where a pixel is measured: the opposite of a hole mask. Other
            values of a measurement, NaN included, are ignored.

    Raises TypeError for a mask that isn't bool, ValueError for another shape or one that measures nothing.
    """

    known: Tensor
    hidden: Tensor

    def __init__(self, known: Tensor):
        super().__init__()
        if not isinstance(known, Tensor) or known.dtype != torch.bool:
            kind = known.dtype if isinstance(known, Tensor) else type(known).__name__
            raise TypeError(f"a mask must be a bool tensor, True where a pixel is known, got {kind}")
        if known.ndim not in (2, 3) or not known.any():
            raise ValueError(f"a mask must be (H, W) or (C, H, W) and know a pixel, got {tuple(known.shape)}")
        self.register_buffer("known", known if known.ndim == 3 else known[None], persistent=False)
        self.register_buffer("hidden", (~self.known).double(), persistent=False)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        _check_batch("images", x)
        channels, height, width = self.known.shape
        if channels not in (1, x.shape[1]) or x.shape[2:] != (height, width):
            raise ValueError(f"the mask is {tuple(self.known.shape)}, which does not fit images {tuple(x.shape[1:])}")
        return torch.where(self.known, x, 0.0)

    def pinv(self, y: Tensor) -> Tensor:
        return self.A(y)

    def null(self, x: Tensor) -> Tensor:
        # Not x - A(x): compiled gradients support a product, and known pixels are exactly 0.
        return x * self.hidden.to(x.dtype)

    def rank(self, shape: Shape) -> int:
        return int(self.known.sum()) * (shape[0] if self.known.shape[0] == 1 else 1)

    def initial_estimate(self, y: Tensor) -> Tensor:
        """The known pixels, and for each hidden one the mean of those around it (`fastebm.data.neighbour_mean`)."""
        known = self.A(y)
        return neighbour_mean(known, (~self.known).expand_as(known))

    def coarsen(self, y: Tensor) -> CoarseMeasurement | None:
        """The measurement at half size, where a pixel is known if all four pixels that it averages are."""
        if y.shape[2] % 2 or y.shape[3] % 2:
            return None
        known = F.avg_pool2d(self.known.double(), 2) == 1
        if not known.any():
            return None
        half = Inpainting(known)
        return CoarseMeasurement(half, half.A(F.avg_pool2d(self.A(y), 2)), 0.5)

    def extra_repr(self) -> str:
        return f"{int(self.known.sum())} of {self.known.numel()} known"


class CompressedSensing(Degradation):
    """A share of the coefficients of every block of pixels, in a pseudo-random orthonormal basis.

    The basis is Sylvester's Hadamard matrix over the pixels of a block in a random order. The measured rows are chosen
    at random too, but always include the mean of the block. They are the same for all blocks and channels.

    Args:
        share: the share of coefficients that are measured, in (0, 1].
        block: the side of a block, a power of two up to 64 that divides the images' sides.
        seed: of the order and of the choice.

    Measurements are (B, C * rows, H / block, W / block). Raises ValueError for numbers out of range.
    """

    orthogonal_rows = True
    rows: Tensor

    def __init__(self, share: float = 0.25, block: int = 8, *, seed: int = 0):
        super().__init__()
        if not 0 < check_number("the share of compressed sensing", share) <= 1:
            raise ValueError(f"the share of compressed sensing must be in (0, 1], got {share}")
        block = check_whole("the block of compressed sensing", block, most=64)
        if block & (block - 1):
            raise ValueError(f"the block of compressed sensing must be a power of two, got {block}")
        check_seed(seed)
        self.share, self.block, self.seed = share, block, seed
        pixels = block**2
        order, choice = uniform((2, pixels), seed=seed, stream=Stream.SHUFFLE).argsort(dim=1, stable=True)
        chosen = torch.cat((choice.new_zeros(1), choice[choice > 0]))[: max(1, round(share * pixels))]
        rows = _hadamard(pixels)[chosen][:, order].reshape(-1, 1, block, block)
        self.register_buffer("rows", rows, persistent=False)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        _check_batch("images", x)
        if x.shape[2] % self.block or x.shape[3] % self.block:
            raise ValueError(f"compressed sensing needs sides that {self.block} divides, got {_size(x.shape)}")
        rows = self.rows.to(x.dtype).repeat(x.shape[1], 1, 1, 1)
        return F.conv2d(x, rows, stride=self.block, groups=x.shape[1])

    def pinv(self, y: Tensor) -> Tensor:
        _check_batch("measurements", y)
        if y.shape[1] % len(self.rows):
            raise ValueError(
                f"a measurement of compressed sensing has {len(self.rows)} numbers for each channel, got {y.shape[1]}"
            )
        channels = y.shape[1] // len(self.rows)
        rows = self.rows.to(y.dtype).repeat(channels, 1, 1, 1)
        return F.conv_transpose2d(y, rows, stride=self.block, groups=channels)

    def rank(self, shape: Shape) -> int:
        return math.prod(shape) // self.block**2 * len(self.rows)

    def extra_repr(self) -> str:
        return f"{len(self.rows)} of {self.block**2} coefficients, seed={self.seed}"


class SeparableBlur(Degradation):
    """A blur along both axes by one kernel, with reflection at the edges; the pseudo-inverse uses singular values.

    The singular values of the blur are the products of those of its two axes. Those at or below `threshold` times the
    largest count as 0, in A as well, so that A pinv A = A holds. A therefore differs from the plain blur by at most
    `threshold` times the norm of the image, and `pinv` amplifies noise by at most `1 / threshold`.

    Args:
        kernel: (k,) numbers, k odd. See `gaussian_kernel`.
        height, width: the size of the images.
        threshold: in (0, 1).

    Raises ValueError for another kernel or threshold.
    """

    def __init__(self, kernel: Tensor, height: int, width: int, *, threshold: float = 0.02):
        super().__init__()
        height, width = check_whole("height", height, most=_LARGEST), check_whole("width", width, most=_LARGEST)
        if kernel.ndim != 1 or len(kernel) % 2 == 0 or not kernel.any() or not kernel.isfinite().all():
            raise ValueError(
                f"a kernel must have an odd number of finite values, not all 0, got shape {tuple(kernel.shape)}"
            )
        if not 0 < threshold < 1:
            raise ValueError(f"the threshold of singular values must be in (0, 1), got {threshold}")
        self.size, self.threshold = (height, width), threshold
        left_h, values_h, right_h = torch.linalg.svd(_blur_matrix(kernel.double(), height))
        left_w, values_w, right_w = torch.linalg.svd(_blur_matrix(kernel.double(), width))
        values = values_h[:, None] * values_w
        seen = values > threshold * values.max()
        constants = {
            "left_h": left_h,
            "left_w": left_w,
            "right_h": right_h,
            "right_w": right_w,
            "gain": torch.where(seen, values, 0.0),
            "inverse_gain": torch.where(seen, 1 / values, 0.0),
            "hidden": (~seen).double(),
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        return self._scale_in_basis(x, "right", "gain", "left")

    def pinv(self, y: Tensor) -> Tensor:
        return self._scale_in_basis(y, "left", "inverse_gain", "right")

    def null(self, x: Tensor) -> Tensor:
        # Not x - pinv(A(x)): that would amplify the rounding of A by 1 / threshold.
        return self._scale_in_basis(x, "right", "hidden", "right")

    def rank(self, shape: Shape) -> int:
        return shape[0] * int(self.get_buffer("gain").count_nonzero())

    def _scale_in_basis(self, x: Tensor, into: str, factors: str, back: str) -> Tensor:
        """x in the basis `into` of left or right singular vectors, times `factors`, then out of the basis `back`."""
        _check_batch("images", x)
        if x.shape[2:] != self.size:
            raise ValueError(f"this blur is for images of {_size(self.size)}, got {_size(x.shape)}")
        into_h, into_w, back_h, back_w = (
            self._basis(side, axis).to(x.dtype) for side in (into, back) for axis in ("h", "w")
        )
        core = _multiply(into_h, x, into_w) * self.get_buffer(factors).to(x.dtype)
        return _multiply(back_h.mT, core, back_w.mT)

    def _basis(self, side: str, axis: str) -> Tensor:
        """Singular vectors as columns; the right ones come from an SVD as rows."""
        vectors = self.get_buffer(f"{side}_{axis}")
        return vectors if side == "left" else vectors.mT

    def extra_repr(self) -> str:
        return f"{_size(self.size)}, threshold={self.threshold:g}"


def gaussian_kernel(std: float, radius: int | None = None) -> Tensor:
    """A Gaussian of `std` pixels as float64 (2 radius + 1,) with sum 1. The default radius is 3 `std`, rounded up.

    Raises ValueError for a std that is not positive, and a radius out of range.
    """
    std = check_number("the std of a kernel", std, above=0)
    radius = check_whole("the radius of a kernel", math.ceil(3 * std) if radius is None else radius, 0, _LARGEST)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    weights = torch.exp(-0.5 * (places / std).square())
    return weights / weights.sum()


def random_mask(height: int, width: int, share: float, *, seed: int) -> Tensor:
    """A mask of known pixels, bool (height, width): True at a random `share`. Raises ValueError outside of (0, 1]."""
    if not 0 < check_number("the share of known pixels", share) <= 1:
        raise ValueError(f"the share of known pixels must be in (0, 1], got {share}")
    check_seed(seed)
    draws = uniform((1, height * width), seed=seed, stream=Stream.SHUFFLE)[0]
    known = torch.zeros(height * width, dtype=torch.bool, device="cpu")
    known[draws.argsort(stable=True)[: max(1, round(share * len(known)))]] = True
    return known.reshape(height, width)


def box_mask(height: int, width: int) -> Tensor:
    """A mask of known pixels, bool (height, width): False in a centred box of half the height and half the width."""
    known = torch.ones(height, width, dtype=torch.bool, device="cpu")
    known[height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = False
    return known


def _check_batch(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is a float tensor, ValueError unless it is (B, C, H, W)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a float tensor, got {kind}")
    if x.layout != torch.strided or x.device.type == "meta":
        raise TypeError(f"{name} must be a dense tensor in memory, got {x.layout} on {x.device}")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must be (B, C, H, W), no side of them 0, got {tuple(x.shape)}")


def _hadamard(size: int) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix, float64; its first row is constant."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def _blur_matrix(kernel: Tensor, size: int) -> Tensor:
    """The matrix (size, size) of a blur along one axis, with reflection at the edges."""
    radius = len(kernel) // 2
    places = torch.arange(size, device="cpu")[:, None] + torch.arange(-radius, radius + 1, device="cpu")
    places = places % (2 * size)
    places = torch.where(places < size, places, 2 * size - 1 - places)
    matrix = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    return matrix.scatter_add_(1, places, kernel.expand(size, -1).contiguous())


def _multiply(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """leftᵀ x right. Images are multiplied from the right alone, as compiled gradients support it."""
    return ((x @ right).transpose(2, 3) @ left).transpose(2, 3)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-2]}x{shape[-1]}"


def bicubic(y: Tensor, degradation: Degradation) -> Tensor | None:
    """The measurement enlarged by bicubic interpolation, for super-resolution; None for other degradations."""
    if not isinstance(degradation, SuperResolution):
        return None
    return F.interpolate(y, scale_factor=degradation.factor, mode="bicubic", align_corners=False)
