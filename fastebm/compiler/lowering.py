"""From a program to a recipe: instructions with epilogues, which one operator runs (`fastebm.ops.program`).

Every convolution, pool or gather begins a group. A pointwise operation joins the group whose newest value it reads, if
all else that it reads was made earlier, so that most of them run on values that are still in registers or L1. A value
is stored only where something outside of its group reads it. Where an activation's derivative is wanted later and the
activation is costly, its group stores the derivative instead of what it would be worked out from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor, Shape, evaluate, lazy
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
    Reshape,
    Slice,
    Softmax,
    Sum,
    Upsample,
)
from fastebm.compiler.program import Node, Program
from fastebm.ops.instructions import KINDS, Buffer, Epilogue, EpilogueOp, Instruction, Kind
from fastebm.ops.program import DENSE, Constant, LoweredProgram

# Activations whose derivative costs more to work out again than to read.
COSTLY = ("silu", "gelu", "gelu_tanh", "softplus", "elu")
POINTWISE = (Activation, ActivationDerivative, LinearCombination, Multiply, Affine)
# What shows another view of the same memory, or the same pixel several times.
VIEWS = (Reshape, Upsample, Broadcast, Slice)
OUTSIDE = 1 << 20

Image = tuple[int, int, int]


class LoweringError(Exception):
    """Why a program has no recipe."""


@dataclass(frozen=True)
class LoweringResult:
    """A recipe and what its constants are made of."""

    recipe: LoweredProgram
    numbers: tuple[Coefficient, ...]
    values: tuple[LazyTensor, ...]

    def constants(self) -> tuple[list[Any], list[Tensor]]:
        """All numbers and values, evaluated now."""
        wanted = [*self.values, *(n for n in self.numbers if isinstance(n, LazyTensor))]
        known = evaluate(wanted)
        return [known[n] if isinstance(n, LazyTensor) else n for n in self.numbers], [known[v] for v in self.values]


def lower(program: Program, itemsize: int) -> LoweringResult:
    """The recipe of a program with energies and gradient as outputs, for numbers of so many bytes.

    Raises LoweringError with the node and the reason where an operation is beyond the instructions.
    """
    return _Lowering(_flattened(program), itemsize).finish()


def _flattened(program: Program) -> Program:
    """A program of the same numbers as vectors, where an energy begins by making a vector of its image.

    A linear map of a vector is a matrix product; one of an image is a convolution that covers it, which for images of
    few channels does many times the work.
    """
    image, gradient = program.nodes[0], program[program.outputs[1]]
    entries = program.users(image.name)
    flat = (math.prod(image.shape),)
    if len(image.shape) != 3 or not entries or image.name in program.outputs:
        return program
    if any(not isinstance(node.operation, Reshape) or node.shape != flat for node in entries):
        return program
    if not isinstance(gradient.operation, Reshape) or program[gradient.inputs[0]].shape != flat:
        return program
    if program.users(gradient.name) or gradient.inputs[0] == image.name or gradient in entries:
        return program
    aside = {node.name for node in entries}
    nodes = [replace(image, operation=Input(flat), shape=flat)]
    for node in program.nodes[1:]:
        if node.name not in aside and node is not gradient:
            inputs = tuple(image.name if name in aside else name for name in node.inputs)
            nodes.append(replace(node, inputs=inputs))
    return Program(tuple(nodes), (program.outputs[0], gradient.inputs[0]))


def image_of(shape: Shape) -> Image:
    """A sample's shape as (C, H, W); what is no image is a vector."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return math.prod(shape), 1, 1


@dataclass(frozen=True)
class _Place:
    """Where a stored result is: a buffer's channels from `channel` on, each pixel standing for `factor` of them."""

    buffer: int
    channel: int = 0
    factor: tuple[int, int] = (1, 1)
    spread: bool = False

    @property
    def plain(self) -> bool:
        return self.factor == (1, 1) and not self.spread


@dataclass
class _Group:
    """Instructions with one epilogue, and the name of the newest value."""

    instructions: list[Instruction]
    epilogue: list[Epilogue]
    tip: str
    image: Image


