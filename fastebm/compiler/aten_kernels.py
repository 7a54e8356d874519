"""How each operation of a program runs on PyTorch's own (ATen) operations.

A kernel takes the batch tensors of its inputs and, if the executor planned one, a tensor to write its result to. All
tensors have the program's dtype; images are channels-last.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor
from fastebm.ops.activations import ACTIVATION_TABLE, PROGRAM_ACTIVATIONS, program_derivative
from fastebm.ops.program import first_maximum

aten = torch.ops.aten
# Activations that run by the formulas of their table, with the position there.
_BY_FORMULA = {
    name: PROGRAM_ACTIVATIONS.index(name)
    for name in ("hardtanh", "hardsigmoid", "hardswish", "mish", "abs", "sqrt", "rsqrt", "reciprocal")
}
Weights = Mapping[LazyTensor, Tensor]
Kernel = Callable[[Sequence[Tensor], Tensor | None], Tensor]

# Operations whose kernels can write to a given tensor.
SUPPORTS_OUT = (
    *(op.Activation, op.ActivationDerivative, op.Affine, op.AppendOnes, op.AveragePool, op.Concatenate),
    *(op.Interleave, op.LinearCombination, op.Multiply, op.Pad, op.Upsample),
)


def inplace_inputs(operation: op.Operation) -> tuple[int, ...]:
    """The positions of the inputs that the result may overwrite if nothing reads them later."""
    if isinstance(operation, op.Multiply):
        return 0, 1
    if isinstance(operation, op.LinearCombination):
        return (_first_term(operation),)
    return (0,) if isinstance(operation, op.Activation | op.ActivationDerivative | op.Affine) else ()


@singledispatch
def kernel(operation: op.Operation, weights: Weights) -> Kernel:
    """The kernel of an operation. It keeps the tensors in `weights`, which later chains overwrite with new values."""
    raise TypeError(f"{type(operation).__name__} has no kernel")


@kernel.register
def _(operation: op.Ones, weights: Weights) -> Kernel:
    # The executor passes a tensor with the batch size and the dtype.
    return lambda inputs, out: inputs[0].new_ones(inputs[0].shape[0])


def _aten(packet: Any, out: Tensor | None, *arguments: Any, **keywords: Any) -> Tensor:
    """The result of an ATen operation, in `out` if there is one."""
    if out is None:
        return packet.default(*arguments, **keywords)  # type: ignore[no-any-return]
    return packet.out(*arguments, **keywords, out=out)  # type: ignore[no-any-return]


# ---- linear maps


@kernel.register
def _(operation: op.Convolution, weights: Weights) -> Kernel:
    weight, bias = weights[operation.weight], _tensor_or_number(operation.bias, weights)
    settings = (
        *(list(operation.stride), list(operation.padding), list(operation.dilation)),
        *(operation.transposed, list(operation.output_padding), operation.groups),
    )
    unpadded = operation.padding == operation.output_padding == (0, 0) and operation.dilation == (1, 1)
    if not unpadded or operation.groups != 1 or (operation.transposed and bias is not None):
        return lambda inputs, out: aten.convolution.default(inputs[0], weight, bias, *settings)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        size = inputs[0].shape[2:]
        if operation.transposed and size == (1, 1):
            return _image_from_one_pixel(inputs[0], weight)
        if not operation.transposed and size == operation.kernel:
            return _one_pixel_from_image(inputs[0], weight, bias)
        return aten.convolution.default(inputs[0], weight, bias, *settings)

    return run


def _one_pixel_from_image(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose kernel covers the image, as a matrix product, which libraries run several times faster."""
    flat = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)
    matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return torch.nn.functional.linear(flat, matrix, bias)[:, :, None, None]


def _image_from_one_pixel(x: Tensor, weight: Tensor) -> Tensor:
    """The adjoint of `_one_pixel_from_image`, to a channels-last image."""
    _, channels, height, width = weight.shape
    matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    flat = x.flatten(1) @ matrix
    return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)


@kernel.register
def _(operation: op.Linear, weights: Weights) -> Kernel:
    weight, bias = weights[operation.weight], _tensor_or_number(operation.bias, weights)
    return lambda inputs, out: torch.nn.functional.linear(inputs[0], weight, bias)


@kernel.register
def _(operation: op.Affine, weights: Weights) -> Kernel:
    scale, shift = _tensor_or_number(operation.scale, weights), _tensor_or_number(operation.shift, weights)
    if scale is not None and shift is not None:
        return lambda inputs, out: torch.addcmul(shift, inputs[0], scale, out=out)
    if scale is not None:
        return lambda inputs, out: torch.mul(inputs[0], scale, out=out)
    if shift is not None:
        return lambda inputs, out: torch.add(inputs[0], shift, out=out)
    raise ValueError("an affine map needs a scale or a shift")


