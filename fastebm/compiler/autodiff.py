"""From a program for energies to one for energies and their gradient with respect to the input, by the chain rule.

The backward part is written in the same vocabulary, so that rewrites see all of it: the adjoint of a convolution is a
transposed convolution, that of a pool an enlargement. What the forward part has to keep is then simply what the
backward part reads.
"""

from collections.abc import Callable
from functools import singledispatch

from torch import Tensor

from fastebm.compiler.lazy_tensors import LazyTensor, Shape, lazy
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
    Input,
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
from fastebm.compiler.program import INPUT, Builder, Node, Program, eliminate_dead_code

# Activations whose derivative their result tells: the pre-activation needn't be kept.
OF_RESULT = ("relu", "tanh", "sigmoid", "exp")


def differentiate(program: Program) -> Program:
    """The program with a second output, the gradient of the sum of the energies, of the shape of the samples.

    Raises ValueError where the energies don't depend on the input.
    """
    reverse = _ReverseMode(program)
    (energies,) = program.outputs
    reverse.accumulate(energies, reverse.add(Ones()))
    for node in reversed(program.nodes):
        if node.name in reverse.gradients and not isinstance(node.operation, Input):
            gradient = reverse.gradient(node.name)
            for name, part in zip(node.inputs, adjoint(node.operation, reverse, node, gradient), strict=True):
                reverse.accumulate(name, part)
    if INPUT not in reverse.gradients:
        raise ValueError("the energies don't depend on the input")
    gradient = reverse.gradient(INPUT)
    return eliminate_dead_code(Program(tuple(reverse.builder.nodes), (energies, gradient)))


class _ReverseMode:
    """The backward part as it grows: gradients by the names of the results that they belong to."""

    def __init__(self, program: Program):
        self.program = program
        self.builder = Builder(program.nodes)
        self.gradients: dict[str, list[str]] = {}
        self._name = "gradient"

    def add(self, operation: Operation, *inputs: str) -> str:
        return self.builder.add(operation, *inputs, name=self._name)

    def accumulate(self, name: str, gradient: str) -> None:
        """Another contribution to the gradient of `name`."""
        self.gradients.setdefault(name, []).append(gradient)

    def gradient(self, name: str) -> str:
        """The sum of all contributions, once all are there."""
        self._name = f"d_{name}"
        parts = self.gradients[name]
        return parts[0] if len(parts) == 1 else self.add(LinearCombination((1.0,) * len(parts)), *parts)

    def shape(self, name: str) -> Shape:
        return self.builder.shape(name)


Adjoint = Callable[[Operation, _ReverseMode, Node, str], list[str]]


