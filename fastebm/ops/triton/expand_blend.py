"""Triton: the Expand blend and its derivative over tensors that lie in memory alike.

A row of a tile is one thread's: LANES elements side by side, one 16-byte access where the tensors are whole ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import INTERPRETED, WARPS

# Tiles of one row a thread. The interpreter pays for each operation and not for each row, so it gets long tiles.
ROWS = 1 << 12 if INTERPRETED else 32 * WARPS

_HINTS = {"do_not_specialize": ["packs"], "do_not_specialize_on_alignment": ["beta"]}


@triton.jit
def elements_of_program(packs: tl.tensor, LANES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr) -> tl.tuple:
    """(pack of each row, offsets of its elements (ROWS, LANES), whether they exist (ROWS, 1)).

    WIDE: there are 2^31 packs or more.
    """
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    pack = program * ROWS + tl.arange(0, ROWS)
    return pack, pack.to(tl.int64)[:, None] * LANES + tl.arange(0, LANES)[None, :], (pack < packs)[:, None]


def tiles(elements: int, lanes: int) -> tuple[tuple[int], int, bool]:
    """(grid, number of packs, WIDE) of programs that cover whole packs."""
    packs = elements // lanes
    programs = triton.cdiv(packs, ROWS)
    return (programs,), packs, programs * ROWS > torch.iinfo(torch.int32).max


@triton.jit
def blended(beta: tl.tensor, primal: tl.tensor, fade: tl.tensor) -> tl.tensor:
    """beta * primal + (1 - beta) * fade, exact at both ends."""
    return tl.fma(beta, primal, (1.0 - beta) * fade)


@triton.jit(**_HINTS)
def blend_kernel(
    out: tl.tensor,
    primal: tl.tensor,
    fade: tl.tensor,
    beta: tl.tensor,
    packs: tl.tensor,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One blend of contiguous memory."""
    _, at, inside = elements_of_program(packs, LANES, ROWS, WIDE)
    new = tl.load(primal + at, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(fade + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, blended(tl.load(beta), new, old).to(out.dtype.element_ty), mask=inside)


@triton.jit(**_HINTS)
def blend_backward_kernel(
    grad_primal: tl.tensor,
    grad_fade: tl.tensor,
    grad: tl.tensor,
    beta: tl.tensor,
    packs: tl.tensor,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """beta and 1 - beta times the gradient."""
    _, at, inside = elements_of_program(packs, LANES, ROWS, WIDE)
    weight = tl.load(beta)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_primal + at, (weight * g).to(grad.dtype.element_ty), mask=inside)
    tl.store(grad_fade + at, ((1.0 - weight) * g).to(grad.dtype.element_ty), mask=inside)


def _launch(kernel: Any, tensors: tuple[Tensor, ...]) -> None:
    lanes = math.gcd(tensors[0].numel(), 16 // tensors[0].element_size())
    grid, packs, wide = tiles(tensors[0].numel(), lanes)
    kernel[grid](*tensors, packs, lanes, ROWS, wide, num_warps=WARPS, enable_fp_fusion=False)


def expand_blend(out: Tensor, primal: Tensor, fade: Tensor, beta: Tensor) -> None:
    """Kernel `expand_blend` of fastebm.ops.schemas."""
    _launch(blend_kernel, (out, primal, fade, beta))


def expand_blend_backward(grad_primal: Tensor, grad_fade: Tensor, grad: Tensor, beta: Tensor) -> None:
    """Kernel `expand_blend_backward` of fastebm.ops.schemas."""
    _launch(blend_backward_kernel, (grad_primal, grad_fade, grad, beta))
