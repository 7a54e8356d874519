"""Triton: half steps of BAOAB, OBABO and leapfrog in one pass, which draws the noise in registers.

Where the kinetic energy of a chain is summed, one program advances a whole chain and sums on its way, in the order of
all backends.

Bytes: 20 an element (read x, velocity and gradient, write x and velocity) in float32. An option that is off is None,
which is compiled away.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ... import rng
from ..langevin import SUM_LANES, check_index
from ..underdamped import BAOAB, LEAPFROG, OBABO, check_closing
from .philox import (
    WARPS,
    addressable,
    chain_of,
    check_readable_address,
    normal_rows,
    philox,
    quads_of,
    rows_of_program,
    tile,
)

_BAOAB, _OBABO, _LEAPFROG = tl.constexpr(BAOAB), tl.constexpr(OBABO), tl.constexpr(LEAPFROG)
_MOMENTUM, _MOMENTUM_END = tl.constexpr(int(rng.Stream.MOMENTUM)), tl.constexpr(int(rng.Stream.MOMENTUM_END))
# Quads of a row of lanes.
SUM_QUADS = SUM_LANES // 4

_NUMBERS = ["batch", "elements", "schedule_rows"]
_TABLES = ["schedule", "key", "chain_ids", "work"]


@triton.jit
def fold(lanes: tl.tensor) -> tl.tensor:
    """The sum of 1024 lanes, in halves."""
    tl.static_assert(lanes.shape[0] == 1024)
    # Sums of two numbers, which have no order of their own.
    for _ in tl.static_range(10):
        lanes = tl.sum(lanes.reshape((2, lanes.shape[0] // 2)), axis=0)
    return tl.sum(lanes, axis=0)


@triton.jit
def mass_of(
    mass: tl.tensor,
    slot: tl.tensor,
    element: tl.tensor,
    elements: tl.tensor,
    wanted: tl.tensor,
    BY_CHAIN: tl.constexpr,
    EACH: tl.constexpr,
) -> tl.tensor:
    """Inverse masses of elements, of chains (rows, 1), or one; 1 where there are none. `slot` is (rows, 1) or one."""
    if mass is None:
        return tl.full((1, 1), 1.0, tl.float32)
    else:
        at = element * 0
        if BY_CHAIN:
            at += slot * elements if EACH else slot
        if EACH:
            at += element
        return tl.load(mass + at, mask=wanted, other=1.0)


@triton.jit
def squares(v: tl.tensor, w: tl.tensor) -> tl.tensor:
    """v^2 / w in float64, 0 where w is 0."""
    wide = v.to(tl.float64)
    return tl.where(w == 0, 0.0, wide * wide / tl.where(w == 0, 1.0, w).to(tl.float64))


@triton.jit
def schedule_row(
    schedule: tl.tensor,
    row: tl.tensor,
    batch: tl.tensor,
    slot: tl.tensor,
    inside: tl.tensor,
    SCHEME: tl.constexpr,
    PER_CHAIN: tl.constexpr,
) -> tl.tuple:
    """(step size, decay, noise std): numbers, or (rows, 1) where each chain has its own."""
    if PER_CHAIN:
        at = schedule + 3 * (row * batch + slot)
        step_size = tl.load(at, mask=inside, other=0.0)[:, None]
        decay = tl.load(at + 1, mask=inside, other=1.0)[:, None]
        noise_std = tl.load(at + 2, mask=inside, other=0.0)[:, None]
    else:
        step_size = tl.load(schedule + 3 * row)
        decay, noise_std = tl.load(schedule + 3 * row + 1), tl.load(schedule + 3 * row + 2)
    if SCHEME == _LEAPFROG:
        decay, noise_std = decay * 0 + 1, noise_std * 0
    return step_size, decay, noise_std


@triton.jit
def refreshed(
    v: tl.tensor,
    w: tl.tensor,
    row: tl.tuple,
    quad: tl.tensor,
    step: tl.tensor,
    chain: tl.tensor,
    seed: tl.tensor,
    STREAM: tl.constexpr,
    PER_CHAIN: tl.constexpr,
) -> tl.tensor:
    """The O step of velocities."""
    _, decay, noise_std = row
    damped = decay * v
    if PER_CHAIN:
        noise = normal_rows(philox(quad, step, chain, STREAM, seed))
        damped = tl.where(noise_std == 0, damped, tl.fma(noise_std * tl.sqrt_rn(w), noise, damped))
    else:
        if noise_std != 0:
            noise = normal_rows(philox(quad, step, chain, STREAM, seed))
            damped = tl.fma(noise_std * tl.sqrt_rn(w), noise, damped)
    return damped


@triton.jit
def drifted(x: tl.tensor, v: tl.tensor, distance: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tuple:
    """(x, v) after a drift, mirrored once at a wall; NaN where x then is beyond the other."""
    moved = tl.fma(distance, v, x)
    mirrored, turned = moved, v
    if low is not None:
        mirrored = tl.where(moved < low, (low + low) - moved, mirrored)
        turned = tl.where(moved < low, -v, turned)
    if high is not None:
        mirrored = tl.where(moved > high, (high + high) - moved, mirrored)
        turned = tl.where(moved > high, -v, turned)
    # Beyond the other wall too: no number, which ends the trajectory.
    if low is not None:
        mirrored = tl.where(mirrored < low, float("nan"), mirrored)
    if high is not None:
        mirrored = tl.where(mirrored > high, float("nan"), mirrored)
    return mirrored, turned


@triton.jit
def advance_rows(
    states: tl.tuple,
    tables: tl.tuple,
    sizes: tl.tuple,
    walls: tl.tuple,
    rows: tl.tuple,
    SCHEME: tl.constexpr,
    CLOSE: tl.constexpr,
    OPEN: tl.constexpr,
    PER_CHAIN: tl.constexpr,
    LISTED: tl.constexpr,
    MASS_BY_CHAIN: tl.constexpr,
    MASS_EACH: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tuple:
    """Advances rows (quad of the chain in a slot) where `inside`. WHOLE: chains are whole quads.

    Returns v^2 / w in float64, after the kick that closes and before the one that opens, and whether no O step lies
    between the two. What is not used is compiled away.
    """
    x_at, velocity_at, grad_at, mass = states
    schedule, key, chain_ids = tables
    batch, elements, schedule_rows = sizes
    low, high = walls
    slot, quad, inside = rows
    seed, step, index = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    chain_slot = slot[:, None]
    element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    wanted = inside[:, None]
    if WHOLE:
        elements = (elements // 4).to(tl.int64) * 4  # tells the compiler that chains are whole quads
    else:
        wanted = wanted & (element < elements)
    chain = chain_of(chain_ids, slot, inside, LISTED)
    # What is out of range is an error that a kernel can't raise: NaN, like a counter that overflows.
    valid = addressable(step, chain) & (index >= 0)
    if SCHEME == _OBABO and CLOSE:
        valid = valid & (step > 0)
    last = schedule_rows - 1
    now_at, before_at = tl.minimum(tl.maximum(index, 0), last), tl.minimum(tl.maximum(index - 1, 0), last)
    before = schedule_row(schedule, before_at, batch, slot, inside, SCHEME, PER_CHAIN)
    now = schedule_row(schedule, now_at, batch, slot, inside, SCHEME, PER_CHAIN)
    quiet = (now[1] == 1) & (now[2] == 0)
    cancels = (before[1] == 1) & (before[2] == 0) & quiet

    at = chain_slot * elements + element
    x = tl.load(x_at + at, mask=wanted, other=0.0)
    v = tl.load(velocity_at + at, mask=wanted, other=0.0)
    g = tl.load(grad_at + at, mask=wanted, other=0.0).to(tl.float32)
    w = mass_of(mass, chain_slot, element, elements, wanted, MASS_BY_CHAIN, MASS_EACH)
    closing, opening = v, v
    if CLOSE:
        v = tl.fma(-((before[0] * 0.5) * w), g, v)
        closing = v
        if SCHEME == _OBABO:
            v = refreshed(v, w, before, quad, step - 1, chain, seed, _MOMENTUM_END, PER_CHAIN)
    if OPEN:
        if SCHEME == _OBABO:
            v = refreshed(v, w, now, quad, step, chain, seed, _MOMENTUM, PER_CHAIN)
        opening = v
        v = tl.fma(-((now[0] * 0.5) * w), g, v)
        if SCHEME == _BAOAB:
            half_way, turned = drifted(x, v, now[0] * 0.5, low, high)
            turned = refreshed(turned, w, now, quad, step, chain, seed, _MOMENTUM, PER_CHAIN)
            there, arrived = drifted(half_way, turned, now[0] * 0.5, low, high)
            at_once, straight = drifted(x, v, now[0], low, high)
            x, v = tl.where(quiet, at_once, there), tl.where(quiet, straight, arrived)
        else:
            x, v = drifted(x, v, now[0], low, high)
        tl.store(x_at + at, tl.where(valid[:, None], x, float("nan")), mask=wanted)
    tl.store(velocity_at + at, tl.where(valid[:, None], v, float("nan")), mask=wanted)
    return tl.where(wanted, squares(closing, w), 0.0), tl.where(wanted, squares(opening, w), 0.0), cancels


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_TABLES)
def kinetic_kernel(
    x: tl.tensor,
    velocity: tl.tensor,
    grad: tl.tensor,
    mass: tl.tensor,
    schedule: tl.tensor,
    key: tl.tensor,
    chain_ids: tl.tensor,
    batch: tl.tensor,
    elements: tl.tensor,
    schedule_rows: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    SCHEME: tl.constexpr,
    CLOSE: tl.constexpr,
    OPEN: tl.constexpr,
    PER_CHAIN: tl.constexpr,
    LISTED: tl.constexpr,
    MASS_BY_CHAIN: tl.constexpr,
    MASS_EACH: tl.constexpr,
    WHOLE: tl.constexpr,
    QUADS: tl.constexpr,
    NUM_CHAINS: tl.constexpr,
) -> None:
    """One row (quad of a chain) a thread."""
    rows = rows_of_program(batch, elements, QUADS, NUM_CHAINS)
    advance_rows(
        *((x, velocity, grad, mass), (schedule, key, chain_ids), (batch, elements, schedule_rows), (low, high), rows),
        *(SCHEME, CLOSE, OPEN, PER_CHAIN, LISTED, MASS_BY_CHAIN, MASS_EACH, WHOLE),
    )


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_TABLES)
def kinetic_work_kernel(
    x: tl.tensor,
    velocity: tl.tensor,
    work: tl.tensor,
    grad: tl.tensor,
    mass: tl.tensor,
    schedule: tl.tensor,
    key: tl.tensor,
    chain_ids: tl.tensor,
    batch: tl.tensor,
    elements: tl.tensor,
    schedule_rows: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    SCHEME: tl.constexpr,
    CLOSE: tl.constexpr,
    OPEN: tl.constexpr,
    PER_CHAIN: tl.constexpr,
    LISTED: tl.constexpr,
    MASS_BY_CHAIN: tl.constexpr,
    MASS_EACH: tl.constexpr,
    WHOLE: tl.constexpr,
    QUADS: tl.constexpr,
) -> None:
    """One program a chain, which adds to its work on the way."""
    lane = tl.arange(0, QUADS)
    slot = tl.program_id(0).to(tl.int64) + (lane * 0).to(tl.int64)
    closing, opening = tl.zeros((QUADS, 4), tl.float64), tl.zeros((QUADS, 4), tl.float64)
    cancelled = tl.zeros((), tl.int32)
    quads, start = quads_of(elements), tl.full((), 0, tl.int64)
    while start < quads:  # Triton 3.6 can't interpret a range that ends at a number known at run time
        quad = start + lane
        after, ahead, cancels = advance_rows(
            *((x, velocity, grad, mass), (schedule, key, chain_ids), (batch, elements, schedule_rows), (low, high)),
            *((slot, quad, quad < quads), SCHEME, CLOSE, OPEN, PER_CHAIN, LISTED, MASS_BY_CHAIN, MASS_EACH, WHOLE),
        )
        closing += after
        opening += ahead
        # The chain's first row is there in any case; rows behind its end read a quiet schedule.
        cancelled = tl.min((tl.zeros((QUADS, 1), tl.int32) + cancels.to(tl.int32)).reshape((QUADS,)), axis=0)
        start += QUADS
    place = work + tl.program_id(0)
    found = tl.load(place)
    done = found
    if CLOSE:
        done += fold(closing.reshape((QUADS * 4,))) * 0.5
    if OPEN:
        done -= fold(opening.reshape((QUADS * 4,))) * 0.5
    if CLOSE and OPEN:
        done = tl.where(cancelled != 0, found, done)
    tl.store(place, done)


@triton.jit(do_not_specialize=["elements"], do_not_specialize_on_alignment=["out"])
def energy_kernel(
    velocity: tl.tensor,
    out: tl.tensor,
    mass: tl.tensor,
    elements: tl.tensor,
    MASS_BY_CHAIN: tl.constexpr,
    MASS_EACH: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """The kinetic energy of one chain, which is one program."""
    slot = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)[None, :].to(tl.int64)
    lanes, start = tl.zeros((1, LANES), tl.float64), tl.full((), 0, tl.int64)
    while start < elements:
        element = start + lane
        wanted = element < elements
        v = tl.load(velocity + slot * elements + element, mask=wanted, other=0.0)
        w = mass_of(mass, slot, element, elements, wanted, MASS_BY_CHAIN, MASS_EACH)
        lanes += squares(v, w)
        start += LANES
    tl.store(out + slot, fold(lanes.reshape((LANES,))) * 0.5)


def _mass_layout(mass: Tensor | None) -> tuple[bool, bool]:
    """MASS_BY_CHAIN and MASS_EACH."""
    return (False, False) if mass is None else (mass.shape[0] > 1, mass.shape[1] > 1)


def kinetic_step(
    x: Tensor,
    velocity: Tensor,
    work: Tensor | None,
    grad: Tensor,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None,
    low: float | None,
    high: float | None,
    scheme: int,
    close: bool,
    open: bool,  # noqa: A002
) -> None:
    """Kernel `kinetic_step` of fastebm.ops.schemas."""
    batch = x.shape[0]
    check_readable_address(key, chain_ids, batch)
    check_index(key)
    check_closing(key, scheme, close)
    count = x.numel()
    if count == 0:
        return
    elements = count // batch
    tables = (grad, inverse_mass, schedule, key, chain_ids, batch, elements, schedule.shape[0], low, high)
    listed, whole = chain_ids.shape[0] > 1, elements % 4 == 0
    options = (scheme, close, open, schedule.dim() == 3, listed, *_mass_layout(inverse_mass), whole)
    # Where no O step lies between closing and opening, the work stays as it is.
    if work is None or (close and open and scheme != OBABO):
        grid, quads, slots = tile(batch, -(-elements // 4))
        kinetic_kernel[grid](x, velocity, *tables, *options, quads, slots, num_warps=WARPS, enable_fp_fusion=False)
    else:
        kinetic_work_kernel[(batch,)](
            *(x, velocity, work, *tables, *options, SUM_QUADS), num_warps=WARPS, enable_fp_fusion=False
        )


def kinetic_energy(velocity: Tensor, out: Tensor, inverse_mass: Tensor | None) -> None:
    """Kernel `kinetic_energy` of fastebm.ops.schemas."""
    batch = velocity.shape[0]
    if velocity.numel() == 0:
        out.zero_()
        return
    energy_kernel[(batch,)](
        *(velocity, out, inverse_mass, velocity.numel() // batch, *_mass_layout(inverse_mass), SUM_LANES),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