@kernel.register
def _(operation: op.LinearCombination, weights: Weights) -> Kernel:
    factors = [_tensor_or_number(c, weights) for c in operation.coefficients]
    first = _first_term(operation)
    unscaled = operation.coefficients[first] == 1
    others = [i for i in range(len(factors)) if i != first]

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        result = inputs[first] if unscaled else torch.mul(inputs[first], factors[first], out=out)
        for i in others:
            # Later terms are added in place, but never to the input that the sum starts from.
            result = _add_scaled(result, inputs[i], factors[i], out if result is inputs[first] else result)
        return result

    return run


def _first_term(operation: op.LinearCombination) -> int:
    """The term that a sum starts from: one with coefficient 1, if there is one, saves a pass over memory."""
    return next((i for i, c in enumerate(operation.coefficients) if c == 1), 0)


def _add_scaled(a: Tensor, b: Tensor, factor: Any, out: Tensor | None) -> Tensor:
    """a + factor * b."""
    if isinstance(factor, Tensor):
        return torch.addcmul(a, b, factor, out=out)
    return torch.add(a, b, alpha=factor, out=out)


def _tensor_or_number(value: Coefficient | None, weights: Weights) -> Any:
    """The tensor of a lazy tensor; a plain number, or None, as it is."""
    return weights[value] if isinstance(value, LazyTensor) else value


# ---- pointwise


@kernel.register
def _(operation: op.Activation, weights: Weights) -> Kernel:
    kind, parameters = operation.kind, operation.parameters
    if kind == "relu":
        return lambda inputs, out: torch.clamp(inputs[0], min=0, out=out)
    if kind in ("square", "exp", "tanh", "sigmoid"):
        function = getattr(torch, kind)
        return lambda inputs, out: function(inputs[0], out=out)
    if kind in _BY_FORMULA:
        return lambda inputs, out: _in(out, ACTIVATION_TABLE[_BY_FORMULA[kind]].function(inputs[0], *parameters))
    packet, keywords = _packet(kind, "")
    return lambda inputs, out: _aten(packet, out, inputs[0], *parameters, **keywords)


