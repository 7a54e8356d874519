"""Linear degradations `y = A x` of images with their exact pseudo-inverses, the operators of zero-shot restoration.

Each is a module with `A`, `pinv` and `null`, x -> x - pinv(A(x)), on batches of images. To rounding A pinv A = A, and
pinv A is a symmetric projection: of all images that explain a measurement, `pinv(y)` is the one of least norm, and
`pinv(y) + null(x)` the one nearest to x (Wang, Yu, Zhang, "Zero-Shot Image Restoration Using Denoising Diffusion
Null-Space Model", ICLR 2023).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastebm.data import neighbour_mean
from fastebm.ops.uniform import uniform
from fastebm.rng import Stream

Shape = tuple[int, int, int]

_AT_ONCE = 2**22  # numbers in a batch of basis vectors, 32 MiB of float64


class Degradation(nn.Module, ABC):
    """What all degradations share. Constants are kept in float64 and used in the dtype of the images.

    Attributes:
        orthogonal_rows: whether A Aᵀ = c I. Anything may follow such an operator, and the pseudo-inverse of both is the
            product of theirs (see `Composition`).
    """

    orthogonal_rows = False

    @abstractmethod
    def A(self, x: Tensor) -> Tensor:  # noqa: N802  (the field's own name)
        """The measurement of images x (B, C, H, W). Raises ValueError for images that don't fit."""

    @abstractmethod
    def pinv(self, y: Tensor) -> Tensor:
        """The images (B, C, H, W) of least norm among those with the measurement nearest to y."""

    def null(self, x: Tensor) -> Tensor:
        """What A doesn't see of images x: x - pinv(A(x))."""
        return x - self.pinv(self.A(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.A(x)

    @abstractmethod
    def rank(self, shape: Shape) -> int:
        """How many numbers A measures of an image of `shape` (C, H, W): the rank of its matrix."""

    def initial_estimate(self, y: Tensor) -> Tensor:
        """Images (B, C, H, W) to start from at full size: `pinv(y)`, unless something smoother costs nothing."""
        return self.pinv(y)

    def coarsened(self, y: Tensor) -> CoarseMeasurement | None:
        """What y says of the images averaged to half their size, or None if that is no degradation of them: then the
        coarse level of a cascade runs free."""
        return None


@dataclass(frozen=True, eq=False)
class CoarseMeasurement:
    """A degradation of images of half the size and its measurement, whose noise has `noise_scale` times the std."""

    degradation: Degradation
    y: Tensor
    noise_scale: float


class SuperResolution(Degradation):
    """Images averaged over blocks of `factor` x `factor` pixels; the pseudo-inverse repeats each pixel.

    `factor` 1 leaves images as they are. Raises ValueError for a factor below 1, and in `A` for sides that it doesn't
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
        if factor < 1:
            raise ValueError(f"the factor of super-resolution must be at least 1, got {factor}")
        self.factor = factor

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"super-resolution by {self.factor} needs sides that are multiples of it, got {_size(x.shape)}"
            )
        return x if self.factor == 1 else F.avg_pool2d(x, self.factor)

    def pinv(self, y: Tensor) -> Tensor:
        return y if self.factor == 1 else F.interpolate(y, scale_factor=self.factor, mode="nearest")

    def rank(self, shape: Shape) -> int:
        return math.prod(shape) // self.factor**2

    def coarsened(self, y: Tensor) -> CoarseMeasurement | None:
        if self.factor % 2 == 0:
            return CoarseMeasurement(SuperResolution(self.factor // 2), y, 1.0)
        if self.factor == 1 and y.shape[2] % 2 == y.shape[3] % 2 == 0:
            return CoarseMeasurement(self, F.avg_pool2d(y, 2), 0.5)
        return None

    def extra_repr(self) -> str:
        return f"{self.factor}"


class Colorization(Degradation):
    """The mean of the channels, (B, 1, H, W); the pseudo-inverse gives it to each of `channels` channels."""

    orthogonal_rows = True

    def __init__(self, channels: int = 3):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.channels = channels

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        if x.shape[1] != self.channels:
            raise ValueError(f"colorization needs images of {self.channels} channels, got {x.shape[1]}")
        return x.mean(1, keepdim=True)

    def pinv(self, y: Tensor) -> Tensor:
        return y.expand(-1, self.channels, -1, -1)

    def rank(self, shape: Shape) -> int:
        return shape[1] * shape[2]

    def coarsened(self, y: Tensor) -> CoarseMeasurement | None:
        return CoarseMeasurement(self, F.avg_pool2d(y, 2), 0.5) if y.shape[2] % 2 == y.shape[3] % 2 == 0 else None

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class Inpainting(Degradation):
    """Images with 0 where `known` is False; A is its own pseudo-inverse.

    Args:
        known: bool (H, W), or (1, H, W) or (C, H, W), True where a pixel is measured. What stands elsewhere in a
            measurement, NaN included, is not read.

    Raises TypeError for a mask that isn't bool, ValueError for another shape or one that measures nothing.
    """

    known: Tensor
    hidden: Tensor

    def __init__(self, known: Tensor):
        super().__init__()
        if known.dtype != torch.bool:
            raise TypeError(f"a mask must be bool, True where a pixel is known, got {known.dtype}")
        if known.ndim not in (2, 3) or not known.any():
            raise ValueError(f"a mask must be (H, W) or (C, H, W) and know a pixel, got {tuple(known.shape)}")
        self.register_buffer("known", known if known.ndim == 3 else known[None], persistent=False)
        self.register_buffer("hidden", (~self.known).double(), persistent=False)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        channels, height, width = self.known.shape
        if channels not in (1, x.shape[1]) or x.shape[2:] != (height, width):
            raise ValueError(f"the mask is {tuple(self.known.shape)}, which does not fit images {tuple(x.shape[1:])}")
        return torch.where(self.known, x, 0.0)

    def pinv(self, y: Tensor) -> Tensor:
        return self.A(y)

    def null(self, x: Tensor) -> Tensor:
        # Not x - A(x): a product is in the vocabulary of fused gradients, and known pixels are exactly 0.
        return x * self.hidden.to(x.dtype)

    def rank(self, shape: Shape) -> int:
        return int(self.known.sum()) * (shape[0] if self.known.shape[0] == 1 else 1)

    def initial_estimate(self, y: Tensor) -> Tensor:
        """With each hidden pixel at the mean of the known ones around it (`fastebm.data.neighbour_mean`)."""
        known = self.A(y)
        return neighbour_mean(known, (~self.known).expand_as(known))

    def coarsened(self, y: Tensor) -> CoarseMeasurement | None:
        """A pixel of the half size is known where all four that it is the mean of are."""
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
    """A share of the coefficients of every block of pixels, in an orthonormal basis that looks like noise.

    The basis of a block is Sylvester's Hadamard matrix over its pixels, in a random order; the rows that are measured
    are chosen at random too, the mean of the block always among them. Blocks and channels have the same rows.

    Args:
        share: of coefficients that are measured, in (0, 1].
        block: side of a block, a power of two that divides the images' sides.
        seed: of order and choice.

    Measurements are (B, C * rows, H / block, W / block). Raises ValueError for numbers out of range.
    """

    orthogonal_rows = True
    rows: Tensor

    def __init__(self, share: float = 0.25, block: int = 8, *, seed: int = 0):
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"the share of compressed sensing must be in (0, 1], got {share}")
        if block < 1 or block & (block - 1):
            raise ValueError(f"the block of compressed sensing must be a power of two, got {block}")
        self.share, self.block, self.seed = share, block, seed
        pixels = block**2
        order, choice = uniform((2, pixels), seed=seed, stream=Stream.SHUFFLE).argsort(dim=1, stable=True)
        chosen = torch.cat((choice.new_zeros(1), choice[choice > 0]))[: max(1, round(share * pixels))]
        rows = _hadamard(pixels)[chosen][:, order].reshape(-1, 1, block, block)
        self.register_buffer("rows", rows, persistent=False)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        if x.shape[2] % self.block or x.shape[3] % self.block:
            raise ValueError(f"compressed sensing needs sides that {self.block} divides, got {_size(x.shape)}")
        rows = self.rows.to(x.dtype).repeat(x.shape[1], 1, 1, 1)
        return F.conv2d(x, rows, stride=self.block, groups=x.shape[1])

    def pinv(self, y: Tensor) -> Tensor:
        channels = y.shape[1] // len(self.rows)
        rows = self.rows.to(y.dtype).repeat(channels, 1, 1, 1)
        return F.conv_transpose2d(y, rows, stride=self.block, groups=channels)

    def rank(self, shape: Shape) -> int:
        return math.prod(shape) // self.block**2 * len(self.rows)

    def extra_repr(self) -> str:
        return f"{len(self.rows)} of {self.block**2} coefficients, seed={self.seed}"


class SeparableBlur(Degradation):
    """Images blurred along both axes by one kernel, reflected at their edges; sharpened by singular values.

    The singular values of the blur are the products of those of its two axes. Those at or below `threshold` times the
    largest are taken as 0, in A as well: what a blur has all but erased is not measured, and A pinv A = A holds. So A
    differs from the plain blur by at most `threshold` times the norm of the image, and `pinv` enlarges noise at most
    `1 / threshold` times.

    Args:
        kernel: (k,) numbers, k odd. See `gaussian_kernel`.
        height, width: of the images.
        threshold: in (0, 1).

    Raises ValueError for another kernel or threshold.
    """

    def __init__(self, kernel: Tensor, height: int, width: int, *, threshold: float = 0.02):
        super().__init__()
        if kernel.ndim != 1 or len(kernel) % 2 == 0 or not kernel.any():
            raise ValueError(f"a kernel must have an odd number of values, not all 0, got shape {tuple(kernel.shape)}")
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
        return self._turned(x, "right", "gain", "left")

    def pinv(self, y: Tensor) -> Tensor:
        return self._turned(y, "left", "inverse_gain", "right")

    def null(self, x: Tensor) -> Tensor:
        # Not x - pinv(A(x)): that would enlarge the rounding of A by 1 / threshold.
        return self._turned(x, "right", "hidden", "right")

    def rank(self, shape: Shape) -> int:
        return shape[0] * int(self.get_buffer("gain").count_nonzero())

    def _turned(self, x: Tensor, into: str, factors: str, back: str) -> Tensor:
        """x in the basis `into` of left or right singular vectors, times `factors`, and from the basis `back`."""
        if x.shape[2:] != self.size:
            raise ValueError(f"this blur is for images of {_size(self.size)}, got {_size(x.shape)}")
        into_h, into_w, back_h, back_w = (
            self._basis(side, axis).to(x.dtype) for side in (into, back) for axis in ("h", "w")
        )
        core = _between(into_h, x, into_w) * self.get_buffer(factors).to(x.dtype)
        return _between(back_h.mT, core, back_w.mT)

    def _basis(self, side: str, axis: str) -> Tensor:
        """Singular vectors as columns; the right ones come from an SVD as rows."""
        vectors = self.get_buffer(f"{side}_{axis}")
        return vectors if side == "left" else vectors.mT

    def extra_repr(self) -> str:
        return f"{_size(self.size)}, threshold={self.threshold:g}"


class Composition(Degradation):
    """`second` of `first`, with the pseudo-inverse `first.pinv(second.pinv(y))`. Build it with `composed`.

    That product is the pseudo-inverse if and only if the ranges fit: A₁A₁ᵀ maps the row space of A₂ into itself, and
    A₂ᵀA₂ the range of A₁ (Greville, "Note on the generalized inverse of a matrix product", 1966). So it always is where
    A₁A₁ᵀ = c I, that is, after super-resolution, colorization and compressed sensing; and after inpainting if the
    mask hides whole blocks of what follows: of pixels that are averaged, or all colours of a pixel.
    """

    def __init__(self, first: Degradation, second: Degradation):
        super().__init__()
        self.first, self.second = first, second
        self.orthogonal_rows = first.orthogonal_rows and second.orthogonal_rows

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        return self.second.A(self.first.A(x))

    def pinv(self, y: Tensor) -> Tensor:
        return self.first.pinv(self.second.pinv(y))

    def rank(self, shape: Shape) -> int:
        if self.first.orthogonal_rows:
            between = self.first.A(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]
            return self.second.rank((between[0], between[1], between[2]))
        return round(_trace_of_projection(self, shape))

    def coarsened(self, y: Tensor) -> CoarseMeasurement | None:
        # Averaging commutes with what is done to each pixel or block alike.
        if isinstance(self.first, Colorization) and (half := self.second.coarsened(y)):
            return replace(half, degradation=Composition(self.first, half.degradation))
        if isinstance(self.first, SuperResolution) and self.first.factor % 2 == 0:
            rest = SuperResolution(self.first.factor // 2)
            return CoarseMeasurement(Composition(rest, self.second), y, 1.0)
        return None


class Dense(Degradation):
    """Any linear map of small images, by its matrix: `pinv` by singular values.

    Args:
        matrix: float64 (numbers of y, C H W) that acts on images row by row.
        shape: (C, H, W) of the images.
        measured: shape of a measurement.
        threshold: singular values at or below this share of the largest are taken as 0, in A as well.
    """

    def __init__(self, matrix: Tensor, shape: Shape, measured: tuple[int, ...], *, threshold: float = 1e-3):
        super().__init__()
        self.shape, self.measured, self.threshold = shape, measured, threshold
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        seen = values > threshold * values.max()
        self.register_buffer("left", left[:, seen].contiguous(), persistent=False)
        self.register_buffer("values", values[seen], persistent=False)
        self.register_buffer("right", right[seen].contiguous(), persistent=False)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        if x.shape[1:] != self.shape:
            raise ValueError(f"this degradation is for images {self.shape}, got {tuple(x.shape[1:])}")
        left, values, right = self._parts(x.dtype)
        return ((x.flatten(1) @ right.mT * values) @ left.mT).unflatten(1, self.measured)

    def pinv(self, y: Tensor) -> Tensor:
        left, values, right = self._parts(y.dtype)
        return ((y.flatten(1) @ left / values) @ right).unflatten(1, self.shape)

    def null(self, x: Tensor) -> Tensor:
        flat, (_, _, right) = x.flatten(1), self._parts(x.dtype)
        return (flat - flat @ right.mT @ right).unflatten(1, self.shape)

    def rank(self, shape: Shape) -> int:
        return len(self.get_buffer("values"))

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = (self.get_buffer(name).to(dtype) for name in ("left", "values", "right"))
        return left, values, right

    def extra_repr(self) -> str:
        return f"{self.shape} to {self.measured}, rank {len(self.get_buffer('values'))}, threshold={self.threshold:g}"


def composed(first: Degradation, second: Degradation, shape: Shape, *, most: int = 4096) -> Degradation:
    """`second` after `first` on images of `shape` (C, H, W), with its true pseudo-inverse.

    A `Composition` where the pseudo-inverses multiply, which is known of `first.orthogonal_rows` and otherwise found
    by the four equations of Penrose on random images; else a `Dense` operator.

    Raises ValueError where neither is possible: an image has more than `most` numbers.

    Example:
        >>> shape = (3, 32, 32)
        >>> gray_and_small = composed(Colorization(), SuperResolution(4), shape)
        >>> type(gray_and_small).__name__, gray_and_small.rank(shape)
        ('Composition', 64)
        >>> blurred_and_small = composed(SeparableBlur(gaussian_kernel(1.0), 8, 8), SuperResolution(2), (1, 8, 8))
        >>> type(blurred_and_small).__name__
        'Dense'
    """
    composition = Composition(first, second)
    if first.orthogonal_rows or _is_pseudo_inverse(composition, shape):
        return composition
    numbers = math.prod(shape)
    if numbers > most:
        raise ValueError(
            f"{second} after {first} has no pseudo-inverse that is the product of theirs, and images of {numbers} "
            f"numbers are too large to find it by singular values (at most {most})"
        )
    columns = composition.A(torch.eye(numbers, dtype=torch.float64).unflatten(1, shape))
    return Dense(columns.flatten(1).mT, shape, tuple(columns.shape[1:]))


def gaussian_kernel(std: float, radius: int | None = None) -> Tensor:
    """A Gaussian of `std` pixels as float64 (2 radius + 1,) with sum 1; by default it reaches over 3 `std`.

    Raises ValueError for a std that is not positive.
    """
    if not std > 0:
        raise ValueError(f"the std of a kernel must be positive, got {std}")
    radius = math.ceil(3 * std) if radius is None else radius
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (places / std).square())
    return weights / weights.sum()


def random_mask(height: int, width: int, share: float, *, seed: int) -> Tensor:
    """bool (height, width), True at a random `share` of all pixels. Raises ValueError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of known pixels must be in (0, 1], got {share}")
    draws = uniform((1, height * width), seed=seed, stream=Stream.SHUFFLE)[0]
    known = torch.zeros(height * width, dtype=torch.bool)
    known[draws.argsort(stable=True)[: max(1, round(share * len(known)))]] = True
    return known.reshape(height, width)


def box_mask(height: int, width: int) -> Tensor:
    """bool (height, width), False in a box in the middle of half the height and half the width."""
    known = torch.ones(height, width, dtype=torch.bool)
    known[height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = False
    return known


def _hadamard(size: int) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix, float64; its first row is constant."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def _blur_matrix(kernel: Tensor, size: int) -> Tensor:
    """(size, size): each row the kernel around its own place, folded back at the edges as in a mirror."""
    radius = len(kernel) // 2
    places = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)
    places = places % (2 * size)
    places = torch.where(places < size, places, 2 * size - 1 - places)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, places, kernel.expand(size, -1).contiguous())


def _between(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """leftᵀ x right. Matrices stand on the right of images: that is in the vocabulary of fused gradients."""
    return ((x @ right).transpose(2, 3) @ left).transpose(2, 3)


def _is_pseudo_inverse(operator: Degradation, shape: Shape, tolerance: float = 1e-9) -> bool:
    """Penrose's equations on four random images: linear identities, so one that fails does so almost everywhere."""
    x, other = uniform((8, *shape), seed=0, dtype=torch.float64).sub(0.5).split(4)
    y, other_y = operator.A(x), operator.A(other).neg().exp()  # the second is in general not a measurement
    both = operator.pinv(y)
    pairs = [
        (operator.A(both), y),
        (operator.pinv(operator.A(operator.pinv(other_y))), operator.pinv(other_y)),
        (_dots(both, other), _dots(x, operator.pinv(operator.A(other)))),
        (_dots(operator.A(operator.pinv(other_y)), y.exp()), _dots(other_y, operator.A(operator.pinv(y.exp())))),
    ]
    return all(bool((left - right).abs().max() <= tolerance * right.abs().max()) for left, right in pairs)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).flatten(1).sum(1)


def _trace_of_projection(operator: Degradation, shape: Shape) -> float:
    """The trace of A pinv, which is the rank, by all unit measurements."""
    measured = operator.A(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]
    total, numbers = 0.0, measured.numel()
    at_once = max(1, _AT_ONCE // math.prod(shape))
    for first in range(0, numbers, at_once):
        last = min(first + at_once, numbers)
        unit = torch.zeros(last - first, numbers, dtype=torch.float64)
        unit[torch.arange(last - first), torch.arange(first, last)] = 1.0
        seen = operator.A(operator.pinv(unit.unflatten(1, measured)))
        total += float(seen.flatten(1)[torch.arange(last - first), torch.arange(first, last)].sum())
    return total


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-2]}x{shape[-1]}"


def bicubic(y: Tensor, degradation: Degradation) -> Tensor | None:
    """The measurement enlarged by bicubic interpolation, for super-resolution; None for other degradations."""
    if not isinstance(degradation, SuperResolution):
        return None
    return F.interpolate(y, scale_factor=degradation.factor, mode="bicubic", align_corners=False)
