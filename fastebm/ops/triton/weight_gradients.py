"""Triton: gradients of weights from the buffers that a fused program left in its workspace, one launch for each task.

A block keeps a part of the result in registers and takes the images in order: each image's sum over pixels, on tensor
cores for a convolution, and then a fused multiply-add by its factor. So the bits depend neither on how a batch is cut
into calls nor on other tasks. Within an image, pixels are added in blocks whose size follows from the task alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..instructions import Buffer, Layout, PlannedProgram
from ..weight_gradients import WeightKind, WeightTask, check_call, checked_tasks
from .compiling import Launcher, launch_together
from .philox import INTERPRETED
from .program import product

_CONVOLUTION, _SUM, _PRODUCT = (tl.constexpr(int(kind)) for kind in WeightKind)
_STORED = {2: torch.bfloat16, 4: torch.float32}
# With a third one, 72 registers spill on sm_80.
STAGES = 2
# The interpreter pays for each operation and not for each number, so it gets large blocks.
_INTERPRETED_BLOCK = 512


class SideShape(NamedTuple):
    """What the compiler knows of one of the two buffers.

    Attributes:
        pixel: numbers from pixel to pixel.
        factor_y, factor_x, broadcast: as in `WeightTask`.
    """

    pixel: int
    factor_y: int
    factor_x: int
    broadcast: bool


class TaskShape(NamedTuple):
    """What the compiler knows of a task: the same for every batch.

    Attributes:
        kind, out, inner, per_pixel: as in `WeightTask`.
        window: (kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x).
        gradient, source: the two buffers.
        one_pixel: whether the grid is one pixel.
        rows, columns: outputs and inputs of a block; of a sum by pixel, pixels and outputs.
        depth: pixels that are read at a time.
    """

    kind: int
    out: int
    inner: int
    per_pixel: bool
    window: tuple[int, ...]
    gradient: SideShape
    source: SideShape
    one_pixel: bool
    rows: int
    columns: int
    depth: int


# Kernels ------------------------------------------------------------------------------------------------------------
#
# `grid` is (height, width) of a task, `strides` (row, image) of a buffer, `size` (height, width) of a source.


@triton.jit
def read(
    image: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    channels: tl.tensor,
    row: tl.tensor,
    mask: tl.tensor,
    SIDE: tl.constexpr,
) -> tl.tensor:
    """The numbers of some pixels (first dimension) and channels (second) of an image."""
    pixels = image + (y // SIDE.factor_y * row + x // SIDE.factor_x * SIDE.pixel)[:, None]
    if SIDE.broadcast:
        channels = tl.zeros_like(channels)
    return tl.load(pixels + channels[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["images"])
def convolution_weight_kernel(
    result: tl.tensor,
    factors: tl.tensor,
    gradient: tl.tensor,
    source: tl.tensor,
    images: tl.tensor,
    grid: tl.tuple,
    gradient_strides: tl.tuple,
    size: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> None:
    """A block of outputs and inputs at one tap."""
    KERNEL_X: tl.constexpr = SHAPE.window[1]
    STRIDE_Y: tl.constexpr = SHAPE.window[2]
    STRIDE_X: tl.constexpr = SHAPE.window[3]
    PAD_Y: tl.constexpr = SHAPE.window[4]
    PAD_X: tl.constexpr = SHAPE.window[5]
    DILATION_Y: tl.constexpr = SHAPE.window[6]
    DILATION_X: tl.constexpr = SHAPE.window[7]
    GRADIENT: tl.constexpr = SHAPE.gradient
    SOURCE: tl.constexpr = SHAPE.source
    ROWS: tl.constexpr = SHAPE.rows
    COLUMNS: tl.constexpr = SHAPE.columns
    ACROSS: tl.constexpr = (SHAPE.inner + COLUMNS - 1) // COLUMNS
    DOWN: tl.constexpr = (SHAPE.out + ROWS - 1) // ROWS
    block = tl.program_id(0)
    inner = block % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    out = block // ACROSS % DOWN * ROWS + tl.arange(0, ROWS)
    tap = block // (ACROSS * DOWN)
    down = tap // KERNEL_X * DILATION_Y - PAD_Y
    right = tap % KERNEL_X * DILATION_X - PAD_X
    there = (out < SHAPE.out)[None, :]
    there_inner = (inner < SHAPE.inner)[None, :]
    places = result + (tap.to(tl.int64) * SHAPE.out + out)[:, None] * SHAPE.inner + inner[None, :]
    known = (out < SHAPE.out)[:, None] & there_inner
    total = tl.load(places, mask=known, other=0.0)
    pixels = grid[0] * grid[1]
    for n in range(images):
        partial = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, pixels, SHAPE.depth):
            pixel = first + tl.arange(0, SHAPE.depth)
            y, x = pixel // grid[1], pixel % grid[1]
            sy, sx = y * STRIDE_Y + down, x * STRIDE_X + right
            # What windows see outside is skipped, not multiplied by zero: 0 * NaN is NaN.
            seen = (pixel < pixels) & (sy >= 0) & (sy < size[0]) & (sx >= 0) & (sx < size[1])
            g = read(gradient, y, x, out, gradient_strides[0], seen[:, None] & there, GRADIENT)
            s = read(source, sy, sx, inner, source_strides[0], seen[:, None] & there_inner, SOURCE)
            if SHAPE.one_pixel:
                partial = tl.trans(g).to(tl.float32) * s.to(tl.float32)
            else:
                partial = product(tl.trans(g), s, partial)
        total = tl.fma(tl.load(factors + n) + tl.zeros_like(partial), partial, total)
        gradient += gradient_strides[1]
        source += source_strides[1]
    tl.store(places, total, mask=known)


@triton.jit(do_not_specialize=["images"])
def sum_weight_kernel(
    result: tl.tensor,
    factors: tl.tensor,
    gradient: tl.tensor,
    source: tl.tensor,
    images: tl.tensor,
    grid: tl.tuple,
    gradient_strides: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> None:
    """A block of outputs, and of pixels where these are left apart. `source` is None but for products."""
    GRADIENT: tl.constexpr = SHAPE.gradient
    SOURCE: tl.constexpr = SHAPE.source
    PANELS: tl.constexpr = (SHAPE.out + SHAPE.columns - 1) // SHAPE.columns
    block = tl.program_id(0)
    out = block % PANELS * SHAPE.columns + tl.arange(0, SHAPE.columns)
    there = (out < SHAPE.out)[None, :]
    pixels = grid[0] * grid[1]
    if SHAPE.per_pixel:
        begin = block // PANELS * SHAPE.rows
        end = begin + SHAPE.rows
        place = begin + tl.arange(0, SHAPE.rows)
        known = there & (place < pixels)[:, None]
        places = result + place.to(tl.int64)[:, None] * SHAPE.out + out[None, :]
    else:
        begin, end = 0, pixels
        known = there
        places = result + out[None, :]
    total = tl.load(places, mask=known, other=0.0)
    for n in range(images):
        partial = tl.zeros_like(total)
        for first in range(begin, end, SHAPE.rows):
            pixel = first + tl.arange(0, SHAPE.rows)
            y, x = pixel // grid[1], pixel % grid[1]
            mask = (pixel < pixels)[:, None] & there
            terms = read(gradient, y, x, out, gradient_strides[0], mask, GRADIENT).to(tl.float32)
            if SHAPE.kind == _PRODUCT:
                terms *= read(source, y, x, out, source_strides[0], mask, SOURCE).to(tl.float32)
            if SHAPE.per_pixel:
                partial += terms
            else:
                partial += tl.sum(terms, axis=0)[None, :]
        total = tl.fma(tl.load(factors + n) + tl.zeros_like(partial), partial, total)
        gradient += gradient_strides[1]
        if SHAPE.kind == _PRODUCT:
            source += source_strides[1]
    tl.store(places, total, mask=known)


# Launcher -----------------------------------------------------------------------------------------------------------


def weight_gradients(
    factors: Tensor, results: Sequence[Tensor], code: Tensor, tasks: Tensor, workspace: Tensor
) -> None:
    """Kernel `weight_gradients` of fastebm.ops.schemas."""
    program, found = checked_tasks(code, tasks)
    check_call(program, found, results, len(factors), workspace)
    if program.header.layout != Layout.PLAIN or program.header.bytes not in _STORED:
        raise ValueError(
            f"Triton has programs of plain weights and of 2 and 4 bytes a number, "
            f"not {Layout(program.header.layout).name} of {program.header.bytes}"
        )
    if len(factors) > program.header.chunk:
        raise ValueError(f"the code is for at most {program.header.chunk} images, got factors of {len(factors)}")
    if len(factors) == 0:
        return
    numbers = workspace.view(_STORED[program.header.bytes])

    def launch_all(launcher: Launcher) -> None:
        for task in found:
            kernel, programs, arguments = call_of(program, task)
            places = [numbers[at:] if at >= 0 else None for at in first_numbers(program, task)]
            options = {"num_warps": 4, "num_stages": STAGES, "enable_fp_fusion": False}
            launcher(kernel, programs, results[task.result], factors, *places, len(factors), *arguments, **options)

    launch_together((code.numpy().tobytes(), tasks.numpy().tobytes(), factors.device), launch_all)


def first_numbers(program: PlannedProgram, task: WeightTask) -> tuple[int, int]:
    """Of gradient and source: the number of the workspace with their first channel at pixel (0, 0); -1 for none."""

    def first(number: int, channel: int) -> int:
        if number < 0:
            return -1
        b = program.buffers[number]
        return b.offset // b.bytes + b.margin * b.pixel_stride + channel

    return first(task.gradient_buffer, task.gradient_channel), first(task.source_buffer, task.source_channel)


def call_of(program: PlannedProgram, task: WeightTask) -> tuple[Any, int, tuple[Any, ...]]:
    """(kernel, blocks, arguments behind the images) of a task's launch."""
    gradient = program.buffers[task.gradient_buffer]
    source = program.buffers[task.source_buffer] if task.source_buffer >= 0 else gradient
    shape = shape_of(task, gradient, source)
    grid, panels = (task.height, task.width), triton.cdiv(task.out, shape.columns)
    strides = [(b.row_stride, b.image_stride) for b in (gradient, source)]
    if task.kind != WeightKind.CONVOLUTION:
        blocks = triton.cdiv(task.height * task.width, shape.rows) if task.per_pixel else 1
        return sum_weight_kernel, panels * blocks, (grid, *strides, shape)
    blocks = triton.cdiv(task.out, shape.rows) * triton.cdiv(task.inner, shape.columns)
    height = task.source_height or source.height * task.source_factor_y
    width = task.source_width or source.width * task.source_factor_x
    arguments = (grid, strides[0], (height, width), strides[1], shape)
    return convolution_weight_kernel, task.kernel_y * task.kernel_x * blocks, arguments


