"""The floor that this machine sets: rates of a large matrix product and of a large copy, measured in the same run."""

from __future__ import annotations

import functools

import torch

from fastebm.compiler.cost_model import Cost
from fastebm.compiler.roofline import Rates
from fastebm.evaluation.speed.measurement import seconds

# Products that reuse each number a thousand times, and copies that no cache near a core holds. A GPU needs more of
# both until the time of a launch no longer shows.
_MATRIX = {"cpu": 1024, "cuda": 8192}
_COPIED = {"cpu": 64 * 2**20, "cuda": 2**30}
_REPEATS = 7


def machine_rates(device: str, dtype: torch.dtype) -> Rates:
    """FLOP/s in products of `dtype` and bytes/s, read and written, in copies: the best of a few, once a process."""
    return _measured(device, dtype, torch.get_num_threads())


def roofline_seconds(cost: Cost, rates: Rates, batch: int = 1) -> float:
    """The least time that `batch` samples of `cost` can take at these rates."""
    return batch * rates.seconds(cost)


@functools.cache
def _measured(device: str, dtype: torch.dtype, threads: int) -> Rates:
    size, copied = _MATRIX[device], _COPIED[device]
    a = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(a, a), 1, device) for _ in range(_REPEATS))
    copy = min(seconds(lambda: target.copy_(source), 1, device) for _ in range(_REPEATS))
    return Rates(2 * size**3 / product, 2 * copied / copy)
