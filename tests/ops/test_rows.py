"""The rows that a Triton program computes, of chains whose length an int32 only just holds."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import fastebm

QUADS = 128


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), reason="needs Triton's interpreter (TRITON_INTERPRET=1)"
)
@pytest.mark.parametrize("elements", [1, 4, 5, 513, 2**31 - 5, 2**31 - 4, 2**31 - 3, 2**31 - 1, 2**31, 2**33 + 3])
def test_the_last_program_of_a_chain_has_its_last_quads(elements):
    triton_rows = pytest.importorskip("tests.ops.triton_rows", reason="Triton is not installed")
    count = -(-elements // 4)
    across = -(-count // QUADS)
    for slot in (0, 1):
        slots, quads, inside, of_chain = triton_rows.rows(2, elements, (slot + 1) * across - 1, QUADS)
        assert torch.equal(slots, torch.full((QUADS,), slot))
        assert torch.equal(quads, torch.arange((across - 1) * QUADS, across * QUADS))
        assert torch.equal(inside.bool(), quads < count)
        assert torch.equal(of_chain, torch.full((QUADS,), count))


def test_every_kernel_counts_quads_like_that():
    """`tl.cdiv` adds 3 to the elements of a chain, which an int32 does not hold for the last ones that it can be."""
    for path in Path(fastebm.__file__).parent.joinpath("ops", "triton").glob("*.py"):
        assert not re.findall(r"tl\.cdiv\(elements.*", path.read_text()), path.name