def shape_of(task: WeightTask, gradient: Buffer, source: Buffer) -> TaskShape:
    """What the compiler knows; blocks follow from the task alone."""
    one_pixel = task.height * task.width == 1
    if task.kind == WeightKind.CONVOLUTION:
        # Large blocks where there are enough of them to fill a GPU.
        large = task.kernel_y * task.kernel_x * triton.cdiv(task.out, 64) * triton.cdiv(task.inner, 64) >= 256
        most = _INTERPRETED_BLOCK if INTERPRETED else 64 if large and not one_pixel else 32
        rows, columns = (min(max(triton.next_power_of_2(n), 16), most) for n in (task.out, task.inner))
        deepest = _INTERPRETED_BLOCK if INTERPRETED else 64 if gradient.bytes == 2 else 32
        pixels = min(max(triton.next_power_of_2(task.height * task.width), 16), deepest)
        depth = 1 if one_pixel else pixels
    else:
        columns = min(triton.next_power_of_2(task.out), _INTERPRETED_BLOCK if INTERPRETED else 32)
        rows, depth = max(1, (1 << 16 if INTERPRETED else 1024) // columns), 1
    window = (task.kernel_y, task.kernel_x, task.stride_y, task.stride_x)
    return TaskShape(
        kind=task.kind,
        out=task.out,
        inner=task.inner,
        per_pixel=bool(task.per_pixel),
        window=(*window, task.pad_y, task.pad_x, task.dilation_y, task.dilation_x),
        gradient=SideShape(
            gradient.pixel_stride, task.gradient_factor_y, task.gradient_factor_x, bool(task.gradient_broadcast)
        ),
        source=SideShape(source.pixel_stride, task.source_factor_y, task.source_factor_x, bool(task.source_broadcast)),
        one_pixel=one_pixel,
        rows=rows,
        columns=columns,
        depth=depth,
    )
