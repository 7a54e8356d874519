"""Reverse-mode differentiation: from a program for energies to one for energies and their gradient.

The backward part consists of the same operations as the forward part, so that rewrites see all of it: the adjoint of a
convolution is a transposed convolution, that of a pool is upsampling. The forward results to keep are those that the
backward part reads.
"""

from collections.abc import Container, Sequence
from dataclasses import replace
from functools import singledispatch

from torch import Tensor

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import LazyTensor, Shape, lazy
from fastebm.compiler.program import INPUT, Builder, Node, Program, eliminate_dead_code

# Activations whose derivative is a function of their result, so that their input need not be kept.
OF_RESULT = ("relu", "tanh", "sigmoid", "exp", "sqrt", "rsqrt", "reciprocal")


def differentiate(program: Program) -> Program:
    """The program with a second output, the gradient of the sum of the energies, of the shape of the samples.

    Raises ValueError if the energies don't depend on the input.
    """
    reverse = _reversed(program)
    if INPUT not in reverse.gradients:
        raise ValueError("the energies don't depend on the input")
    outputs = (*program.outputs, reverse.gradient(INPUT))
    return eliminate_dead_code(Program(tuple(reverse.builder.nodes), outputs))


def differentiate_weights(program: Program, trained: Container[LazyTensor]) -> Program:
    """The program with the gradients of the sum of the energies with respect to its `trained` weights, as operations.

    The gradient with respect to the samples is no output.
    """
    reverse = _reversed(program, trained)
    return eliminate_dead_code(Program(tuple(reverse.builder.nodes), program.outputs))


def _reversed(program: Program, trained: Container[LazyTensor] = ()) -> "_ReverseMode":
    reverse = _ReverseMode(program)
    (energies,) = program.outputs
    reverse.accumulate(energies, reverse.add(op.Ones()))
    for node in reversed(program.nodes):
        if node.name in reverse.gradients and not isinstance(node.operation, op.Input):
            gradient = reverse.gradient(node.name)
            if any(weight in trained for weight in node.operation.weights()):
                reverse.add(op.WeightGradient(node.operation), *node.inputs, gradient)
            for name, part in zip(node.inputs, adjoint(node.operation, reverse, node, gradient), strict=True):
                if part is not None:
                    reverse.accumulate(name, part)
    return reverse


class _ReverseMode:
    """The backward part under construction: for each result, the contributions to its gradient so far."""

    def __init__(self, program: Program):
        self.program = program
        self.builder = Builder(program.nodes)
        self.gradients: dict[str, list[str]] = {}
        self._name = "gradient"

    def add(self, operation: op.Operation, *inputs: str) -> str:
        return self.builder.add(operation, *inputs, name=self._name)

    def accumulate(self, name: str, gradient: str) -> None:
        """Add a contribution to the gradient of `name`."""
        self.gradients.setdefault(name, []).append(gradient)

    def gradient(self, name: str) -> str:
        """The sum of all contributions to the gradient of `name`."""
        self._name = f"d_{name}"
        parts = self.gradients[name]
        return parts[0] if len(parts) == 1 else self.add(op.LinearCombination((1.0,) * len(parts)), *parts)

    def shape(self, name: str) -> Shape:
        return self.builder.shape(name)


@singledispatch
def adjoint(operation: op.Operation, reverse: _ReverseMode, node: Node, gradient: str) -> Sequence[str | None]:
    """Add operations for the gradients of a node's inputs, given that of its result; return their names in order.

    None is for an input without a gradient.
    """
    raise TypeError(f"{type(operation).__name__} has no derivative")


