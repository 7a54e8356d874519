"""The rules of a planned program: what its numbers must keep for kernels to follow them without looking.

`check_code` reads a program once, as it would run on one worker, and gives the `Needs` of a call: which constants,
which samples and how much memory. It refuses

- numbers beyond their ranges, tables beyond their lengths, and buffers beyond the slot;
- an instruction that reads or writes anything beyond its buffers, or a constant beyond its shape;
- a buffer that is read before all of it was written in this very call, or after another has taken its memory;
- grids and borders out of all proportion to the memory of the program, which would never end.

`csrc/cpu/program_check.cpp` has the same rules for the C++ kernels, which trust no caller; tests/fuzz/test_operators.py
compares the two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .activations import ACTIVATION_TABLE, PROGRAM_ACTIVATIONS
from .instructions import (
    Buffer,
    Epilogue,
    EpilogueOp,
    Instruction,
    Kind,
    Layout,
    PlannedProgram,
    decode,
)
from .tiles import DENSE, tile_reach, tile_window

__all__ = ["Needs", "check_code", "checked_bytes", "checked_program"]

# Numbers of pixels, channels and the like stay below the first, bytes and strides of rows and images below the second.
LIMIT = 1 << 31
MEMORY_LIMIT = 1 << 47
# Channels that a softmax has room for in C++, and more constants than any program has.
SOFTMAX_CHANNELS = 1024
MOST_CONSTANTS = 1 << 20
LINE = 64
# Filling behind the channels of a constant image, by the bytes of a number (`LANES` of program.py).
LANES = {2: 32, 4: 16, 8: 1}
_WEIGHTS = {Layout.PANELS: torch.float32, Layout.TILES: torch.bfloat16, Layout.PAIRS: torch.bfloat16}
_STORED = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_READS = (EpilogueOp.ADD, EpilogueOp.MULTIPLY, EpilogueOp.SLOPE)
_WRITES = (EpilogueOp.STORE, EpilogueOp.ACTIVATE_KEEPING)
_CONSTANTS = (EpilogueOp.ADD_CONSTANT, EpilogueOp.MULTIPLY_CONSTANT)
_ACTIVATIONS = (EpilogueOp.ACTIVATE, EpilogueOp.ACTIVATE_KEEPING, EpilogueOp.SLOPE)

Axis = tuple[int, int, int]  # start, step, count
Box = tuple[Axis, Axis, Axis]  # channels, rows, columns


@dataclass
class Needs:
    """What a call must bring to a checked program.

    Attributes:
        bytes, chunk, workspace: of a number, the images of a worker, and the bytes of all slots.
        numbers: how many the first constant must have at least.
        weights: by constant, its exact shape.
        images: by constant, the least (channels, height, width); a height or width of 1 stands for all.
        weight_dtype: of the weights.
        sample: (C, H, W) of the samples that are loaded, or None if none are.
        gradient: the least (C, H, W) of a sample whose gradient is written, C exactly; None if none is.
        whole_gradient: whether every entry within `gradient` is written.
        energies: whether the energies are written.
        kept: the buffers that hold every image of a chunk when the program has run.
    """

    bytes: int
    chunk: int
    workspace: int
    weight_dtype: torch.dtype
    numbers: int = 0
    weights: dict[int, tuple[int, ...]] = field(default_factory=dict)
    images: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    sample: tuple[int, int, int] | None = None
    gradient: tuple[int, int, int] | None = None
    whole_gradient: bool = False
    energies: bool = False
    kept: frozenset[int] = frozenset()

    def check_call(self, x: Tensor, constants: Sequence[Tensor]) -> bool:
        """Raises ValueError where x or constants are not what the program reads.

        Returns whether it writes all energies and the whole gradient.
        """
        given = tuple(x.shape[1:]) if x.dim() == 4 else (x.shape[1:].numel(), 1, 1)
        channels, height, width = given
        if self.sample not in (None, given):
            raise ValueError(
                f"this program is for samples of {_by(self.sample)} numbers, got x of shape {tuple(x.shape)}"
            )
        least = self.gradient
        if least is not None and (channels != least[0] or height < least[1] or width < least[2]):
            raise ValueError(f"this program writes a gradient of {_by(least)} numbers, got x of shape {tuple(x.shape)}")
        wide = torch.float64 if self.bytes == 8 else torch.float32
        if not constants or constants[0].dtype not in (wide, x.dtype) or constants[0].dim() != 1:
            raise ValueError(f"the first constant must be the numbers, a vector in {wide}")
        if constants[0].numel() < self.numbers:
            raise ValueError(f"the first constant must have {self.numbers} numbers, got {constants[0].numel()}")
        last = max((0, *self.weights, *self.images))
        if last >= len(constants):
            raise ValueError(f"this program reads {last + 1} constants, got {len(constants)}")
        for number, shape in self.weights.items():
            tensor = constants[number]
            if tuple(tensor.shape) != shape or tensor.dtype != self.weight_dtype:
                raise ValueError(
                    f"constant {number} must be a weight {shape} in {self.weight_dtype}, "
                    f"got {tuple(tensor.shape)} in {tensor.dtype}"
                )
        for number, image in self.images.items():
            tensor = constants[number]
            if tensor.dtype != wide or tensor.dim() != 3 or not self._covers(tensor, image):
                raise ValueError(
                    f"constant {number} must be an image ({image[1]} or 1, {image[2]} or 1, {image[0]} and filling) "
                    f"in {wide}, got {tuple(tensor.shape)} in {tensor.dtype}"
                )
        return self.energies and self.whole_gradient and self.gradient == given

    def _covers(self, tensor: Tensor, image: tuple[int, int, int]) -> bool:
        height, width, channels = tensor.shape
        filled = channels >= image[0] and channels % LANES[self.bytes] == 0
        return filled and (height == 1 or height >= image[1]) and (width == 1 or width >= image[2])

    def check_workspace(self, workspace: Tensor) -> None:
        """Raises ValueError where the slots do not lie in the workspace."""
        vector = workspace.dtype == torch.uint8 and workspace.dim() == 1 and workspace.is_contiguous()
        if not vector or workspace.numel() < self.workspace or workspace.data_ptr() % LINE:
            raise ValueError(
                f"the workspace must be a vector of {self.workspace} bytes or more, at a multiple of {LINE}, "
                f"got {workspace.dtype} {tuple(workspace.shape)}"
            )


def _by(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape or ()))


def checked_program(code: Tensor) -> tuple[PlannedProgram, Needs]:
    """The program behind a code and its needs. Raises ValueError where it breaks a rule."""
    if code.dtype != torch.int64 or code.dim() != 1 or code.device.type != "cpu":
        raise ValueError(f"code must be an int64 vector on the CPU, got {code.dtype} {tuple(code.shape)}")
    return checked_bytes(code.numpy().tobytes())


@functools.lru_cache(maxsize=256)
def checked_bytes(code: bytes) -> tuple[PlannedProgram, Needs]:
    """`checked_program` for the contents of a code."""
    program = decode(torch.frombuffer(bytearray(code or bytes(8)), dtype=torch.int64))
    return program, check_code(program)


def check_code(program: PlannedProgram) -> Needs:
    """The needs of a program. Raises ValueError, in one line, where it breaks a rule."""
    return _Check(program).run()


class _Coverage:
    """Which part of an image was written, as boxes of a grid. One that overlaps others counts only if it is whole."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.total = channels * height * width
        self.covered = 0
        self.boxes: list[Box] = []

    def add(self, box: Box) -> None:
        size = math.prod(count for _, _, count in box)
        if size == self.total:
            self.boxes, self.covered = [box], size
        elif box not in self.boxes and all(_disjoint(box, other) for other in self.boxes):
            self.boxes.append(box)
            self.covered += size

    @property
    def whole(self) -> bool:
        return self.covered == self.total

    def clear(self) -> None:
        self.boxes, self.covered = [], 0


