"""Where arguments lie in memory must not matter: strided addresses and tables, and what shares the state's memory."""

from __future__ import annotations

import pytest
import torch

import fastebm
from fastebm import rng


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