@singledispatch
def adjoint(operation: Operation, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    """Add what makes the gradients of a node's inputs from that of its result, and name them in order."""
    raise TypeError(f"{type(operation).__name__} has no derivative")


@adjoint.register
def _(operation: Convolution, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    weight, source = operation.weight, node.inputs[0]
    if isinstance(reverse.program[source].operation, AppendOnes):
        weight = lazy(_without_last_input, weight)
    _, height, width = reverse.shape(source)
    # The channel of ones has no gradient, so it isn't computed; AppendOne's own adjoint takes what is there.
    return [reverse.add(_transposed(operation, weight, node.shape, (height, width)), gradient)]


def _transposed(operation: Convolution, weight: LazyTensor, result: Shape, size: tuple[int, int]) -> Convolution:
    """The adjoint of a convolution from images of `size` to `result`."""
    common = {
        "stride": operation.stride,
        "padding": operation.padding,
        "dilation": operation.dilation,
        "groups": operation.groups,
    }
    if operation.transposed:
        return Convolution(weight, **common)  # type: ignore[arg-type]
    smallest = Convolution(weight, transposed=True, **common).shape(result)  # type: ignore[arg-type]
    rest = (size[0] - smallest[1], size[1] - smallest[2])
    return Convolution(weight, transposed=True, output_padding=rest, **common)  # type: ignore[arg-type]


def _without_last_input(weight: Tensor) -> Tensor:
    return weight[:, :-1]


@adjoint.register
def _(operation: AppendOnes, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [gradient]


@adjoint.register
def _(operation: Linear, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [reverse.add(Linear(lazy(Tensor.t, operation.weight)), gradient)]


@adjoint.register
def _(operation: Affine, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [gradient if operation.scale is None else reverse.add(Affine(operation.scale), gradient)]


@adjoint.register
def _(operation: LinearCombination, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [reverse.add(LinearCombination((c,)), gradient) for c in operation.coefficients]


@adjoint.register
def _(operation: Activation, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    kind, parameters = operation.kind, operation.parameters
    if kind == "square":
        return [reverse.add(Multiply(), reverse.add(LinearCombination((2.0,)), gradient), node.inputs[0])]
    if kind == "exp":
        return [reverse.add(Multiply(), gradient, node.name)]
    # With a negative slope or alpha the sign of the result is not that of the pre-activation.
    increasing = kind in ("leaky_relu", "elu") and all(p > 0 for p in parameters)
    of_result = kind in OF_RESULT or increasing
    kept = node.name if of_result else node.inputs[0]
    return [reverse.add(ActivationDerivative(kind, parameters, of_result), gradient, kept)]


@adjoint.register
def _(operation: Multiply, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    a, b = node.inputs
    return [reverse.add(Multiply(), gradient, b), reverse.add(Multiply(), gradient, a)]


@adjoint.register
def _(operation: AveragePool, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    sample = reverse.shape(node.inputs[0])
    tiles = all(n % k == 0 for n, k in zip(sample[1:], operation.kernel, strict=True))
    if operation.simple and tiles:
        share = reverse.add(LinearCombination((1.0 / (operation.kernel[0] * operation.kernel[1]),)), gradient)
        return [reverse.add(Upsample(operation.kernel), share)]
    return [reverse.add(AveragePoolBackward(operation, sample), gradient)]


@adjoint.register
def _(operation: Upsample, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    mean = reverse.add(AveragePool(operation.factor, operation.factor), gradient)
    return [reverse.add(LinearCombination((float(operation.factor[0] * operation.factor[1]),)), mean)]


@adjoint.register
def _(operation: Sum, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [reverse.add(Broadcast(reverse.shape(node.inputs[0])), gradient)]


@adjoint.register
def _(operation: Broadcast, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    shape = reverse.shape(node.inputs[0])
    stretched = tuple(dim for dim, n in enumerate(shape) if n != operation.target[dim])
    return [reverse.add(Sum(stretched), gradient) if stretched else gradient]


@adjoint.register
def _(operation: LogSumExp, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    source = node.inputs[0]
    spread = reverse.add(Broadcast(reverse.shape(source)), gradient)
    return [reverse.add(Multiply(), spread, reverse.add(Softmax(operation.dim), source))]


@adjoint.register
def _(operation: Reshape, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    return [reverse.add(Reshape(reverse.shape(node.inputs[0])), gradient)]


@adjoint.register
def _(operation: Permute, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    inverse = sorted(range(len(operation.order)), key=operation.order.__getitem__)
    return [reverse.add(Permute(tuple(inverse)), gradient)]


@adjoint.register
def _(operation: Slice, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    shape = reverse.shape(node.inputs[0])
    before = tuple(operation.start if dim == operation.dim else 0 for dim in range(len(shape)))
    after = tuple(n - operation.stop if dim == operation.dim else 0 for dim, n in enumerate(shape))
    return [reverse.add(Pad(before, after), gradient)]


@adjoint.register
def _(operation: Pad, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    for dim, (before, length) in enumerate(zip(operation.before, reverse.shape(node.inputs[0]), strict=True)):
        if length != node.shape[dim]:
            gradient = reverse.add(Slice(dim, before, before + length), gradient)
    return [gradient]


@adjoint.register
def _(operation: Concatenate, reverse: _ReverseMode, node: Node, gradient: str) -> list[str]:
    parts, start = [], 0
    for name in node.inputs:
        length = reverse.shape(name)[operation.dim]
        parts.append(reverse.add(Slice(operation.dim, start, start + length), gradient))
        start += length
    return parts
