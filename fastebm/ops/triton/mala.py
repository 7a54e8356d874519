"""Triton: the Metropolis test of each chain, and the ratio of a Langevin proposal before it.

One program sums the ratio of a chain, in the order of all backends; a second kernel decides and copies, over the whole
batch.

Bytes: 16 an element for the ratio, and 16 more where a chain is accepted, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ... import rng
from ..langevin import check_index
from .langevin import limited
from .philox import (
    WARPS,
    addressable,
    chain_of,
    check_readable_address,
    minus_two_log,
    normal_rows,
    philox,
    quads_of,
    rows_of_program,
    tile,
    uniform_from_bits,
)
from .underdamped import SUM_QUADS, fold

_LANGEVIN, _ACCEPTANCE = tl.constexpr(int(rng.Stream.LANGEVIN)), tl.constexpr(int(rng.Stream.ACCEPTANCE))


@triton.jit(
    do_not_specialize=["batch", "elements", "schedule_rows"],
    do_not_specialize_on_alignment=["energy", "proposal_energy", "log_ratio", "schedule", "key", "chain_ids"],
)
def ratio_kernel(
    x: tl.tensor,
    energy: tl.tensor,
    grad: tl.tensor,
    log_ratio: tl.tensor,
    proposal: tl.tensor,
    proposal_energy: tl.tensor,
    proposal_grad: tl.tensor,
    schedule: tl.tensor,
    key: tl.tensor,
    chain_ids: tl.tensor,
    batch: tl.tensor,
    elements: tl.tensor,
    schedule_rows: tl.tensor,
    grad_clip: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    PER_CHAIN: tl.constexpr,
    LISTED: tl.constexpr,
    WHOLE: tl.constexpr,
    QUADS: tl.constexpr,
) -> None:
    """The logarithm of one chain's acceptance ratio, which is one program."""
    slot = tl.program_id(0).to(tl.int64)
    seed, step, index = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    if LISTED:
        chain = tl.load(chain_ids + slot)
    else:
        chain = tl.load(chain_ids) + slot
    row = tl.minimum(tl.maximum(index, 0), schedule_rows - 1)
    if PER_CHAIN:
        row = row * batch + slot
    step_size, noise_std = tl.load(schedule + 2 * row), tl.load(schedule + 2 * row + 1)
    eta, sigma = step_size.to(tl.float64), noise_std.to(tl.float64)
    rise = tl.load(proposal_energy + slot).to(tl.float64) - tl.load(energy + slot).to(tl.float64)
    quads = quads_of(elements)
    if WHOLE:
        elements = (elements // 4).to(tl.int64) * 4  # tells the compiler that chains are whole quads
    lanes = tl.zeros((QUADS, 4), tl.float64)
    outside = tl.zeros((QUADS, 4), tl.int32)
    start = tl.full((), 0, tl.int64)
    while start < quads:  # Triton 3.6 can't interpret a range that ends at a number known at run time
        quad = start + tl.arange(0, QUADS)
        element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
        wanted = element < elements
        at = slot * elements + element
        here, there = tl.load(x + at, mask=wanted, other=0.0), tl.load(proposal + at, mask=wanted, other=0.0)
        g = tl.load(grad + at, mask=wanted, other=0.0).to(tl.float32)
        back = tl.load(proposal_grad + at, mask=wanted, other=0.0).to(tl.float32)
        if grad_clip is not None:
            g, back = limited(g, -grad_clip, grad_clip), limited(back, -grad_clip, grad_clip)
        difference, total = back.to(tl.float64) - g.to(tl.float64), back.to(tl.float64) + g.to(tl.float64)
        if low is None and high is None:
            way = there.to(tl.float64) - here.to(tl.float64)
            lanes = tl.fma(tl.fma(eta, difference, -2.0 * way), total, lanes)
        else:
            unfolded = tl.fma(-step_size, g, here)
            if noise_std != 0:
                noise = normal_rows(philox(quad, step, chain, _LANGEVIN, seed))
                unfolded = tl.fma(noise_std, noise, unfolded)
            turned = unfolded != limited(unfolded, low, high)
            way = 2.0 * (unfolded.to(tl.float64) - here.to(tl.float64))
            first, second = tl.where(turned, total, difference), tl.where(turned, difference, total)
            added = tl.fma(tl.fma(eta, first, tl.where(turned, way, -way)), second, lanes)
            lanes = tl.where(wanted, added, lanes)
            # NaN is no more between the walls than what lies beyond one.
            outside = tl.where(wanted & (there != limited(there, low, high)), 1, outside)
        start += QUADS
    ratio = -(rise + fold(lanes.reshape((QUADS * 4,))) * 0.25) / (sigma * sigma / (2.0 * eta))
    if low is not None or high is not None:
        ratio = tl.where(tl.max(outside.reshape((QUADS * 4,)), axis=0) != 0, float("-inf"), ratio)
    # What is out of range is an error that a kernel can't raise: NaN rejects.
    ratio = tl.where(addressable(step, chain) & (index >= 0), ratio, float("nan"))
    tl.store(log_ratio + slot, ratio)


@triton.jit(
    do_not_specialize=["batch", "elements"],
    do_not_specialize_on_alignment=["energy", "accepted", "proposal_energy", "log_ratio", "key", "chain_ids"],
)
def metropolis_kernel(
    x: tl.tensor,
    energy: tl.tensor,
    grad: tl.tensor,
    accepted: tl.tensor,
    proposal: tl.tensor,
    proposal_energy: tl.tensor,
    proposal_grad: tl.tensor,
    log_ratio: tl.tensor,
    key: tl.tensor,
    chain_ids: tl.tensor,
    batch: tl.tensor,
    elements: tl.tensor,
    LISTED: tl.constexpr,
    WHOLE: tl.constexpr,
    QUADS: tl.constexpr,
    NUM_CHAINS: tl.constexpr,
) -> None:
    """One row (quad of a chain) a thread, each of which decides for itself; the first of a chain writes the energy."""
    slot, quad, inside = rows_of_program(batch, elements, QUADS, NUM_CHAINS)
    seed, step = tl.load(key), tl.load(key + 1)
    chain = chain_of(chain_ids, slot, inside, LISTED)
    valid = addressable(step, chain)
    words = philox(quad * 0, step, chain, _ACCEPTANCE, seed)
    log_uniform = minus_two_log(uniform_from_bits(words[0])) * -0.5
    # NaN rejects, as what is out of range must be: that is an error that a kernel can't raise.
    ratio = tl.where(valid, tl.load(log_ratio + slot, mask=inside, other=0.0), float("nan"))
    proposed = tl.load(proposal_energy + slot, mask=inside, other=0.0)
    yes = inside & (log_uniform.to(tl.float64) < ratio) & (tl.abs(proposed) < float("inf"))
    first = inside & (quad == 0)
    tl.store(accepted + slot, yes, mask=first)
    kept = tl.where(yes, proposed, tl.load(energy + slot, mask=first, other=0.0))
    tl.store(energy + slot, tl.where(valid, kept, float("nan")), mask=first)
    element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    taken = yes[:, None]
    if WHOLE:
        elements = (elements // 4).to(tl.int64) * 4  # tells the compiler that chains are whole quads
    else:
        taken = taken & (element < elements)
    at = slot[:, None] * elements + element
    tl.store(x + at, tl.load(proposal + at, mask=taken, other=0.0), mask=taken)
    tl.store(grad + at, tl.load(proposal_grad + at, mask=taken, other=0.0), mask=taken)


def metropolis(
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    accepted: Tensor,
    proposal: Tensor,
    proposal_energy: Tensor,
    proposal_grad: Tensor,
    log_ratio: Tensor,
    key: Tensor,
    chain_ids: Tensor,
) -> None:
    """Kernel `metropolis` of fastebm.ops.schemas."""
    batch = x.shape[0]
    check_readable_address(key, chain_ids, batch)
    if batch == 0:
        return
    elements = x.numel() // batch
    grid, quads, slots = tile(batch, max(-(-elements // 4), 1))
    metropolis_kernel[grid](
        *(x, energy, grad, accepted, proposal, proposal_energy, proposal_grad, log_ratio, key, chain_ids),
        *(batch, elements, chain_ids.shape[0] > 1, elements > 0 and elements % 4 == 0, quads, slots),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def mala_step(
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    accepted: Tensor,
    log_ratio: Tensor,
    proposal: Tensor,
    proposal_energy: Tensor,
    proposal_grad: Tensor,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    grad_clip: float | None,
    low: float | None,
    high: float | None,
) -> None:
    """Kernel `mala_step` of fastebm.ops.schemas."""
    batch = x.shape[0]
    check_readable_address(key, chain_ids, batch)
    check_index(key)
    if batch == 0:
        return
    elements = x.numel() // batch
    ratio_kernel[(batch,)](
        *(x, energy, grad, log_ratio, proposal, proposal_energy, proposal_grad, schedule, key, chain_ids),
        *(batch, elements, schedule.shape[0], grad_clip, low, high),
        *(schedule.dim() == 3, chain_ids.shape[0] > 1, elements % 4 == 0, SUM_QUADS),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    metropolis(x, energy, grad, accepted, proposal, proposal_energy, proposal_grad, log_ratio, key, chain_ids)
