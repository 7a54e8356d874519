"""Triton: pool, activate, add, blend in one pass over the images, and the derivatives.

Bytes for each pooled pixel, in float32: 36 forward (read 4 pixels of main and of skip, write 1), 52 backward (read the
gradient and 4 of main, write 4 of each). A row of a tile is one thread's: LANES pooled elements side by side, so that
where they lie is worked out once a thread. Their windows are read 16 bytes at once: the channels of a pixel in
channels-last, and in NCHW pairs of neighbouring pixels that are parted in registers.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activations import activated
from .expand_blend import ROWS, blended, elements_of_program, tiles
from .philox import WARPS

_HALF_ROOT = tl.constexpr(1 / math.sqrt(2))
_HINTS = {
    "do_not_specialize": ["packs", "height", "width", "inner", "row", "plane"],
    "do_not_specialize_on_alignment": ["beta"],
}


@triton.jit
def windows(
    pack: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    row: tl.tensor,
    plane: tl.tensor,
    LANES: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tl.tuple:
    """Where windows lie in the input: offsets of their first pixels (ROWS, LANES), or PAIRED of their whole top rows
    (ROWS, 2 LANES), and how far it is from there to the right and down.

    Pooled elements are numbered (plane, row, pixel, channel). Not PAIRED, `inner` (the channels of a pixel in
    channels-last, 1 in NCHW), `row` and `plane` (of the input) are counted in LANES; PAIRED, `row` and `plane` in
    2 LANES, `width` in LANES. So the compiler sees that they are multiples, which 16-byte accesses need.
    """
    STEP: tl.constexpr = 2 * LANES if PAIRED else LANES
    if PAIRED:
        column = pack % width
        line = pack // width
    else:
        column = (pack // inner) % width * 2 * inner + pack % inner
        line = pack // inner // width
    first = (line // height).to(tl.int64) * plane + (line % height).to(tl.int64) * 2 * row + column
    return first[:, None] * STEP + tl.arange(0, STEP)[None, :], inner * STEP, row * STEP


@triton.jit
def column_sums(top: tl.tensor, bottom: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Float32 sums of pixels and the ones below."""
    above = tl.load(top, mask=inside, other=0.0).to(tl.float32)
    return above + tl.load(bottom, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def means(
    image: tl.tensor, window: tl.tensor, right: tl.tensor, down: tl.tensor, inside: tl.tensor, PAIRED: tl.constexpr
) -> tl.tensor:
    """Float32 means (ROWS, LANES) over windows."""
    top, bottom = image + window, image + window + down
    left = column_sums(top, bottom, inside)
    if PAIRED:
        left, beside = tl.split(left.reshape((left.shape[0], left.shape[1] // 2, 2)))
    else:
        top, bottom = top + right, bottom + right
        beside = column_sums(top, bottom, inside)
    return 0.25 * (left + beside)


@triton.jit
def spread(
    image: tl.tensor,
    values: tl.tensor,
    window: tl.tensor,
    right: tl.tensor,
    down: tl.tensor,
    inside: tl.tensor,
    PAIRED: tl.constexpr,
) -> None:
    """Write each of the values (ROWS, LANES) to the four pixels of its window."""
    values = values.to(image.dtype.element_ty)
    if PAIRED:
        values = tl.join(values, values).reshape((values.shape[0], 2 * values.shape[1]))
    tl.store(image + window, values, mask=inside)
    tl.store(image + window + down, values, mask=inside)
    if not PAIRED:
        tl.store(image + window + right, values, mask=inside)
        tl.store(image + window + down + right, values, mask=inside)


@triton.jit(**_HINTS)
def forward_kernel(
    out: tl.tensor,
    main: tl.tensor,
    skip: tl.tensor,
    fade: tl.tensor,
    beta: tl.tensor,
    packs: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    row: tl.tensor,
    plane: tl.tensor,
    parameter: tl.tensor,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """(act(mean(main)) + mean(skip)) / sqrt(2), blended with `fade` unless that is None."""
    pack, pooled, inside = elements_of_program(packs, LANES, ROWS, WIDE)
    window, right, down = windows(pack, height, width, inner, row, plane, LANES, PAIRED)
    act = activated(means(main, window, right, down, inside, PAIRED), parameter, ACTIVATION, 0)
    tail = (act + means(skip, window, right, down, inside, PAIRED)) * _HALF_ROOT
    if fade is not None:
        tail = blended(tl.load(beta), tail, tl.load(fade + pooled, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + pooled, tail.to(out.dtype.element_ty), mask=inside)


@triton.jit(**_HINTS)
def backward_kernel(
    grad_main: tl.tensor,
    grad_skip: tl.tensor,
    grad_fade: tl.tensor,
    grad: tl.tensor,
    main: tl.tensor,
    beta: tl.tensor,
    packs: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    row: tl.tensor,
    plane: tl.tensor,
    parameter: tl.tensor,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """The gradients of main, skip and, unless beta is None, fade."""
    pack, pooled, inside = elements_of_program(packs, LANES, ROWS, WIDE)
    window, right, down = windows(pack, height, width, inner, row, plane, LANES, PAIRED)
    g = tl.load(grad + pooled, mask=inside, other=0.0).to(tl.float32)
    if beta is not None:
        weight = tl.load(beta)
        tl.store(grad_fade + pooled, ((1.0 - weight) * g).to(grad.dtype.element_ty), mask=inside)
        share = 0.25 * (weight * _HALF_ROOT) * g
    else:
        share = g * (0.25 * _HALF_ROOT)
    slope = activated(means(main, window, right, down, inside, PAIRED), parameter, ACTIVATION, 1)
    spread(grad_main, share * slope, window, right, down, inside, PAIRED)
    spread(grad_skip, share, window, right, down, inside, PAIRED)


@triton.jit(**_HINTS)
def double_backward_kernel(
    out_grad: tl.tensor,
    out_main: tl.tensor,
    grad_main: tl.tensor,
    grad_skip: tl.tensor,
    grad_fade: tl.tensor,
    grad: tl.tensor,
    main: tl.tensor,
    beta: tl.tensor,
    packs: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    row: tl.tensor,
    plane: tl.tensor,
    parameter: tl.tensor,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """The derivative of the backward kernel along (grad_main, grad_skip, grad_fade)."""
    pack, pooled, inside = elements_of_program(packs, LANES, ROWS, WIDE)
    window, right, down = windows(pack, height, width, inner, row, plane, LANES, PAIRED)
    mean = means(main, window, right, down, inside, PAIRED)
    by_main = means(grad_main, window, right, down, inside, PAIRED)
    by_skip = means(grad_skip, window, right, down, inside, PAIRED)
    g = tl.load(grad + pooled, mask=inside, other=0.0).to(tl.float32)
    along = tl.fma(activated(mean, parameter, ACTIVATION, 1), by_main, by_skip)
    if beta is not None:
        fading = tl.load(beta)
        weight = fading * _HALF_ROOT
        by_fade = tl.load(grad_fade + pooled, mask=inside, other=0.0).to(tl.float32)
        along = tl.fma(weight, along, (1.0 - fading) * by_fade)
        share = 0.25 * weight * g
    else:
        along = along * _HALF_ROOT
        share = g * (0.25 * _HALF_ROOT)
    tl.store(out_grad + pooled, along.to(grad.dtype.element_ty), mask=inside)
    to_main = share * activated(mean, parameter, ACTIVATION, 2) * by_main
    spread(out_main, to_main, window, right, down, inside, PAIRED)


# Launchers ----------------------------------------------------------------------------------------------------------


def _launch(kernel: Any, tensors: tuple, main: Tensor, pooled: Tensor, *options: Any) -> None:
    """Run a kernel over all packs of pooled elements."""
    beta, activation, parameter = options
    _, channels, height, width = main.shape
    channels_last = channels > 1 and main.stride(1) == 1
    paired = not channels_last and width % 2 == 0
    vector = 16 // main.element_size()
    if paired:
        lanes = math.gcd(width // 2, vector // 2)
        extents = (height // 2, width // 2 // lanes, 1, width // (2 * lanes), height * width // (2 * lanes))
    else:
        inner = channels if channels_last else 1
        lanes = math.gcd(inner, vector)
        across = inner // lanes
        extents = (height // 2, width // 2, across, width * across, height * width * across)
    grid, packs, wide = tiles(pooled.numel(), lanes)
    kernel[grid](
        *(*tensors, beta, packs, *extents, parameter, activation, lanes, paired, ROWS, wide),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def block_tail(out: Tensor, main: Tensor, skip: Tensor, fade: Tensor | None, *options: Any) -> None:
    """Kernel `block_tail` of fastebm.ops.schemas."""
    _launch(forward_kernel, (out, main, skip, fade), main, out, *options)


def block_tail_backward(
    grad_main: Tensor, grad_skip: Tensor, grad_fade: Tensor | None, grad: Tensor, main: Tensor, *options: Any
) -> None:
    """Kernel `block_tail_backward` of fastebm.ops.schemas."""
    _launch(backward_kernel, (grad_main, grad_skip, grad_fade, grad, main), main, grad, *options)


def block_tail_double_backward(
    out_grad: Tensor,
    out_main: Tensor,
    grad_main: Tensor,
    grad_skip: Tensor,
    grad_fade: Tensor | None,
    grad: Tensor,
    main: Tensor,
    *options: Any,
) -> None:
    """Kernel `block_tail_double_backward` of fastebm.ops.schemas."""
    tensors = (out_grad, out_main, grad_main, grad_skip, grad_fade, grad, main)
    _launch(double_backward_kernel, tensors, main, grad, *options)
