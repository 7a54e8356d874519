"""Triton: a microcanonical Langevin update of each chain; csrc/cpu/mclmc.cpp, step for step.

A program covers CHAINS chains, of which it takes LANES elements at a time: once for the sums, once for the update.

Bytes: 28 an element in float32 (read gradient and momentum, read all three, write momentum and state), of which the
second reads come from the caches. An option that is off is None, which is compiled away.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ... import rng
from ..langevin import SUM_LANES
from ..mclmc import AGAINST, LARGEST_DELTA
from .philox import INTERPRETED, WARPS, addressable, chain_of, check_readable_address, normal_rows, philox

_STREAM = tl.constexpr(int(rng.Stream.REFRESH))
_AGAINST, _LARGEST_DELTA = tl.constexpr(AGAINST), tl.constexpr(LARGEST_DELTA)
_LOG_TWO, _LOG_TWO_REST = (tl.constexpr(float.fromhex(h)) for h in ("0x1.62e42fefa39efp-1", "0x1.abc9e3b39803fp-56"))
_ONE_OVER_LOG_TWO = tl.constexpr(float.fromhex("0x1.71547652b82fep+0"))
# Added and taken off, it rounds to a whole number, which its last bits then hold.
_ROUND, _ROUND_BITS = tl.constexpr(1.5 * 2.0**52), tl.constexpr(0x4338000000000000)
_SQRT_HALF_BITS = tl.constexpr(0x3FE6A09E667F3BCD)
# Highest power first: e^r, and 2 artanh(s) / s in s^2, without its constant term.
_EXP = tl.constexpr(tuple(1 / math.factorial(k) for k in range(13, -1, -1)))
_LOG = tl.constexpr(tuple(2 / (2 * k + 1) for k in range(11, 0, -1)))

_NUMBERS = ["batch", "elements", "mass_of_chain"]
_TABLES = ["work", "coefficients", "key", "chain_ids"]


@triton.jit
def double(VALUE: tl.constexpr) -> tl.tensor:
    """A constant in float64, which Triton would else make a float32."""
    return tl.full((), VALUE, tl.float64)


@triton.jit
def double_polynomial(x: tl.tensor, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """A polynomial in float64, whose COUNT coefficients are given from the highest power on."""
    p = tl.fma(x, double(COEFFICIENTS[0]), double(COEFFICIENTS[1]))
    for i in tl.static_range(2, COUNT):
        p = tl.fma(p, x, double(COEFFICIENTS[i]))
    return p


@triton.jit
def exp_of_minus(delta: tl.tensor) -> tl.tensor:
    """e^-delta for a delta that is not negative."""
    z = -tl.where(delta > _LARGEST_DELTA, _LARGEST_DELTA, delta)
    shifted = tl.fma(z, double(_ONE_OVER_LOG_TWO), double(_ROUND))
    n = shifted - double(_ROUND)
    r = tl.fma(n, double(-_LOG_TWO_REST), tl.fma(n, double(-_LOG_TWO), z))
    exponent = shifted.to(tl.int64, bitcast=True) - _ROUND_BITS + 1023
    return double_polynomial(r, _EXP, 14) * (exponent << 52).to(tl.float64, bitcast=True)


@triton.jit
def log_of(m: tl.tensor) -> tl.tensor:
    """log(m) for normal m > 0; NaN stays NaN."""
    bits = m.to(tl.int64, bitcast=True)
    k = (bits - _SQRT_HALF_BITS) >> 52
    f = (bits - (k << 52)).to(tl.float64, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    log1p = tl.fma(s * z, double_polynomial(z, _LOG, 11), 2.0 * s)
    exponent = k.to(tl.float64)
    result = tl.fma(exponent, double(_LOG_TWO), tl.fma(exponent, double(_LOG_TWO_REST), log1p))
    return tl.where(m == m, result, m)


@triton.jit
def kick(delta: tl.tensor, along: tl.tensor) -> tl.tuple:
    """(toward, keep, change) of the flow over delta: u' = toward e + keep u for a unit u with e.u = along, and the
    change of the kinetic energy over (d - 1)."""
    along = tl.where(along < -1.0, -1.0, along)
    along = tl.where(along > 1.0, 1.0, along)
    near = 1.0 + along
    zeta = exp_of_minus(delta)
    length = tl.fma(1.0 - along, zeta * zeta, near)
    toward = (1.0 - zeta) * tl.fma(zeta, 1.0 - along, near) / length
    keep = 2.0 * zeta / length
    change = delta + log_of(0.5 * length)
    against = near < _AGAINST
    return tl.where(against, 0.0, toward), tl.where(against, 1.0, keep), tl.where(against, -delta, change)


@triton.jit
def read(
    grad: tl.tensor,
    inverse_mass: tl.tensor,
    at: tl.tensor,
    mass_at: tl.tensor,
    wanted: tl.tensor,
    pulled: tl.tensor,
) -> tl.tuple:
    """(gradient, root of the inverse mass) of elements: 0 beyond the end of a chain, and where it is not pulled."""
    gradient = tl.load(grad + at, mask=wanted & pulled, other=0.0).to(tl.float32)
    if inverse_mass is not None:
        scale = tl.sqrt_rn(tl.load(inverse_mass + mass_at, mask=wanted, other=0.0))
        return scale * gradient, scale
    else:
        return gradient, gradient


@triton.jit
def draw(
    quad: tl.tensor, step: tl.tensor, chain: tl.tensor, seed: tl.tensor, CHAINS: tl.constexpr, QUADS: tl.constexpr
) -> tl.tensor:
    """(CHAINS, QUADS, 4) of noise."""
    rows: tl.constexpr = CHAINS * QUADS
    quads = tl.broadcast_to(quad[None, :], (CHAINS, QUADS)).reshape((rows,))
    chains = tl.broadcast_to(chain[:, None], (CHAINS, QUADS)).reshape((rows,))
    return normal_rows(philox(quads, step, chains, _STREAM, seed)).reshape((CHAINS, QUADS, 4))


@triton.jit
def add_products(lanes: tl.tensor, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Each lane with the product of its elements added."""
    return tl.fma(first.to(tl.float64), second.to(tl.float64), lanes)


