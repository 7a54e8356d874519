"""Triton: a fused program, with one launch for each instruction over the whole batch.

A convolution is an implicit matrix product: rows are positions (image, y, x) of its grid, columns its outputs, and the
inner dimension runs over taps and input channels, so nothing is unfolded in memory. Each kernel is compiled for its
epilogue, so what follows a product (bias, activation, derivative, sums) costs no launch and no pass over memory.

Block sizes follow from the instruction alone, never from the batch: the order of summation does not depend on it.
Products of bfloat16 run on tensor cores with float32 sums; those of float32 as three products of tf32 parts, which
keeps 22 bits. There is no allocation here and nothing waits for the device, so that a chain can be captured in a graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..instructions import Buffer, Epilogue, EpilogueOp, Instruction, Kind, Layout, PlannedProgram
from ..program_check import checked_bytes
from .activations import exponential, logarithm
from .philox import INTERPRETED
from .program_epilogue import Step, epilogue

_LOAD, _GATHER, _CONVOLUTION, _POOL, _LOG_SUM_EXP, _SOFTMAX, _FIRST_MAXIMUM = (tl.constexpr(int(kind)) for kind in Kind)
# Inputs of so few channels make the inner dimension out of taps and channels together: a product needs 16 of it.
FEW = 16
_FEW = tl.constexpr(FEW)
_INTERPRETED = tl.constexpr(INTERPRETED)
# Pixels of a window that one step of a pool reads, so that their loads are under way together.
WINDOW_STEP = 16
# What an int32 holds: a kernel counts all pixels, and the numbers of one image and of one constant.
MOST = torch.iinfo(torch.int32).max
_STORED = {2: torch.bfloat16, 4: torch.float32}


class Window(NamedTuple):
    """The window of a convolution, pool or gather; see `instructions.Kind`."""

    kernel_y: int
    kernel_x: int
    stride_y: int
    stride_x: int
    pad_y: int
    pad_x: int
    dilation_y: int
    dilation_x: int


class Shape(NamedTuple):
    """What the compiler knows of an instruction: the same for every batch.

    Attributes:
        kind, window, broadcast: as in `instructions.Instruction`.
        steps: the operations of its epilogue.
        channels, inputs: of the result and of the source.
        pixel: numbers from pixel to pixel of the source.
        one_pixel: whether a block is of images at one pixel, because the source of a convolution is one pixel.
        filled: whether a gather has a number for what is outside of the source.
        rows, columns: positions and channels of a block.
        depth: of the inner dimension of a product that is read at a time.
        taps: pixels of a pool's window that are read at a time.
    """

    kind: int
    window: Window
    broadcast: bool
    steps: tuple[Step, ...]
    channels: int
    inputs: int
    pixel: int
    one_pixel: bool
    filled: bool
    rows: int
    columns: int
    depth: int
    taps: int


# Kernels ------------------------------------------------------------------------------------------------------------
#
# `grid` is (images, height, width) of an instruction, `source_strides` (height, width, row, image) of the buffer that
# it reads. `place` is (image, y, x, columns, inside) of one block: the positions that are its rows, with `image` in
# int64, the channels that are its columns, and which rows exist.


@triton.jit
def place_of_block(block: tl.tensor, grid: tl.tuple, SHAPE: tl.constexpr) -> tl.tuple:
    """The place of one block of an instruction's grid."""
    PANELS: tl.constexpr = (SHAPE.channels + SHAPE.columns - 1) // SHAPE.columns
    columns = block % PANELS * SHAPE.columns + tl.arange(0, SHAPE.columns)
    unit = block // PANELS
    plane = grid[1] * grid[2]
    if SHAPE.one_pixel:
        image = unit // plane * SHAPE.rows + tl.arange(0, SHAPE.rows)
        pixel = unit % plane
    else:
        position = unit * SHAPE.rows + tl.arange(0, SHAPE.rows)
        image = position // plane
        pixel = position % plane
    return image.to(tl.int64), pixel // grid[2], pixel % grid[2], columns, image < grid[0]


@triton.jit
def product(a: tl.tensor, b: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """sums + a @ b, for float32 by three products of tf32 parts."""
    if _INTERPRETED:  # whose product takes the bits of a bfloat16 for an integer
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="tf32x3")


