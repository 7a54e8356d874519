"""The operations that a program consists of, each with its output shape and cost.

An operation maps a batch of samples to a batch of results and never mixes samples. Shapes are those of one sample,
without the batch dimension. Everything that does not depend on x, such as weights, is a `LazyTensor`. `autodiff.py` has
the derivatives; `aten_kernels.py` and `lowering/` run the operations.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor, Shape

Pair = tuple[int, int]


@dataclass(frozen=True)
class Operation:
    """The base class. Equal operations on equal inputs give equal results, so that repetitions can be dropped."""

    is_view: ClassVar[bool] = False  # whether the result shares its input's memory
    flops_per_number: ClassVar[int] = 1  # of the output

    def shape(self, *inputs: Shape) -> Shape:
        """The output's shape for inputs of these shapes; by default that of the first input."""
        return inputs[0]

    def flops(self, output: Shape, *inputs: Shape) -> int:
        """Floating-point operations for one sample; a multiply-add counts two."""
        return 0 if self.is_view else self.flops_per_number * math.prod(output)

    def weights(self) -> list[LazyTensor]:
        """The lazy tensors among the operation's fields."""
        parts = [getattr(self, field.name) for field in fields(self)]
        flat = [item for part in parts for item in (part if isinstance(part, tuple) else (part,))]
        return [item for item in flat if isinstance(item, LazyTensor)]

    def attributes(self) -> str:
        """The settings that `describe` prints beside the name."""
        return ""


@dataclass(frozen=True)
class _OfTargetShape(Operation):
    """An operation whose output shape is a field."""

    target: Shape

    def shape(self, *inputs: Shape) -> Shape:
        return self.target


@dataclass(frozen=True)
class Input(_OfTargetShape):
    """The samples."""

    is_view = True


@dataclass(frozen=True)
class Ones(Operation):
    """A one for each sample: the derivative of the energy with respect to itself, where differentiation starts."""

    is_view = True

    def shape(self, *inputs: Shape) -> Shape:
        return ()


# ---- linear maps with weights


@dataclass(frozen=True)
class Convolution(Operation):
    """(C, H, W) to (O, H', W') with zero padding; arguments as in `torch.convolution`."""

    weight: LazyTensor
    bias: LazyTensor | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    transposed: bool = False
    output_padding: Pair = (0, 0)
    groups: int = 1

    @property
    def kernel(self) -> Pair:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def plain(self) -> bool:
        """Whether it is neither transposed nor dilated nor grouped; most rewrites require that."""
        return not self.transposed and self.dilation == (1, 1) and self.groups == 1

    @property
    def pointwise(self) -> bool:
        return self.plain and self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    def shape(self, *inputs: Shape) -> Shape:
        axes = zip(
            inputs[0][1:], self.kernel, self.stride, self.padding, self.dilation, self.output_padding, strict=True
        )
        if self.transposed:
            out = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, s, p, d, extra in axes]
            return (self.weight.shape[1] * self.groups, *out)
        return (self.weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes))

    def flops(self, output: Shape, *inputs: Shape) -> int:
        positions = inputs[0] if self.transposed else output
        return 2 * math.prod(self.weight.shape) * math.prod(positions[1:])

    def attributes(self) -> str:
        text = f"{self.kernel[0]}x{self.kernel[1]}"
        text += f" stride {self.stride[0]}" if self.stride != (1, 1) else ""
        text += f" dilation {self.dilation[0]}" if self.dilation != (1, 1) else ""
        text += f" groups {self.groups}" if self.groups != 1 else ""
        return text + (" transposed" if self.transposed else "") + (" + bias" if self.bias is not None else "")


@dataclass(frozen=True)
class Linear(Operation):
    """(..., n) to (..., m) by a weight (m, n)."""

    weight: LazyTensor
    bias: LazyTensor | None = None

    def shape(self, *inputs: Shape) -> Shape:
        return (*inputs[0][:-1], self.weight.shape[0])

    def flops(self, output: Shape, *inputs: Shape) -> int:
        return 2 * math.prod(output) * self.weight.shape[1]

    def attributes(self) -> str:
        return "+ bias" if self.bias is not None else ""


