"""How each operation of a program runs: stock ATen operations on a whole batch.

A kernel gets the batch's tensors and, where one was planned, a tensor to write its result to. All tensors have the
program's dtype; images lie channels-last.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor
from fastebm.compiler.operations import (
    Activation,
    ActivationDerivative,
    Affine,
    AppendOnes,
    AveragePool,
    AveragePoolBackward,
    Broadcast,
    Concatenate,
    Convolution,
    Interleave,
    Linear,
    LinearCombination,
    LogSumExp,
    Multiply,
    Ones,
    Operation,
    Pad,
    Permute,
    Reshape,
    Slice,
    Softmax,
    Sum,
    Upsample,
)

aten = torch.ops.aten
Known = Mapping[LazyTensor, Tensor]
Kernel = Callable[[Sequence[Tensor], Tensor | None], Tensor]

# Operations that can write to a tensor they are given.
TO_BUFFER = (
    Activation,
    Affine,
    AppendOnes,
    AveragePool,
    LinearCombination,
    Concatenate,
    Interleave,
    Multiply,
    Pad,
    ActivationDerivative,
    Upsample,
)


def overwritable(operation: Operation) -> tuple[int, ...]:
    """The inputs whose place the result may take, if nothing else needs them."""
    if isinstance(operation, Multiply):
        return 0, 1
    if isinstance(operation, LinearCombination):
        return (_first_term(operation),)
    return (0,) if isinstance(operation, Activation | ActivationDerivative | Affine) else ()


@singledispatch
def kernel(operation: Operation, known: Known) -> Kernel:
    """The kernel of an operation; its values are in `known`, and later chains write to the same tensors."""
    raise TypeError(f"{type(operation).__name__} has no kernel")


@kernel.register
def _(operation: Ones, known: Known) -> Kernel:
    # It reads nothing; what it is given has the length of the batch, and the dtype.
    return lambda inputs, out: inputs[0].new_ones(inputs[0].shape[0])


# ---- linear maps


@kernel.register
def _(operation: Convolution, known: Known) -> Kernel:
    weight, bias = known[operation.weight], _optional(operation.bias, known)
    rest = (
        list(operation.stride),
        list(operation.padding),
        list(operation.dilation),
        operation.transposed,
        list(operation.output_padding),
        operation.groups,
    )
    covers = operation.padding == operation.output_padding == (0, 0) and operation.dilation == (1, 1)
    if not covers or operation.groups != 1 or (operation.transposed and bias is not None):
        return lambda inputs, out: aten.convolution.default(inputs[0], weight, bias, *rest)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        size = inputs[0].shape[2:]
        if operation.transposed and size == (1, 1):
            return _image_from_one_pixel(inputs[0], weight)
        if not operation.transposed and size == operation.kernel:
            return _one_pixel_from_image(inputs[0], weight, bias)
        return aten.convolution.default(inputs[0], weight, bias, *rest)

    return run


def _one_pixel_from_image(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose kernel covers the image is a matrix product, which libraries run several times faster."""
    flat = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)
    matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return torch.nn.functional.linear(flat, matrix, bias)[:, :, None, None]


def _image_from_one_pixel(x: Tensor, weight: Tensor) -> Tensor:
    """The adjoint, to an image that lies channels-last."""
    _, channels, height, width = weight.shape
    matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    flat = x.flatten(1) @ matrix
    return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)


@kernel.register
def _(operation: Linear, known: Known) -> Kernel:
    weight, bias = known[operation.weight], _optional(operation.bias, known)
    return lambda inputs, out: torch.nn.functional.linear(inputs[0], weight, bias)


@kernel.register
def _(operation: Affine, known: Known) -> Kernel:
    scale, shift = _optional(operation.scale, known), _optional(operation.shift, known)
    if scale is not None and shift is not None:
        return lambda inputs, out: torch.addcmul(shift, inputs[0], scale, out=out)
    if scale is not None:
        return lambda inputs, out: torch.mul(inputs[0], scale, out=out)
    if shift is not None:
        return lambda inputs, out: torch.add(inputs[0], shift, out=out)
    raise ValueError("an affine map has a scale or a shift")


@kernel.register
def _(operation: LinearCombination, known: Known) -> Kernel:
    factors = [_number(c, known) for c in operation.coefficients]
    first = _first_term(operation)
    bare = operation.coefficients[first] == 1
    others = [i for i in range(len(factors)) if i != first]

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        result = inputs[first] if bare else torch.mul(inputs[first], factors[first], out=out)
        for i in others:
            # The first result is the place for those that follow.
            result = _plus(result, inputs[i], factors[i], out if result is inputs[first] else result)
        return result

    return run


