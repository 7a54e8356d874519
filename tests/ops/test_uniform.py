"""Uniform noise: the integers and the map to (0, 1], equal to the last bit on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastebm
from tests.ops import philox_by_hand
from tests.ops.agreement import assert_cast, compiled_or_reference

INTERPRETED = ("triton", "cpu")

ADDRESSES = [
    {"seed": 0, "step": 0, "chain": 0, "stream": 0},
    {"seed": -1, "step": 1, "chain": 1, "stream": 255},
    {"seed": 2**64 - 1, "step": 2**31 - 1, "chain": 2**31, "stream": 1},
    {"seed": -(2**63), "step": 2**31, "chain": 2**32 - 2, "stream": 7},
    {"seed": 2**63, "step": 2**32 - 1, "chain": 2**32 - 1, "stream": 127},
    {"seed": 0x0123456789ABCDEF, "step": 2**31 + 12345, "chain": 2**56 - 3, "stream": 128},
]


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda a: "-".join(str(v) for v in a.values()))
def test_words_are_those_of_their_address(backend_device, address):
    _, device = backend_device
    seed, step, chain, stream = address.values()
    drawn = fastebm.ops.uniform((3, 10), seed=seed, step=step, chain_ids=chain, stream=stream, device=device)
    expected = [
        [
            philox_by_hand.uniform(w)
            for quad in range(3)
            for w in philox_by_hand.words(seed, step, chain + b, stream, quad)
        ][:10]
        for b in range(3)
    ]
    assert torch.equal(drawn.cpu(), torch.tensor(expected))


def test_random123_first_vector(backend_device):
    drawn = fastebm.ops.uniform((1, 4), seed=0, device=backend_device[1])
    assert drawn.flatten().tolist() == [philox_by_hand.uniform(w) for w in philox_by_hand.KNOWN_ANSWERS[0][2]]


def test_listed_chains_are_the_consecutive_ones_in_another_order(backend_device):
    _, device = backend_device
    whole = fastebm.ops.uniform((8, 2, 3, 5), seed=3, step=9, chain_ids=2**40, device=device)
    order = torch.tensor([5, 0, 7, 5], device=device)
    listed = fastebm.ops.uniform((4, 2, 3, 5), seed=3, step=9, chain_ids=2**40 + order)
    assert listed.device.type == device
    assert torch.equal(listed, whole[order])


@pytest.mark.parametrize(
    "shape", [(1,), (2,), (3,), (5, 1), (0,), (0, 7), (3, 0), (2, 3, 4), (65, 63), (2, 1023), (2, 1025)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_backends_agree_to_the_last_bit(backend_device, shape, dtype):
    name, device = backend_device
    if dtype == torch.float64 and name in ("triton", "cuda"):
        pytest.skip("float64 is for the reference and C++")
    drawn = fastebm.ops.uniform(shape, seed=11, step=3, stream=2, chain_ids=77, device=device, dtype=dtype)
    with fastebm.ops.backend(compiled_or_reference()):
        expected = fastebm.ops.uniform(shape, seed=11, step=3, stream=2, chain_ids=77, dtype=dtype)
    assert drawn.shape == shape
    assert drawn.is_contiguous()
    assert_cast(drawn, expected, backend_device)


def test_lies_above_zero_and_up_to_one(backend_device):
    name, device = backend_device
    drawn = fastebm.ops.uniform((16, 1 << (12 if (name, device) == INTERPRETED else 16)), seed=5, device=device)
    assert float(drawn.min()) > 0
    assert float(drawn.max()) <= 1


@pytest.mark.parametrize("word", [0, 1, 2, 2**24 + 1, 2**31, 2**32 - 2**7, 2**32 - 2**7 + 1, 2**32 - 1])
def test_map_from_words(word):
    from fastebm.ops.normal import uniforms_from_words

    assert float(uniforms_from_words(torch.tensor([word]))) == philox_by_hand.uniform(word)
    assert 2.0**-33 <= philox_by_hand.uniform(word) <= 1.0


def test_kolmogorov_smirnov():
    count = 10**7 if fastebm.ops.backends.select_backend("cpu") == "cpp" else 10**6
    drawn = np.sort(fastebm.ops.uniform((100, count // 100), seed=2024).numpy().ravel()).astype(np.float64)
    num_steps = np.arange(count + 1) / count
    distance = max(np.max(num_steps[1:] - drawn), np.max(drawn - num_steps[:-1]))
    # P(D sqrt(n) > 1.95) is 0.001.
    assert distance * math.sqrt(count) < 1.95
    assert abs(drawn.mean() - 0.5) < 4 * math.sqrt(1 / 12 / count)
    assert abs(drawn.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / count)


def test_opcheck(backend_device):
    _, device = backend_device
    key = fastebm.rng.make_key(1, 2, device=device)
    for chain_ids in (fastebm.rng.make_chain_ids(5, 3, device), torch.tensor([4, 2, 9], device=device)):
        torch.library.opcheck(torch.ops.fastebm.uniform.default, ((3, 2, 5), key, chain_ids, 3, torch.float32))


def test_is_of_a_given_stream_and_no_other(backend_device):
    _, device = backend_device
    draws = [fastebm.ops.uniform((2, 8), seed=1, stream=stream, device=device) for stream in fastebm.rng.Stream]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(fastebm.rng.Stream)
