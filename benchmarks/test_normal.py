"""`fastebm.normal` against torch's generators."""

from __future__ import annotations

import pytest
import torch

import fastebm


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (5461, 3, 32, 32)], ids=["64x3x32x32", "16M elements"])
def test_normal(compare, device, shape):
    inside = torch.compile(lambda: torch.randn(shape, device=device))
    compare(
        f"normal {'x'.join(map(str, shape))}",
        {
            "fastebm.normal": lambda: fastebm.normal(shape, seed=0, device=device),
            "torch.randn": lambda: torch.randn(shape, device=device),
            "torch.compile of randn": inside,
        },
    )