@kernel.register
def _(operation: op.ActivationDerivative, weights: Weights) -> Kernel:
    kind, parameters = operation.kind, operation.parameters
    if kind in _BY_FORMULA:
        number, of_result = _BY_FORMULA[kind], operation.of_result

        def multiply(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            slope = program_derivative(inputs[1], number, parameters, of_result=of_result)
            return torch.mul(inputs[0], slope, out=out)

        return multiply
    packet, keywords = _packet("threshold" if kind == "relu" else kind, "_backward")
    if kind == "relu":
        parameters = (0.0,)
    elif kind == "leaky_relu":
        parameters = (*parameters, operation.of_result)
    # elu_backward takes its parameters before the second input.
    before, after = ((*parameters, operation.of_result), ()) if kind == "elu" else ((), parameters)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        arguments = (inputs[0], *before, inputs[1], *after)
        if out is None:
            return packet.default(*arguments, **keywords)
        return packet.grad_input(*arguments, **keywords, grad_input=out)

    return run


def _in(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)


def _packet(kind: str, suffix: str) -> tuple[Any, dict[str, str]]:
    """The ATen operation of an activation or its derivative, and its keyword arguments."""
    tanh = kind == "gelu_tanh"
    return getattr(aten, ("gelu" if tanh else kind) + suffix), {"approximate": "tanh"} if tanh else {}


@kernel.register
def _(operation: op.Multiply, weights: Weights) -> Kernel:
    return lambda inputs, out: torch.mul(inputs[0], inputs[1], out=out)


# ---- resolution, sums


def _pool_settings(pool: op.AveragePool) -> tuple[Any, ...]:
    windows = (list(pool.kernel), list(pool.stride), list(pool.padding))
    return (*windows, pool.ceil_mode, pool.count_include_pad, pool.divisor)


@kernel.register
def _(operation: op.AveragePool, weights: Weights) -> Kernel:
    settings = _pool_settings(operation)
    return lambda inputs, out: _aten(aten.avg_pool2d, out, inputs[0], *settings)


@kernel.register
def _(operation: op.AveragePoolBackward, weights: Weights) -> Kernel:
    settings = _pool_settings(operation.pool)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        gradient = _packed(inputs[0])
        # ATen reads only the shape and the memory format of the pool's input.
        sample = gradient.new_empty(()).expand(gradient.shape[0], *operation.target)
        sample = torch.empty_like(sample, memory_format=torch.channels_last)
        return aten.avg_pool2d_backward.default(gradient, sample, *settings)

    return run


@kernel.register
def _(operation: op.FirstMaximum, weights: Weights) -> Kernel:
    return lambda inputs, out: _packed(first_maximum(inputs[0].contiguous(), operation.kernel))


@kernel.register
def _(operation: op.Upsample, weights: Weights) -> Kernel:
    rows, columns = operation.factor

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        size = [inputs[0].shape[2] * rows, inputs[0].shape[3] * columns]
        return _aten(aten.upsample_nearest2d, out, inputs[0], size)

    return run


@kernel.register
def _(operation: op.Interleave, weights: Weights) -> Kernel:
    (rows, columns), (top, left), (height, width) = operation.factor, operation.start, operation.size

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        source = inputs[0]
        channels = source.shape[1] // (rows * columns)
        if out is None:
            out = _empty_images(source, (channels, height, width))
        if source.shape[2] * rows - top < height or source.shape[3] * columns - left < width:
            out.zero_()
        for i in range(rows):
            to_rows, from_rows = _phase_slices(i, rows, top, height, source.shape[2])
            for j in range(columns):
                to_columns, from_columns = _phase_slices(j, columns, left, width, source.shape[3])
                block = (i * columns + j) * channels
                out[:, :, to_rows, to_columns] = source[:, block : block + channels, from_rows, from_columns]
        return out

    return run


def _phase_slices(phase: int, factor: int, start: int, size: int, length: int) -> tuple[slice, slice]:
    """The result's positions along one axis that a phase fills, and the positions of its `length` that fill them."""
    to = (phase - start) % factor
    source = (to + start - phase) // factor
    count = max(0, min((size - to + factor - 1) // factor, length - source))
    return slice(to, to + (count - 1) * factor + 1 if count else to, factor), slice(source, source + count)


@kernel.register
def _(operation: op.Sum, weights: Weights) -> Kernel:
    dims = [dim + 1 for dim in operation.dims]
    return lambda inputs, out: inputs[0].sum(dims, keepdim=True)


@kernel.register
def _(operation: op.LogSumExp, weights: Weights) -> Kernel:
    return lambda inputs, out: inputs[0].logsumexp(operation.dim + 1, keepdim=True)


@kernel.register
def _(operation: op.Softmax, weights: Weights) -> Kernel:
    return lambda inputs, out: inputs[0].softmax(operation.dim + 1)


# ---- moving data


@kernel.register
def _(operation: op.Broadcast, weights: Weights) -> Kernel:
    return lambda inputs, out: inputs[0].expand(-1, *operation.target)


@kernel.register
def _(operation: op.Reshape, weights: Weights) -> Kernel:
    return lambda inputs, out: _packed(inputs[0].reshape(inputs[0].shape[0], *operation.target))


@kernel.register
def _(operation: op.Permute, weights: Weights) -> Kernel:
    order = [0, *(dim + 1 for dim in operation.order)]
    return lambda inputs, out: inputs[0].permute(order)


@kernel.register
def _(operation: op.Slice, weights: Weights) -> Kernel:
    return lambda inputs, out: inputs[0].narrow(operation.dim + 1, operation.start, operation.stop - operation.start)


@kernel.register
def _(operation: op.Pad, weights: Weights) -> Kernel:
    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        source = inputs[0]
        if out is None:
            out = _empty_images(source, operation.shape(tuple(source.shape[1:])))
        out.fill_(operation.constant)
        inside = out
        for dim, before in enumerate(operation.before):
            inside = inside.narrow(dim + 1, before, source.shape[dim + 1])
        inside.copy_(source)
        return out

    return run


@kernel.register
def _(operation: op.Concatenate, weights: Weights) -> Kernel:
    return lambda inputs, out: torch.cat(list(inputs), dim=operation.dim + 1, out=out)


@kernel.register
def _(operation: op.AppendOnes, weights: Weights) -> Kernel:
    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        source = inputs[0]
        if out is None:
            out = _empty_images(source, (source.shape[1] + 1, *source.shape[2:]))
        out[:, :-1] = source
        out[:, -1] = 1
        return out

    return run


def memory_format(ndim: int) -> torch.memory_format:
    """Channels-last for a batch of images, contiguous for everything else."""
    return torch.channels_last if ndim == 4 else torch.contiguous_format


def _packed(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format(x.ndim))


def _empty_images(x: Tensor, sample: tuple[int, ...]) -> Tensor:
    size = (x.shape[0], *sample)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(len(size)))
