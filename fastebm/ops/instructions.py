"""The format of a fused program: buffers, instructions and their epilogues, as numbers in one tensor.

An instruction computes a grid of pixels, image by image, and hands every block of values to its *epilogue*: a short
list of pointwise operations on float32 values that ends in stores. So a convolution, its bias, its activation, the
derivative that the backward part needs and the sum with another branch take one pass over memory.

The tensor (int64, on the host) holds, one after the other, a header of `HEADER` numbers, `BUFFER_FIELDS` for each
buffer, `INSTRUCTION_FIELDS` for each instruction, `EPILOGUE_FIELDS` for each operation of all epilogues, and
`SEGMENT_FIELDS` for each segment (a run of instructions and how many images go through it at a time). All
floating-point numbers are in `constants`, so that new weights are written in place and this tensor stays as it is.

`csrc/cpu/program.h` repeats the numbering; a test compares the two. `program_check.py` says what holds for the numbers
of a program that can run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor

__all__ = [
    "HEADER",
    "Buffer",
    "Epilogue",
    "EpilogueOp",
    "Header",
    "Instruction",
    "Kind",
    "Layout",
    "Segment",
    "decode",
    "encode",
]

VERSION = 1
# Columns of a panel of `Layout.PAIRS`, and the pixels that a kernel without a stride may span for its taps to be some.
COLUMNS, REACH = 32, 16


class Layout(IntEnum):
    """The memory layout of a convolution's weights, which depends on the backend.

    PLAIN: (taps, in, out), as in Triton. PANELS: (panels, taps, in, panel), a panel of 32 or 16 outputs. TILES: as the
    matrix units of x86 (AMX) read pairs of bfloat16: (panels, steps, tiles, 16 pairs, 16 outputs, 2). PAIRS: as its
    vectors multiply them (AVX512-BF16): (panels, taps, pairs of inputs, 32 outputs, 2), or one panel
    (1, 1, pairs, 32, 2) whose outputs are (tap, output) where `Instruction.taps_are_outputs`.
    """

    PLAIN = 0
    PANELS = 1
    TILES = 2
    PAIRS = 3


class Kind(IntEnum):
    """What an instruction computes before its epilogue, for each pixel (y, x) of its grid and each channel.

    LOAD: the samples themselves. GATHER: the source at ((y + offset) / factor), `fill` outside. CONVOLUTION: with
    source row y * stride - pad + tap * dilation, zero outside. POOL: the sum over such a window. LOG_SUM_EXP and
    SOFTMAX: over the channels of a pixel. FIRST_MAXIMUM: 1 where a pixel of the source is the first of the largest in
    its window, of those that lie side by side from pixel (0, 0) on, and 0 elsewhere, also behind the last whole window.
    """

    LOAD = 0
    GATHER = 1
    CONVOLUTION = 2
    POOL = 3
    LOG_SUM_EXP = 4
    SOFTMAX = 5
    FIRST_MAXIMUM = 6


class EpilogueOp(IntEnum):
    """An operation of an epilogue on the values v.

    ADD_CONSTANT, MULTIPLY_CONSTANT: v + k, v * k, with k a constant image (H or 1, W or 1, channels), a bias mostly.
    SCALE: v * number. ADD: v + number * b, MULTIPLY: v * b, with b a buffer's value. ACTIVATE: f(v). ACTIVATE_KEEPING:
    f(v), after f'(v) was stored in the buffer. SLOPE: v * f'(h), where the buffer holds h, or f(h) if `of_result`.
    STORE: v to the buffer. STORE_GRADIENT, STORE_ENERGIES: v to the results.
    """

    ADD_CONSTANT = 0
    MULTIPLY_CONSTANT = 1
    SCALE = 2
    ADD = 3
    MULTIPLY = 4
    ACTIVATE = 5
    ACTIVATE_KEEPING = 6
    SLOPE = 7
    STORE = 8
    STORE_GRADIENT = 9
    STORE_ENERGIES = 10


@dataclass(frozen=True)
class Buffer:
    """A result that is kept: images that lie pixel by pixel, in the workspace of one worker.

    Attributes:
        channels, height, width: of one image.
        bytes: of a number: 2 for bfloat16, 4 for float32.
        images: how many there is room for.
        margin: pixels of zeros on either side of a row, for convolutions that pad.
        offset: in bytes, from the start of the workspace.
        pixel_stride, row_stride, image_stride: in numbers, from one to the next; a pixel has `channels` or more.
    """

    channels: int
    height: int
    width: int
    bytes: int
    images: int = 1
    margin: int = 0
    offset: int = 0
    pixel_stride: int = 0
    row_stride: int = 0
    image_stride: int = 0


@dataclass(frozen=True)
class Instruction:
    """One instruction. Where a pair (y, x) is meant, fields come in twos.

    Attributes:
        kind: a `Kind`.
        source, source_channel, source_channels: the buffer that is read, from which channel on, and how many.
        channels, height, width: of the grid that is computed.
        start_*, step_*: pixel (y, x) of the grid is pixel (start + step * (y, x)) of all buffers in the epilogue.
        kernel_*, stride_*, pad_*, dilation_*: as in `Kind`; for GATHER the factor, 1, minus the offset, and 1.
        constant: the weight among the constants; for GATHER the number of `fill`, for LOAD one more channel of ones if
            not 0.
        first, count: its epilogue.
        broadcast: whether the source has one channel that stands for all.
    """

    kind: int
    source: int = -1
    source_channel: int = 0
    source_channels: int = 0
    channels: int = 1
    height: int = 1
    width: int = 1
    start_y: int = 0
    start_x: int = 0
    step_y: int = 1
    step_x: int = 1
    kernel_y: int = 1
    kernel_x: int = 1
    stride_y: int = 1
    stride_x: int = 1
    pad_y: int = 0
    pad_x: int = 0
    dilation_y: int = 1
    dilation_x: int = 1
    constant: int = -1
    first: int = 0
    count: int = 0
    broadcast: int = 0

    @property
    def taps_are_outputs(self) -> bool:
        """Whether all taps of a convolution are columns of one panel of `Layout.PAIRS`: few outputs, and no stride."""
        taps = self.kernel_y * self.kernel_x
        reach = max((self.kernel_y - 1) * self.dilation_y, (self.kernel_x - 1) * self.dilation_x)
        dilation = max(self.dilation_y, self.dilation_x)
        few = taps > 1 and taps * self.channels <= COLUMNS
        return few and self.stride_y == self.stride_x == 1 and dilation <= REACH and reach < REACH


@dataclass(frozen=True)
class Epilogue:
    """One operation of an epilogue.

    Attributes:
        op: an `EpilogueOp`.
        buffer, channel: the buffer that is read or written, and its channel that belongs to channel 0 of v.
        factor_y, factor_x: pixel (y, x) reads the buffer's pixel (y / factor_y, x / factor_x).
        number: of a factor among the numbers, -1 for one; of the first parameter of an activation; of a constant.
        activation: its number in `activations.ACTIVATION_TABLE`.
        of_result: see `EpilogueOp.SLOPE`.
        broadcast: whether the buffer's one channel stands for all.
    """

    op: int
    buffer: int = -1
    channel: int = 0
    factor_y: int = 1
    factor_x: int = 1
    number: int = -1
    activation: int = 0
    of_result: int = 0
    broadcast: int = 0


@dataclass(frozen=True)
class Segment:
    """Instructions [first, first + count), through which `images` images go at a time, depth first."""

    first: int
    count: int
    images: int


@dataclass(frozen=True)
class Header:
    """The backend and the batch that a program is planned for.

    Attributes:
        layout, panel: of the weights (`Layout`), and the outputs in one panel.
        bytes: of a number that a convolution reads: 2 for bfloat16, 4 for float32 (8 in the reference).
        chunk: the images that one worker takes at a time.
        slot: the bytes of one worker's workspace.
        workers: how many slots the workspace has.
        team: 1 where all workers share one slot and divide each instruction among them, for batches smaller than them.
    """

    layout: int
    panel: int
    bytes: int
    chunk: int
    slot: int
    workers: int
    team: int = 0


HEADER = 16
BUFFER_FIELDS = len(fields(Buffer))
INSTRUCTION_FIELDS = len(fields(Instruction))
EPILOGUE_FIELDS = len(fields(Epilogue))
SEGMENT_FIELDS = len(fields(Segment))


@dataclass(frozen=True)
class PlannedProgram:
    """A program with its memory planned: all parts of what `encode` writes into one tensor."""

    header: Header
    buffers: tuple[Buffer, ...]
    instructions: tuple[Instruction, ...]
    epilogues: tuple[Epilogue, ...]
    segments: tuple[Segment, ...]

    def epilogue(self, instruction: Instruction) -> tuple[Epilogue, ...]:
        """The operations behind one instruction."""
        return self.epilogues[instruction.first : instruction.first + instruction.count]


def encode(code: PlannedProgram) -> Tensor:
    """The program as one int64 tensor."""
    counts = [len(code.buffers), len(code.instructions), len(code.epilogues), len(code.segments)]
    header = [VERSION, *counts, *_numbers(code.header)]
    header += [0] * (HEADER - len(header))
    rows = [header]
    for part in (code.buffers, code.instructions, code.epilogues, code.segments):
        rows += [_numbers(row) for row in part]
    return torch.tensor([number for row in rows for number in row], dtype=torch.int64, device="cpu")


def decode(tensor: Tensor) -> PlannedProgram:
    """The program behind `encode`'s tensor. Raises ValueError where it is none."""
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.device.type != "cpu":
        raise ValueError(f"code must be an int64 vector on the CPU, got {tensor.dtype} {tuple(tensor.shape)}")
    numbers = tensor.tolist()
    if len(numbers) < HEADER or numbers[0] != VERSION:
        raise ValueError("code does not begin as a program does")
    header = Header(*numbers[5 : 5 + len(fields(Header))])
    at, parts = HEADER, []
    for row, count in zip((Buffer, Instruction, Epilogue, Segment), numbers[1:5], strict=True):
        width = len(fields(row))
        if not 0 <= count <= (len(numbers) - at) // width:
            raise ValueError(f"code has {len(numbers)} numbers, fewer than its header says")
        parts.append(tuple(row(*numbers[at + i * width : at + (i + 1) * width]) for i in range(count)))
        at += count * width
    if at != len(numbers):
        raise ValueError(f"code has {len(numbers)} numbers, its header says {at}")
    return PlannedProgram(header, *parts)  # type: ignore[arg-type]


def _numbers(row: Header | Buffer | Instruction | Epilogue | Segment) -> list[int]:
    return [int(getattr(row, field.name)) for field in fields(row)]