@dataclass(frozen=True)
class Affine(Operation):
    """`scale * h + shift`, with scale and shift broadcast over a sample: for example a batch norm in eval mode."""

    scale: LazyTensor | None
    shift: LazyTensor | None = None

    def flops(self, output: Shape, *inputs: Shape) -> int:
        return math.prod(output) * ((self.scale is not None) + (self.shift is not None))


@dataclass(frozen=True)
class LinearCombination(Operation):
    """`c0 * h0 + c1 * h1 + ...` of any number of inputs of one shape."""

    coefficients: tuple[Coefficient, ...]

    def flops(self, output: Shape, *inputs: Shape) -> int:
        scalings = sum(c != 1 for c in self.coefficients)
        return math.prod(output) * (scalings + len(inputs) - 1)

    def attributes(self) -> str:
        return ", ".join(f"{c:.4g}" if not isinstance(c, LazyTensor) else "c" for c in self.coefficients)


# ---- pointwise


@dataclass(frozen=True)
class Activation(Operation):
    """A pointwise function, by name; `parameters` are those of the ATen operation of that name."""

    kind: str
    parameters: tuple[float, ...] = ()
    flops_per_number = 4

    def attributes(self) -> str:
        return self.kind


@dataclass(frozen=True)
class ActivationDerivative(Operation):
    """`gradient * f'(h)` of inputs gradient and h, or gradient and f(h) if `of_result`."""

    kind: str
    parameters: tuple[float, ...] = ()
    of_result: bool = False
    flops_per_number = 6

    def attributes(self) -> str:
        return self.kind


@dataclass(frozen=True)
class Multiply(Operation):
    """The pointwise product of two inputs of one shape."""


# ---- resolution, sums


@dataclass(frozen=True)
class AveragePool(Operation):
    """Means over windows of (C, H, W); arguments as in `torch.nn.functional.avg_pool2d`."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    @property
    def simple(self) -> bool:
        """Whether windows tile the image without padding; trailing rows and columns that fill no window are dropped."""
        return self.kernel == self.stride and self.padding == (0, 0) and not self.ceil_mode and self.divisor is None

    def shape(self, *inputs: Shape) -> Shape:
        channels, *size = inputs[0]
        return (channels, *(self._length(n, axis) for axis, n in enumerate(size)))

    def _length(self, n: int, axis: int) -> int:
        k, s, p = self.kernel[axis], self.stride[axis], self.padding[axis]
        count = (n + 2 * p - k + (s - 1 if self.ceil_mode else 0)) // s + 1
        # As in ATen, the last window must start inside the image or its left padding.
        return count - 1 if self.ceil_mode and (count - 1) * s >= n + p else count

    def flops(self, output: Shape, *inputs: Shape) -> int:
        return math.prod(output) * math.prod(self.kernel)

    def attributes(self) -> str:
        return f"{self.kernel[0]}x{self.kernel[1]}"


@dataclass(frozen=True)
class FirstMaximum(Operation):
    """1 where a pixel is the first of the largest in its window, 0 elsewhere: a max pool is the sum of what it picks.

    Windows lie side by side; pixels behind the last whole one are in none. It has no gradient.
    """

    kernel: Pair

    def flops(self, output: Shape, *inputs: Shape) -> int:
        return math.prod(output) * math.prod(self.kernel)

    def attributes(self) -> str:
        return f"{self.kernel[0]}x{self.kernel[1]}"


@dataclass(frozen=True)
class AveragePoolBackward(_OfTargetShape):
    """The adjoint of an average pool of samples of shape `target`, for pools whose adjoint is not an `Upsample`."""

    pool: AveragePool


@dataclass(frozen=True)
class Upsample(Operation):
    """Nearest-neighbour upsampling of (C, H, W) by integer factors."""

    factor: Pair

    def shape(self, *inputs: Shape) -> Shape:
        channels, height, width = inputs[0]
        return channels, height * self.factor[0], width * self.factor[1]

    def attributes(self) -> str:
        return f"{self.factor[0]}x{self.factor[1]}"


@dataclass(frozen=True)
class Interleave(Operation):
    """(rows * columns * C, h, w) to (C, *size): channel block (i, j) becomes pixels (rows * y + i, columns * x + j).

    Pixels before `start` are cut off; pixels beyond the last given one are zero.
    """

    factor: Pair
    start: Pair
    size: Pair
    flops_per_number = 0

    def shape(self, *inputs: Shape) -> Shape:
        return (inputs[0][0] // math.prod(self.factor), *self.size)

    def attributes(self) -> str:
        return f"{self.factor[0]}x{self.factor[1]}"


@dataclass(frozen=True)
class Sum(Operation):
    """The sum over at least one dimension of a sample; summed dimensions keep length 1."""

    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.dims:  # PyTorch reads an empty list of dimensions as all of them, the batch included
            raise ValueError("Sum needs at least one dimension")

    def shape(self, *inputs: Shape) -> Shape:
        return tuple(1 if dim in self.dims else n for dim, n in enumerate(inputs[0]))

    def flops(self, output: Shape, *inputs: Shape) -> int:
        return math.prod(inputs[0])


@dataclass(frozen=True)
class LogSumExp(Operation):
    """log(sum(exp(h))) over one dimension of a sample, which keeps length 1."""

    dim: int

    def shape(self, *inputs: Shape) -> Shape:
        return Sum((self.dim,)).shape(*inputs)

    def flops(self, output: Shape, *inputs: Shape) -> int:
        return 4 * math.prod(inputs[0])


@dataclass(frozen=True)
class Softmax(Operation):
    """softmax(h) over one dimension of a sample: the derivative of `LogSumExp`."""

    dim: int
    flops_per_number = 4


# ---- moving data


@dataclass(frozen=True)
class Broadcast(_OfTargetShape):
    """Dimensions of length 1 expanded to those of `target`, which has as many dimensions."""

    is_view = True


@dataclass(frozen=True)
class Reshape(_OfTargetShape):
    """The same numbers, in row-major order, in another shape."""

    is_view = True


@dataclass(frozen=True)
class Permute(Operation):
    """The sample's dimensions in another order."""

    order: tuple[int, ...]
    is_view = True

    def shape(self, *inputs: Shape) -> Shape:
        return tuple(inputs[0][dim] for dim in self.order)


