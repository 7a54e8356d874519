"""Philox4x32-10 in Python's own integers, from the paper (Salmon et al., SC 2011), and Random123's known answers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

# (counter, key, output) of Random123's known-answer file for philox4x32, 10 rounds.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Four words from four counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def words(seed: int, step: int, chain: int, stream: int, quad: int) -> tuple[int, int, int, int]:
    """The words of one quad of one chain, by the layout of the counter in DESIGN and fastebm/rng.py."""
    counter = (quad, step, chain % 2**32, stream << 24 | chain >> 32)
    return philox(counter, (seed % 2**32, (seed % 2**64) >> 32))


def uniform(word: int) -> float:
    """fma(float(word), 2^-32, 2^-33), rounded once, by exact arithmetic."""
    return float(np.float32(float(Fraction(float(np.float32(word))) / 2**32 + Fraction(1, 2**33))))