@triton.jit
def folded(lanes: tl.tensor, CHAINS: tl.constexpr, LANES: tl.constexpr, FOLDS: tl.constexpr) -> tl.tensor:
    """(CHAINS,) sums of lanes, folded in halves: sums of two numbers, which have no order of their own."""
    lanes = lanes.reshape((CHAINS, LANES))
    for _ in tl.static_range(FOLDS):
        lanes = tl.sum(lanes.reshape((CHAINS, 2, lanes.shape[1] // 2)), axis=1)
    return tl.sum(lanes, axis=1)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_TABLES)
def mclmc_kernel(
    x: tl.tensor,
    momentum: tl.tensor,
    work: tl.tensor,
    grad: tl.tensor,
    coefficients: tl.tensor,
    key: tl.tensor,
    chain_ids: tl.tensor,
    inverse_mass: tl.tensor,
    batch: tl.tensor,
    elements: tl.tensor,
    mass_of_chain: tl.tensor,
    MASS_OF_ELEMENT: tl.constexpr,
    PER_CHAIN: tl.constexpr,
    LISTED: tl.constexpr,
    WHOLE: tl.constexpr,
    CHAINS: tl.constexpr,
    LANES: tl.constexpr,
    FOLDS: tl.constexpr,
) -> None:
    """WHOLE: chains are whole quads, which are one 16-byte access each."""
    quads: tl.constexpr = LANES // 4
    if WHOLE:
        elements = (elements // 4).to(tl.int64) * 4  # tells the compiler that chains are whole quads
    slot = tl.program_id(0).to(tl.int64) * CHAINS + tl.arange(0, CHAINS)
    inside = slot < batch
    seed, step = tl.load(key), tl.load(key + 1)
    chain = chain_of(chain_ids, slot, inside, LISTED)
    row = coefficients + (4 * slot if PER_CHAIN else tl.zeros_like(slot))
    closing, refresh = tl.load(row, mask=inside, other=0.0), tl.load(row + 1, mask=inside, other=0.0)
    opening, drift = tl.load(row + 2, mask=inside, other=0.0), tl.load(row + 3, mask=inside, other=0.0)
    pulled = ((closing != 0) | (opening != 0))[:, None, None]
    refreshed = (refresh != 0)[:, None, None]
    drawing = tl.max((refresh != 0).to(tl.int32), axis=0) != 0

    offset = tl.arange(0, quads)[:, None] * 4 + tl.arange(0, 4)[None, :]
    lane = offset[None, :, :].to(tl.int64)
    base, mass_base = (slot * elements)[:, None, None], (slot * mass_of_chain)[:, None, None]
    quad = tl.arange(0, quads).to(tl.int64)
    shape: tl.constexpr = (CHAINS, quads, 4)
    gg, ug, uu = tl.zeros(shape, tl.float64), tl.zeros(shape, tl.float64), tl.zeros(shape, tl.float64)
    zg, zu, zz = tl.zeros(shape, tl.float64), tl.zeros(shape, tl.float64), tl.zeros(shape, tl.float64)
    free = tl.zeros((CHAINS,), tl.int64)
    start = tl.full((), 0, tl.int64)
    while start < elements:  # Triton 3.6 can't interpret a range that ends at a number known at run time
        element = start + lane
        wanted = inside[:, None, None] & (element < elements)
        mass_at = mass_base + (element if MASS_OF_ELEMENT else tl.zeros_like(element))
        g, scale = read(grad, inverse_mass, base + element, mass_at, wanted, pulled)
        u = tl.load(momentum + base + element, mask=wanted, other=0.0)
        gg, ug, uu = add_products(gg, g, g), add_products(ug, u, g), add_products(uu, u, u)
        if inverse_mass is not None:
            free += tl.sum((scale != 0).to(tl.int32).reshape((CHAINS, LANES)), axis=1)
        if drawing:
            z = draw(quad + start // 4, step, chain, seed, CHAINS, quads)
            z = tl.where(wanted if inverse_mass is None else scale != 0, z, 0.0)
            zg, zu, zz = add_products(zg, z, g), add_products(zu, z, u), add_products(zz, z, z)
        start += LANES
    # Every thread reads these and one writes them: these sums bring a barrier.
    closed, opened = (
        tl.load(work + 2 * slot, mask=inside, other=0.0),
        tl.load(work + 2 * slot + 1, mask=inside, other=0.0),
    )
    sum_gg, sum_ug = folded(gg, CHAINS, LANES, FOLDS), folded(ug, CHAINS, LANES, FOLDS)
    sum_uu, sum_zg = folded(uu, CHAINS, LANES, FOLDS), folded(zg, CHAINS, LANES, FOLDS)
    sum_zu, sum_zz = folded(zu, CHAINS, LANES, FOLDS), folded(zz, CHAINS, LANES, FOLDS)
    if inverse_mass is not None:
        freedom = (free - 1).to(tl.float64)
    else:
        freedom = tl.zeros_like(sum_gg) + (elements - 1).to(tl.float64)

    # The momentum is g of_g + u of_u + z of_z, and its length.
    force, length = tl.sqrt(sum_gg), tl.sqrt(sum_uu)
    # Chains that are not there, or without a force, get numbers that divide without a warning of the interpreter.
    force, length = tl.where(sum_gg != 0, force, 1.0), tl.where(inside, length, 1.0)
    of_g, of_z = tl.zeros_like(force), tl.zeros_like(force)
    of_u = of_g + 1.0
    pulls = (closing != 0) & (sum_gg != 0)
    toward, keep, change = kick(closing * force / freedom, -(sum_ug / (force * length)))
    of_g, of_u = tl.where(pulls, -(toward / force), of_g), tl.where(pulls, keep / length, of_u)
    length = tl.where(pulls, 1.0, length)
    tl.store(work + 2 * slot, tl.where(pulls, closed + freedom * change, closed), mask=inside)

    crossed = tl.fma(of_g, sum_zg, of_u * sum_zu)
    noise = refresh * tl.fma(tl.zeros_like(crossed) + 2.0, crossed, refresh * sum_zz)
    mixed = tl.sqrt(tl.fma(length, length, noise))
    drawn = (refresh != 0) & (mixed != 0)
    mixed = tl.where(drawn, mixed, 1.0)
    of_g, of_u = tl.where(drawn, of_g / mixed, of_g), tl.where(drawn, of_u / mixed, of_u)
    of_z = tl.where(drawn, refresh / mixed, of_z)
    length = tl.where(drawn, 1.0, length)

    pulls = (opening != 0) & (sum_gg != 0)
    along = tl.fma(of_g, sum_gg, tl.fma(of_u, sum_ug, of_z * sum_zg))
    toward, keep, change = kick(opening * force / freedom, -(along / (force * length)))
    kept = keep / length
    of_g = tl.where(pulls, tl.fma(kept, of_g, -(toward / force)), of_g)
    of_u, of_z = tl.where(pulls, kept * of_u, of_u), tl.where(pulls, kept * of_z, of_z)
    tl.store(work + 2 * slot + 1, tl.where(pulls, opened + freedom * change, opened), mask=inside)

    of_g, of_u, of_z = of_g[:, None, None], of_u[:, None, None], of_z[:, None, None]
    moving = (drift != 0)[:, None, None]
    drift = drift.to(tl.float32)[:, None, None]
    # A kernel can't raise: NaN, like a counter that overflows.
    valid = addressable(step, chain)[:, None, None]
    start = tl.full((), 0, tl.int64)
    while start < elements:
        element = start + lane
        wanted = inside[:, None, None] & (element < elements)
        mass_at = mass_base + (element if MASS_OF_ELEMENT else tl.zeros_like(element))
        g, scale = read(grad, inverse_mass, base + element, mass_at, wanted, pulled)
        u = tl.load(momentum + base + element, mask=wanted, other=0.0)
        # In float64, since a momentum nearly against the force comes out of large numbers that cancel.
        wide = tl.fma(of_g, g.to(tl.float64), of_u * u.to(tl.float64))
        if drawing:
            z = draw(quad + start // 4, step, chain, seed, CHAINS, quads)
            if inverse_mass is not None:
                z = tl.where(scale == 0, 0.0, z)
            wide = tl.where(refreshed, tl.fma(of_z, z.to(tl.float64), wide), wide)
        u = tl.where(valid, wide.to(tl.float32), float("nan"))
        tl.store(momentum + base + element, u, mask=wanted)
        along_u = u
        if inverse_mass is not None:
            along_u = scale * u
        state = tl.load(x + base + element, mask=wanted & moving, other=0.0)
        tl.store(x + base + element, tl.fma(drift, along_u, state), mask=wanted & moving)
        start += LANES


def tile_of_chains(batch: int, elements: int) -> tuple[int, int, int]:
    """(chains, lanes, warps) of a program: one quad a thread where there are as many."""
    lanes = min(SUM_LANES, max(4, 1 << (elements - 1).bit_length()))
    chains = max(1, 4 * (1 << 16 if INTERPRETED else 32 * WARPS) // lanes)  # with two quads, its registers spill
    if INTERPRETED:
        chains = min(chains, 1 << (batch - 1).bit_length())
    return chains, lanes, max(WARPS, lanes // 128)


def mclmc_step(
    x: Tensor,
    momentum: Tensor,
    work: Tensor,
    grad: Tensor,
    coefficients: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None,
) -> None:
    """Kernel `mclmc_step` of fastebm.ops.schemas."""
    batch = x.shape[0]
    check_readable_address(key, chain_ids, batch)
    if x.numel() == 0:
        return
    elements = x.numel() // batch
    rows, columns = (1, 1) if inverse_mass is None else inverse_mass.shape
    chains, lanes, warps = tile_of_chains(batch, elements)
    mclmc_kernel[(-(-batch // chains),)](
        *(x, momentum, work, grad, coefficients, key, chain_ids, inverse_mass, batch, elements),
        *(columns if rows > 1 else 0, columns > 1, coefficients.shape[0] > 1, chain_ids.shape[0] > 1),
        *(elements % 4 == 0, chains, lanes, lanes.bit_length() - 1),
        num_warps=warps,
        enable_fp_fusion=False,
    )
