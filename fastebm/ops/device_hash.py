"""A hash of tensors, computed where they lie: the host waits for one number instead of copying all of them.

Words of 16 bits are multiplied by fixed odd numbers of 64 bits, one for each place in a row, and added up modulo 2^64.
The sums of the rows are words again, until one row is left. Whole numbers add up to the same in any order, so the hash
depends on no kernel and no device. A single changed word always changes the sum of its row; several do but for one case
in 2^48, for multipliers that look random.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["device_hash"]

# Words of a row: so many that a net's rows fit into one, and few enough that the multipliers stay in a cache.
ROW = 1 << 14


@torch.no_grad()
def device_hash(tensors: Sequence[Tensor]) -> Tensor:
    """The hash of the contents of tensors on one device, an int64 tensor () there. Their sizes are not part of it."""
    words = [_words(tensor) for tensor in tensors]
    multipliers, zeros = _multipliers(words[0].device)
    while True:
        count = sum(map(len, words))
        rows = max(1, -(-count // ROW))
        table = torch.cat([*words, zeros[: rows * ROW - count]]).view(rows, ROW)
        sums = (table * multipliers).sum(1)
        if rows == 1:
            return sums[0]
        words = [sums.view(torch.int16)]


def _words(tensor: Tensor) -> Tensor:
    """All bits of a dense tensor as int16."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(torch.uint8).to(torch.int16) if flat.itemsize == 1 else flat.view(torch.int16)


@functools.cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    """An odd number for each word of a row, by splitmix64, and as many zero words."""
    mixed = np.arange(1, ROW + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    odd = torch.from_numpy((mixed ^ (mixed >> np.uint64(31)) | np.uint64(1)).view(np.int64))
    return odd.to(device), torch.zeros(ROW, dtype=torch.int16, device=device)
