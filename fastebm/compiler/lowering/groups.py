"""Fusion groups: instructions that share one epilogue, and the buffers and constants that they read and write."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor
from fastebm.compiler.operations import Pair
from fastebm.compiler.program import Node, Program
from fastebm.ops.instructions import Buffer, Epilogue, EpilogueOp, Instruction, Kind
from fastebm.ops.program import Constant
from fastebm.ops.weight_gradients import WeightTask

POINTWISE = (op.Activation, op.ActivationDerivative, op.LinearCombination, op.Multiply, op.Affine)
# Activations whose derivative costs more to compute again than to read.
COSTLY = ("silu", "gelu", "gelu_tanh", "softplus", "elu", "mish")
# An offset beyond every image: a copy with it reads only the fill value.
OUTSIDE = 1 << 20

Image = tuple[int, int, int]


class LoweringError(Exception):
    """A program has an operation that no instruction computes."""


@dataclass(frozen=True)
class Location:
    """Where a result is stored: in a buffer's channels from `channel` on.

    Each stored pixel stands for `factor` pixels of the result, and with `broadcast` one channel stands for all.
    """

    buffer: int
    channel: int = 0
    factor: Pair = (1, 1)
    broadcast: bool = False

    @property
    def plain(self) -> bool:
        """Whether every pixel and channel of the result is stored."""
        return self.factor == (1, 1) and not self.broadcast


@dataclass(frozen=True)
class WeightResult:
    """What the result of a task is: the gradient with respect to `weight`, after `restore` has given it that shape."""

    weight: LazyTensor
    restore: Callable[[Tensor], Tensor]


@dataclass
class Group:
    """Instructions with one epilogue. `result` names the value at the epilogue's end, "" if none can be appended."""

    instructions: list[Instruction]
    epilogue: list[Epilogue]
    result: str
    image: Image


