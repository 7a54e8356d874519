"""Triton: a fused program, with one launch for each instruction over the whole batch.

The phases of a transposed convolution are instructions of their own. They are one launch, whose blocks take turns.

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
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from ..instructions import Buffer, Epilogue, EpilogueOp, Instruction, Kind, Layout, PlannedProgram
from ..program_check import checked_bytes
from .activations import exponential, logarithm
from .compiling import Launcher, launch_together
from .philox import INTERPRETED
from .program_epilogue import Step, epilogue

_LOAD, _GATHER, _CONVOLUTION, _POOL, _LOG_SUM_EXP, _SOFTMAX, _FIRST_MAXIMUM = (tl.constexpr(int(kind)) for kind in Kind)
# Inputs of so few channels make the inner dimension out of taps and channels together: a product needs 16 of it.
FEW = 16
_FEW = tl.constexpr(FEW)
_INTERPRETED = tl.constexpr(INTERPRETED)
# Convolutions of no more than so many pairs of a tap and a channel multiply them side by side (`beside_one_another`),
# for so many positions of a block.
PAIRS, PAIRED_ROWS = 32, 256
# A product has so many columns at least.
LEAST = 16
_LEAST = tl.constexpr(LEAST)
# Channels that an epilogue works on at a time: with 128, activation and derivative take up to 255 registers and spill.
_AT_ONCE = tl.constexpr(64)
# Pixels of a window that one step of a pool reads, so that their loads are under way together.
WINDOW_STEP = 16
# Phases that one launch computes: each of them adds a few instructions to all of its blocks.
PHASES = 16
# What an int32 holds: a kernel counts all pixels, and the numbers of one image and of one constant.
MOST = torch.iinfo(torch.int32).max
_STORED = {2: torch.bfloat16, 4: torch.float32}


class Window(NamedTuple):
    """The windows of a convolution, pool or gather; see `instructions.Kind`. Each phase has its kernel and padding."""

    kernel_y: tuple[int, ...]
    kernel_x: tuple[int, ...]
    pad_y: tuple[int, ...]
    pad_x: tuple[int, ...]
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int


class Shape(NamedTuple):
    """What the compiler knows of an instruction: the same for every batch.

    Attributes:
        kind, window, broadcast: as in `instructions.Instruction`.
        phases: how many are computed.
        steps: the operations of its epilogue.
        channels, inputs: of the result and of the source.
        pixel: numbers from pixel to pixel of the source.
        one_pixel: whether a block is of images at one pixel, because the source of a convolution is one pixel.
        paired: whether columns of a product are pairs of a tap and a channel.
        filled: whether a gather has a number for what is outside of the source.
        rows, columns: positions and channels of a block.
        depth: of the inner dimension of a product that is read at a time.
        taps: pixels of a pool's window that are read at a time; taps but the middle one where they are `paired`.
    """

    kind: int
    window: Window
    phases: int
    broadcast: bool
    steps: tuple[Step, ...]
    channels: int
    inputs: int
    pixel: int
    one_pixel: bool
    paired: bool
    filled: bool
    rows: int
    columns: int
    depth: int
    taps: int


# Kernels ------------------------------------------------------------------------------------------------------------
#
# `grid` is (images, height, width) of an instruction, `source_strides` (height, width, row, image) of the buffer that
# it reads. `place` is (image, y, x, columns, inside) of one block: the positions that are its rows, with `image` in
# int64, the channels that are its columns, and which rows exist. `taps` is (kernel_y, kernel_x, pad_y, pad_x).


@triton.jit
def chosen(options: tl.tuple, number: tl.tensor) -> tl.tensor:
    """options[number] of scalars or pointers."""
    value = options[0]
    for i in tl.static_range(1, len(options)):
        value = tl.where(number == i, options[i], value)
    return value


@triton.jit
def chosen_constant(OPTIONS: tl.constexpr, number: tl.tensor) -> tl.tensor:
    """OPTIONS[number] of numbers that the compiler knows, as it knows the result where all are the same."""
    value = OPTIONS[0]
    for i in tl.static_range(1, len(OPTIONS)):
        value = tl.where(number == i, OPTIONS[i], value)
    return value


@triton.jit
def taps_of(phase: tl.tensor, SHAPE: tl.constexpr) -> tl.tuple:
    """The taps of a phase."""
    WINDOW: tl.constexpr = SHAPE.window
    KERNEL_Y: tl.constexpr = WINDOW.kernel_y
    KERNEL_X: tl.constexpr = WINDOW.kernel_x
    PAD_Y: tl.constexpr = WINDOW.pad_y
    PAD_X: tl.constexpr = WINDOW.pad_x
    kernel_y, kernel_x = chosen_constant(KERNEL_Y, phase), chosen_constant(KERNEL_X, phase)
    return kernel_y, kernel_x, chosen_constant(PAD_Y, phase), chosen_constant(PAD_X, phase)


@triton.jit
def padded(grid: tl.tuple, SHAPE: tl.constexpr) -> tl.tuple:
    """(height, width, halo) of an image whose rows end in the zeros that taps reach, and behind which rows of them lie.

    The zeros behind a row are those before the next one. Taps reach `halo` positions before and behind their own.
    """
    WINDOW: tl.constexpr = SHAPE.window
    width = grid[2] + WINDOW.pad_x[0]
    return grid[1] + WINDOW.pad_y[0], width, WINDOW.pad_y[0] * width + WINDOW.pad_x[0]


@triton.jit
def columns_of_block(block: tl.tensor, SHAPE: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """The first channels of one block."""
    PANELS: tl.constexpr = (SHAPE.channels + SHAPE.columns - 1) // SHAPE.columns
    return block % PANELS * SHAPE.columns + tl.arange(0, COUNT)


@triton.jit
def place_of_block(block: tl.tensor, grid: tl.tuple, SHAPE: tl.constexpr) -> tl.tuple:
    """The place of one block of an instruction's grid."""
    columns = columns_of_block(block, SHAPE, SHAPE.columns)
    unit = block // ((SHAPE.channels + SHAPE.columns - 1) // SHAPE.columns)
    if SHAPE.paired:
        height, width, halo = padded(grid, SHAPE)
        row = tl.arange(0, SHAPE.rows)
        position = unit * (SHAPE.rows - 2 * halo) + row - halo
        own = (row >= halo) & (row < SHAPE.rows - halo)
        image = position // (height * width)
        y, x = position // width % height, position % width
        return image.to(tl.int64), y, x, columns, own & (image < grid[0]) & (y < grid[1]) & (x < grid[2])
    else:
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
def within(at: tl.tensor, size: tl.tensor) -> tl.tensor:
    """0 <= at < size, by one comparison."""
    return at.to(tl.uint32, bitcast=True) < size