@dataclass
class _Lowering:
    program: Program
    bytes: int
    buffers: list[Buffer] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    values: list[LazyTensor] = field(default_factory=list)
    numbers: list[Coefficient] = field(default_factory=list)
    groups: list[_Group] = field(default_factory=list)
    places: dict[str, _Place] = field(default_factory=dict)
    slopes: dict[tuple[str, str, tuple[float, ...]], _Place] = field(default_factory=dict)
    group_of: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.energies, self.gradient = self.program.outputs
        self.images = _images(self.program)

    def finish(self) -> LoweringResult:
        for node in self.program:
            try:
                self._lower(node)
            except LoweringError as reason:
                raise LoweringError(f"{node.name}: {reason}") from None
        for group in self.groups:
            self._leave(group, None)
        for output in (self.energies, self.gradient):
            if not any(self._delivers(group, output) for group in self.groups):
                self._leave(self._gathered(output, self.places[output], self.images[output]), None)
        return self._recipe()

    def _recipe(self) -> LoweringResult:
        instructions: list[Instruction] = []
        epilogues: list[Epilogue] = []
        for group in self.groups:
            for instruction in group.instructions:
                instructions.append(replace(instruction, first=len(epilogues), count=len(group.epilogue)))
            epilogues += group.epilogue
        buffers, constants = self._dense(instructions)
        sample = self.program[self.program.nodes[0].name].shape
        recipe = LoweredProgram(sample, self.bytes, buffers, tuple(instructions), tuple(epilogues), constants)
        return LoweringResult(recipe, tuple(self.numbers), tuple(self.values))

    def _dense(self, instructions: list[Instruction]) -> tuple[tuple[Buffer, ...], tuple[Constant, ...]]:
        """Buffers of few channels, and the weights that read them, in the form where a pixel has four numbers."""
        wide = set()
        for i in instructions:
            if i.kind == Kind.CONVOLUTION and (i.kernel_x > 8 or i.dilation_x > 1 or i.source_channel):
                wide.add(i.source)
        dense = {b for b, buffer in enumerate(self.buffers) if buffer.channels <= DENSE and b not in wide}
        buffers = tuple(replace(buffer, pixel=DENSE) if b in dense else buffer for b, buffer in enumerate(self.buffers))
        constants = list(self.constants)
        for i in instructions:
            if i.kind == Kind.CONVOLUTION:
                constants[i.constant - 1] = replace(constants[i.constant - 1], dense=i.source in dense)
        return buffers, tuple(constants)

    # ---- nodes

    def _lower(self, node: Node) -> None:
        operation = node.operation
        shapes = [node.shape, *self.program.shapes(node)]
        if any(len(shape) not in (0, 1, 3) for shape in shapes) and not isinstance(
            operation, (Input, Reshape, *POINTWISE)
        ):
            raise LoweringError(f"samples of shape {shapes[0]} are neither images nor vectors")
        if isinstance(operation, Input):
            channels, height, width = self.images[node.name]
            ones = any(isinstance(user.operation, AppendOnes) for user in self.program.users(node.name))
            load = Instruction(
                Kind.LOAD,
                source_channels=channels,
                channels=channels + ones,
                height=height,
                width=width,
                constant=int(ones),
            )
            self._begin(node, [load], (channels + ones, height, width))
        elif isinstance(operation, Ones):
            self._begin(node, [Instruction(Kind.LOAD, constant=1)], (1, 1, 1))
        elif isinstance(operation, POINTWISE):
            self._pointwise(node)
        elif isinstance(operation, VIEWS):
            self._view(node, operation)
        elif isinstance(operation, AppendOnes):
            self._append_one(node)
        elif isinstance(operation, Concatenate):
            self._concatenate(node, operation)
        else:
            self._anchor(node, operation)

    def _begin(self, node: Node, instructions: list[Instruction], image: Image | None = None) -> _Group:
        """Open a group whose newest value is the node's result."""
        image = image or self.images[node.name]
        group = _Group(instructions, [], node.name, image)
        self.group_of[node.name] = len(self.groups)
        self.groups.append(group)
        return group

    def _anchor(self, node: Node, operation: Operation) -> None:
        """What begins a group of its own: maps with weights, windows, sums, borders."""
        if isinstance(operation, Convolution):
            group = self._begin(node, self._convolution(node, operation))
            self._bias(group, operation.bias)
        elif isinstance(operation, Linear):
            group = self._begin(node, [self._linear(node, operation)])
            self._bias(group, operation.bias)
        elif isinstance(operation, AveragePool):
            self._pool(node, operation)
        elif isinstance(operation, AveragePoolBackward):
            pool = operation.pool
            if not pool.simple:
                raise LoweringError("the derivative of a pool whose windows overlap or are padded is not known")
            place = self._stored(node.inputs[0])
            group = self._begin(node, [self._gather(place, self.images[node.name], factor=pool.kernel)])
            group.epilogue.append(self._scale(1.0 / math.prod(pool.kernel)))
        elif isinstance(operation, Sum):
            self._sum(node, operation)
        elif isinstance(operation, LogSumExp | Softmax):
            self._softmax(node, operation)
        elif isinstance(operation, Pad):
            self._pad(node, operation)
        else:
            raise LoweringError(f"{type(operation).__name__} is not among the instructions")

    # ---- convolutions and other maps with weights

    def _convolution(self, node: Node, conv: Convolution) -> list[Instruction]:
        if conv.groups != 1:
            raise LoweringError("a convolution in groups is not among the instructions")
        if conv.transposed:
            return self._transposed(node, conv)
        (channels, height, width), place = self.images[node.name], self._stored(node.inputs[0])
        return [
            self._windows(
                place,
                conv.weight,
                (channels, height, width),
                conv.stride,
                conv.padding,
                conv.dilation,
            )
        ]

    def _windows(
        self,
        place: _Place,
        weight: LazyTensor,
        image: Image,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> Instruction:
        """A plain convolution with `weight`, (out, in, K, K), whose results are `image`."""
        return Instruction(
            Kind.CONVOLUTION,
            source=place.buffer,
            source_channel=place.channel,
            source_channels=weight.shape[1],
            channels=image[0],
            height=image[1],
            width=image[2],
            kernel_y=weight.shape[2],
            kernel_x=weight.shape[3],
            stride_y=stride[0],
            stride_x=stride[1],
            pad_y=padding[0],
            pad_x=padding[1],
            dilation_y=dilation[0],
            dilation_x=dilation[1],
            constant=self._constant(Constant("convolution"), weight),
        )

    def _transposed(self, node: Node, conv: Convolution) -> list[Instruction]:
        """One plain convolution for each phase of the output; see `rewrites.parity` for the formula."""
        if conv.dilation != (1, 1) and conv.stride != (1, 1):
            raise LoweringError("a transposed convolution with stride and dilation is not among the instructions")
        (channels, height, width), place = self.images[node.name], self._stored(node.inputs[0])
        if conv.stride == (1, 1):
            weight = lazy(_flipped, conv.weight)
            padding = tuple(d * (k - 1) - p for d, k, p in zip(conv.dilation, conv.kernel, conv.padding, strict=True))
            return [self._windows(place, weight, (channels, height, width), (1, 1), padding, conv.dilation)]  # type: ignore[arg-type]
        instructions = []
        for row in range(min(conv.stride[0], height)):
            for column in range(min(conv.stride[1], width)):
                phase = [
                    _phase(start, k, s, p, size)
                    for start, k, s, p, size in zip(
                        (row, column), conv.kernel, conv.stride, conv.padding, (height, width), strict=True
                    )
                ]
                (first_y, taps_y, pad_y, rows), (first_x, taps_x, pad_x, columns) = phase
                image = (channels, rows, columns)
                if taps_y and taps_x:
                    weight = lazy(_taps, conv.weight, (first_y, first_x), conv.stride)
                    one = self._windows(place, weight, image, padding=(pad_y, pad_x))
                else:
                    one = self._gather(replace(place, spread=True), image, offset=(-OUTSIDE, 0))
                instructions.append(
                    replace(one, start_y=row, start_x=column, step_y=conv.stride[0], step_x=conv.stride[1])
                )
        return instructions

    def _linear(self, node: Node, linear: Linear) -> Instruction:
        source, target = self.images[node.inputs[0]], self.images[node.name]
        if len(self.program[node.inputs[0]].shape) > 1:
            raise LoweringError("a linear map of something other than vectors is not among the instructions")
        place = self._stored(node.inputs[0])
        if target[1:] == (1, 1):
            weight = lazy(_over_image, linear.weight, source)
            return self._windows(place, weight, target)
        if source[1:] == (1, 1):
            weight = lazy(_to_image, linear.weight, target)
            return self._windows(place, weight, target, padding=(target[1] - 1, target[2] - 1))
        raise LoweringError("a linear map from an image to an image is not among the instructions")

    def _bias(self, group: _Group, bias: LazyTensor | None) -> None:
        if bias is not None:
            image = (
                lazy(_spread_out, bias, group.image)
                if group.image[1:] != (1, 1) and bias.shape[0] != group.image[0]
                else lazy(_column, bias)
            )
            group.epilogue.append(Epilogue(EpilogueOp.ADD_CONSTANT, number=self._constant(Constant("image"), image)))

    # ---- windows without weights

    def _pool(self, node: Node, pool: AveragePool) -> None:
        source, target = self.images[node.inputs[0]], self.images[node.name]
        padded = pool.padding != (0, 0)
        if padded and not pool.count_include_pad and pool.divisor is None:
            raise LoweringError("a pool that doesn't count its padding is not among the instructions")
        floors = [
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip(source[1:], pool.kernel, pool.stride, pool.padding, strict=True)
        ]
        if pool.ceil_mode and tuple(floors) != target[1:]:
            raise LoweringError("a pool in ceil mode is not among the instructions")
        self._window_sum(node, pool.kernel, pool.stride, pool.padding, 1.0 / (pool.divisor or math.prod(pool.kernel)))

    def _window_sum(
        self, node: Node, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], factor: float
    ) -> None:
        """Sums over windows, times `factor`."""
        place, image = self._stored(node.inputs[0]), self.images[node.name]
        instruction = Instruction(
            Kind.POOL,
            source=place.buffer,
            source_channel=place.channel,
            source_channels=image[0],
            channels=image[0],
            height=image[1],
            width=image[2],
            kernel_y=kernel[0],
            kernel_x=kernel[1],
            stride_y=stride[0],
            stride_x=stride[1],
            pad_y=padding[0],
            pad_x=padding[1],
        )
        group = self._begin(node, [instruction])
        if factor != 1:
            group.epilogue.append(self._scale(factor))

    def _sum(self, node: Node, operation: Sum) -> None:
        shape, image = self.program[node.inputs[0]].shape, self.images[node.inputs[0]]
        dims = operation.dims if len(shape) == 3 else (0, 1, 2)
        kernel = (image[1] if 1 in dims else 1, image[2] if 2 in dims else 1)
        if 0 not in dims:
            self._window_sum(node, kernel, (1, 1), (0, 0), 1.0)
            return
        weight = LazyTensor(_ones, (image[0], *kernel, self._device()), (1, image[0], *kernel))
        self._begin(node, [self._windows(self._stored(node.inputs[0]), weight, self.images[node.name])])

    def _device(self) -> Callable[[], torch.device]:
        """Where constants of our own go: beside the weights, or on the CPU where there are none."""
        for node in self.program:
            for value in node.operation.weights():
                return lambda: evaluate([value])[value].device
        return lambda: torch.device("cpu")

    def _softmax(self, node: Node, operation: LogSumExp | Softmax) -> None:
        channels, height, width = self.images[node.inputs[0]]
        if operation.dim != 0 or channels > 1024 or len(self.program[node.inputs[0]].shape) == 1 < height * width:
            raise LoweringError("only a softmax over at most 1024 channels is among the instructions")
        place, image = self._stored(node.inputs[0]), self.images[node.name]
        kind = Kind.LOG_SUM_EXP if isinstance(operation, LogSumExp) else Kind.SOFTMAX
        instruction = Instruction(
            kind, place.buffer, place.channel, channels, channels=image[0], height=height, width=width
        )
        self._begin(node, [instruction])

    # ---- copies and views

    def _gather(
        self,
        place: _Place,
        image: Image,
        factor: tuple[int, int] = (1, 1),
        offset: tuple[int, int] = (0, 0),
    ) -> Instruction:
        """A copy of a stored result: pixel (y, x) reads ((y, x) + offset) / factor, on top of what its place says."""
        return Instruction(
            Kind.GATHER,
            source=place.buffer,
            source_channel=place.channel,
            source_channels=1 if place.spread else image[0],
            channels=image[0],
            height=image[1],
            width=image[2],
            kernel_y=factor[0] * place.factor[0],
            kernel_x=factor[1] * place.factor[1],
            pad_y=-offset[0],
            pad_x=-offset[1],
            spread=int(place.spread),
        )

    def _gathered(self, name: str, place: _Place, image: Image) -> _Group:
        """A new group that begins with a stored result."""
        group = _Group([self._gather(place, image)], [], name, image)
        self.groups.append(group)
        return group

    def _view(self, node: Node, operation: Operation) -> None:
        """Another name, shape or factor for the same memory, where nothing has to be moved."""
        name = node.inputs[0]
        if isinstance(operation, Reshape):
            if self.images[name] != self.images[node.name]:
                raise LoweringError(f"{self.program[name].shape} becomes {node.shape}")
            group = self._open(name)
            if group is not None and self.program.only_user(name) is not None:
                group.tip = node.name
                self.group_of[node.name] = self.group_of[name]
            else:
                self.places[node.name] = self._stored(name, plain=False)
            return
        place = self._stored(name, plain=False)
        if isinstance(operation, Upsample):
            rows, columns = operation.factor
            self.places[node.name] = replace(place, factor=(place.factor[0] * rows, place.factor[1] * columns))
        elif isinstance(operation, Broadcast):
            self._broadcast(node, place)
        elif isinstance(operation, Slice):
            self._slice(node, operation, place)

    def _broadcast(self, node: Node, place: _Place) -> None:
        source, target = self.images[node.inputs[0]], self.images[node.name]
        factor = [m // n for n, m in zip(source[1:], target[1:], strict=True)]
        self.places[node.name] = replace(
            place,
            factor=(place.factor[0] * factor[0], place.factor[1] * factor[1]),
            spread=place.spread or source[0] != target[0],
        )

    def _slice(self, node: Node, operation: Slice, place: _Place) -> None:
        shape, source = self.program[node.inputs[0]].shape, self.images[node.inputs[0]]
        if self.images[node.name][1:] != (source[1:] if len(shape) == 1 else node.shape[1:]):
            raise LoweringError("a part of a vector lies as an image elsewhere")
        if operation.dim == 0 and (len(shape) == 3 or source[1:] == (1, 1)):
            self.places[node.name] = place if place.spread else replace(place, channel=place.channel + operation.start)
            return
        if len(shape) != 3 or not place.plain:
            raise LoweringError("this slice is not among the instructions")
        offset = (operation.start, 0) if operation.dim == 1 else (0, operation.start)
        self._begin(node, [self._gather(place, self.images[node.name], offset=offset)])

    def _pad(self, node: Node, pad: Pad) -> None:
        """A constant border: a copy that reads it outside; around channels the inside over a filled buffer."""
        place, image = self._stored(node.inputs[0]), self.images[node.name]
        channel, *before = pad.before if len(pad.before) == 3 else (*pad.before, 0, 0)
        fill = self._number(pad.constant)
        inner = (self.images[node.inputs[0]][0], *image[1:])
        copy = replace(self._gather(place, inner, offset=(-before[0], -before[1])), constant=fill)
        if inner == image:
            self._begin(node, [copy])
            return
        if len(pad.before) == 1 and image[1:] != (1, 1):
            raise LoweringError("a vector that lies as an image is padded")
        # First the border, and then what lies within over it.
        buffer = self._buffer(image)
        border = replace(self._gather(replace(place, spread=True), image, offset=(-OUTSIDE, 0)), constant=fill)
        self.groups.append(_Group([border], [Epilogue(EpilogueOp.STORE, buffer)], "", image))
        self.groups.append(_Group([copy], [Epilogue(EpilogueOp.STORE, buffer, channel=channel)], "", inner))
        self.places[node.name] = _Place(buffer)

    def _append_one(self, node: Node) -> None:
        """A buffer with one more channel; for the samples themselves LOAD has put the ones there."""
        source = self.program[node.inputs[0]]
        if isinstance(source.operation, Input):
            self.places[node.name] = self._stored(node.inputs[0])
            return
        channels, height, width = self.images[source.name]
        buffer = self._buffer((channels + 1, height, width))
        copy = self._gathered(node.name, self._stored(source.name, plain=False), (channels, height, width))
        copy.epilogue.append(Epilogue(EpilogueOp.STORE, buffer))
        ones = Instruction(Kind.LOAD, height=height, width=width, constant=1)
        self.groups.append(
            _Group([ones], [Epilogue(EpilogueOp.STORE, buffer, channel=channels)], node.name, (1, height, width))
        )
        self.places[node.name] = _Place(buffer)
        copy.tip = self.groups[-1].tip = ""

    def _concatenate(self, node: Node, operation: Concatenate) -> None:
        """One buffer, into whose channels, rows or columns each part is copied."""
        shapes = self.program.shapes(node)
        if any(len(shape) == 1 and self.images[n][1:] != (1, 1) for shape, n in zip(shapes, node.inputs, strict=True)):
            raise LoweringError("vectors that lie as images are concatenated")
        if operation.dim > 0:
            self._begin(node, self._side_by_side(node, operation.dim))
            return
        buffer, channel = self._buffer(self.images[node.name]), 0
        for name in node.inputs:
            copy = self._gathered("", self._stored(name, plain=False), self.images[name])
            copy.epilogue.append(Epilogue(EpilogueOp.STORE, buffer, channel=channel))
            channel += self.images[name][0]
        self.places[node.name] = _Place(buffer)

    def _side_by_side(self, node: Node, dim: int) -> list[Instruction]:
        """Copies of images, each after the ones before it along rows (1) or columns (2)."""
        copies, reached = [], 0
        for name in node.inputs:
            copy = self._gather(self._stored(name, plain=False), self.images[name])
            copies.append(replace(copy, start_y=reached) if dim == 1 else replace(copy, start_x=reached))
            reached += self.images[name][dim]
        return copies

    # ---- pointwise operations, in the epilogue of a group

    def _pointwise(self, node: Node) -> None:
        """Into the epilogue of the group that made its newest input, or of a new one that begins with a copy."""
        name = self._joined(node)
        group = self._open(name) if name is not None else None
        if name is None or group is None:
            name = node.inputs[0]
            group = self._gathered(name, self._stored(name, plain=False), self.images[name])
            number = len(self.groups) - 1
        else:
            number = self.group_of[name]
            self._leave(group, node)
        self._extend(group, node, name)
        group.tip = node.name
        self.group_of[node.name] = number

    def _joined(self, node: Node) -> str | None:
        """The input whose group the operation joins: the newest, where the rest was made before."""
        candidates = node.inputs[:1] if isinstance(node.operation, ActivationDerivative) else node.inputs
        newest = max(
            (self.group_of[n] for n in node.inputs if n in self.group_of and self._open(n) is not None), default=-1
        )
        for name in candidates:
            newest_of_all = self._open(name) is not None and self.group_of[name] == newest
            others = [other for other in node.inputs if other != name]
            once = len(others) == len(node.inputs) - 1
            if newest_of_all and once and all(self._made_before(other, newest) for other in others):
                return name
        return None

    def _made_before(self, name: str, number: int) -> bool:
        """Whether a result is stored by a group before `number`."""
        if name in self.group_of and self._open(name) is not None:
            return self.group_of[name] < number
        place = self.places.get(name)
        if place is None:
            return True  # its derivative was kept instead
        writers = [
            k
            for k, group in enumerate(self.groups)
            if any(
                e.buffer == place.buffer and e.do in (EpilogueOp.STORE, EpilogueOp.ACTIVATE_KEEPING)
                for e in group.epilogue
            )
        ]
        return bool(writers) and max(writers) < number

    def _open(self, name: str) -> _Group | None:
        """The group whose newest value is `name`."""
        number = self.group_of.get(name)
        return self.groups[number] if number is not None and self.groups[number].tip == name else None

    def _extend(self, group: _Group, node: Node, name: str) -> None:
        """The steps of a pointwise operation on the value `name`, which the group holds."""
        operation, add = node.operation, group.epilogue.append
        if isinstance(operation, LinearCombination):
            for c, other in sorted(
                zip(operation.coefficients, node.inputs, strict=True), key=lambda term: term[1] != name
            ):
                if other == name:
                    if c != 1:
                        add(self._scale(c))
                else:
                    add(self._operand(EpilogueOp.ADD, other, number=self._number(c) if c != 1 else -1))
        elif isinstance(operation, Multiply):
            others = [other for other in node.inputs if other != name] or [name]
            add(self._operand(EpilogueOp.MULTIPLY, others[0]))
        elif isinstance(operation, Affine):
            for do, value in (
                (EpilogueOp.MULTIPLY_CONSTANT, operation.scale),
                (EpilogueOp.ADD_CONSTANT, operation.shift),
            ):
                if value is not None:
                    image = lazy(_as_image, value, self.images[node.name], node.shape)
                    add(Epilogue(do, number=self._constant(Constant("image"), image)))
        elif isinstance(operation, Activation):
            self._activate(group, node, operation, name)
        elif isinstance(operation, ActivationDerivative):
            kept = self.slopes.get((node.inputs[1], operation.kind, operation.parameters))
            if kept is not None:
                add(Epilogue(EpilogueOp.MULTIPLY, kept.buffer))
            else:
                step = self._operand(EpilogueOp.SLOPE, node.inputs[1], number=self._parameters(operation.parameters))
                add(replace(step, kind=KINDS.index(operation.kind), of_result=int(operation.of_result)))

    def _activate(self, group: _Group, node: Node, operation: Activation, name: str) -> None:
        kind, number = KINDS.index(operation.kind), self._parameters(operation.parameters)
        if any(self._keeps(user, operation, name) for user in self.program.users(name)):
            place = _Place(self._buffer(group.image))
            self.slopes[name, operation.kind, operation.parameters] = place
            group.epilogue.append(Epilogue(EpilogueOp.ACTIVATE_KEEPING, place.buffer, number=number, kind=kind))
        else:
            group.epilogue.append(Epilogue(EpilogueOp.ACTIVATE, number=number, kind=kind))

    @staticmethod
    def _keeps(user: Node, activation: Activation, name: str) -> bool:
        """Whether `user` wants the derivative of a costly activation at `name`."""
        slope = user.operation
        return (
            isinstance(slope, ActivationDerivative)
            and not slope.of_result
            and user.inputs[1] == name
            and user.inputs[0] != name
            and (slope.kind, slope.parameters) == (activation.kind, activation.parameters)
            and slope.kind in COSTLY
        )

    # ---- storing

    def _leave(self, group: _Group, joining: Node | None) -> None:
        """Store or deliver the newest value where anything but `joining` wants it."""
        name = group.tip
        if not name:
            return
        if name not in self.places and any(
            user is not joining and not self._served(user, name) for user in self.program.users(name)
        ):
            buffer = self._buffer(group.image)
            group.epilogue.append(Epilogue(EpilogueOp.STORE, buffer))
            self.places[name] = _Place(buffer)
        for output, do in ((self.energies, EpilogueOp.STORE_ENERGIES), (self.gradient, EpilogueOp.STORE_GRADIENT)):
            if name == output and not self._delivers(group, output):
                group.epilogue.append(Epilogue(do))

    def _served(self, user: Node, name: str) -> bool:
        """Whether `user` has what it wants of `name` without it: a derivative that is kept, or will be."""
        activations = [u.operation for u in self.program.users(name) if isinstance(u.operation, Activation)]
        return any(self._keeps(user, activation, name) for activation in activations)

    def _delivers(self, group: _Group, output: str) -> bool:
        do = EpilogueOp.STORE_ENERGIES if output == self.energies else EpilogueOp.STORE_GRADIENT
        return any(step.do == do for step in group.epilogue)

    def _stored(self, name: str, plain: bool = True) -> _Place:
        """Where a result is, stored now if it isn't yet; with `plain` as whole pixels, one by one."""
        if name not in self.places:
            group = self._open(name)
            if group is None:
                raise LoweringError(f"{name} was not kept")
            self._leave(group, None)
            if name not in self.places:
                raise LoweringError(f"{name} was not kept")
        place = self.places[name]
        if plain and not place.plain:
            copy = self._gathered("", place, self.images[name])
            buffer = self._buffer(self.images[name])
            copy.epilogue.append(Epilogue(EpilogueOp.STORE, buffer))
            place = self.places[name] = _Place(buffer)
        return place

    def _operand(self, do: EpilogueOp, name: str, number: int = -1) -> Epilogue:
        place = self._stored(name, plain=False)
        return Epilogue(do, place.buffer, place.channel, *place.factor, number=number, spread=int(place.spread))

    def _buffer(self, image: Image) -> int:
        self.buffers.append(Buffer(*image, bytes=self.bytes))
        return len(self.buffers) - 1

    def _constant(self, constant: Constant, value: LazyTensor) -> int:
        """The position of a new constant among all, of which number 0 holds the numbers."""
        self.constants.append(constant)
        self.values.append(value)
        return len(self.constants)  # constant 0 holds the numbers

    def _number(self, coefficient: Coefficient) -> int:
        self.numbers.append(coefficient)
        return len(self.numbers) - 1

    def _parameters(self, parameters: tuple[float, ...]) -> int:
        """The position of an activation's parameters, filled up to three; -1 where it has none."""
        if not parameters:
            return -1
        first = len(self.numbers)
        self.numbers += [*parameters, *[0.0] * (3 - len(parameters))]
        return first

    def _scale(self, factor: Coefficient) -> Epilogue:
        return Epilogue(EpilogueOp.SCALE, number=self._number(factor))


def _images(program: Program) -> dict[str, Image]:
    """How each result lies in memory, as (C, H, W).

    A vector that is an image somewhere else, or meets such a one in a pointwise operation, lies as that image, so that
    nothing has to be moved: the maps before and after it take its order into their weights.
    """
    images = {node.name: image_of(node.shape) for node in program}
    changed = True
    while changed:
        changed = False
        for node in program:
            if not isinstance(node.operation, (Reshape, *POINTWISE)):
                continue
            names = [node.name, *node.inputs]
            shaped = {images[n] for n in names if images[n][1:] != (1, 1)}
            flat = [n for n in names if images[n][1:] == (1, 1)]
            if len(shaped) > 1:
                raise LoweringError(f"{node.name}: one vector is several images")
            for n in flat:
                if shaped:
                    images[n], changed = next(iter(shaped)), True
    return images


def _phase(start: int, kernel: int, stride: int, padding: int, size: int) -> tuple[int, int, int, int]:
    """(first tap, taps, padding, length) of the outputs start, start + stride, ... along one axis."""
    first, shift = (start + padding) % stride, (start + padding) // stride
    taps = max(0, -(-(kernel - first) // stride))
    return first, taps, taps - 1 - shift, -(-(size - start) // stride)


def _flipped(weight: Tensor) -> Tensor:
    """(in, out, K, K) of a transposed convolution to (out, in, K, K) of a plain one."""
    return weight.transpose(0, 1).flip(2, 3)


def _taps(weight: Tensor, first: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Of a transposed convolution's weight the taps of one phase, for a plain convolution."""
    return _flipped(weight[:, :, first[0] :: stride[0], first[1] :: stride[1]])


def _over_image(weight: Tensor, image: Image) -> Tensor:
    """A linear map of a flattened image as a convolution that covers it."""
    return weight.reshape(-1, *image)


def _to_image(weight: Tensor, image: Image) -> Tensor:
    """A linear map to a flattened image as a convolution of one padded pixel."""
    return weight.reshape(*image, -1).permute(0, 3, 1, 2).flip(2, 3)


def _column(bias: Tensor) -> Tensor:
    return bias.reshape(-1, 1, 1)


def _spread_out(bias: Tensor, image: Image) -> Tensor:
    return bias.reshape(image)


def _as_image(value: Tensor, image: Image, shape: Shape) -> Tensor:
    """A value that broadcasts over samples of `shape`, as (C, H or 1, W or 1) of the image that they lie as."""
    if len(shape) == 2 or (len(shape) == 1 and image[1:] != (1, 1)):
        return value.expand(shape).reshape(image)
    if len(shape) == 0:
        return value.reshape(1, 1, 1)
    value = value.reshape((1,) * (len(shape) - value.dim()) + tuple(value.shape)) if value.dim() < len(shape) else value
    value = value.reshape(value.shape[-len(shape) :])
    if len(shape) == 1:
        value = value[:, None, None]
    return value.expand(image[0], -1, -1)


def _ones(channels: int, height: int, width: int, device: Callable[[], torch.device]) -> Tensor:
    return torch.ones(1, channels, height, width, device=device())
