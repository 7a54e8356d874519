"""How much an operator that rounds once may lose, against the truth in float64 and against what eager PyTorch loses."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Of the norm. Narrower types: twice what eager loses, which rounds after every operation.
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The error's norm over the truth's; over 1 where the truth is zero."""
    actual, truth = actual.detach().cpu().double(), truth.detach().cpu().double()
    size = float(truth.norm())
    return float((actual - truth).norm()) / (size if size > 0 else 1.0)


def assert_precise(actual: Tensor, truth: Tensor, eager: Tensor) -> None:
    """`actual` is of the dtype and shape of `eager`, and as near to the float64 `truth` as its dtype asks for."""
    assert actual.dtype == eager.dtype
    assert actual.shape == eager.shape == truth.shape
    limit = LIMITS.get(actual.dtype)
    if limit is None:
        # Triton's interpreter truncates to bfloat16 where a GPU rounds, and so loses twice as much.
        truncates = actual.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
        limit = (4 if truncates else 2) * relative_error(eager, truth)
    assert relative_error(actual, truth) <= limit


def supported(backend_device: tuple[str, str], dtype: torch.dtype) -> bool:
    """Triton and CUDA have no float64."""
    return dtype != torch.float64 or backend_device[0] in ("reference", "cpp")