@triton.jit
def over_taps(
    source: tl.tensor,
    weight: tl.tensor,
    taps: tl.tuple,
    place: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """A convolution: the sums over inputs, `depth` at a time, and taps.

    All taps of a part of the inputs come before the next part, and the source comes through the L1 cache (`.ca`). There
    most taps find what others read. What differs from thread to thread is computed before the loop.
    """
    image, y, x, columns, inside = place
    kernel_y, kernel_x, pad_y, pad_x = taps
    WINDOW: tl.constexpr = SHAPE.window
    CHANNELS: tl.constexpr = SHAPE.channels
    INPUTS: tl.constexpr = SHAPE.inputs
    DEPTH: tl.constexpr = SHAPE.depth
    STEPS: tl.constexpr = (INPUTS + DEPTH - 1) // DEPTH
    there = (columns < CHANNELS)[None, :]
    sy, sx = y * WINDOW.stride_y - pad_y, x * WINDOW.stride_x - pad_x
    inner = tl.arange(0, DEPTH)
    pixels = (image * source_strides[3] + (sy * source_strides[2] + sx * SHAPE.pixel))[:, None] + inner[None, :]
    sy = tl.where(inside, sy, -(2**30))
    weights = (inner * CHANNELS)[:, None] + columns[None, :]
    sums = tl.zeros((image.shape[0], columns.shape[0]), tl.float32)
    count = kernel_y * kernel_x
    for k in range(count * STEPS):
        tap, first = k % count, k // count * DEPTH
        dy, dx = tap // kernel_x * WINDOW.dilation_y, tap % kernel_x * WINDOW.dilation_x
        seen = (within(sy + dy, source_strides[0]) & within(sx + dx, source_strides[1]))[:, None]
        from_source = source + (dy * source_strides[2] + dx * SHAPE.pixel + first) + pixels
        from_weight = weight + (tap * INPUTS + first) * CHANNELS + weights
        if INPUTS % DEPTH == 0:
            a = tl.load(from_source, mask=seen, other=0.0, cache_modifier=".ca")
            b = tl.load(from_weight, mask=there, other=0.0)
        else:
            a = tl.load(from_source, mask=seen & (first + inner < INPUTS)[None, :], other=0.0, cache_modifier=".ca")
            b = tl.load(from_weight, mask=there & (first + inner < INPUTS)[:, None], other=0.0)
        sums = product(a, b, sums)
    return sums


@triton.jit
def over_few_inputs(
    source: tl.tensor,
    weight: tl.tensor,
    taps: tl.tuple,
    place: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """A convolution: the sums over (tap, input) as one dimension, in which the weights lie side by side as well."""
    image, y, x, columns, inside = place
    kernel_y, kernel_x, pad_y, pad_x = taps
    WINDOW: tl.constexpr = SHAPE.window
    CHANNELS: tl.constexpr = SHAPE.channels
    INPUTS: tl.constexpr = SHAPE.inputs
    DEPTH: tl.constexpr = SHAPE.depth
    total = kernel_y * kernel_x * INPUTS
    there = (columns < CHANNELS)[None, :]
    base = image * source_strides[3]
    sums = tl.zeros((image.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, total, DEPTH):
        k = first + tl.arange(0, DEPTH)
        tap = k // INPUTS
        sy = (y * WINDOW.stride_y - pad_y)[:, None] + (tap // kernel_x * WINDOW.dilation_y)[None, :]
        sx = (x * WINDOW.stride_x - pad_x)[:, None] + (tap % kernel_x * WINDOW.dilation_x)[None, :]
        seen = inside[:, None] & (k < total)[None, :]
        seen = seen & (sy >= 0) & (sy < source_strides[0]) & (sx >= 0) & (sx < source_strides[1])
        numbers = source + base[:, None] + (sy * source_strides[2] + sx * SHAPE.pixel + (k % INPUTS)[None, :])
        a = tl.load(numbers, mask=seen, other=0.0)
        b = tl.load(weight + (k * CHANNELS)[:, None] + columns[None, :], mask=there & (k < total)[:, None], other=0.0)
        sums = product(a, b, sums)
    return sums


@triton.jit
def of_one_tap(
    source: tl.tensor,
    weight: tl.tensor,
    taps: tl.tuple,
    place: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """A convolution over images of one pixel, which one pixel (y, x) of the grid sees through one tap."""
    image, y, x, columns, inside = place
    kernel_y, kernel_x, pad_y, pad_x = taps
    CHANNELS: tl.constexpr = SHAPE.channels
    INPUTS: tl.constexpr = SHAPE.inputs
    DEPTH: tl.constexpr = SHAPE.depth
    tap_y, tap_x = pad_y - y, pad_x - x
    seen = (tap_y >= 0) & (tap_y < kernel_y) & (tap_x >= 0) & (tap_x < kernel_x)
    weight += tl.where(seen, tap_y * kernel_x + tap_x, 0) * (INPUTS * CHANNELS)
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
def beside_one_another(
    source: tl.tensor,
    weight: tl.tensor,
    place: tl.tuple,
    grid: tl.tuple,
    source_strides: tl.tuple,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """A convolution to few channels, of the size of its source: all taps in one product, then shifts and a sum.

    The product is that of each position with the weights of all (tap, channel) side by side, so the source is read once
    and not once a tap. A position's result is the sum of what taps have at the positions that they reach; the tap in
    the middle reaches its own, and has a product for itself. Blocks overlap by a halo on either side, for which there
    are products and no results. Positions are those of `padded` images, so that no tap reaches the end of another row.
    """
    image, y, x, _, _ = place
    WINDOW: tl.constexpr = SHAPE.window
    CHANNELS: tl.constexpr = SHAPE.channels
    INPUTS: tl.constexpr = SHAPE.inputs
    DEPTH: tl.constexpr = SHAPE.depth
    ROWS: tl.constexpr = SHAPE.rows
    COLUMNS: tl.constexpr = SHAPE.columns
    TAPS: tl.constexpr = SHAPE.taps
    KERNEL_X: tl.constexpr = WINDOW.kernel_x[0]
    MIDDLE: tl.constexpr = WINDOW.kernel_y[0] * KERNEL_X // 2
    known = (image >= 0) & (image < grid[0]) & (y >= 0) & (y < grid[1]) & (x >= 0) & (x < grid[2])
    pixels = source + (image * source_strides[3] + (y * source_strides[2] + x * SHAPE.pixel))[:, None]
    pair = tl.arange(0, TAPS * COLUMNS)
    tap, channel = pair // COLUMNS, pair % COLUMNS
    tap += tl.where(tap >= MIDDLE, 1, 0)
    there = ((tap <= 2 * MIDDLE) & (channel < CHANNELS))[None, :]
    weights = weight + (tap * (INPUTS * CHANNELS) + channel)[None, :]
    own = tl.arange(0, _LEAST)
    in_middle = weight + (MIDDLE * (INPUTS * CHANNELS) + own)[None, :]
    sums = tl.zeros((ROWS, TAPS * COLUMNS), tl.float32)
    middle = tl.zeros((ROWS, _LEAST), tl.float32)
    for first in range(0, INPUTS, DEPTH):
        inputs = first + tl.arange(0, DEPTH)
        a = tl.load(pixels + inputs[None, :], mask=known[:, None] & (inputs < INPUTS)[None, :], other=0.0)
        here = (inputs < INPUTS)[:, None]
        b = tl.load(weights + (inputs * CHANNELS)[:, None], mask=there & here, other=0.0)
        sums = product(a, b, sums)
        b = tl.load(in_middle + (inputs * CHANNELS)[:, None], mask=(own < CHANNELS)[None, :] & here, other=0.0)
        middle = product(a, b, middle)
    _, width, _ = padded(grid, SHAPE)
    down, right = tap // KERNEL_X * WINDOW.dilation_y, tap % KERNEL_X * WINDOW.dilation_x
    shift = (down - WINDOW.pad_y[0]) * width + (right - WINDOW.pad_x[0])
    reached = (tl.arange(0, ROWS)[:, None] + shift[None, :]) & (ROWS - 1)  # a result's lie within the block
    terms = tl.gather(sums, reached, 0)
    if TAPS != 2 * MIDDLE:  # what is no tap may have reached a lost image, and 0 * NaN is NaN
        terms = tl.where((tap <= 2 * MIDDLE)[None, :], terms, 0.0)
    shifted = tl.sum(tl.reshape(terms, (ROWS, TAPS, COLUMNS)), axis=1)
    return shifted + tl.sum(tl.reshape(middle, (ROWS, _LEAST // COLUMNS, COLUMNS)), axis=1)  # zeros but for the first


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
    sy, sx = y - WINDOW.pad_y[0], x - WINDOW.pad_x[0]
    seen = (sy >= 0) & (sx >= 0)
    seen = seen & (sy < source_strides[0] * WINDOW.kernel_y[0]) & (sx < source_strides[1] * WINDOW.kernel_x[0])
    pixel = sy // WINDOW.kernel_y[0] * source_strides[2] + sx // WINDOW.kernel_x[0] * SHAPE.pixel
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
    TOTAL: tl.constexpr = WINDOW.kernel_y[0] * WINDOW.kernel_x[0]
    sums = tl.zeros((image.shape[0], columns.shape[0]), tl.float32)
    base = (image * source_strides[3])[:, None]
    for first in range(0, TOTAL, TAPS):
        tap = first + tl.arange(0, TAPS)[None, :]
        sy = (y * WINDOW.stride_y - WINDOW.pad_y[0])[:, None] + tap // WINDOW.kernel_x[0]
        sx = (x * WINDOW.stride_x - WINDOW.pad_x[0])[:, None] + tap % WINDOW.kernel_x[0]
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
    top, left = y - y % WINDOW.kernel_y[0], x - x % WINDOW.kernel_x[0]
    seen = inside & (top + WINDOW.kernel_y[0] <= source_strides[0]) & (left + WINDOW.kernel_x[0] <= source_strides[1])
    mask = seen[:, None] & (columns < SHAPE.channels)[None, :]
    base = source + (image * source_strides[3])[:, None] + columns[None, :]
    own = tl.load(base + (y * source_strides[2] + x * SHAPE.pixel)[:, None], mask=mask, other=0.0).to(tl.float32)
    place_in_window = (y - top) * WINDOW.kernel_x[0] + (x - left)
    largest = mask
    for tap in range(WINDOW.kernel_y[0] * WINDOW.kernel_x[0]):
        sy, sx = top + tap // WINDOW.kernel_x[0], left + tap % WINDOW.kernel_x[0]
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
    taps: tl.tuple,
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
    elif SHAPE.paired:
        return beside_one_another(source, weight, place, grid, source_strides, SHAPE)
    elif SHAPE.one_pixel:
        return of_one_tap(source, weight, taps, place, source_strides, SHAPE)
    elif SHAPE.inputs <= _FEW:
        return over_few_inputs(source, weight, taps, place, source_strides, SHAPE)
    else:
        return over_taps(source, weight, taps, place, source_strides, SHAPE)


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
    weights: tl.tuple,
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
    OVERLAPS: tl.constexpr,
) -> None:
    """One block of an instruction, or of one of its phases, which take turns.

    `weights` are the numbers but for convolutions. `grid` has height, width and start of each phase, and their step.

    The batch is no part of `grid`: within a tuple, Triton compiles anew for 1 and for multiples of 16. So the kernels
    of a first check with a few samples are those of the chain.

    With OVERLAPS blocks are there before the launch before has ended. They wait for its end, which is when all that it
    wrote can be read, ahead of anything they read or write, and then the next launch may prepare itself.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    phase, block = tl.program_id(0) % SHAPE.phases, tl.program_id(0) // SHAPE.phases
    whole = (batch, chosen(grid[0], phase), chosen(grid[1], phase))
    place, taps = place_of_block(block, whole, SHAPE), taps_of(phase, SHAPE)
    v = computed(source, chosen(weights, phase), numbers, fill, taps, place, whole, source_strides, SHAPE)
    start = (chosen(grid[2], phase), chosen(grid[3], phase))
    image, y, x, columns, inside = place_in_buffers(place, start, (grid[4], grid[5]), SHAPE)
    if SHAPE.kind == _CONVOLUTION and SHAPE.columns > _AT_ONCE:
        HALF: tl.constexpr = SHAPE.columns // 2
        first, second = tl.split(tl.permute(tl.reshape(v, (SHAPE.rows, 2, HALF)), (0, 2, 1)))
        columns = columns_of_block(block, SHAPE, HALF)
        epilogue(first, (image, y, x, columns, inside), numbers, operands, rows, images, at, SHAPE)
        epilogue(second, (image, y, x, columns + HALF, inside), numbers, operands, rows, images, at, SHAPE)
    else:
        epilogue(v, (image, y, x, columns, inside), numbers, operands, rows, images, at, SHAPE)


# Launcher -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One instruction, or several that are phases of one, as a launch; all but the batch and the places in memory.

    Attributes:
        shape, num_warps, num_stages: what is compiled.
        source: the buffer that is read and its first channel; -1 for x.
        weights: the constants with the weights of each phase, -1 for none.
        fill: the number that a gather puts outside of its source.
        operands: of each step where it points to, "buffers", "constants" and an index, "gradient" or "energies".
        rows, images, at: the run-time numbers of each step.
        grid: heights, widths and starts (y, x) of the phases' grids, and their step.
        source_strides: height, width, row and image of the source.
    """

    shape: Shape
    num_warps: int
    num_stages: int | None
    source: tuple[int, int]
    weights: tuple[int, ...]
    fill: int
    operands: tuple[tuple[str, int], ...]
    rows: tuple[int, ...]
    images: tuple[int, ...]
    at: tuple[int, ...]
    grid: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]
    source_strides: tuple[int, ...]

    @property
    def padded(self) -> tuple[int, int]:
        """(positions of an image, halo) where taps are columns of a product; see `padded`."""
        (pad_y,), (pad_x,), (height,), (width,) = *self.shape.window[2:4], *self.grid[:2]
        return (height + pad_y) * (width + pad_x), halo_of(pad_y, pad_x, width)

    def positions(self, batch: int) -> int:
        """How many there are in the largest grid of so many images."""
        return batch * (self.padded[0] if self.shape.paired else max(map(operator.mul, *self.grid[:2])))

    def programs(self, batch: int) -> int:
        """How many blocks cover the grids of so many images. All phases have as many as the largest of them."""
        rows = self.shape.rows - (2 * self.padded[1] if self.shape.paired else 0)
        panels = triton.cdiv(self.shape.channels, self.shape.columns)
        if self.shape.one_pixel:
            units = self.positions(1) * triton.cdiv(batch, rows)
        else:
            units = triton.cdiv(self.positions(batch), rows)
        return units * panels * self.shape.phases


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

    def launch_all(launcher: Launcher) -> None:
        for call in calls:
            _launch(launcher, call, x, constants, places)

    launch_together((content, facts, x.device), launch_all)


def facts_of(x: Tensor, constants: Sequence[Tensor]) -> Facts:
    return Facts(tuple(x.shape[1:]), tuple((t.dtype, tuple(t.shape)) for t in constants))


def _launch(
    launcher: Launcher, call: Call, x: Tensor, constants: Sequence[Tensor], places: dict[str, Sequence[Tensor]]
) -> None:
    buffer, channel = call.source
    source = x if buffer < 0 else places["buffers"][buffer][channel:]
    weights = tuple(constants[max(weight, 0)] for weight in call.weights)
    operands = tuple(places[kind][index] for kind, index in call.operands)
    overlaps = _overlaps()
    launcher(
        *(instruction_kernel, call.programs(x.shape[0])),
        *(source, weights, constants[0], call.fill, operands, call.rows, call.images, call.at, x.shape[0]),
        *(call.grid, call.source_strides, call.shape, overlaps),
        num_warps=call.num_warps,
        **({} if call.num_stages is None else {"num_stages": call.num_stages}),
        **({"launch_pdl": True} if overlaps else {}),
        enable_fp_fusion=False,
    )


def _overlaps() -> bool:
    """Whether launches of this device may begin before the one before has ended: from sm_90 on."""
    if INTERPRETED:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


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
    pixels = max((call.positions(batch) for call in calls_of(code, facts_of(x, constants))[1]), default=batch)
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
    return program, tuple(calls_in_order(program, facts))


def calls_in_order(program: PlannedProgram, facts: Facts) -> list[Call]:
    """The launches of all instructions; phases that follow one another are one launch."""
    calls: list[Call] = []
    for i in program.instructions:
        call = call_of(program, facts, i)
        if calls and _is_phase_of(call, calls[-1]):
            calls[-1] = _joined(calls[-1], call)
        else:
            calls.append(call)
    return calls


def _is_phase_of(call: Call, before: Call) -> bool:
    """Whether one launch computes both: convolutions that differ in taps and weights alone, and write other pixels.

    What an instruction writes it reads at its own pixels at most (`program_check`), so neither waits for the other.
    Where taps are columns of a product, their number is the compiler's.
    """
    if call.weights[0] < 0 or call.shape.paired or before.shape.phases == PHASES:
        return False
    if _apart_from_phase(call) != _apart_from_phase(before):
        return False
    *_, starts_y, starts_x, step_y, step_x = _joined(before, call).grid
    starts = {(y % step_y, x % step_x) for y, x in zip(starts_y, starts_x, strict=True)}
    return len(starts) == len(starts_y) and ("energies", 0) not in call.operands


def _apart_from_phase(call: Call) -> Call:
    none: tuple[int, ...] = ()
    window = call.shape.window._replace(kernel_y=none, kernel_x=none, pad_y=none, pad_x=none)
    shape = call.shape._replace(window=window, phases=0)
    return replace(call, shape=shape, weights=none, grid=(none, none, none, none, *call.grid[4:]))


def _joined(call: Call, other: Call) -> Call:
    """Both with all of their phases."""
    window, more = call.shape.window, other.shape.window
    window = window._replace(
        kernel_y=window.kernel_y + more.kernel_y,
        kernel_x=window.kernel_x + more.kernel_x,
        pad_y=window.pad_y + more.pad_y,
        pad_x=window.pad_x + more.pad_x,
    )
    heights, widths, starts_y, starts_x = (a + b for a, b in zip(call.grid[:4], other.grid[:4], strict=True))
    return replace(
        call,
        shape=call.shape._replace(window=window, phases=call.shape.phases + other.shape.phases),
        weights=call.weights + other.weights,
        grid=(heights, widths, starts_y, starts_x, *call.grid[4:]),
    )


def call_of(program: PlannedProgram, facts: Facts, i: Instruction) -> Call:
    """One instruction's launch."""
    kind, source = Kind(i.kind), program.buffers[i.source] if i.source >= 0 else None
    operands, steps, rows, images, at = _steps(program, facts, i)
    taps = ((i.kernel_y,), (i.kernel_x,), (i.pad_y,), (i.pad_x,))
    window = Window(*taps, i.stride_y, i.stride_x, i.dilation_y, i.dilation_x)
    one_pixel, paired, depth, pixels, num_warps, num_stages = False, False, 0, 1, 4, None
    if kind == Kind.CONVOLUTION:
        _check_weight(program, facts, i)
        one_pixel = source is not None and (source.height, source.width) == (1, 1)
        one_pixel = one_pixel and window[4:] == (1, 1, 1, 1)
        block_rows, columns, depth, num_warps = _product_blocks(i, program.header.bytes, one_pixel)
        num_stages = 3
        if paired := source is not None and _is_paired(i, source):
            block_rows, columns, num_warps = PAIRED_ROWS, triton.next_power_of_2(i.channels), 8
            depth, pixels = min(depth, 64 // program.header.bytes), triton.next_power_of_2(i.kernel_y * i.kernel_x - 1)
    elif kind in (Kind.LOG_SUM_EXP, Kind.SOFTMAX):
        columns = triton.next_power_of_2(i.source_channels)
        block_rows = max(1, 1024 // columns)
    else:
        columns = min(triton.next_power_of_2(i.channels), 64)
        if kind == Kind.POOL:
            pixels = min(triton.next_power_of_2(i.kernel_y * i.kernel_x), WINDOW_STEP)
        block_rows = max(1, 2048 // (columns * pixels))
    shape = Shape(
        kind=i.kind,
        window=window,
        phases=1,
        broadcast=bool(i.broadcast),
        steps=steps,
        channels=i.channels,
        inputs=i.source_channels,
        pixel=source.pixel_stride if source is not None else 0,
        one_pixel=one_pixel,
        paired=paired,
        filled=kind == Kind.GATHER and i.constant >= 0,
        rows=block_rows,
        columns=columns,
        depth=depth,
        taps=pixels,
    )
    return Call(
        shape,
        num_warps,
        num_stages,
        source=(i.source, i.source_channel),
        weights=(i.constant if kind == Kind.CONVOLUTION else -1,),
        fill=max(i.constant, 0) if kind == Kind.GATHER else 0,
        operands=operands,
        rows=rows,
        images=images,
        at=at,
        grid=((i.height,), (i.width,), (i.start_y,), (i.start_x,), i.step_y, i.step_x),
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

    Blocks are large where a single image fills several, because each reads all weights of its columns. Eight warps, so
    that a thread holds at most 64 sums: with four and 128 an epilogue spills. docs/results/gpu-model/update compares
    other blocks. Operands of three stages take at most 96 KB of shared memory.
    """
    plane = 1 if one_pixel else i.height * i.width * i.step_y * i.step_x  # of all phases, which are one launch
    few = not one_pixel and i.source_channels <= FEW
    rows, most = (128, 64 if few or size == 4 else 128) if plane >= 256 else (64, 64) if plane >= 16 else (16, 32)
    columns = min(max(triton.next_power_of_2(i.channels), 16), most)
    inner = i.source_channels * i.kernel_y * i.kernel_x if few else i.source_channels
    deepest = 32 if size == 4 else 64 if plane >= 16 else 128
    depth = min(max(triton.next_power_of_2(inner), 16), deepest)
    return rows, columns, depth, 8 if rows * columns >= (64 if size == 2 else 128) * 64 else 4


def halo_of(pad_y: int, pad_x: int, width: int) -> int:
    """How far taps reach before and behind a position of a padded image."""
    return pad_y * (width + pad_x) + pad_x


def _is_paired(i: Instruction, source: Buffer) -> bool:
    """Whether a convolution multiplies (tap, channel) side by side: where this reads its source half as often, or less.

    Its images fill a block, since a chain of smaller ones needs blocks of four warps.
    """
    taps, reach = i.kernel_y * i.kernel_x, ((i.kernel_y - 1) * i.dilation_y, (i.kernel_x - 1) * i.dilation_x)
    same = (i.height, i.width) == (source.height, source.width) and (2 * i.pad_y, 2 * i.pad_x) == reach
    pairs = triton.next_power_of_2(max(taps - 1, 1)) * triton.next_power_of_2(i.channels)
    few = i.source_channels > FEW and taps > 1 and taps % 2 and pairs <= PAIRS and i.stride_y == i.stride_x == 1
    own = PAIRED_ROWS - 2 * halo_of(i.pad_y, i.pad_x, i.width)
    return bool(same and few and i.height * i.width >= PAIRED_ROWS and taps * own >= 2 * PAIRED_ROWS)


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
    do, approximate = EpilogueOp(operation.op), program.header.bytes == 2
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
        step = Step(int(do), activation=operation.activation, approximate=approximate)
        return ("constants", 0), step, 0, 0
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
        approximate=approximate,
    )
    return ("buffers", operation.buffer), step, buffer.row_stride, buffer.image_stride