def _disjoint(a: Box, b: Box) -> bool:
    for (start, step, count), (other, other_step, other_count) in zip(a, b, strict=True):
        if start + step * (count - 1) < other or other + other_step * (other_count - 1) < start:
            return True
        if step == other_step and (start - other) % step:
            return True
    return False


class _Check:
    """One pass over a program."""

    def __init__(self, program: PlannedProgram) -> None:
        self.program, header = program, program.header
        self.needs = Needs(
            header.bytes,
            header.chunk,
            header.slot * header.workers,
            _WEIGHTS.get(Layout(header.layout) if header.layout in set(Layout) else Layout.PLAIN)
            or _STORED.get(header.bytes, torch.float32),
        )
        self.used: dict[int, _Coverage] = {}
        self.segment_of: dict[int, int] = {}
        self.gradient: _Coverage | None = None
        self.at = "the header"

    def refuse_unless(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"code is not a program that can run: {self.at}: {rule}")

    def within(self, name: str, number: int, low: int, high: int = LIMIT) -> None:
        self.refuse_unless(low <= number < high, f"{name} must be in [{low}, {high}), got {number}")

    def run(self) -> Needs:
        header = self.program.header
        for name, number, low, high in (
            ("layout", header.layout, 0, len(Layout)),
            ("panel", header.panel, 0, LIMIT),
            ("chunk", header.chunk, 1, LIMIT),
            ("slot", header.slot, 0, MEMORY_LIMIT),
            ("workers", header.workers, 1, LIMIT),
            ("team", header.team, 0, 2),
        ):
            self.within(name, number, low, high)
        self.refuse_unless(header.bytes in LANES, f"bytes must be 2, 4 or 8, got {header.bytes}")
        self.refuse_unless(header.layout != Layout.PANELS or header.panel in (16, 32), "a panel has 16 or 32 outputs")
        self.refuse_unless(header.layout != Layout.TILES or header.bytes == 2, "tiles are of 2 bytes")
        self.refuse_unless(
            header.layout != Layout.PAIRS or (header.bytes == 2 and header.panel == 32),
            "pairs are of 2 bytes, in panels of 32 outputs",
        )
        self.refuse_unless(header.bytes != 8 or header.layout == Layout.PLAIN, "8 bytes are for plain weights")
        expected = 0
        for number, segment in enumerate(self.program.segments):
            self.at = f"segment {number}"
            self.within("images", segment.images, 1, header.chunk + 1)
            self.within("count", segment.count, 0)
            self.refuse_unless(segment.first == expected, "segments must follow one another")
            self.refuse_unless(
                header.layout != Layout.PLAIN or segment.images == header.chunk, "plain programs go in one piece"
            )
            expected += segment.count
        self.refuse_unless(expected == len(self.program.instructions), "segments must cover all instructions")
        for number, segment in enumerate(self.program.segments):
            self.segment(number, segment.images, range(segment.first, segment.first + segment.count))
        if self.gradient is not None:
            self.needs.whole_gradient = self.gradient.whole
        whole = (b for b, coverage in self.used.items() if coverage.whole)
        self.needs.kept = frozenset(b for b in whole if self.program.buffers[b].images >= header.chunk)
        return self.needs

    def segment(self, number: int, images: int, instructions: range) -> None:
        """Where a segment is run more than once for a chunk, nothing that outlives a run may lie where it writes."""
        self.dead: set[int] = set()
        writes = [self._writes(i) for i in instructions]
        if images < self.program.header.chunk:
            written = {step.buffer for steps in writes for step in steps}
            for b in set(self.used) | written:
                buffer = self.program.buffers[b]
                if buffer.images >= self.program.header.chunk and any(w != b and self._overlap(b, w) for w in written):
                    self.dead.add(b)
                    if b in self.used:
                        self.used[b].clear()
        for i, steps in zip(instructions, writes, strict=True):
            self.at = f"instruction {i}"
            self.instruction(self.program.instructions[i], number, images, steps)

    def _writes(self, number: int) -> list[Epilogue]:
        """The operations of an instruction that write a buffer, whose numbers are checked for being there."""
        self.at, i = f"instruction {number}", self.program.instructions[number]
        self.within("first", i.first, 0, len(self.program.epilogues) + 1)
        self.within("count", i.count, 0, len(self.program.epilogues) - i.first + 1)
        found = [step for step in self.program.epilogue(i) if step.op in _WRITES]
        for step in found:
            self.buffer(step.buffer)
        return found

    # ---- buffers

    def buffer(self, number: int) -> Buffer:
        """A buffer that is used. Checked at its first use: those that nothing uses have no place."""
        self.within("a buffer's number", number, 0, len(self.program.buffers))
        b = self.program.buffers[number]
        if number in self.used:
            return b
        at, self.at = self.at, f"buffer {number}"
        header = self.program.header
        for name in ("channels", "height", "width", "images", "pixel_stride"):
            self.within(name, getattr(b, name), 1)
        self.within("margin", b.margin, 0)
        for name in ("row_stride", "image_stride"):
            self.within(name, getattr(b, name), 1, MEMORY_LIMIT)
        self.within("offset", b.offset, 0, MEMORY_LIMIT)
        self.refuse_unless(b.offset % LINE == 0, f"the offset must be a multiple of {LINE}, got {b.offset}")
        self.refuse_unless(b.bytes == header.bytes, f"a number has {header.bytes} bytes in this program, got {b.bytes}")
        row = (2 * b.margin + b.width) * b.pixel_stride
        if b.image_stride < b.pixel_stride:  # images lie pixel by pixel beside each other
            self.refuse_unless(header.layout != Layout.PLAIN, "images beside each other are not for plain weights")
            fits = b.channels <= b.image_stride and b.images * b.image_stride <= b.pixel_stride and row == b.row_stride
        else:
            fits = b.channels <= b.pixel_stride and row <= b.row_stride and b.height * b.row_stride <= b.image_stride
        self.refuse_unless(fits, "pixels, rows or images overlap")
        self.refuse_unless(b.row_stride % b.pixel_stride == 0, "a row must be a number of pixels")
        begin, end = extent(b)
        self.refuse_unless(end <= header.slot, f"it lies at [{begin}, {end}), beyond the slot of {header.slot} bytes")
        self.used[number] = _Coverage(b.channels, b.height, b.width)
        self.at = at
        return b

    def _overlap(self, one: int, other: int) -> bool:
        (begin, end), (other_begin, other_end) = (extent(self.program.buffers[b]) for b in (one, other))
        return begin < other_end and other_begin < end

    def use(self, number: int, segment: int, images: int) -> Buffer:
        """A buffer in a segment. One with fewer images than a chunk belongs to one segment."""
        b = self.buffer(number)
        if b.images < self.program.header.chunk:
            self.refuse_unless(b.images >= images, f"buffer {number} has room for {b.images} images of {images}")
            self.refuse_unless(
                self.segment_of.setdefault(number, segment) == segment, f"buffer {number} is of another segment"
            )
        return b

    # ---- instructions

    def instruction(self, i: Instruction, segment: int, images: int, writes: list[Epilogue]) -> None:
        for name in ("channels", "height", "width", "step_y", "step_x", "kernel_y", "kernel_x", "stride_y", "stride_x"):
            self.within(name, getattr(i, name), 1)
        for name in ("start_y", "start_x", "source_channel", "source_channels"):
            self.within(name, getattr(i, name), 0)
        for name in ("dilation_y", "dilation_x"):
            self.within(name, getattr(i, name), 1)
        for name in ("pad_y", "pad_x", "constant"):
            self.within(name, getattr(i, name), -LIMIT + 1)
        self.within("kind", i.kind, 0, len(Kind))
        self.within("broadcast", i.broadcast, 0, 2)
        steps = self.program.epilogue(i)
        size = i.channels * i.height * i.width
        slot = self.program.header.slot
        bounded = size <= (1 << 20) + 4 * slot or any(step.op == EpilogueOp.STORE_GRADIENT for step in steps)
        self.refuse_unless(bounded, f"its grid of {size} numbers is out of proportion to a slot of {slot} bytes")
        if i.kind == Kind.LOAD:
            self.load(i)
        else:
            self.source(i, self.use(i.source, segment, images), images, writes)
        own: dict[int, int] = {}
        for step in steps:
            self.step(i, step, segment, images, writes, own)
        for step in writes:
            for other, coverage in self.used.items():
                if other != step.buffer and self._overlap(other, step.buffer):
                    coverage.clear()
            if step.buffer not in self.dead:
                self.used[step.buffer].add(_box(i, step.channel))

    def load(self, i: Instruction) -> None:
        self.refuse_unless(i.source == -1, "LOAD has no source")
        if not i.source_channels:
            return
        ones = int(i.constant > 0)
        self.refuse_unless(i.channels == i.source_channels + ones, "LOAD has the sample's channels, and one of ones")
        sample = (i.source_channels, i.height, i.width)
        self.refuse_unless(self.needs.sample in (None, sample), "all samples have one shape")
        self.needs.sample = sample

    def source(self, i: Instruction, b: Buffer, images: int, writes: list[Epilogue]) -> None:
        self.within("source_channels", i.source_channels, 1)
        behind = i.source_channel + i.source_channels
        self.refuse_unless(behind <= b.channels, f"it reads channels to {behind} of {b.channels} in buffer {i.source}")
        self.refuse_unless(self.used[i.source].whole, f"it reads buffer {i.source} before all of it is written")
        written = any(step.buffer == i.source or self._overlap(step.buffer, i.source) for step in writes)
        self.refuse_unless(not written, f"it writes where it reads, buffer {i.source}")
        if i.kind == Kind.GATHER:
            channels = 1 if i.broadcast else i.channels
            self.refuse_unless(i.source_channels == channels, f"GATHER reads {channels} channels")
            if i.constant >= 0:
                self.needs.numbers = max(self.needs.numbers, i.constant + 1)
        elif i.kind == Kind.CONVOLUTION:
            self.border(i, b, i.kernel_y * i.kernel_x * i.source_channels * i.channels)
            self.weight(i, b, images)
        elif i.kind == Kind.POOL:
            self.refuse_unless(i.source_channels == i.channels, "POOL keeps channels")
            self.refuse_unless(i.dilation_y == i.dilation_x == 1, "POOL has no dilation")
            self.border(i, b, 0)
        elif i.kind == Kind.FIRST_MAXIMUM:
            shapes = (i.source_channels, b.height, b.width), (i.channels, i.height, i.width)
            self.refuse_unless(shapes[0] == shapes[1], "FIRST_MAXIMUM keeps shapes")
        else:
            channels = i.source_channels if i.kind == Kind.SOFTMAX else 1
            self.refuse_unless(i.channels == channels, f"a softmax over {i.source_channels} has {channels} channels")
            self.refuse_unless(
                i.source_channels <= SOFTMAX_CHANNELS, f"a softmax has {SOFTMAX_CHANNELS} channels at most"
            )
            self.refuse_unless((i.height, i.width) == (b.height, b.width), "a softmax keeps pixels")

    def border(self, i: Instruction, b: Buffer, weights: int) -> None:
        """The source with all that windows see around it, which the reference lays out."""
        padded = i.source_channels
        for n, size, s, k, d, p in (
            (i.height, b.height, i.stride_y, i.kernel_y, i.dilation_y, i.pad_y),
            (i.width, b.width, i.stride_x, i.kernel_x, i.dilation_x, i.pad_x),
        ):
            padded *= max(size, (n - 1) * s + (k - 1) * d + 1 - p) + max(0, p)
        self.refuse_unless(
            padded <= (1 << 20) + 64 * self.program.header.slot + 4 * weights,
            f"its windows reach over {padded} numbers, out of proportion to what there is",
        )

    def weight(self, i: Instruction, b: Buffer, images: int) -> None:
        self.within("constant", i.constant, 1, MOST_CONSTANTS)
        taps, header = i.kernel_y * i.kernel_x, self.program.header
        shape: tuple[int, ...]
        if header.layout == Layout.PLAIN:
            shape = (taps, i.source_channels, i.channels)
        elif header.layout == Layout.PANELS:
            shape = (-(-i.channels // header.panel), taps, i.source_channels, header.panel)
        elif header.layout == Layout.PAIRS:
            taps = 1 if i.taps_are_outputs else taps
            shape = (-(-i.channels // header.panel), taps, -(-i.source_channels // 2), header.panel, 2)
        else:
            dense = b.pixel_stride == DENSE
            if dense:
                short = i.kernel_x <= 32 // DENSE and i.dilation_x == 1 and i.source_channel == 0
                self.refuse_unless(short, "rows of a kernel over few channels have 8 pixels at most")
            tiles = 1 if i.channels <= 16 else 2
            steps = i.kernel_y if dense else taps * -(-i.source_channels // 32)
            shape = (-(-i.channels // (16 * tiles)), steps, tiles, 16, 16, 2)
            left, right = tile_window(i, b)
            zeros = b.row_stride // b.pixel_stride - b.margin - b.width
            self.refuse_unless(
                left <= b.margin and right <= zeros,
                f"windows see {left} and {right} pixels beside buffer {i.source}, which has {b.margin} and {zeros}",
            )
            reach = tile_reach(i, b, images)
            self.refuse_unless(reach <= header.slot, f"tiles reach to {reach}, beyond the slot of {header.slot} bytes")
        self.refuse_unless(self.needs.weights.setdefault(i.constant, shape) == shape, "a constant has one shape")
        self.refuse_unless(i.constant not in self.needs.images, "a constant is a weight or an image")

    # ---- epilogues

    def step(
        self, i: Instruction, step: Epilogue, segment: int, images: int, writes: list[Epilogue], own: dict[int, int]
    ) -> None:
        self.within("an operation's number", step.op, 0, len(EpilogueOp))
        self.within("number", step.number, -1)
        rows, columns = i.start_y + i.step_y * (i.height - 1), i.start_x + i.step_x * (i.width - 1)
        if step.op in _CONSTANTS:
            self.within("a constant's number", step.number, 1, MOST_CONSTANTS)
            self.refuse_unless(step.number not in self.needs.weights, "a constant is a weight or an image")
            known = self.needs.images.get(step.number, (1, 1, 1))
            needed = zip(known, (i.channels, rows + 1, columns + 1), strict=True)
            self.needs.images[step.number] = tuple(max(pair) for pair in needed)  # type: ignore[assignment]
            return
        if step.op == EpilogueOp.STORE_ENERGIES:
            self.refuse_unless(i.channels == i.height == i.width == 1, "an energy is one number")
            self.needs.energies = True
            return
        if step.op == EpilogueOp.STORE_GRADIENT:
            self.store_gradient(i, rows + 1, columns + 1)
            return
        if step.op == EpilogueOp.SCALE:
            self.within("a factor's number", step.number, 0)
        count = 3 if step.op in _ACTIVATIONS else 1
        if step.number >= 0:
            self.needs.numbers = max(self.needs.numbers, step.number + count)
        if step.op in _ACTIVATIONS:
            self.within("activation", step.activation, 0, len(PROGRAM_ACTIVATIONS))
            row = ACTIVATION_TABLE[step.activation]
            self.refuse_unless(step.number >= 0 or not row.num_parameters, f"{row.name} has parameters")
        if step.op == EpilogueOp.SLOPE:
            self.within("of_result", step.of_result, 0, 2)
            formula = row.backward_of_result if step.of_result else row.backward
            self.refuse_unless(formula is not None, f"{row.name} has no derivative by its result")
        if step.op in _READS or step.op in _WRITES:
            self.operand(i, step, self.use(step.buffer, segment, images), rows, columns, writes, own)

    def operand(
        self,
        i: Instruction,
        step: Epilogue,
        b: Buffer,
        rows: int,
        columns: int,
        writes: list[Epilogue],
        own: dict[int, int],
    ) -> None:
        """Reads and writes of a buffer at the grid's places."""
        self.within("factor_y", step.factor_y, 1)
        self.within("factor_x", step.factor_x, 1)
        self.within("channel", step.channel, 0)
        self.within("broadcast", step.broadcast, 0, 2)
        behind = step.channel + (1 if step.broadcast else i.channels)
        self.refuse_unless(behind <= b.channels, f"channels to {behind} of {b.channels} in buffer {step.buffer}")
        inside = rows // step.factor_y < b.height and columns // step.factor_x < b.width
        self.refuse_unless(
            inside, f"pixel ({rows}, {columns}) is beyond buffer {step.buffer} of {b.height}x{b.width} pixels"
        )
        straight = step.factor_y == step.factor_x == 1 and not step.broadcast
        if step.op in _WRITES:
            self.refuse_unless(straight, "what is written has each pixel and channel")
            for other in writes:
                same = other.buffer == step.buffer
                apart = abs(other.channel - step.channel) >= i.channels
                clash = (
                    not (other.channel == step.channel or apart) if same else self._overlap(other.buffer, step.buffer)
                )
                self.refuse_unless(not clash, f"two operations write to one place, in buffer {step.buffer}")
            own.setdefault(step.buffer, step.channel)
            return
        if straight and own.get(step.buffer) == step.channel:
            return
        self.refuse_unless(self.used[step.buffer].whole, f"it reads buffer {step.buffer} before all of it is written")
        for other in writes:
            same = other.buffer == step.buffer and straight and other.channel == step.channel
            self.refuse_unless(
                same or not (other.buffer == step.buffer or self._overlap(other.buffer, step.buffer)),
                f"it writes where it reads, buffer {step.buffer}",
            )

    def store_gradient(self, i: Instruction, height: int, width: int) -> None:
        least = self.needs.gradient or (i.channels, 1, 1)
        self.refuse_unless(least[0] == i.channels, "a gradient has all channels of a sample")
        least = (i.channels, max(least[1], height), max(least[2], width))
        boxes = self.gradient.boxes if self.gradient is not None else []
        self.needs.gradient, self.gradient = least, _Coverage(*least)
        for box in (*boxes, _box(i, 0)):
            self.gradient.add(box)


def _box(i: Instruction, channel: int) -> Box:
    return ((channel, 1, i.channels), (i.start_y, i.step_y, i.height), (i.start_x, i.step_x, i.width))


def extent(b: Buffer) -> tuple[int, int]:
    """The bytes [begin, end) of the slot in which a buffer lies."""
    numbers = b.height * b.row_stride if b.image_stride < b.pixel_stride else b.images * b.image_stride
    return b.offset, b.offset + numbers * b.bytes