@dataclass
class GroupBuilder:
    """The groups, buffers and constants of a program that is being lowered.

    Attributes:
        bytes: of a number that a convolution reads.
        images: the image as which each result lies in memory.
        weights: the lazy tensor of each constant.
        numbers: factors and parameters of activations, which together are constant number 0.
        locations: where results are stored.
        derivatives: where derivatives of activations are stored, by the activation and its input.
        group_of: the position of the group that computes a result.
        trained: the weights whose gradients are wanted.
        tasks, results: of the gradients of weights, and what becomes of each.
    """

    program: Program
    bytes: int
    images: dict[str, Image]
    buffers: list[Buffer] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    weights: list[LazyTensor] = field(default_factory=list)
    numbers: list[Coefficient] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    locations: dict[str, Location] = field(default_factory=dict)
    derivatives: dict[tuple[str, str, tuple[float, ...]], Location] = field(default_factory=dict)
    group_of: dict[str, int] = field(default_factory=dict)
    trained: Container[LazyTensor] = ()
    tasks: list[WeightTask] = field(default_factory=list)
    results: list[WeightResult] = field(default_factory=list)

    # ---- groups

    def open_group(self, node: Node, instructions: Iterable[Instruction], image: Image | None = None) -> Group:
        """A new group whose result so far is that of `node`."""
        self.group_of[node.name] = len(self.groups)
        return self.add_group(node.name, instructions, image or self.images[node.name])

    def add_group(self, result: str, instructions: Iterable[Instruction], image: Image, *steps: Epilogue) -> Group:
        self.groups.append(Group(list(instructions), list(steps), result, image))
        return self.groups[-1]

    def copy_group(self, result: str, location: Location, image: Image, *steps: Epilogue) -> Group:
        """A new group that starts by copying a stored result."""
        return self.add_group(result, [self.copy_from(location, image)], image, *steps)

    def group_ending_in(self, name: str) -> Group | None:
        """The group whose result so far is `name`."""
        number = self.group_of.get(name)
        return self.groups[number] if number is not None and self.groups[number].result == name else None

    def close_group(self, group: Group, next_node: Node | None = None) -> None:
        """Store or return the group's result if a node other than `next_node` reads it, or if it is an output."""
        name = group.result
        if not name:
            return
        readers = [user for user in self.program.users(name) if user is not next_node]
        if name not in self.locations and not all(self._reads_stored_derivative(user, name) for user in readers):
            self.store(group, name)
        for output, step in self.outputs():
            if name == output and not self.returns(group, step):
                group.epilogue.append(Epilogue(step))

    def outputs(self) -> list[tuple[str, EpilogueOp]]:
        """The program's outputs, energies and a gradient if it has one, each with the operation that returns it."""
        return list(zip(self.program.outputs, (EpilogueOp.STORE_ENERGIES, EpilogueOp.STORE_GRADIENT), strict=False))

    @staticmethod
    def returns(group: Group, output: EpilogueOp) -> bool:
        return any(step.op == output for step in group.epilogue)

    def _reads_stored_derivative(self, user: Node, name: str) -> bool:
        """Whether `user` does not need `name`, because an activation's group stores the derivative for it."""
        activations = [u.operation for u in self.program.users(name) if isinstance(u.operation, op.Activation)]
        return any(self.needs_derivative(user, activation, name) for activation in activations)

    @staticmethod
    def needs_derivative(user: Node, activation: op.Activation, name: str) -> bool:
        """Whether `user` multiplies by the derivative of a costly activation at `name`."""
        derivative = user.operation
        return (
            isinstance(derivative, op.ActivationDerivative)
            and not derivative.of_result
            and user.inputs[1] == name
            and user.inputs[0] != name
            and (derivative.kind, derivative.parameters) == (activation.kind, activation.parameters)
            and derivative.kind in COSTLY
        )

    # ---- stored results

    def store(self, group: Group, name: str) -> Location:
        """Append a store of the group's value, as the location of `name`."""
        self.locations[name] = Location(self.add_buffer(group.image))
        group.epilogue.append(Epilogue(EpilogueOp.STORE, self.locations[name].buffer))
        return self.locations[name]

    def locate(self, name: str, plain: bool = True) -> Location:
        """Where a result is stored. It is stored now if it is not yet; with `plain`, so that each pixel is."""
        if name not in self.locations:
            group = self.group_ending_in(name)
            if group is not None:
                self.close_group(group)
            if name not in self.locations:
                raise LoweringError(f"{name} was not stored")
        location = self.locations[name]
        if plain and not location.plain:
            location = self.store(self.copy_group("", location, self.images[name]), name)
        return location

    def operand(self, do: EpilogueOp, name: str, number: int = -1) -> Epilogue:
        """An epilogue operation that reads a stored result."""
        location = self.locate(name, plain=False)
        broadcast = int(location.broadcast)
        return Epilogue(do, location.buffer, location.channel, *location.factor, number=number, broadcast=broadcast)

    def add_buffer(self, image: Image) -> int:
        self.buffers.append(Buffer(*image, bytes=self.bytes))
        return len(self.buffers) - 1

    # ---- constants

    def add_constant(self, kind: str, weight: LazyTensor) -> int:
        """The number of a new constant; number 0 is reserved for `numbers`."""
        self.constants.append(Constant(kind))
        self.weights.append(weight)
        return len(self.constants)

    def add_number(self, coefficient: Coefficient) -> int:
        self.numbers.append(coefficient)
        return len(self.numbers) - 1

    def add_parameters(self, parameters: tuple[float, ...]) -> int:
        """The position of an activation's parameters, filled up to three; -1 if it has none."""
        if not parameters:
            return -1
        first = len(self.numbers)
        self.numbers += [*parameters, *[0.0] * (3 - len(parameters))]
        return first

    def scaling(self, factor: Coefficient) -> Epilogue:
        return Epilogue(EpilogueOp.SCALE, number=self.add_number(factor))

    # ---- instructions

    @staticmethod
    def window(
        kind: Kind,
        location: Location,
        source_channels: int,
        image: Image,
        kernel: Pair = (1, 1),
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        constant: int = -1,
    ) -> Instruction:
        """An instruction that computes `image` from windows of a stored result."""
        source = (location.buffer, location.channel, source_channels)
        start, step = (0, 0), (1, 1)
        grid = (*image, *start, *step, *kernel, *stride, *padding, *dilation)
        return Instruction(kind, *source, *grid, constant, broadcast=int(location.broadcast))

    def copy_from(
        self, location: Location, image: Image, factor: Pair = (1, 1), offset: Pair = (0, 0), fill: int = -1
    ) -> Instruction:
        """A copy of a stored result: pixel (y, x) reads ((y, x) + offset) / factor, or `fill` outside the source."""
        channels = 1 if location.broadcast else image[0]
        factor = (factor[0] * location.factor[0], factor[1] * location.factor[1])
        padding = (-offset[0], -offset[1])
        return self.window(Kind.GATHER, location, channels, image, factor, padding=padding, constant=fill)
