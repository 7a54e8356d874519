"""Where arguments lie in memory must not matter: strided addresses and tables, and what shares the state's memory."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastebm
from fastebm import rng
from fastebm.ops.memory import refuse_self_overlap


def test_strided_chain_ids_are_read_as_they_count(backend_device):
    _, device = backend_device
    every_other = torch.arange(10, device=device)[::2]
    for draw in (fastebm.ops.normal, fastebm.ops.uniform):
        expected = draw((5, 8), seed=3, chain_ids=every_other.clone(), device=device)
        assert torch.equal(draw((5, 8), seed=3, chain_ids=every_other, device=device), expected)
        assert torch.equal(expected[1], draw((1, 8), seed=3, chain_ids=2, device=device)[0])
        repeated = draw((5, 8), seed=3, chain_ids=torch.tensor([3], device=device).expand(5), device=device)
        assert torch.equal(repeated, draw((1, 8), seed=3, chain_ids=3, device=device).expand(5, 8))


def test_strided_tables_are_read_as_they_count(backend_device):
    _, device = backend_device
    x, grad = (fastebm.ops.normal((3, 8), seed=seed, device=device) for seed in (0, 1))
    schedule = torch.tensor([[0.1, 0.2], [9.0, 9.0], [0.3, 0.4]], device=device)[::2]
    weights = torch.tensor([[0.5, 7.0], [0.25, 7.0]], device=device)[:, 0]
    key = torch.tensor([[5, 0], [6, 0], [1, 0]], device=device)[:, 0]
    chain_ids = torch.tensor([[4, 9], [2, 9], [8, 9]], device=device)[:, 0]
    options = (None,) * 4 + (None, None, None, None, grad)

    def step(*tables):
        schedule, key, chain_ids, weights = tables
        return torch.ops.fastebm.langevin_step(x, grad, schedule, key, chain_ids, *options, weights, 0.0)

    tables = (schedule, key, chain_ids, weights)
    assert not any(table.is_contiguous() for table in tables)
    assert torch.equal(step(*tables), step(*(table.clone() for table in tables)))


SHARING = {
    "known is x": lambda x: {"mask": x > 0, "known": x},
    "known is x, turned": lambda x: {"mask": x > 0, "known": x.flip(0).set_(x.untyped_storage(), 0, (4, 16), (16, 1))},
    "known is one chain of x": lambda x: {"mask": x > 0, "known": x[1:2]},
    "data target is one chain of x": lambda x: {"data_term": (x[:1], 0.5)},
    "data target is x": lambda x: {"data_term": (x, 0.5, 0.1)},
    "nothing but the gradient": lambda x: {},
}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("gradient", ["apart", "x", "one chain of x"])
def test_a_step_in_place_reads_what_was_there_before(backend_device, sharing, gradient):
    _, device = backend_device
    x = fastebm.ops.normal((4, 16), seed=0, device=device)
    grads = {"apart": lambda x: fastebm.ops.normal((4, 16), seed=1, device=device), "x": lambda x: x}
    grads["one chain of x"] = lambda x: x[2:3].expand(4, 16)
    options = {"step_size": 0.3, "noise_std": 0.1, "seed": 2}
    expected = fastebm.langevin_step(x, grads[gradient](x), **SHARING[sharing](x), **options)
    written = x.clone()
    fastebm.langevin_step_(written, grads[gradient](written), **SHARING[sharing](written), **options)
    assert torch.equal(written, expected)


def overlapping(device: str) -> dict[str, Tensor]:
    """Tensors of which several elements lie at one address."""
    room = torch.arange(400.0, device=device) / 400
    return {
        "windows": room.as_strided((4, 1, 8, 8), (1, 64, 8, 1)),
        "windows of rows": room.as_strided((4, 3, 5, 5), (50, 20, 4, 1)),
        "unfolded": room.unfold(0, 20, 10),
        "interleaved onto one another": room.as_strided((3, 4), (4, 2)),
        "one chain expanded": room[:16].expand(4, 16),
        "one channel expanded": room[:64].view(4, 1, 4, 4).expand(4, 3, 4, 4),
    }


@pytest.mark.parametrize("name", overlapping("cpu"))
def test_elements_that_share_memory_are_not_written(backend_device, name):
    x = overlapping(backend_device[1])[name]
    before, grad = x.clone(), torch.ones_like(x)
    with pytest.raises(RuntimeError, match="x can't be written in place: its elements share memory"):
        fastebm.langevin_step_(x, grad, step_size=0.1, noise_std=0.1, seed=0)
    assert torch.equal(x, before)
    fastebm.langevin_step(x, grad, step_size=0.1, noise_std=0.1, seed=0)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 2), (2, 3)), ((2, 3, 4), (1, 2, 6)), ((4, 1, 5), (7, 0, 1)), ((2, 2, 2), (3, 5, 7)), ((1, 4), (0, 3))],
    ids=str,
)
def test_elements_that_interleave_may_be_written(backend_device, shape, strides):
    x = torch.linspace(-1, 1, 400, device=backend_device[1]).as_strided(shape, strides)
    options = {"step_size": 0.1, "noise_std": 0.1, "seed": 0}
    expected = fastebm.langevin_step(x, torch.ones_like(x), **options)
    assert torch.equal(fastebm.langevin_step_(x, torch.ones(shape, device=x.device), **options), expected)


def test_self_overlap_is_found_exactly():
    """Against all addresses of random strides."""
    generator = random.Random(0)
    room, answers = torch.zeros(2000), []
    for _ in range(500):
        shape = [generator.randint(1, 4) for _ in range(generator.randint(1, 4))]
        strides = [generator.choice([0, 1, 2, 3, 4, 5, 8, 12, 16, 37]) for _ in shape]
        x = room.as_strided(shape, strides)
        places = {sum(i * s for i, s in zip(at, strides, strict=True)) for at in itertools.product(*map(range, shape))}
        answers.append(len(places) < x.numel())
        if answers[-1]:
            with pytest.raises(RuntimeError, match="share memory"):
                refuse_self_overlap("x", x)
        else:
            refuse_self_overlap("x", x)
    assert 50 < sum(answers) < 450


@pytest.mark.parametrize("which", ["grad", "known", "target", "low", "high", "mask"])
def test_a_step_in_place_reads_before_it_writes_whatever_the_view(backend_device, which):
    """What is read begins a little before or behind the state, has another type, or comes by another storage."""
    _, device = backend_device
    size = 4 * 16
    for shift in (-16, -3, -1, 1, 3, 16):
        room = torch.linspace(-1, 1, size + 40, device=device)
        options: dict[str, Any] = {"step_size": 0.3, "noise_std": 0.1, "seed": 2}

        def step(x, other, inplace, options=options):
            sides = {
                "grad": {},
                "known": {"mask": torch.arange(16, device=device) % 2 == 0, "known": other},
                "target": {"data_term": (other, 0.5, 0.1)},
                "low": {"clamp": (other[0], None)},
                "high": {"clamp": (None, other[0])},
                "mask": {"mask": other.view(torch.int32) % 2, "known": torch.zeros(4, 16, device=device)},
            }[which]
            grad = other if which == "grad" else torch.ones(4, 16, device=device)
            return fastebm.langevin_step(x, grad, **sides, **options, inplace=inplace)

        x, other = room[20 : 20 + size].view(4, 16), room[20 + shift : 20 + shift + size].view(4, 16)
        expected = step(x.clone(), other.clone(), False)
        assert torch.equal(step(x, other, True), expected)
        if device == "cpu":  # two storages over one array
            array = np.linspace(-1, 1, size + 40, dtype=np.float32)
            x = torch.from_numpy(array[20 : 20 + size]).view(4, 16)
            other = torch.from_numpy(array[20 + shift : 20 + shift + size]).view(4, 16)
            expected = step(x.clone(), other.clone(), False)
            assert torch.equal(step(x, other, True), expected)


def test_tables_may_lie_in_the_state(backend_device):
    _, device = backend_device
    x = fastebm.ops.normal((4, 16), seed=0, device=device).abs() + 0.1
    grad = fastebm.ops.normal((4, 16), seed=1, device=device)

    def tables(x):
        return x[:1, :2], x.view(torch.int64)[:, 3], x[0, :1]

    def options(schedule, chain_ids, weight):
        return schedule, rng.make_key(3, device=device), chain_ids, *(None,) * 8, grad.flip(0), weight, 0.0

    x.view(torch.int64)[:, 3] = torch.tensor([7, 5, 2**55, 1], device=device)
    expected = torch.ops.fastebm.langevin_step(x, grad, *options(*(table.clone() for table in tables(x))))
    torch.ops.fastebm.langevin_step_(x, grad, *options(*tables(x)))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("wrong", [1.5, "1", None])
def test_addresses_must_be_whole(wrong):
    for call in (
        lambda: rng.make_key(wrong),
        lambda: rng.make_key(0, wrong),
        lambda: rng.make_key(0, 0, wrong),
        lambda: rng.check_stream(wrong),
        lambda: rng.make_chain_ids(wrong, 3),
        lambda: fastebm.ops.normal((2, 2), seed=wrong),
    ):
        with pytest.raises(TypeError, match="must be an integer, got"):
            call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"known": 0.0, "mask": torch.ones(2, 3)}, TypeError, "known must be a tensor, got float"),
        ({"known": torch.ones(2, 3), "mask": [1]}, TypeError, "mask must be a tensor, got list"),
        ({"clamp": 1.0}, TypeError, r"clamp must be \(low, high\), got 1.0"),
        ({"data_term": (torch.ones(2, 3), float("nan"))}, ValueError, "weight of data_term must be finite, got nan"),
        ({"data_term": (1.0, 1.0)}, TypeError, "target of data_term must be a tensor, got float"),
        ({"step_size": torch.tensor(-1.0)}, ValueError, "step_size must be positive and finite"),
        ({"noise_std": torch.tensor([0.1, -1.0])}, ValueError, "noise_std must be finite and not negative"),
    ],
)
def test_wrong_options_say_what_is_needed(options, error, message):
    x = torch.zeros(2, 3)
    with pytest.raises(error, match=message):
        fastebm.langevin_step(x, x, **{"step_size": 0.1, "noise_std": 0.1, "seed": 0, **options})
