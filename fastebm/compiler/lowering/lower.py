"""Lowers every operation of a program: which instruction computes it, or which stored result it is a view of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import Coefficient, LazyTensor, evaluate, lazy
from fastebm.compiler.lowering import layout
from fastebm.compiler.lowering.groups import OUTSIDE, POINTWISE, Group, Image, Location, LoweringError, WeightResult
from fastebm.compiler.lowering.weights import WeightBuilder
from fastebm.compiler.operations import Operation, Pair
from fastebm.compiler.program import Node, Program
from fastebm.ops.instructions import Buffer, Epilogue, EpilogueOp, Instruction, Kind
from fastebm.ops.program import DENSE, Constant, LoweredProgram
from fastebm.ops.weight_gradients import WeightTask

# Pixels of a window in which each is compared with all others.
MOST_COMPARED = 64


@dataclass(frozen=True)
class LoweringResult:
    """A lowered program, and the lazy tensors from which its constants are evaluated.

    `tasks` and `results` are those of the gradients of weights, where the program has any.
    """

    program: LoweredProgram
    numbers: tuple[Coefficient, ...]
    weights: tuple[LazyTensor, ...]
    tasks: tuple[WeightTask, ...] = ()
    results: tuple[WeightResult, ...] = ()

    def lazy_tensors(self) -> list[LazyTensor]:
        """All weights, and the numbers that are lazy tensors."""
        return [*self.weights, *(n for n in self.numbers if isinstance(n, LazyTensor))]

    def constants(self, results: dict[LazyTensor, Any] | None = None) -> tuple[list[Any], list[Tensor]]:
        """All numbers and weights, from `results`, or evaluated now."""
        results = evaluate(self.lazy_tensors()) if results is None else results
        numbers = [results[n] if isinstance(n, LazyTensor) else n for n in self.numbers]
        return numbers, [results[weight] for weight in self.weights]


def lower(program: Program, itemsize: int, trained: Container[LazyTensor] = ()) -> LoweringResult:
    """Lower a program whose outputs are energies and gradient, for numbers of `itemsize` bytes.

    Or energies alone, with gradients of the `trained` weights among its operations.

    Raises LoweringError with the node and the reason if no instruction computes one of its operations.
    """
    program = layout.flatten_samples(program)
    return _Lowering(program, itemsize, layout.assign_images(program), trained=trained).finish()


class _Lowering(WeightBuilder):
    """Lowers one program node by node."""

    def finish(self) -> LoweringResult:
        for node in self.program:
            try:
                self._lower(node)
            except LoweringError as reason:
                raise LoweringError(f"{node.name}: {reason}") from None
        for group in self.groups:
            self.close_group(group)
        for name, step in self.outputs():
            if not any(self.returns(group, step) for group in self.groups):
                self.close_group(self.copy_group(name, self.locations[name], self.images[name]))
        instructions: list[Instruction] = []
        epilogues: list[Epilogue] = []
        for group in self.groups:
            for instruction in group.instructions:
                instructions.append(replace(instruction, first=len(epilogues), count=len(group.epilogue)))
            epilogues += group.epilogue
        buffers, constants = self._mark_dense(instructions)
        sample = self.program.nodes[0].shape
        kept = frozenset(b for task in self.tasks for b in (task.gradient_buffer, task.source_buffer) if b >= 0)
        program = LoweredProgram(sample, self.bytes, buffers, tuple(instructions), tuple(epilogues), constants, kept)
        return LoweringResult(program, tuple(self.numbers), tuple(self.weights), tuple(self.tasks), tuple(self.results))

    def _mark_dense(self, instructions: list[Instruction]) -> tuple[tuple[Buffer, ...], tuple[Constant, ...]]:
        """Buffers of few channels, and the weights that read them, with `DENSE` numbers for each pixel."""
        convolutions = [i for i in instructions if i.kind == Kind.CONVOLUTION]
        wide = {i.source for i in convolutions if i.kernel_x > 8 or i.dilation_x > 1 or i.source_channel}
        dense = {b for b, buffer in enumerate(self.buffers) if buffer.channels <= DENSE and b not in wide}
        buffers = tuple(
            replace(buffer, pixel_stride=DENSE) if b in dense else buffer for b, buffer in enumerate(self.buffers)
        )
        constants = list(self.constants)
        for i in convolutions:
            constants[i.constant - 1] = replace(constants[i.constant - 1], dense=i.source in dense)
        return buffers, tuple(constants)

    def _lower(self, node: Node) -> None:
        operation = node.operation
        shapes = [node.shape, *self.program.input_shapes(node)]
        any_shape = (op.Input, op.Reshape, *POINTWISE)
        if any(len(shape) not in (0, 1, 3) for shape in shapes) and not isinstance(operation, any_shape):
            raise LoweringError(f"samples of shape {shapes[0]} are neither images nor vectors")
        if isinstance(operation, op.Input):
            self._input(node)
        elif isinstance(operation, op.Ones):
            self.open_group(node, [Instruction(Kind.LOAD, constant=1)], (1, 1, 1))
        elif isinstance(operation, POINTWISE):
            self.lower_pointwise(node)
        elif isinstance(operation, op.Convolution):
            self._add_bias(self.open_group(node, self._convolution(node, operation)), operation.bias)
        elif isinstance(operation, op.Linear):
            self._add_bias(self.open_group(node, [self._linear(node, operation)]), operation.bias)
        elif isinstance(operation, op.AveragePool):
            self._pool(node, operation)
        elif isinstance(operation, op.FirstMaximum):
            self._first_maximum(node, operation.kernel)
        elif isinstance(operation, op.AveragePoolBackward):
            self._pool_backward(node, operation.pool)
        elif isinstance(operation, op.Sum):
            self._sum(node, operation)
        elif isinstance(operation, op.LogSumExp | op.Softmax):
            self._softmax(node, operation)
        elif isinstance(operation, op.Reshape):
            self._reshape(node)
        elif isinstance(operation, op.Upsample | op.Broadcast | op.Slice):
            self._view(node, operation, self.locate(node.inputs[0], plain=False))
        elif isinstance(operation, op.Pad):
            self._pad(node, operation)
        elif isinstance(operation, op.AppendOnes):
            self._append_ones(node)
        elif isinstance(operation, op.Concatenate):
            self._concatenate(node, operation)
        elif isinstance(operation, op.WeightGradient):
            self.add_weight_tasks(node, operation.of)
        else:
            raise LoweringError(f"no instruction computes {type(operation).__name__}")

    def _input(self, node: Node) -> None:
        """The samples, with a channel of ones appended if the program needs one."""
        channels, height, width = self.images[node.name]
        ones = any(isinstance(user.operation, op.AppendOnes) for user in self.program.users(node.name))
        image = (channels + ones, height, width)
        load = Instruction(
            Kind.LOAD, source_channels=channels, channels=image[0], height=height, width=width, constant=int(ones)
        )
        self.open_group(node, [load], image)

    # ---- linear maps

    def _convolution(self, node: Node, conv: op.Convolution) -> list[Instruction]:
        if conv.groups != 1:
            raise LoweringError("no instruction computes a grouped convolution")
        image, location = self.images[node.name], self.locate(node.inputs[0])
        if not conv.transposed:
            return [self._convolve(location, conv.weight, image, conv.stride, conv.padding, conv.dilation)]
        if conv.stride == (1, 1):
            rows, columns = (d * (k - 1) - p for d, k, p in zip(conv.dilation, conv.kernel, conv.padding, strict=True))
            weight = lazy(layout.flip_weight, conv.weight)
            return [self._convolve(location, weight, image, (1, 1), (rows, columns), conv.dilation)]
        if conv.dilation != (1, 1):
            raise LoweringError("no instruction computes a transposed convolution with stride and dilation")
        starts = itertools.product(range(min(conv.stride[0], image[1])), range(min(conv.stride[1], image[2])))
        return [self._phase(location, conv, image, start) for start in starts]

    def _phase(self, location: Location, conv: op.Convolution, image: Image, start: Pair) -> Instruction:
        """One phase of a transposed convolution with a stride: the pixels start, start + stride, ... of the output."""
        axes = zip(start, conv.kernel, conv.stride, conv.padding, image[1:], strict=True)
        (first_y, taps_y, pad_y, rows), (first_x, taps_x, pad_x, columns) = (layout.phase(*axis) for axis in axes)
        image = (image[0], rows, columns)
        if taps_y and taps_x:
            weight = lazy(layout.phase_weight, conv.weight, (first_y, first_x), conv.stride)
            instruction = self._convolve(location, weight, image, padding=(pad_y, pad_x))
        else:  # no tap of the kernel reaches these pixels: zeros
            instruction = self.copy_from(replace(location, broadcast=True), image, offset=(-OUTSIDE, 0))
        return replace(instruction, start_y=start[0], start_x=start[1], step_y=conv.stride[0], step_x=conv.stride[1])

    def _convolve(
        self,
        location: Location,
        weight: LazyTensor,
        image: Image,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
    ) -> Instruction:
        """A plain convolution with `weight`, (out, in, K, K), that computes `image`."""
        _, channels, *kernel = weight.shape
        constant = self.add_constant("convolution", weight)
        size = (kernel[0], kernel[1])
        return self.window(Kind.CONVOLUTION, location, channels, image, size, stride, padding, dilation, constant)

    def _linear(self, node: Node, linear: op.Linear) -> Instruction:
        source, target = self.images[node.inputs[0]], self.images[node.name]
        if len(self.program[node.inputs[0]].shape) > 1:
            raise LoweringError("no instruction computes a linear map of anything but vectors")
        location = self.locate(node.inputs[0])
        if target[1:] == (1, 1):
            return self._convolve(location, lazy(layout.weight_from_image, linear.weight, source), target)
        if source[1:] == (1, 1):
            weight = lazy(layout.weight_to_image, linear.weight, target)
            return self._convolve(location, weight, target, padding=(target[1] - 1, target[2] - 1))
        raise LoweringError("no instruction computes a linear map from an image to an image")

    def _add_bias(self, group: Group, bias: LazyTensor | None) -> None:
        if bias is not None:
            image = layout.bias_image(bias, group.image)
            group.epilogue.append(Epilogue(EpilogueOp.ADD_CONSTANT, number=self.add_constant("image", image)))

    # ---- pools and sums

    def _pool(self, node: Node, pool: op.AveragePool) -> None:
        if pool.padding != (0, 0) and not pool.count_include_pad and pool.divisor is None:
            raise LoweringError("no instruction computes a pool that excludes its padding from the mean")
        if replace(pool, ceil_mode=False).shape(self.images[node.inputs[0]]) != self.images[node.name]:
            raise LoweringError("no instruction computes a pool in ceil mode")
        self._window_sum(node, pool.kernel, pool.stride, pool.padding, 1.0 / (pool.divisor or math.prod(pool.kernel)))

    def _window_sum(self, node: Node, kernel: Pair, stride: Pair, padding: Pair, factor: float) -> None:
        """Sums over windows, times `factor`."""
        location, image = self.locate(node.inputs[0]), self.images[node.name]
        group = self.open_group(node, [self.window(Kind.POOL, location, image[0], image, kernel, stride, padding)])
        if factor != 1:
            group.epilogue.append(self.scaling(factor))

    def _first_maximum(self, node: Node, kernel: Pair) -> None:
        if math.prod(kernel) > MOST_COMPARED:
            raise LoweringError(f"no instruction looks for maxima in windows of more than {MOST_COMPARED} pixels")
        image = self.images[node.name]
        window = self.window(Kind.FIRST_MAXIMUM, self.locate(node.inputs[0]), image[0], image, kernel)
        self.open_group(node, [window])

    def _pool_backward(self, node: Node, pool: op.AveragePool) -> None:
        if not pool.simple:
            raise LoweringError("no instruction computes the derivative of a pool with overlapping or padded windows")
        copy = self.copy_from(self.locate(node.inputs[0]), self.images[node.name], factor=pool.kernel)
        self.open_group(node, [copy]).epilogue.append(self.scaling(1.0 / math.prod(pool.kernel)))

    def _sum(self, node: Node, operation: op.Sum) -> None:
        shape, image = self.program[node.inputs[0]].shape, self.images[node.inputs[0]]
        dims = operation.dims if len(shape) == 3 else (0, 1, 2)
        kernel = (image[1] if 1 in dims else 1, image[2] if 2 in dims else 1)
        if 0 not in dims:
            self._window_sum(node, kernel, (1, 1), (0, 0), 1.0)
            return
        arguments = (image[0], *kernel, self._weight_device())
        weight = LazyTensor(layout.ones_weight, arguments, (1, image[0], *kernel))
        self.open_group(node, [self._convolve(self.locate(node.inputs[0]), weight, self.images[node.name])])

    def _weight_device(self) -> Callable[[], torch.device]:
        """The device of the program's weights; the CPU if it has none."""
        weight = next((weight for node in self.program for weight in node.operation.weights()), None)
        return lambda: torch.device("cpu") if weight is None else evaluate([weight])[weight].device

    def _softmax(self, node: Node, operation: op.LogSumExp | op.Softmax) -> None:
        channels, height, width = self.images[node.inputs[0]]
        if operation.dim != 0 or channels > 1024 or len(self.program[node.inputs[0]].shape) == 1 < height * width:
            raise LoweringError("no instruction computes a softmax over anything but 1024 channels or fewer")
        kind = Kind.LOG_SUM_EXP if isinstance(operation, op.LogSumExp) else Kind.SOFTMAX
        image = (self.images[node.name][0], height, width)
        self.open_group(node, [self.window(kind, self.locate(node.inputs[0]), channels, image)])

    # ---- views: other names, shapes or factors for a stored result

    def _reshape(self, node: Node) -> None:
        name = node.inputs[0]
        if self.images[name] != self.images[node.name]:
            raise LoweringError(f"no instruction reshapes {self.program[name].shape} to {node.shape}")
        group = self.group_ending_in(name)
        if group is not None and self.program.only_user(name) is not None:
            group.result = node.name
            self.group_of[node.name] = self.group_of[name]
        else:
            self.locations[node.name] = self.locate(name, plain=False)

    def _view(self, node: Node, operation: Operation, location: Location) -> None:
        source, target = self.images[node.inputs[0]], self.images[node.name]
        if isinstance(operation, op.Slice):
            self._slice(node, operation, location)
            return
        rows, columns = (m // n * f for n, m, f in zip(source[1:], target[1:], location.factor, strict=True))
        broadcast = location.broadcast or source[0] != target[0]
        self.locations[node.name] = replace(location, factor=(rows, columns), broadcast=broadcast)

    def _slice(self, node: Node, operation: op.Slice, location: Location) -> None:
        shape, source = self.program[node.inputs[0]].shape, self.images[node.inputs[0]]
        if self.images[node.name][1:] != (source[1:] if len(shape) == 1 else node.shape[1:]):
            raise LoweringError("no instruction slices a vector whose part lies as an image")
        if operation.dim == 0 and (len(shape) == 3 or source[1:] == (1, 1)):
            channel = location.channel if location.broadcast else location.channel + operation.start
            self.locations[node.name] = replace(location, channel=channel)
            return
        if len(shape) != 3 or not location.plain:
            raise LoweringError("no instruction computes this slice")
        offset = (operation.start, 0) if operation.dim == 1 else (0, operation.start)
        self.open_group(node, [self.copy_from(location, self.images[node.name], offset=offset)])

    # ---- copies

    def _pad(self, node: Node, pad: op.Pad) -> None:
        """A constant border: a copy that reads outside its source, or, around channels, a copy into a filled buffer."""
        location, image = self.locate(node.inputs[0]), self.images[node.name]
        channel, *before = pad.before if len(pad.before) == 3 else (*pad.before, 0, 0)
        fill = self.add_number(pad.constant)
        inner = (self.images[node.inputs[0]][0], *image[1:])
        copy = self.copy_from(location, inner, offset=(-before[0], -before[1]), fill=fill)
        if inner == image:
            self.open_group(node, [copy])
            return
        if len(pad.before) == 1 and image[1:] != (1, 1):
            raise LoweringError("no instruction pads a vector that lies as an image")
        buffer = self.add_buffer(image)
        border = self.copy_from(replace(location, broadcast=True), image, offset=(-OUTSIDE, 0), fill=fill)
        self.add_group("", [border], image, Epilogue(EpilogueOp.STORE, buffer))
        self.add_group("", [copy], inner, Epilogue(EpilogueOp.STORE, buffer, channel=channel))
        self.locations[node.name] = Location(buffer)

    def _append_ones(self, node: Node) -> None:
        """A buffer with one more channel. For the samples themselves, `_input` has appended the ones."""
        source = self.program[node.inputs[0]]
        if isinstance(source.operation, op.Input):
            self.locations[node.name] = self.locate(source.name)
            return
        channels, height, width = self.images[source.name]
        buffer = self.add_buffer((channels + 1, height, width))
        location = self.locate(source.name, plain=False)
        self.copy_group("", location, (channels, height, width), Epilogue(EpilogueOp.STORE, buffer))
        ones = Instruction(Kind.LOAD, height=height, width=width, constant=1)
        self.add_group("", [ones], (1, height, width), Epilogue(EpilogueOp.STORE, buffer, channel=channels))
        self.locations[node.name] = Location(buffer)

    def _concatenate(self, node: Node, operation: op.Concatenate) -> None:
        """One buffer, into whose channels, rows or columns each input is copied."""
        shapes = self.program.input_shapes(node)
        if any(len(shape) == 1 and self.images[n][1:] != (1, 1) for shape, n in zip(shapes, node.inputs, strict=True)):
            raise LoweringError("no instruction concatenates vectors that lie as images")
        axis, start = operation.dim, 0
        if axis > 0:
            copies = []
            for name in node.inputs:
                copy = self.copy_from(self.locate(name, plain=False), self.images[name])
                copies.append(replace(copy, start_y=start) if axis == 1 else replace(copy, start_x=start))
                start += self.images[name][axis]
            self.open_group(node, copies)
            return
        buffer = self.add_buffer(self.images[node.name])
        for name in node.inputs:
            store = Epilogue(EpilogueOp.STORE, buffer, channel=start)
            self.copy_group("", self.locate(name, plain=False), self.images[name], store)
            start += self.images[name][0]
        self.locations[node.name] = Location(buffer)