@dataclass(frozen=True)
class Slice(Operation):
    """The part [start, stop) of one dimension."""

    dim: int
    start: int
    stop: int
    is_view = True

    def shape(self, *inputs: Shape) -> Shape:
        return tuple(self.stop - self.start if dim == self.dim else n for dim, n in enumerate(inputs[0]))

    def attributes(self) -> str:
        return f"{self.start}:{self.stop} of dimension {self.dim}"


@dataclass(frozen=True)
class Pad(Operation):
    """A constant border: `before` and `after` each dimension."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    constant: float = 0.0

    def shape(self, *inputs: Shape) -> Shape:
        return tuple(b + n + a for b, n, a in zip(self.before, inputs[0], self.after, strict=True))


@dataclass(frozen=True)
class Concatenate(Operation):
    """The inputs concatenated along one dimension."""

    dim: int

    def shape(self, *inputs: Shape) -> Shape:
        length = sum(shape[self.dim] for shape in inputs)
        return tuple(length if dim == self.dim else n for dim, n in enumerate(inputs[0]))


@dataclass(frozen=True)
class AppendOnes(Operation):
    """(C, H, W) to (C + 1, H, W): the last channel is 1 inside the image, and 0 where a convolution pads."""

    def shape(self, *inputs: Shape) -> Shape:
        channels, *size = inputs[0]
        return (channels + 1, *size)


# ---- what leaves the program


@dataclass(frozen=True)
class WeightGradient(Operation):
    """The gradient of the energies' weighted sum with respect to the weights of `of`, summed over samples.

    Its inputs are those of `of`, and the gradient of `of`'s result. No other operation reads it: results of weights
    leave the program beside its outputs (`fastebm.ops.weight_gradients`). Dead code does not include it.
    """

    of: Operation

    def shape(self, *inputs: Shape) -> Shape:
        return ()

    def flops(self, output: Shape, *inputs: Shape) -> int:
        return self.of.flops(inputs[-1], *inputs[:-1])

    def weights(self) -> list[LazyTensor]:
        """None: it reads no weight, it differentiates them."""
        return []

    def attributes(self) -> str:
        return f"of {type(self.of).__name__} {self.of.attributes()}".strip()
