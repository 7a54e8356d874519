"""The hash of tensors where they lie, against whole numbers in Python, and what it has to tell apart."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from fastebm.ops import backends
from fastebm.ops.device_hash import ROW, device_hash

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn),
)
WORD = 2**64


def of(*tensors: Tensor) -> int:
    return int(device_hash(tensors))


def numbers(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (200 * random - 100).to(dtype) if dtype != torch.bool else random < 0.5


def splitmix(index: int) -> int:
    x = index * 0x9E3779B97F4A7C15 % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31 | 1


def by_hand(words: list[int]) -> int:
    factors = [splitmix(index + 1) for index in range(ROW)]
    while True:
        rows = [words[first : first + ROW] for first in range(0, max(1, len(words)), ROW)]
        sums = [sum(w * f for w, f in zip(row, factors, strict=False)) % WORD for row in rows]
        if len(sums) == 1:
            return struct.unpack("<q", struct.pack("<Q", sums[0]))[0]
        words = [word for total in sums for word in struct.unpack("<4h", struct.pack("<Q", total))]


@pytest.mark.parametrize("count", [0, 1, 5, ROW, ROW + 1, 3 * ROW + 7])
def test_value(count):
    words = torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    assert of(words) == by_hand(words.tolist())
    assert of(words[: count // 3], words[count // 3 :]) == of(words)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts(dtype):
    given = numbers(37, dtype)
    found = {of(given)}
    flat = given.view(torch.uint8)
    bits = 1 if dtype == torch.bool else 8
    for byte in range(len(flat)):
        for bit in range(bits):
            flat[byte] ^= 1 << bit
            found.add(of(given))
            flat[byte] ^= 1 << bit
    assert len(found) == 1 + len(flat) * bits


def test_several_changes_at_once_count():
    """Changes that weak sums don't see: signs, exchanged numbers and tensors, a shift, a common factor, zeros."""
    given = numbers(3 * ROW)
    changed = [given]
    for first, second in ((0, 1), (5, ROW), (7, 2 * ROW + 7), (ROW // 2, ROW // 2 + ROW)):
        signs = given.clone()
        signs[[first, second]] *= -1
        exchanged = given.clone()
        exchanged[[first, second]] = given[[second, first]]
        changed += [signs, exchanged]
    changed += [-given, 2 * given, given.roll(1), given.roll(ROW), given.flip(0), 0 * given, -0.0 * given.abs()]
    assert len({of(each) for each in changed}) == len(changed)
    parts = given.split(ROW // 4)
    assert of(*parts) != of(parts[1], parts[0], *parts[2:])


def test_equal_numbers_have_equal_hashes():
    given = numbers(60).reshape(4, 3, 5)
    padded = torch.zeros(4, 3, 9)
    padded[..., 2:7] = given
    assert of(given) == of(given.clone()) == of(padded[..., 2:7])
    assert of(given.mT) == of(given.mT.contiguous()) != of(given)
    pair = torch.complex(given, given.flip(0))
    assert of(pair.conj()) == of(torch.complex(given, -given.flip(0)))
    assert of(torch.tensor(3.0), torch.zeros(0), torch.tensor([True])) == of(torch.tensor([3.0]), torch.tensor(True))


def test_content_hash_of_tensors_on_a_gpu(monkeypatch):
    """Which tensors lie where is pretended; the sizes are part of the hash, and None says that it is unknown."""
    on_gpu = {1: torch.device("cuda", 0), 2: torch.device("cuda", 1)}
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: len(tensor) in on_gpu))
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda tensor: len(tensor) not in on_gpu and not tensor.is_meta))
    a, b, host = torch.tensor([1.0]), torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    found = {backends.content_hash(each) for each in ([a], [b], [a, b], [b, a], [a, host], [host], [])}
    assert None not in found
    assert len(found) == 7
    assert backends.content_hash([a, b, host]) == backends.content_hash([host.clone(), a.clone(), b.clone()])
    assert backends.content_hash([a, torch.zeros(3, device="meta")]) is None
    b[1] = -3.0
    assert backends.content_hash([a, b, host]) not in found
    monkeypatch.setattr(backends, "_extension", None)
    assert backends.content_hash([a, host]) is None
    assert backends.content_hash([a]) is not None
