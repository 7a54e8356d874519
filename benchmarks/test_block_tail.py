"""The block tail against the same in eager PyTorch and under `torch.compile`, on what a CF-EBM block at 32x32 gives it.

The floor is bytes over the memory's bandwidth: 9 values a pooled pixel forward (read 4 of main and of skip, write 1),
and 13 more backward (read the gradient and 4 of main, write 4 of each).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastebm

SHAPE = (64, 128, 32, 32)
LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}


def eager(main, skip):
    return (F.silu(F.avg_pool2d(main, 2)) / 1.1 + F.avg_pool2d(skip, 2)) / math.sqrt(2)


def with_backward(tail, main, skip, grad):
    return lambda: torch.autograd.grad(tail(main, skip), (main, skip), grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_tail(compare, device, dtype, layout):
    torch._dynamo.reset()
    main, skip = (
        fastebm.normal(SHAPE, seed=seed, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        for seed in (0, 1)
    )
    tails = {
        "fastebm.ops.block_tail": fastebm.ops.block_tail,
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    title = f"block_tail {'x'.join(map(str, SHAPE))} {dtype} {layout}"
    with torch.no_grad():
        grad = torch.randn_like(eager(main, skip))
        compare(f"{title}, forward", {name: lambda tail=tail: tail(main, skip) for name, tail in tails.items()})
    main.requires_grad_()
    skip.requires_grad_()
    cases = {name: with_backward(tail, main, skip, grad) for name, tail in tails.items()}
    compare(f"{title}, forward and backward", cases)
