"""Addresses of random numbers: seeds, streams, steps and chain ids of the Philox counter are defined here alone.

Noise is a pure function of where it falls, never of when or by whom it was drawn. Philox4x32-10 (Salmon et al., SC
2011) maps

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (quad, step, chain low 32 bits, stream << 24 | chain high 24 bits)

to four 32-bit words, for elements `4 * quad` to `4 * quad + 3` of one chain in row-major (C, H, W) order. So chains
can be split into batches, spread over processes or resumed, and see the same noise.
"""

from __future__ import annotations

from enum import IntEnum
from typing import SupportsIndex

import torch
from torch import Tensor

from .scalars import as_int

__all__ = [
    "MAX_CHAIN",
    "MAX_STEP",
    "Stream",
    "check_step",
    "check_stream",
    "draw_seed",
    "fold_in_seed",
    "make_chain_ids",
    "make_key",
    "own_stream",
]

MAX_STEP = 2**32
MAX_CHAIN = 2**56
MAX_STREAM = 2**8
FIRST_OWN_STREAM = 128
MAX_ELEMENTS = 2**34
_WORD = 2**32 - 1


class Stream(IntEnum):
    """What the noise is for; different streams of one seed are independent. Numbers are part of the contract and never
    reused. Those from 128 on are never the library's; see `own_stream`."""

    LANGEVIN = 0
    INITIAL = 1
    MOMENTUM = 2
    ACCEPTANCE = 3
    PRIOR = 4
    DATA_NOISE = 5
    AUGMENTATION = 6
    RESTART = 7
    SHUFFLE = 8
    RESEED = 9
    POSTERIOR = 10
    NOISY_START = 11
    HOLE = 12
    MOMENTUM_END = 13
    SWAP = 14
    BUFFER_DRAW = 15
    BUFFER_RESTART = 16
    BUFFER_NOISE = 17
    TRAJECTORY_LENGTH = 18
    REFRESH = 19
    PROJECTION = 20
    MINIBATCH = 21


def draw_seed() -> int:
    """A fresh seed in [0, 2^63) from torch's default generator, so that `torch.manual_seed` governs."""
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def fold_in_seed(seed: SupportsIndex, index: SupportsIndex) -> int:
    """The seed in [0, 2^64) of the `index`-th fresh start of what began with `seed`; number 0 is `seed` itself.

    The first 64 bits that Philox gives at key `seed`, step `index` and stream RESEED, computed here in whole numbers:
    the operators give floats, which don't hold as many bits. Raises as `make_key` does.
    """
    make_key(seed, index)
    if index == 0:
        return as_int("seed", seed)
    key = [int(seed) & _WORD, int(seed) >> 32 & _WORD]
    counter = [0, int(index), 0, Stream.RESEED << 24]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & _WORD, key[1] + 0xBB67AE85 & _WORD]
    return counter[0] | counter[1] << 32


def check_step(step: SupportsIndex) -> int:
    """`step` as an int. Raises ValueError outside [0, 2^32), where the counter would overflow."""
    step = as_int("step", step)
    if not 0 <= step < MAX_STEP:
        raise ValueError(f"step must be in [0, 2^32), got {step}: the noise counter would overflow")
    return step


def check_stream(stream: SupportsIndex) -> int:
    """`stream` as an int. Raises ValueError outside [0, 256)."""
    stream = as_int("stream", stream)
    if not 0 <= stream < MAX_STREAM:
        raise ValueError(f"stream must be in [0, 256), got {stream}")
    return stream


def own_stream(use: SupportsIndex = 0) -> int:
    """The stream of the `use`-th kind of noise in code of your own, which no stream of the library meets.

    Raises ValueError for a use outside [0, 128), and TypeError for one that is not whole.

    Example:
        >>> import fastebm
        >>> noise = fastebm.ops.normal((4, 3), seed=7, step=2, stream=fastebm.rng.own_stream(1))
    """
    use = as_int("use", use)
    if not 0 <= use < MAX_STREAM - FIRST_OWN_STREAM:
        raise ValueError(f"use must be in [0, {MAX_STREAM - FIRST_OWN_STREAM}), got {use}")
    return FIRST_OWN_STREAM + use


def make_key(
    seed: SupportsIndex, step: SupportsIndex = 0, index: SupportsIndex = 0, device: torch.device | str | None = None
) -> Tensor:
    """An int64 tensor (seed, step, schedule index), as operators take it.

    Args:
        seed: in [-2^63, 2^64), the range of `torch.manual_seed`; its 64 bits are the Philox key.
        step: in [0, 2^32), the step of the chain; counts on through the levels of a cascade.
        index: the row of the schedule, not negative.

    Raises:
        ValueError: for a number outside its range.
        TypeError: for one that is not whole.
    """
    seed, index = as_int("seed", seed), as_int("the schedule index", index)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")
    if index < 0:
        raise ValueError(f"the schedule index must not be negative, got {index}")
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor([signed, check_step(step), index], dtype=torch.int64, device=device or "cpu")


def make_chain_ids(chain_ids: int | Tensor, count: int, device: torch.device | str | None = None) -> Tensor:
    """Ids of `count` chains as operators take them: an int64 tensor (1,), the id of the first of consecutive ones, or
    (count,).

    Args:
        chain_ids: the id of the first chain, or an int64 tensor of `count` ids. Ids lie in [0, 2^56). Chains of one id
            draw the same noise.

    Raises:
        ValueError: for ids out of range (a tensor on a GPU is not read, which would stall it: there the noise of such
            a chain is NaN), or a tensor of another length.
        TypeError: for ids that are not integers.
    """
    if isinstance(chain_ids, Tensor) and chain_ids.dim():
        if chain_ids.dtype != torch.int64:
            raise TypeError(f"chain_ids must be an int64 tensor or an int, got a tensor of {chain_ids.dtype}")
        if chain_ids.shape != (count,):
            raise ValueError(f"chain_ids must hold one id a chain, shape ({count},), got {tuple(chain_ids.shape)}")
        if (
            chain_ids.device.type == "cpu"
            and count
            and not (int(chain_ids.min()) >= 0 and int(chain_ids.max()) < MAX_CHAIN)
        ):
            raise ValueError(f"chain ids must be in [0, 2^56), got {int(chain_ids.min())} to {int(chain_ids.max())}")
        return chain_ids.to(device) if device is not None else chain_ids
    chain_ids = as_int("chain_ids", chain_ids)
    if not (chain_ids >= 0 and chain_ids + max(count, 1) <= MAX_CHAIN):
        raise ValueError(f"chain ids must be in [0, 2^56), got {chain_ids} to {chain_ids + max(count, 1) - 1}")
    return torch.tensor([chain_ids], dtype=torch.int64, device=device or "cpu")