@adjoint.register
def _(operation: op.Convolution, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    weight, source = operation.weight, node.inputs[0]
    if isinstance(reverse.program[source].operation, op.AppendOnes):
        weight = lazy(Tensor.narrow, weight, 1, 0, weight.shape[1] - 1)
    _, height, width = reverse.shape(source)
    # The channel of ones needs no gradient, so it is not computed: the adjoint of AppendOnes expects it to be missing.
    return [reverse.add(_transposed(operation, weight, node.shape, (height, width)), gradient)]


def _transposed(operation: op.Convolution, weight: LazyTensor, result: Shape, size: tuple[int, int]) -> op.Convolution:
    """The adjoint of a convolution from images of `size` to `result`."""
    transpose = replace(operation, weight=weight, bias=None, transposed=not operation.transposed, output_padding=(0, 0))
    if operation.transposed:
        return transpose
    _, height, width = transpose.shape(result)
    return replace(transpose, output_padding=(size[0] - height, size[1] - width))


@adjoint.register
def _(operation: op.AppendOnes, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [gradient]


@adjoint.register
def _(operation: op.Linear, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [reverse.add(op.Linear(lazy(Tensor.t, operation.weight)), gradient)]


@adjoint.register
def _(operation: op.Affine, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [gradient if operation.scale is None else reverse.add(op.Affine(operation.scale), gradient)]


@adjoint.register
def _(operation: op.LinearCombination, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [reverse.add(op.LinearCombination((c,)), gradient) for c in operation.coefficients]


@adjoint.register
def _(operation: op.Activation, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    kind, parameters = operation.kind, operation.parameters
    if kind == "square":
        return [reverse.add(op.Multiply(), reverse.add(op.LinearCombination((2.0,)), gradient), node.inputs[0])]
    if kind == "exp":
        return [reverse.add(op.Multiply(), gradient, node.name)]
    # With a negative slope or alpha, the sign of the result does not tell the sign of the input.
    increasing = kind in ("leaky_relu", "elu") and all(p > 0 for p in parameters)
    inside = kind == "hardtanh" and parameters[2] == 0
    of_result = kind in OF_RESULT or increasing or inside
    source = node.name if of_result else node.inputs[0]
    return [reverse.add(op.ActivationDerivative(kind, parameters, of_result), gradient, source)]


@adjoint.register
def _(operation: op.Multiply, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    a, b = node.inputs
    return [reverse.add(op.Multiply(), gradient, b), reverse.add(op.Multiply(), gradient, a)]


@adjoint.register
def _(operation: op.AveragePool, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    sample = reverse.shape(node.inputs[0])
    tiles = all(n % k == 0 for n, k in zip(sample[1:], operation.kernel, strict=True))
    if operation.simple and tiles:
        share = reverse.add(op.LinearCombination((1.0 / (operation.kernel[0] * operation.kernel[1]),)), gradient)
        return [reverse.add(op.Upsample(operation.kernel), share)]
    return [reverse.add(op.AveragePoolBackward(sample, operation), gradient)]


@adjoint.register
def _(operation: op.FirstMaximum, reverse: _ReverseMode, node: Node, gradient: str) -> list[None]:
    return [None]


@adjoint.register
def _(operation: op.Upsample, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    mean = reverse.add(op.AveragePool(operation.factor, operation.factor), gradient)
    return [reverse.add(op.LinearCombination((float(operation.factor[0] * operation.factor[1]),)), mean)]


@adjoint.register
def _(operation: op.Sum, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [reverse.add(op.Broadcast(reverse.shape(node.inputs[0])), gradient)]


@adjoint.register
def _(operation: op.Broadcast, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    shape = reverse.shape(node.inputs[0])
    stretched = tuple(dim for dim, n in enumerate(shape) if n != operation.target[dim])
    return [reverse.add(op.Sum(stretched), gradient) if stretched else gradient]


@adjoint.register
def _(operation: op.LogSumExp, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    source = node.inputs[0]
    spread = reverse.add(op.Broadcast(reverse.shape(source)), gradient)
    return [reverse.add(op.Multiply(), spread, reverse.add(op.Softmax(operation.dim), source))]


@adjoint.register
def _(operation: op.Reshape, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [reverse.add(op.Reshape(reverse.shape(node.inputs[0])), gradient)]


@adjoint.register
def _(operation: op.Permute, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    inverse = sorted(range(len(operation.order)), key=operation.order.__getitem__)
    return [reverse.add(op.Permute(tuple(inverse)), gradient)]


@adjoint.register
def _(operation: op.Slice, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    shape = reverse.shape(node.inputs[0])
    before = tuple(operation.start if dim == operation.dim else 0 for dim in range(len(shape)))
    after = tuple(n - operation.stop if dim == operation.dim else 0 for dim, n in enumerate(shape))
    return [reverse.add(op.Pad(before, after), gradient)]


@adjoint.register
def _(operation: op.Pad, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    for dim, (before, length) in enumerate(zip(operation.before, reverse.shape(node.inputs[0]), strict=True)):
        if length != node.shape[dim]:
            gradient = reverse.add(op.Slice(dim, before, before + length), gradient)
    return [gradient]


@adjoint.register
def _(operation: op.Concatenate, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    parts, start = [], 0
    for name in node.inputs:
        length = reverse.shape(name)[operation.dim]
        parts.append(reverse.add(op.Slice(operation.dim, start, start + length), gradient))
        start += length
    return parts
