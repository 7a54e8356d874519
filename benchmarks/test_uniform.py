"""`fastebm.uniform` against torch's generators."""

from __future__ import annotations

import pytest
import torch

import fastebm


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (5461, 3, 32, 32)], ids=["64x3x32x32", "16M elements"])
def test_uniform(compare, device, shape):
    inside = torch.compile(lambda: torch.rand(shape, device=device))
    compare(
        f"uniform {'x'.join(map(str, shape))}",
        {
            "fastebm.uniform": lambda: fastebm.uniform(shape, seed=0, device=device),
            "torch.rand": lambda: torch.rand(shape, device=device),
            "torch.compile of rand": inside,
        },
    )