@triton.jit
def over_taps(
    source: tl.tensor, weight: tl.tensor, place: tl.tuple, source_strides: tl.tuple, SHAPE: tl.constexpr
) -> tl.tensor:
    """A convolution: the sums over taps and, `depth` at a time, inputs."""
    image, y, x, columns, inside = place
    WINDOW: tl.constexpr = SHAPE.window
    CHANNELS: tl.constexpr = SHAPE.channels
    INPUTS: tl.constexpr = SHAPE.inputs
    DEPTH: tl.constexpr = SHAPE.depth
    STEPS: tl.constexpr = (INPUTS + DEPTH - 1) // DEPTH
    there = (columns < CHANNELS)[None, :]
    base = image * source_strides[3]
    sums = tl.zeros((image.shape[0], columns.shape[0]), tl.float32)
    for k in range(WINDOW.kernel_y * WINDOW.kernel_x * STEPS):
        tap = k // STEPS
        inputs = k % STEPS * DEPTH + tl.arange(0, DEPTH)
        sy = y * WINDOW.stride_y - WINDOW.pad_y + tap // WINDOW.kernel_x * WINDOW.dilation_y
        sx = x * WINDOW.stride_x - WINDOW.pad_x + tap % WINDOW.kernel_x * WINDOW.dilation_x
        seen = inside & (sy >= 0) & (sy < source_strides[0]) & (sx >= 0) & (sx < source_strides[1])
        pixels = source + (base + (sy * source_strides[2] + sx * SHAPE.pixel))[:, None]
        weights = weight + ((tap * INPUTS + inputs) * CHANNELS)[:, None] + columns[None, :]
        if INPUTS % DEPTH == 0:
            a = tl.load(pixels + inputs[None, :], mask=seen[:, None], other=0.0)
            b = tl.load(weights, mask=there, other=0.0)
        else:
            a = tl.load(pixels + inputs[None, :], mask=seen[:, None] & (inputs < INPUTS)[None, :], other=0.0)
            b = tl.load(weights, mask=there & (inputs < INPUTS)[:, None], other=0.0)
        sums = product(a, b, sums)
    return sums