def _first_term(operation: LinearCombination) -> int:
    """The term that a sum starts from: one without a factor saves a pass."""
    return next((i for i, c in enumerate(operation.coefficients) if c == 1), 0)


def _plus(a: Tensor, b: Tensor, factor: Any, out: Tensor | None) -> Tensor:
    """a + factor * b."""
    if isinstance(factor, Tensor):
        return torch.addcmul(a, b, factor, out=out)
    return torch.add(a, b, alpha=factor, out=out)


def _number(coefficient: Coefficient, known: Known) -> Any:
    return known[coefficient] if isinstance(coefficient, LazyTensor) else coefficient


def _optional(value: LazyTensor | None, known: Known) -> Tensor | None:
    return None if value is None else known[value]


# ---- pointwise

# By kind: f(h) as an ATen operation with its arguments after h, and f'(h) * gradient likewise.
Pointwise = tuple[str, str]
_POINTWISE: dict[str, Pointwise] = {
    "silu": ("silu", "silu_backward"),
    "gelu": ("gelu", "gelu_backward"),
    "gelu_tanh": ("gelu", "gelu_backward"),
    "elu": ("elu", "elu_backward"),
    "leaky_relu": ("leaky_relu", "leaky_relu_backward"),
    "relu": ("relu", "threshold_backward"),
    "softplus": ("softplus", "softplus_backward"),
    "tanh": ("tanh", "tanh_backward"),
    "sigmoid": ("sigmoid", "sigmoid_backward"),
}


@kernel.register
def _(operation: Activation, known: Known) -> Kernel:
    kind, parameters = operation.kind, operation.parameters
    if kind in ("square", "exp", "relu", "tanh", "sigmoid"):
        function = getattr(torch, kind)
        if kind == "relu":
            return lambda inputs, out: torch.clamp(inputs[0], min=0, out=out)
        return lambda inputs, out: function(inputs[0], out=out)
    keywords = {"approximate": "tanh"} if kind == "gelu_tanh" else {}
    packet = getattr(aten, _POINTWISE[kind][0])

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        if out is None:
            return packet.default(inputs[0], *parameters, **keywords)
        return packet.out(inputs[0], *parameters, **keywords, out=out)

    return run


@kernel.register
def _(operation: ActivationDerivative, known: Known) -> Kernel:
    kind, parameters, keywords = operation.kind, operation.parameters, {}
    packet = getattr(aten, _POINTWISE[kind][1])
    if kind == "relu":
        parameters = (0.0,)
    elif kind == "leaky_relu":
        parameters = (*parameters, operation.of_result)
    elif kind == "gelu_tanh":
        keywords = {"approximate": "tanh"}
    # elu_backward takes its arguments in front of what was kept.
    in_front = (*parameters, operation.of_result) if kind == "elu" else ()
    behind = () if kind == "elu" else parameters

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        arguments = (inputs[0], *in_front, inputs[1], *behind)
        if out is None:
            return packet.default(*arguments, **keywords)
        return packet.grad_input(*arguments, **keywords, grad_input=out)

    return run


@kernel.register
def _(operation: Multiply, known: Known) -> Kernel:
    return lambda inputs, out: torch.mul(inputs[0], inputs[1], out=out)


# ---- resolution, sums


@kernel.register
def _(operation: AveragePool, known: Known) -> Kernel:
    arguments = (
        list(operation.kernel),
        list(operation.stride),
        list(operation.padding),
        operation.ceil_mode,
        operation.count_include_pad,
        operation.divisor,
    )

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        if out is None:
            return aten.avg_pool2d.default(inputs[0], *arguments)
        return aten.avg_pool2d.out(inputs[0], *arguments, out=out)

    return run


@kernel.register
def _(operation: AveragePoolBackward, known: Known) -> Kernel:
    pool = operation.pool
    arguments = (
        list(pool.kernel),
        list(pool.stride),
        list(pool.padding),
        pool.ceil_mode,
        pool.count_include_pad,
        pool.divisor,
    )

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        gradient = _laid_out(inputs[0])
        # Only its shape and layout are read.
        sample = gradient.new_empty(()).expand(gradient.shape[0], *operation.sample)
        sample = torch.empty_like(sample, memory_format=torch.channels_last)
        return aten.avg_pool2d_backward.default(gradient, sample, *arguments)

    return run


