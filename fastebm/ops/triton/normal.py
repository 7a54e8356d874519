"""Triton: standard normal noise as a function of (seed, step, chain, stream, element)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .philox import (
    WARPS,
    addressable,
    chain_of,
    check_readable_address,
    normal_rows,
    philox,
    rows_of_program,
    tile,
    uniform_rows,
)


@triton.jit(do_not_specialize=["batch", "elements", "stream"], do_not_specialize_on_alignment=["key", "chain_ids"])
def fill_kernel(
    out: tl.tensor,
    key: tl.tensor,
    chain_ids: tl.tensor,
    batch: tl.tensor,
    elements: tl.tensor,
    stream: tl.tensor,
    NORMAL: tl.constexpr,
    LISTED: tl.constexpr,
    WHOLE: tl.constexpr,
    QUADS: tl.constexpr,
    NUM_CHAINS: tl.constexpr,
) -> None:
    """One row a thread. WHOLE: chains are whole quads, so that a row is one 16-byte store."""
    slot, quad, inside = rows_of_program(batch, elements, QUADS, NUM_CHAINS)
    seed, step = tl.load(key), tl.load(key + 1)
    chain = chain_of(chain_ids, slot, inside, LISTED)
    words = philox(quad, step, chain, stream, seed)
    drawn = normal_rows(words) if NORMAL else uniform_rows(words)
    drawn = tl.where(addressable(step, chain)[:, None], drawn, float("nan"))
    lane = tl.arange(0, 4)[None, :]
    if WHOLE:
        offset = ((slot * (elements // 4) + quad) * 4)[:, None] + lane
        wanted = inside[:, None]
    else:
        offset = (slot * elements + quad * 4)[:, None] + lane
        wanted = inside[:, None] & (quad[:, None] * 4 + lane < elements)
    tl.store(out + offset, drawn.to(out.dtype.element_ty), mask=wanted)


def fill(out: Tensor, key: Tensor, chain_ids: Tensor, stream: int, normal: bool) -> None:
    """Fill contiguous `out` (B, ...) with normals or uniforms."""
    batch = out.shape[0]
    check_readable_address(key, chain_ids, batch)
    count = out.numel()
    if count == 0:
        return
    elements = count // batch
    grid, quads, slots = tile(batch, -(-elements // 4))
    fill_kernel[grid](
        *(out, key, chain_ids, batch, elements, stream, normal),
        *(chain_ids.shape[0] > 1, elements % 4 == 0, quads, slots),
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def normal(out: Tensor, key: Tensor, chain_ids: Tensor, stream: int) -> None:
    """Kernel `normal` of fastebm.ops.schemas."""
    fill(out, key, chain_ids, stream, normal=True)
