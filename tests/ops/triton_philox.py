"""Triton's Philox at any counter and key, which operators reach only through addresses of elements that exist."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastebm.ops.triton.philox import philox


@triton.jit
def words_kernel(out, counters_and_keys):
    at = counters_and_keys + 6 * tl.program_id(0)
    quad, step = tl.load(at), tl.load(at + 1)
    low, high = tl.load(at + 2), tl.load(at + 3)
    seed = tl.load(at + 4) | (tl.load(at + 5) << 32)
    # The last counter word is stream << 24 | chain high: 8 and 24 bits.
    words = philox(quad, step, low | ((high & 0xFFFFFF) << 32), high >> 24, seed)
    for lane in tl.static_range(4):
        tl.store(out + 4 * tl.program_id(0) + lane, words[lane].to(tl.int64))


def words(counters_and_keys: Tensor) -> Tensor:
    """(n, 4) Philox words of int64 rows (counter, key)."""
    out = torch.empty(len(counters_and_keys), 4, dtype=torch.int64, device=counters_and_keys.device)
    words_kernel[(len(out),)](out, counters_and_keys)
    return out
