"""The roofline of this machine: the least time that a program can take at the measured rates of compute and memory."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastebm.compiler.cost_model import Cost

# Products that reuse each number a thousand times, and copies that no cache near a core holds. A GPU needs more of both
# until the time of a launch no longer shows.
_MATRIX = {"cpu": 1024, "cuda": 8192}
_COPIED = {"cpu": 2**26, "cuda": 2**28}
_REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a large matrix product, and bytes/s (read and written) of a large copy."""

    flops: float
    bytes: float

    def seconds(self, cost: Cost) -> float:
        """The longer of the times for the FLOPs and for the bytes, each at its full rate."""
        return max(cost.flops / self.flops, cost.bytes / self.bytes)


def measured_peak_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of `device` with the current number of threads; measured once per process, in about 0.1 s."""
    return _measured(device, dtype, torch.get_num_threads())


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    size, copied = _MATRIX[device.type], _COPIED[device.type]
    a = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(a, a), device)
    copy = _fastest(lambda: target.copy_(source), device)
    return Rates(2 * size**3 / product, 2 * copied / copy)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run, after one warm-up run."""
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
