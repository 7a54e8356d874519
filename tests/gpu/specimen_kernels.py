"""Kernels that take more than some GPUs have."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transposed_kernel(out, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A transposed copy, through shared memory."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    block = tl.load(x + row[:, None] * COLUMNS + column[None, :])
    tl.store(out + column[:, None] * ROWS + row[None, :], tl.trans(block))


@triton.jit
def above_the_smallest_kernel(out, x, SIZE: tl.constexpr):
    """Keeps SIZE numbers in registers until the smallest is known."""
    values = tl.load(x + tl.arange(0, SIZE))
    tl.store(out + tl.arange(0, SIZE), values - tl.min(values, axis=0))