@triton.jit
def over_few_inputs(
    source: tl.tensor, weight: tl.tensor, place: tl.tuple, source_strides: tl.tuple, SHAPE: tl.constexpr
) -> tl.tensor:
    """A convolution: the sums over (tap, input) as one dimension, in which the weights lie side by side as well."""
    image, y, x, columns, inside = place
    WINDOW: tl.constexpr = SHAPE.window
    CHANNELS: tl.constexpr = SHAPE.channels
    INPUTS: tl.constexpr = SHAPE.inputs
    DEPTH: tl.constexpr = SHAPE.depth
    TOTAL: tl.constexpr = WINDOW.kernel_y * WINDOW.kernel_x * INPUTS
    there = (columns < CHANNELS)[None, :]
    base = image * source_strides[3]
    sums = tl.zeros((image.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, TOTAL, DEPTH):
        k = first + tl.arange(0, DEPTH)
        tap = k // INPUTS
        sy = (y * WINDOW.stride_y - WINDOW.pad_y)[:, None] + (tap // WINDOW.kernel_x * WINDOW.dilation_y)[None, :]
        sx = (x * WINDOW.stride_x - WINDOW.pad_x)[:, None] + (tap % WINDOW.kernel_x * WINDOW.dilation_x)[None, :]
        seen = inside[:, None] & (k < TOTAL)[None, :]
        seen = seen & (sy >= 0) & (sy < source_strides[0]) & (sx >= 0) & (sx < source_strides[1])
        numbers = source + base[:, None] + (sy * source_strides[2] + sx * SHAPE.pixel + (k % INPUTS)[None, :])
        a = tl.load(numbers, mask=seen, other=0.0)
        b = tl.load(weight + (k * CHANNELS)[:, None] + columns[None, :], mask=there & (k < TOTAL)[:, None], other=0.0)
        sums = product(a, b, sums)
    return sums


@triton.jit
def of_one_tap(
    source: tl.tensor, weight: tl.tensor, place: tl.tuple, source_strides: tl.tuple, SHAPE: tl.constexpr
) -> tl.tensor:
    """A convolution over images of one pixel, which one pixel (y, x) of the grid sees through one tap."""
    image, y, x, columns, inside = place
    WINDOW: tl.constexpr = SHAPE.window
    CHANNELS: tl.constexpr = SHAPE.channels
    INPUTS: tl.constexpr = SHAPE.inputs
    DEPTH: tl.constexpr = SHAPE.depth
    tap_y, tap_x = WINDOW.pad_y - y, WINDOW.pad_x - x
    seen = (tap_y >= 0) & (tap_y < WINDOW.kernel_y) & (tap_x >= 0) & (tap_x < WINDOW.kernel_x)
    weight += tl.where(seen, tap_y * WINDOW.kernel_x + tap_x, 0) * (INPUTS * CHANNELS)
    bound = tl.where(seen, INPUTS, 0)
    pixels = source + (image * source_strides[3])[:, None]
    sums = tl.zeros((image.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, INPUTS, DEPTH):
        inputs = first + tl.arange(0, DEPTH)
        a = tl.load(pixels + inputs[None, :], mask=inside[:, None] & (inputs < bound)[None, :], other=0.0)
        mask = (columns < CHANNELS)[None, :] & (inputs < bound)[:, None]
        b = tl.load(weight + (inputs * CHANNELS)[:, None] + columns[None, :], mask=mask, other=0.0)
        sums = product(a, b, sums)
    return sums


@triton.jit
def gathered(
    source: tl.tensor,
    numbers: tl.tensor,
    fill: tl.tensor,
    place: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """Pixel ((y, x) - pad) / kernel of the source, numbers[fill] (or 0) outside of it."""
    image, y, x, columns, inside = place
    WINDOW: tl.constexpr = SHAPE.window
    sy, sx = y - WINDOW.pad_y, x - WINDOW.pad_x
    seen = (sy >= 0) & (sx >= 0)
    seen = seen & (sy < source_strides[0] * WINDOW.kernel_y) & (sx < source_strides[1] * WINDOW.kernel_x)
    pixel = sy // WINDOW.kernel_y * source_strides[2] + sx // WINDOW.kernel_x * SHAPE.pixel
    pointers = source + (image * source_strides[3] + pixel)[:, None]
    if not SHAPE.broadcast:
        pointers += columns[None, :]
    mask = (inside & seen)[:, None] & (columns < SHAPE.channels)[None, :]
    value = tl.load(pointers + tl.zeros_like(columns)[None, :], mask=mask, other=0.0).to(tl.float32)
    if SHAPE.filled:
        value = tl.where(seen[:, None], value, tl.load(numbers + fill))
    return value


@triton.jit
def window_sums(source: tl.tensor, place: tl.tuple, source_strides: tl.tuple, SHAPE: tl.constexpr) -> tl.tensor:
    """Sums over the windows of a pool, `taps` pixels of them at a time."""
    image, y, x, columns, inside = place
    WINDOW: tl.constexpr = SHAPE.window
    TAPS: tl.constexpr = SHAPE.taps
    TOTAL: tl.constexpr = WINDOW.kernel_y * WINDOW.kernel_x
    sums = tl.zeros((image.shape[0], columns.shape[0]), tl.float32)
    base = (image * source_strides[3])[:, None]
    for first in range(0, TOTAL, TAPS):
        tap = first + tl.arange(0, TAPS)[None, :]
        sy = (y * WINDOW.stride_y - WINDOW.pad_y)[:, None] + tap // WINDOW.kernel_x
        sx = (x * WINDOW.stride_x - WINDOW.pad_x)[:, None] + tap % WINDOW.kernel_x
        seen = inside[:, None] & (tap < TOTAL)
        seen = seen & (sy >= 0) & (sy < source_strides[0]) & (sx >= 0) & (sx < source_strides[1])
        pointers = source + (base + (sy * source_strides[2] + sx * SHAPE.pixel))[:, :, None] + columns[None, None, :]
        mask = seen[:, :, None] & (columns < SHAPE.channels)[None, None, :]
        sums += tl.sum(tl.load(pointers, mask=mask, other=0.0).to(tl.float32), axis=1)
    return sums


@triton.jit
def first_maximum(source: tl.tensor, place: tl.tuple, source_strides: tl.tuple, SHAPE: tl.constexpr) -> tl.tensor:
    """1 where a pixel is the first of the largest in its window, 0 elsewhere."""
    image, y, x, columns, inside = place
    WINDOW: tl.constexpr = SHAPE.window
    top, left = y - y % WINDOW.kernel_y, x - x % WINDOW.kernel_x
    seen = inside & (top + WINDOW.kernel_y <= source_strides[0]) & (left + WINDOW.kernel_x <= source_strides[1])
    mask = seen[:, None] & (columns < SHAPE.channels)[None, :]
    base = source + (image * source_strides[3])[:, None] + columns[None, :]
    own = tl.load(base + (y * source_strides[2] + x * SHAPE.pixel)[:, None], mask=mask, other=0.0).to(tl.float32)
    place_in_window = (y - top) * WINDOW.kernel_x + (x - left)
    largest = mask
    for tap in range(WINDOW.kernel_y * WINDOW.kernel_x):
        sy, sx = top + tap // WINDOW.kernel_x, left + tap % WINDOW.kernel_x
        other = tl.load(base + (sy * source_strides[2] + sx * SHAPE.pixel)[:, None], mask=mask, other=0.0).to(
            tl.float32
        )
        before = (tap < place_in_window)[:, None]
        largest = largest & tl.where(before, own > other, own >= other)
    return tl.where(largest, 1.0, 0.0)


@triton.jit
def softmaxed(source: tl.tensor, place: tl.tuple, source_strides: tl.tuple, SHAPE: tl.constexpr) -> tl.tensor:
    """LOG_SUM_EXP, one column, or SOFTMAX over all channels of a pixel, `columns` being as many or more."""
    image, y, x, columns, inside = place
    pixels = source + (image * source_strides[3] + (y * source_strides[2] + x * SHAPE.pixel))[:, None]
    there = (columns < SHAPE.inputs)[None, :]
    h = tl.load(pixels + columns[None, :], mask=inside[:, None] & there, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(there, h, float("-inf")), axis=1)[:, None]
    e = tl.where(there, exponential(h - largest), 0.0)
    total = tl.sum(e, axis=1)[:, None]
    if SHAPE.kind == _LOG_SUM_EXP:
        return largest + logarithm(total)
    else:
        return tl.div_rn(e, total + tl.zeros_like(e))


@triton.jit
def computed(
    source: tl.tensor,
    weight: tl.tensor,
    numbers: tl.tensor,
    fill: tl.tensor,
    place: tl.tuple,
    grid: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """The values of one block before the epilogue. For LOAD the source is x, channel by channel."""
    if SHAPE.kind == _LOAD:
        image, y, x, columns, inside = place
        plane = grid[1] * grid[2]
        offset = image * (SHAPE.inputs * plane) + (y * grid[2] + x)
        mask = inside[:, None] & (columns < SHAPE.inputs)[None, :]
        return tl.load(source + offset[:, None] + (columns * plane)[None, :], mask=mask, other=1.0)
    elif SHAPE.kind == _GATHER:
        return gathered(source, numbers, fill, place, source_strides, SHAPE)
    elif SHAPE.kind == _POOL:
        return window_sums(source, place, source_strides, SHAPE)
    elif SHAPE.kind == _FIRST_MAXIMUM:
        return first_maximum(source, place, source_strides, SHAPE)
    elif SHAPE.kind != _CONVOLUTION:
        return softmaxed(source, place, source_strides, SHAPE)
    elif SHAPE.one_pixel:
        return of_one_tap(source, weight, place, source_strides, SHAPE)
    elif SHAPE.inputs <= _FEW:
        return over_few_inputs(source, weight, place, source_strides, SHAPE)
    else:
        return over_taps(source, weight, place, source_strides, SHAPE)


@triton.jit
def place_in_buffers(place: tl.tuple, start: tl.tuple, step: tl.tuple, SHAPE: tl.constexpr) -> tl.tuple:
    """Where a block's values belong in the buffers of its epilogue."""
    image, y, x, columns, inside = place
    if SHAPE.kind == _LOG_SUM_EXP:
        columns = tl.arange(0, 1)
    return image, start[0] + step[0] * y, start[1] + step[1] * x, columns, inside


@triton.jit(do_not_specialize=["batch", "fill"])
def instruction_kernel(
    source: tl.tensor,
    weight: tl.tensor,
    numbers: tl.tensor,
    fill: tl.tensor,
    operands: tl.tuple,
    rows: tl.tuple,
    images: tl.tuple,
    at: tl.tuple,
    batch: tl.tensor,
    grid: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> None:
    """One block of an instruction. `weight` is None but for convolutions; `grid` has height, width, start and step.

    The batch is no part of `grid`: within a tuple, Triton compiles anew for 1 and for multiples of 16. So the kernels
    of a first check with a few samples are those of the chain.
    """
    whole = (batch, grid[0], grid[1])
    place = place_of_block(tl.program_id(0), whole, SHAPE)
    v = computed(source, weight, numbers, fill, place, whole, source_strides, SHAPE)
    place = place_in_buffers(place, (grid[2], grid[3]), (grid[4], grid[5]), SHAPE)
    epilogue(v, place, numbers, operands, rows, images, at, SHAPE)


# Launcher -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One instruction as a launch, all but the batch and the places in memory.

    Attributes:
        shape, num_warps, num_stages: what is compiled.
        source: the buffer that is read and its first channel; -1 for x.
        weight: the constant with the weights, -1 for none.
        fill: the number that a gather puts outside of its source.
        operands: of each step where it points to, "buffers", "constants" and an index, "gradient" or "energies".
        rows, images, at: the run-time numbers of each step.
        grid: height, width, start and step of the instruction's grid.
        source_strides: height, width, row and image of the source.
    """

    shape: Shape
    num_warps: int
    num_stages: int | None
    source: tuple[int, int]
    weight: int
    fill: int
    operands: tuple[tuple[str, int], ...]
    rows: tuple[int, ...]
    images: tuple[int, ...]
    at: tuple[int, ...]
    grid: tuple[int, ...]
    source_strides: tuple[int, ...]

    def programs(self, batch: int) -> int:
        """How many blocks cover the grids of so many images."""
        plane, rows = self.grid[0] * self.grid[1], self.shape.rows
        panels = triton.cdiv(self.shape.channels, self.shape.columns)
        if self.shape.one_pixel:
            return plane * triton.cdiv(batch, rows) * panels
        return triton.cdiv(batch * plane, rows) * panels


@dataclass(frozen=True)
class Facts:
    """What, beside the code, decides about launches: the sample's shape, and dtypes and shapes of constants."""

    sample: tuple[int, ...]
    constants: tuple[tuple[torch.dtype, tuple[int, ...]], ...]


def run_program(
    energies: Tensor, gradient: Tensor, x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor
) -> None:
    """Kernel `run_program` of fastebm.ops.schemas."""
    facts = facts_of(x, constants)
    content = code.numpy().tobytes()
    program, calls = calls_of(content, facts)
    if not check_program(content, x, constants, workspace):
        energies.zero_()
        gradient.zero_()
    buffers = [view_of(workspace, buffer) for buffer in program.buffers]
    places = {"buffers": buffers, "constants": constants, "gradient": [gradient], "energies": [energies]}
    for call in calls:
        _launch(call, x, constants, places)


def facts_of(x: Tensor, constants: Sequence[Tensor]) -> Facts:
    return Facts(tuple(x.shape[1:]), tuple((t.dtype, tuple(t.shape)) for t in constants))


def _launch(call: Call, x: Tensor, constants: Sequence[Tensor], places: dict[str, Sequence[Tensor]]) -> None:
    buffer, channel = call.source
    source = x if buffer < 0 else places["buffers"][buffer][channel:]
    weight = constants[call.weight] if call.weight >= 0 else None
    operands = tuple(places[kind][index] for kind, index in call.operands)
    instruction_kernel[(call.programs(x.shape[0]),)](
        *(source, weight, constants[0], call.fill, operands, call.rows, call.images, call.at, x.shape[0]),
        *(call.grid, call.source_strides, call.shape),
        num_warps=call.num_warps,
        **({} if call.num_stages is None else {"num_stages": call.num_stages}),
        enable_fp_fusion=False,
    )


def view_of(workspace: Tensor, buffer: Buffer) -> Tensor:
    """All numbers of a buffer."""
    size = buffer.images * buffer.image_stride * buffer.bytes
    return workspace[buffer.offset : buffer.offset + size].view(_STORED[buffer.bytes])


def check_program(code: bytes, x: Tensor, constants: Sequence[Tensor], workspace: Tensor) -> bool:
    """Raises ValueError where a program can't run on this batch, in this workspace.

    Returns whether it writes all energies and the whole gradient.
    """
    (program, needs), batch = checked_bytes(code), x.shape[0]
    whole = needs.check_call(x, constants)
    if batch > program.header.chunk:
        raise ValueError(f"the code is for at most {program.header.chunk} images at a time, got a batch of {batch}")
    needs.check_workspace(workspace)
    if not all(constant.is_contiguous() for constant in constants):
        raise ValueError("all constants must be contiguous")
    pixels = batch * max((i.height * i.width for i in program.instructions), default=1)
    if pixels > MOST - 1024:
        raise ValueError(f"a batch of {batch} has {pixels} pixels at a time; this kernel counts up to 2**31 of them")
    return whole


@functools.lru_cache(maxsize=256)
def calls_of(code: bytes, facts: Facts) -> tuple[PlannedProgram, tuple[Call, ...]]:
    """The program and its launches. Raises ValueError where the code is for another backend or constants don't fit."""
    program, _ = checked_bytes(code)
    if program.header.layout != Layout.PLAIN:
        raise ValueError(
            f"the weights of this program lie as {Layout(program.header.layout).name}, as C++ reads them, not PLAIN"
        )
    if program.header.bytes not in _STORED:
        raise ValueError(f"Triton has programs of 2 and 4 bytes a number, not {program.header.bytes}")
    if not facts.constants or facts.constants[0][0] != torch.float32:
        raise ValueError("the first constant must be the numbers, in float32")
    images = (EpilogueOp.ADD_CONSTANT, EpilogueOp.MULTIPLY_CONSTANT)
    read = [i.constant for i in program.instructions if i.kind == Kind.CONVOLUTION]
    read += [operation.number for operation in program.epilogues if operation.op in images]
    if max(read, default=0) >= len(facts.constants):
        raise ValueError(f"this program reads {max(read) + 1} constants, got {len(facts.constants)}")
    sizes = [math.prod(shape) for shape in (facts.sample, *(shape for _, shape in facts.constants))]
    if (largest := max(*sizes, *(b.image_stride for b in program.buffers))) > MOST:
        raise ValueError(f"an image or a constant has {largest} numbers; this kernel counts up to 2**31 of them")
    return program, tuple(call_of(program, facts, i) for i in program.instructions)


def call_of(program: PlannedProgram, facts: Facts, i: Instruction) -> Call:
    """One instruction's launch."""
    kind, source = Kind(i.kind), program.buffers[i.source] if i.source >= 0 else None
    operands, steps, rows, images, at = _steps(program, facts, i)
    window = Window(i.kernel_y, i.kernel_x, i.stride_y, i.stride_x, i.pad_y, i.pad_x, i.dilation_y, i.dilation_x)
    one_pixel, depth, taps, num_warps, num_stages = False, 0, 1, 4, None
    if kind == Kind.CONVOLUTION:
        _check_weight(program, facts, i)
        one_pixel = source is not None and (source.height, source.width) == (1, 1)
        one_pixel = one_pixel and window[2:4] == window[6:8] == (1, 1)
        block_rows, columns, depth, num_warps = _product_blocks(i, program.header.bytes, one_pixel)
        num_stages = 3
    elif kind in (Kind.LOG_SUM_EXP, Kind.SOFTMAX):
        columns = triton.next_power_of_2(i.source_channels)
        block_rows = max(1, 1024 // columns)
    else:
        columns = min(triton.next_power_of_2(i.channels), 64)
        if kind == Kind.POOL:
            taps = min(triton.next_power_of_2(i.kernel_y * i.kernel_x), WINDOW_STEP)
        block_rows = max(1, 2048 // (columns * taps))
    shape = Shape(
        kind=i.kind,
        window=window,
        broadcast=bool(i.broadcast),
        steps=steps,
        channels=i.channels,
        inputs=i.source_channels,
        pixel=source.pixel_stride if source is not None else 0,
        one_pixel=one_pixel,
        filled=kind == Kind.GATHER and i.constant >= 0,
        rows=block_rows,
        columns=columns,
        depth=depth,
        taps=taps,
    )
    return Call(
        shape,
        num_warps,
        num_stages,
        source=(i.source, i.source_channel),
        weight=i.constant if kind == Kind.CONVOLUTION else -1,
        fill=max(i.constant, 0) if kind == Kind.GATHER else 0,
        operands=operands,
        rows=rows,
        images=images,
        at=at,
        grid=(i.height, i.width, i.start_y, i.start_x, i.step_y, i.step_x),
        source_strides=(source.height, source.width, source.row_stride, source.image_stride)
        if source
        else (0, 0, 0, 0),
    )


def _check_weight(program: PlannedProgram, facts: Facts, i: Instruction) -> None:
    dtype, shape = facts.constants[i.constant]
    needed = (i.kernel_y * i.kernel_x, i.source_channels, i.channels)
    if shape != needed or dtype != _STORED[program.header.bytes]:
        raise ValueError(
            f"constant {i.constant} must be a weight (taps, in, out) = {needed} in {_STORED[program.header.bytes]}, "
            f"got {shape} in {dtype}"
        )


def _product_blocks(i: Instruction, size: int, one_pixel: bool) -> tuple[int, int, int, int]:
    """(rows, columns, depth, warps) of a convolution's blocks, by its shape alone.

    Blocks are large where a single image fills several. Sums are float32 in registers, at most 32 a thread: with 64, an
    epilogue of activation and derivative spills. Operands of three stages take at most 72 KB of shared memory.
    """
    plane = 1 if one_pixel else i.height * i.width
    columns = min(max(triton.next_power_of_2(i.channels), 16), 64)
    rows = 128 if plane >= 256 else 64 if plane >= 16 else 16
    inner = i.source_channels if one_pixel or i.source_channels > FEW else i.source_channels * i.kernel_y * i.kernel_x
    depth = min(max(triton.next_power_of_2(inner), 16), 64 if size == 2 else 32)
    return rows, columns, depth, 8 if rows * columns > 64 * 64 else 4


def _steps(program: PlannedProgram, facts: Facts, i: Instruction) -> tuple[Any, ...]:
    """Operands, what the compiler knows, and the strides and numbers of an epilogue's operations."""
    lists: tuple[list[Any], ...] = ([], [], [], [], [])
    written: set[int] = set()
    for operation in program.epilogue(i):
        operand, step, row, image = _step(program, facts, i, operation, operation.buffer in written)
        for values, value in zip(lists, (operand, step, row, image, max(operation.number, 0)), strict=True):
            values.append(value)
        if operation.op in (EpilogueOp.STORE, EpilogueOp.ACTIVATE_KEEPING):
            written.add(operation.buffer)
    return tuple(tuple(values) for values in lists)


def _step(
    program: PlannedProgram, facts: Facts, i: Instruction, operation: Epilogue, own: bool
) -> tuple[tuple[str, int], Step, int, int]:
    """(operand, what the compiler knows, row, image) of one operation."""
    do = EpilogueOp(operation.op)
    if do in (EpilogueOp.ADD_CONSTANT, EpilogueOp.MULTIPLY_CONSTANT):
        dtype, (height, width, channels) = facts.constants[operation.number]
        if dtype != torch.float32 or channels < i.channels:
            raise ValueError(
                f"constant {operation.number} must be a float32 image of {i.channels} channels or more, "
                f"got {facts.constants[operation.number]}"
            )
        pixel, row = (channels if width > 1 else 0), (width * channels if height > 1 else 0)
        return ("constants", operation.number), Step(int(do), pixel=pixel, flat=not (pixel or row)), row, 0
    if do == EpilogueOp.STORE_GRADIENT:
        width = facts.sample[-1] if len(facts.sample) == 3 else 1
        return ("gradient", 0), Step(int(do)), width, math.prod(facts.sample)
    if do == EpilogueOp.STORE_ENERGIES:
        return ("energies", 0), Step(int(do)), 0, 0
    if do in (EpilogueOp.SCALE, EpilogueOp.ACTIVATE):
        return ("constants", 0), Step(int(do), activation=operation.activation), 0, 0
    buffer = program.buffers[operation.buffer]
    step = Step(
        int(do),
        activation=operation.activation,
        of_result=bool(operation.of_result),
        broadcast=bool(operation.broadcast),
        channel=operation.channel,
        factor_y=operation.factor_y,
        factor_x=operation.factor_x,
        scaled=do == EpilogueOp.ADD and operation.number >= 0,
        pixel=buffer.pixel_stride,
        own=own,
    )
    return ("buffers", operation.buffer), step, buffer.row_stride, buffer.image_stride
