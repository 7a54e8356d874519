"""The rows of one Triton program among many, in the interpreter: of chains that are too long for a test's memory."""

from __future__ import annotations

from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastebm.ops.triton.philox import quads_of, rows_of_program


@triton.jit
def rows_kernel(out, batch, elements, QUADS: tl.constexpr):
    slot, quad, inside = rows_of_program(batch, elements, QUADS, 1)
    lane = tl.arange(0, QUADS)
    tl.store(out + lane, slot)
    tl.store(out + QUADS + lane, quad)
    tl.store(out + 2 * QUADS + lane, inside.to(tl.int64))
    tl.store(out + 3 * QUADS + lane, tl.zeros((QUADS,), tl.int64) + quads_of(elements))


def rows(batch: int, elements: int, program: int, quads: int) -> Tensor:
    """(4, quads): the slots, quads, whether they exist, and the quads of a chain, as that program finds them."""
    out = torch.empty(4, quads, dtype=torch.int64)
    builder = interpreter.interpreter_builder
    with mock.patch.object(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (program, y, z))):
        rows_kernel[(1,)](out, batch, elements, quads)
    return out