@kernel.register
def _(operation: Upsample, known: Known) -> Kernel:
    rows, columns = operation.factor

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        size = [inputs[0].shape[2] * rows, inputs[0].shape[3] * columns]
        if out is None:
            return aten.upsample_nearest2d.default(inputs[0], size)
        return aten.upsample_nearest2d.out(inputs[0], size, out=out)

    return run


@kernel.register
def _(operation: Interleave, known: Known) -> Kernel:
    rows, columns = operation.factor

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        source = inputs[0]
        channels = source.shape[1] // (rows * columns)
        if out is None:
            out = _images_like(source, (channels, *operation.size))
        reach = (source.shape[2] * rows - operation.start[0], source.shape[3] * columns - operation.start[1])
        if reach[0] < operation.size[0] or reach[1] < operation.size[1]:
            out.zero_()
        for i in range(rows):
            to_rows, from_rows = _interleaved(i, rows, operation.start[0], operation.size[0], source.shape[2])
            for j in range(columns):
                to_columns, from_columns = _interleaved(
                    j, columns, operation.start[1], operation.size[1], source.shape[3]
                )
                block = (i * columns + j) * channels
                out[:, :, to_rows, to_columns] = source[:, block : block + channels, from_rows, from_columns]
        return out

    return run


def _interleaved(phase: int, factor: int, start: int, size: int, length: int) -> tuple[slice, slice]:
    """Which positions of the result one phase fills, and from which of its own `length`."""
    to = (phase - start) % factor
    source = (to + start - phase) // factor
    count = max(0, min((size - to + factor - 1) // factor, length - source))
    return slice(to, to + (count - 1) * factor + 1 if count else to, factor), slice(source, source + count)


@kernel.register
def _(operation: Sum, known: Known) -> Kernel:
    dims = [dim + 1 for dim in operation.dims]
    return lambda inputs, out: inputs[0].sum(dims, keepdim=True)


@kernel.register
def _(operation: LogSumExp, known: Known) -> Kernel:
    return lambda inputs, out: inputs[0].logsumexp(operation.dim + 1, keepdim=True)


@kernel.register
def _(operation: Softmax, known: Known) -> Kernel:
    return lambda inputs, out: inputs[0].softmax(operation.dim + 1)


# ---- moving data


@kernel.register
def _(operation: Broadcast, known: Known) -> Kernel:
    return lambda inputs, out: inputs[0].expand(-1, *operation.target)


@kernel.register
def _(operation: Reshape, known: Known) -> Kernel:
    return lambda inputs, out: _laid_out(inputs[0].reshape(inputs[0].shape[0], *operation.target))


@kernel.register
def _(operation: Permute, known: Known) -> Kernel:
    order = [0, *(dim + 1 for dim in operation.order)]
    return lambda inputs, out: inputs[0].permute(order)


@kernel.register
def _(operation: Slice, known: Known) -> Kernel:
    return lambda inputs, out: inputs[0].narrow(operation.dim + 1, operation.start, operation.stop - operation.start)


@kernel.register
def _(operation: Pad, known: Known) -> Kernel:
    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        source = inputs[0]
        if out is None:
            out = _images_like(source, operation.shape(tuple(source.shape[1:])))
        out.fill_(operation.constant)
        inside = out
        for dim, before in enumerate(operation.before):
            inside = inside.narrow(dim + 1, before, source.shape[dim + 1])
        inside.copy_(source)
        return out

    return run


@kernel.register
def _(operation: Concatenate, known: Known) -> Kernel:
    return lambda inputs, out: torch.cat(list(inputs), dim=operation.dim + 1, out=out)


@kernel.register
def _(operation: AppendOnes, known: Known) -> Kernel:
    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        source = inputs[0]
        if out is None:
            out = _images_like(source, (source.shape[1] + 1, *source.shape[2:]))
        out[:, :-1] = source
        out[:, -1] = 1
        return out

    return run


def _laid_out(x: Tensor) -> Tensor:
    """Images channels-last, all else row by row."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def _images_like(x: Tensor, sample: tuple[int, ...]) -> Tensor:
    layout = torch.channels_last if len(sample) == 3 else torch.contiguous_format
    return torch.empty((x.shape[0], *sample), dtype=x.dtype, device=x.device, memory_format=layout)
