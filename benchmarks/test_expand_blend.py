"""The Expand blend against eager PyTorch and `torch.compile`. The floor is 3 values an element (read 2, write 1)."""

from __future__ import annotations

import pytest
import torch

import fastebm

SHAPE = (64, 128, 16, 16)


def eager(primal, fade, beta):
    return beta * primal + (1 - beta) * fade


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expand_blend(compare, device, dtype):
    torch._dynamo.reset()
    primal, fade = (fastebm.normal(SHAPE, seed=seed, device=device, dtype=dtype) for seed in (0, 1))
    beta = torch.full((1,), 0.3, device=device)
    # A beta of no dimensions leaves the dtype alone, as a number does.
    scalar = beta.reshape(()).to(dtype)
    compiled = torch.compile(eager)
    compare(
        f"expand_blend {'x'.join(map(str, SHAPE))} {dtype}",
        {
            "fastebm.ops.expand_blend": lambda: fastebm.ops.expand_blend(primal, fade, beta),
            "eager": lambda: eager(primal, fade, scalar),
            "torch.lerp": lambda: torch.lerp(fade, primal, scalar),
            "torch.compile": lambda: compiled(primal, fade, scalar),
        },
    )
