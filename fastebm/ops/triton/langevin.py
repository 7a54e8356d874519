"""Triton: one Langevin update in one pass, which draws the noise in registers.

Clipping by the norm and a hinge need a factor for each chain, which a kernel sums up before it.

Bytes: 12 an element (read x and gradient, write x) in float32. An option that is off is None, which is compiled away.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import rng
from ..langevin import SUM_LANES, check_index
from .philox import WARPS, addressable, chain_of, check_readable_address, normal_rows, philox, rows_of_program, tile

_STREAM = tl.constexpr(int(rng.Stream.LANGEVIN))
# Rows of lanes that a sum reads before it adds them, so that their loads are under way together.
_READ_AHEAD = tl.constexpr(4)

_NUMBERS = ["batch", "elements", "pixels", "schedule_rows", "weight_rows"]
_TABLES = ["schedule", "key", "chain_ids", "data_term_weight", "factors"]


@triton.jit
def offsets(
    slot: tl.tensor, channel: tl.tensor, pixel: tl.tensor, element: tl.tensor, elements: tl.tensor, strides: tl.tuple
) -> tl.tensor:
    """Where elements lie: contiguous (strides None), or by (batch, channel, pixel) strides."""
    if strides is None:
        return slot * elements + element
    else:
        return slot * strides[0] + channel * strides[1] + pixel * strides[2]


@triton.jit
def limited(value: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """value in [low, high], either may be None. NaN passes."""
    if low is not None:
        value = tl.where(value < low, low, value)
    if high is not None:
        value = tl.where(value > high, high, value)
    return value


@triton.jit
def update_rows(
    images: tl.tuple,
    strides: tl.tuple,
    address: tl.tuple,
    schedule: tl.tensor,
    data_term_weight: tl.tensor,
    factors: tl.tensor,
    sizes: tl.tuple,
    limits: tl.tuple,
    rows: tl.tuple,
    NORM_CLIP: tl.constexpr,
    PER_CHAIN: tl.constexpr,
    LISTED: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDED: tl.constexpr,
) -> None:
    """The update of rows (quad of the chain in a slot) where `inside`. WHOLE: channels are whole quads; a contiguous
    row is one 16-byte access. `strides` are those of the images."""
    out, x, grad, mask, known, data_target, lower_bounds, upper_bounds = images
    seed, step, index, chain_ids = address
    batch, elements, pixels, schedule_rows, weight_rows = sizes
    clamp_min, clamp_max, grad_clip = limits
    slot, quad, inside = rows
    # What is one number a chain is a column beside (rows, 4).
    chain_slot = slot[:, None]
    element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    wanted = inside[:, None]
    if WHOLE:
        elements = (elements // 4).to(tl.int64) * 4  # tells the compiler that chains are whole quads
    else:
        wanted = wanted & (element < elements)
    channel, pixel = element, element
    if STRIDED:
        if WHOLE:
            # A row lies within one channel: one division, of 32 bits, where elements would take four of 64.
            channel_quads = (pixels // 4).to(tl.uint32)
            channel = (quad.to(tl.uint32) // channel_quads).to(tl.int64)[:, None]
            pixel = (quad.to(tl.uint32) % channel_quads).to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
        else:
            channel, pixel = element // pixels, element % pixels

    chain = chain_of(chain_ids, slot, inside, LISTED)
    # A negative index is an error that a kernel can't raise: NaN, like a counter that overflows.
    valid = (addressable(step, chain) & (index >= 0))[:, None]
    index = tl.maximum(index, 0)
    row = tl.minimum(index, schedule_rows - 1)
    if PER_CHAIN:
        pair = schedule + 2 * (row * batch + slot)
        step_size = tl.load(pair, mask=inside, other=0.0)[:, None]
        noise_std = tl.load(pair + 1, mask=inside, other=0.0)[:, None]
    else:
        step_size, noise_std = tl.load(schedule + 2 * row), tl.load(schedule + 2 * row + 1)

    state = tl.load(x + offsets(chain_slot, channel, pixel, element, elements, strides[1]), mask=wanted, other=0.0)
    g = tl.load(grad + offsets(chain_slot, channel, pixel, element, elements, strides[2]), mask=wanted, other=0.0)
    g = g.to(tl.float32)
    if grad_clip is not None:
        g = limited(g, -grad_clip, grad_clip)
    if NORM_CLIP:
        g = g * tl.load(factors + 2 * slot, mask=inside, other=0.0)[:, None]
    if data_target is not None:
        if factors is not None:
            weight = tl.load(factors + 2 * slot + 1, mask=inside, other=0.0)[:, None]
        else:
            weight = tl.load(data_term_weight + tl.minimum(index, weight_rows - 1))
        target_at = offsets(chain_slot, channel, pixel, element, elements, strides[5])
        target = tl.load(data_target + target_at, mask=wanted, other=0.0)
        g = tl.where(weight == 0, g, tl.fma(weight, state - target, g))

    moved = tl.fma(tl.where(valid, -step_size, float("nan")), g, state)
    if PER_CHAIN:
        noise = normal_rows(philox(quad, step, chain, _STREAM, seed))
        moved = tl.where(noise_std == 0, moved, tl.fma(noise_std, noise, moved))
    else:
        if noise_std != 0:
            noise = normal_rows(philox(quad, step, chain, _STREAM, seed))
            moved = tl.fma(noise_std, noise, moved)
    moved = limited(moved, clamp_min, clamp_max)
    if lower_bounds is not None:
        low_at = offsets(chain_slot, channel, pixel, element, elements, strides[6])
        low = tl.load(lower_bounds + low_at, mask=wanted, other=0.0)
        moved = tl.where(moved < low, low, moved)
    if upper_bounds is not None:
        high_at = offsets(chain_slot, channel, pixel, element, elements, strides[7])
        high = tl.load(upper_bounds + high_at, mask=wanted, other=0.0)
        moved = tl.where(moved > high, high, moved)
    if mask is not None:
        masked = tl.load(
            mask + offsets(chain_slot, channel, pixel, element, elements, strides[3]), mask=wanted, other=0
        )
        known_at = offsets(chain_slot, channel, pixel, element, elements, strides[4])
        moved = tl.where(masked != 0, tl.load(known + known_at, mask=wanted, other=0.0), moved)
    tl.store(out + offsets(chain_slot, channel, pixel, element, elements, strides[0]), moved, mask=wanted)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_TABLES)
def step_kernel(
    out: tl.tensor,
    x: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    known: tl.tensor,
    data_target: tl.tensor,
    lower_bounds: tl.tensor,
    upper_bounds: tl.tensor,
    schedule: tl.tensor,
    key: tl.tensor,
    chain_ids: tl.tensor,
    data_term_weight: tl.tensor,
    factors: tl.tensor,
    batch: tl.tensor,
    elements: tl.tensor,
    pixels: tl.tensor,
    schedule_rows: tl.tensor,
    weight_rows: tl.tensor,
    clamp_min: tl.tensor,
    clamp_max: tl.tensor,
    grad_clip: tl.tensor,
    out_strides: tl.tuple,
    x_strides: tl.tuple,
    grad_strides: tl.tuple,
    mask_strides: tl.tuple,
    known_strides: tl.tuple,
    data_target_strides: tl.tuple,
    lower_strides: tl.tuple,
    upper_strides: tl.tuple,
    NORM_CLIP: tl.constexpr,
    PER_CHAIN: tl.constexpr,
    LISTED: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDED: tl.constexpr,
    QUADS: tl.constexpr,
    NUM_CHAINS: tl.constexpr,
) -> None:
    """Two rows (quads of a chain) a thread."""
    slot, quad, inside = rows_of_program(batch, elements, QUADS, NUM_CHAINS)
    seed, step, index = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    images = (out, x, grad, mask, known, data_target, lower_bounds, upper_bounds)
    target_strides, low, high = data_target_strides, lower_strides, upper_strides
    strides = (out_strides, x_strides, grad_strides, mask_strides, known_strides, target_strides, low, high)
    update_rows(
        *(images, strides, (seed, step, index, chain_ids), schedule),
        *(data_term_weight, factors, (batch, elements, pixels, schedule_rows, weight_rows)),
        *((clamp_min, clamp_max, grad_clip), (slot, quad, inside), NORM_CLIP, PER_CHAIN, LISTED, WHOLE, STRIDED),
    )


@triton.jit
def read_lanes(
    tensor: tl.tensor, slot: tl.tensor, element: tl.tensor, elements: tl.tensor, pixels: tl.tensor, strides: tl.tuple
) -> tl.tensor:
    """float32 elements of one chain, 0 beyond its end."""
    if strides is None:
        at = slot * elements + element
    else:
        at = slot * strides[0] + (element // pixels) * strides[1] + (element % pixels) * strides[2]
    return tl.load(tensor + at, mask=element < elements, other=0.0).to(tl.float32)


@triton.jit
def ordered_square_sum(
    first: tl.tensor,
    second: tl.tensor,
    slot: tl.tensor,
    elements: tl.tensor,
    pixels: tl.tensor,
    first_strides: tl.tuple,
    second_strides: tl.tuple,
    LANES: tl.constexpr,
) -> tl.tensor:
    """Sum of squares of `first`, or of first - second, over one chain: lane l adds elements l, l + LANES, ..., then the
    lanes fold in halves."""
    lane = tl.arange(0, LANES).to(tl.int64)
    lanes = tl.zeros((LANES,), tl.float32)
    start = tl.full((), 0, tl.int64)
    while start < elements:  # Triton 3.6 can't interpret a range that ends at a number known at run time
        for ahead in tl.static_range(_READ_AHEAD):
            element = start + ahead * LANES + lane
            value = read_lanes(first, slot, element, elements, pixels, first_strides)
            if second is not None:
                value = value - read_lanes(second, slot, element, elements, pixels, second_strides)
            lanes = tl.fma(value, value, lanes)
        start += LANES * _READ_AHEAD
    # Sums of two numbers, which have no order of their own.
    tl.static_assert(LANES == 1024)
    for _ in tl.static_range(10):
        lanes = tl.sum(lanes.reshape((2, lanes.shape[0] // 2)), axis=0)
    return tl.sum(lanes, axis=0)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_TABLES)
def factors_kernel(
    factors: tl.tensor,
    x: tl.tensor,
    grad: tl.tensor,
    data_target: tl.tensor,
    key: tl.tensor,
    data_term_weight: tl.tensor,
    elements: tl.tensor,
    pixels: tl.tensor,
    weight_rows: tl.tensor,
    norm_clip: tl.tensor,
    hinge: tl.tensor,
    x_strides: tl.tuple,
    grad_strides: tl.tuple,
    data_target_strides: tl.tuple,
    LANES: tl.constexpr,
) -> None:
    """(gradient scale, weight of the data term) of one chain, which is one program."""
    slot = tl.program_id(0).to(tl.int64)
    if norm_clip is not None:
        norm = tl.sqrt_rn(ordered_square_sum(grad, None, slot, elements, pixels, grad_strides, None, LANES))
        tl.store(factors + 2 * slot, tl.where(norm > norm_clip, tl.div_rn(norm_clip, norm), 1.0))
    if data_target is not None:
        index = tl.maximum(tl.load(key + 2), 0)
        weight = tl.load(data_term_weight + tl.minimum(index, weight_rows - 1))
        if hinge is not None:
            distance = ordered_square_sum(x, data_target, slot, elements, pixels, x_strides, data_target_strides, LANES)
            weight = tl.where(distance > hinge, weight, 0.0)
        tl.store(factors + 2 * slot + 1, weight)


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """None for a contiguous tensor, else the strides of (batch, channel, pixel)."""
    return None if tensor is None or tensor.is_contiguous() else tensor.stride()


def langevin_step(out: Tensor, x: Tensor, grad: Tensor, *options: Any) -> None:
    """Kernel `langevin_step` of fastebm.ops.schemas."""
    schedule, key, chain_ids, clamp_min, clamp_max, grad_clip, grad_norm_clip, *sides = options
    lower_bounds, upper_bounds, mask, known, data_target, data_term_weight, data_term_hinge = sides
    batch = x.shape[0]
    check_readable_address(key, chain_ids, batch)
    check_index(key)
    count = x.numel()
    if count == 0:
        return
    elements = count // batch
    images = (out, x, grad, mask, known, data_target, lower_bounds, upper_bounds)
    strides = [_strides(tensor) for tensor in images]
    strided = any(s is not None for s in strides)
    pixels = x.shape[2] if strided else elements
    weight_rows = 0 if data_term_weight is None else data_term_weight.shape[0]
    hinge = data_term_hinge if data_target is not None and data_term_hinge > 0 else None
    factors = None
    if grad_norm_clip is not None or hinge is not None:
        factors = torch.empty(2 * batch, dtype=torch.float32, device=x.device)
        factors_kernel[(batch,)](
            *(factors, x, grad, data_target, key, data_term_weight, elements, pixels, weight_rows, grad_norm_clip),
            *(hinge, strides[1], strides[2], strides[5], SUM_LANES),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    grid, quads, slots = tile(batch, -(-elements // 4))
    step_kernel[grid](
        *images,
        *(schedule, key, chain_ids, data_term_weight, factors),
        *(batch, elements, pixels, schedule.shape[0], weight_rows, clamp_min, clamp_max, grad_clip),
        *strides,
        *(grad_norm_clip is not None, schedule.dim() == 3, chain_ids.shape[0] > 1, pixels % 4 == 0, strided),
        *(quads, slots),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
