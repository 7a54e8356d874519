"""Triton: the epilogue of an instruction of a fused program, which is unrolled when its kernel is compiled.

Values are float32 blocks (positions, channels) in registers. Where a step's buffer lies is known to the compiler as far
as alignment needs it (channels of a pixel, `Step.pixel`), the rest comes at run time, so that one compiled kernel
serves all sizes of an image and all lengths of a batch. Factors and parameters are read from the constants: new weights
and a captured graph need nothing else.

What the compiler knows are named tuples within named tuples. Triton 3.6 takes an inner one out by an attribute only,
and hands it on only under a name that is annotated as a constexpr. So functions take the outer one, and a number where
the inner one is in a list.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..instructions import EpilogueOp
from .activations import activate, derivative, parameters


class Step(NamedTuple):
    """One operation as the compiler knows it.

    Attributes:
        op, activation, of_result, broadcast, channel, factor_y, factor_x: as in `instructions.Epilogue`.
        scaled: whether a factor belongs to it.
        pixel: numbers from pixel to pixel of the operand; 0 where all columns share one.
        flat: whether the operand is one row of channels for all pixels and images.
        own: whether the buffer was written by this epilogue before.
        approximate: whether an activation takes the GPU's approximate instructions, as in a program of bfloat16.
    """

    op: int
    activation: int = 0
    of_result: bool = False
    broadcast: bool = False
    channel: int = 0
    factor_y: int = 1
    factor_x: int = 1
    scaled: bool = False
    pixel: int = 0
    flat: bool = False
    own: bool = False
    approximate: bool = False


(
    _ADD_CONSTANT,
    _MULTIPLY_CONSTANT,
    _SCALE,
    _ADD,
    _MULTIPLY,
    _ACTIVATE,
    _ACTIVATE_KEEPING,
    _SLOPE,
    _STORE,
    _STORE_GRADIENT,
    _STORE_ENERGIES,
) = (tl.constexpr(int(do)) for do in EpilogueOp)


@triton.jit
def pixels_of(
    operand: tl.tensor, place: tl.tuple, row: tl.tensor, image_stride: tl.tensor, STEP: tl.constexpr
) -> tl.tensor:
    """Pointers (positions, 1) to channel 0 of v in the operand."""
    image, y, x, _, _ = place
    offset = image * image_stride + (y // STEP.factor_y * row + x // STEP.factor_x * STEP.pixel)
    return operand + offset[:, None] + STEP.channel


@triton.jit
def read(
    operand: tl.tensor,
    place: tl.tuple,
    row: tl.tensor,
    image_stride: tl.tensor,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """The operand's float32 values, (positions, channels) or what broadcasts to it."""
    _, _, _, columns, inside = place
    there = (columns < CHANNELS)[None, :]
    pixels = pixels_of(operand, place, row, image_stride, STEP)
    if STEP.own:
        tl.debug_barrier()  # other threads of this block may have written what this one reads
    if STEP.flat:
        return tl.load(operand + columns[None, :], mask=there, other=0.0)
    elif STEP.broadcast:
        return tl.load(pixels, mask=inside[:, None], other=0.0).to(tl.float32)
    else:
        return tl.load(pixels + columns[None, :], mask=inside[:, None] & there, other=0.0).to(tl.float32)


@triton.jit
def write(
    v: tl.tensor,
    operand: tl.tensor,
    place: tl.tuple,
    row: tl.tensor,
    image_stride: tl.tensor,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """v to the operand. Behind the last channel nothing is written: no kernel here reads it."""
    _, _, _, columns, inside = place
    pixels = pixels_of(operand, place, row, image_stride, STEP)
    mask = inside[:, None] & (columns < CHANNELS)[None, :]
    tl.store(pixels + columns[None, :], v.to(operand.dtype.element_ty), mask=mask)


@triton.jit
def done(
    v: tl.tensor,
    place: tl.tuple,
    numbers: tl.tensor,
    operand: tl.tensor,
    row: tl.tensor,
    image_stride: tl.tensor,
    at: tl.tensor,
    SHAPE: tl.constexpr,
    NUMBER: tl.constexpr,
) -> tl.tensor:
    """The values after operation NUMBER."""
    STEP: tl.constexpr = SHAPE.steps[NUMBER]
    CHANNELS: tl.constexpr = SHAPE.channels
    image, y, x, columns, inside = place
    if STEP.op == _ADD_CONSTANT:
        v += read(operand, place, row, image_stride, STEP, CHANNELS)
    elif STEP.op == _MULTIPLY_CONSTANT:
        v *= read(operand, place, row, image_stride, STEP, CHANNELS)
    elif STEP.op == _SCALE:
        v *= tl.load(numbers + at)
    elif STEP.op == _ADD:
        term = read(operand, place, row, image_stride, STEP, CHANNELS)
        if STEP.scaled:
            term *= tl.load(numbers + at)
        v += term
    elif STEP.op == _MULTIPLY:
        v *= read(operand, place, row, image_stride, STEP, CHANNELS)
    elif STEP.op == _ACTIVATE:
        a, b, c = parameters(numbers, at, STEP.activation)
        v = activate(v, a, b, c, STEP.activation, STEP.approximate)
    elif STEP.op == _ACTIVATE_KEEPING:
        a, b, c = parameters(numbers, at, STEP.activation)
        kept = derivative(v, a, b, c, STEP.activation, False, STEP.approximate)
        write(kept, operand, place, row, image_stride, STEP, CHANNELS)
        v = activate(v, a, b, c, STEP.activation, STEP.approximate)
    elif STEP.op == _SLOPE:
        a, b, c = parameters(numbers, at, STEP.activation)
        h = read(operand, place, row, image_stride, STEP, CHANNELS)
        v *= derivative(h, a, b, c, STEP.activation, STEP.of_result, STEP.approximate)
    elif STEP.op == _STORE:
        write(v, operand, place, row, image_stride, STEP, CHANNELS)
    elif STEP.op == _STORE_GRADIENT:
        # Channel by channel: an image of the result has image_stride numbers, a plane its share of them.
        plane = image_stride // CHANNELS
        offset = image * image_stride + (y * row + x)
        mask = inside[:, None] & (columns < CHANNELS)[None, :]
        tl.store(operand + offset[:, None] + (columns * plane)[None, :], v, mask=mask)
    else:
        tl.store(operand + image[:, None] + columns[None, :], v, mask=inside[:, None] & (columns == 0)[None, :])
    return v


@triton.jit
def epilogue(
    v: tl.tensor,
    place: tl.tuple,
    numbers: tl.tensor,
    operands: tl.tuple,
    rows: tl.tuple,
    images: tl.tuple,
    at: tl.tuple,
    SHAPE: tl.constexpr,
) -> None:
    """Every operation on the values v, whose place (image, y, x, columns, inside) is that in the buffers.

    Operation i has operands[i] with strides rows[i] and images[i], and its number at numbers[at[i]].
    """
    for i in tl.static_range(len(SHAPE.steps)):
        v = done(v, place, numbers, operands[i], rows[i], images[i], at[i], SHAPE, i)
