"""The contracts of Langevin chains: explicit state, the same bits by any route, pins and limits, errors."""

import doctest
import importlib
import math
import types

import pytest
import torch
from torch import nn

from fastebm import langevin_step, rng
from fastebm.compiler import energy_gradient
from fastebm.sampling import ChainState, Langevin, constant, linear
from fastebm.sampling.observers import checking_finite
from tests.docstrings import run_examples

SHAPE = (7, 2, 3, 5)


def bowl(x):
    """An energy whose gradient is elementwise, so that its bits don't depend on the batch."""
    return (0.25 * x**4 - 0.5 * x**2).sum(dim=(1, 2, 3))


@pytest.fixture
def x0():
    return torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)


@pytest.fixture
def sampler():
    return Langevin(bowl, linear(0.2, 0.1), linear(0.1, 0.02), clamp=(-1.2, 1.2), grad_norm_clip=1.5)


def everything(x0):
    """Options that exercise each field of the state, some with a row for each chain and some without."""
    return {
        "mask": torch.arange(5) == 2,
        "known": x0.flip(0),
        "data_term": (torch.full(SHAPE[1:], 0.3), linear(0.5, 0.0), 0.1),
    }


def steps_of(sampler, state, num_steps):
    for _ in range(num_steps):
        state, info = sampler.step(state)
    return state, info


# The same chain by every route ----------------------------------------------------------------------------------------


def test_sample_is_step_repeated(sampler, x0):
    state = sampler.init(x0, 3, 10, num_steps=9, **everything(x0))
    by_steps, _ = steps_of(sampler, state, 9)
    assert torch.equal(sampler.sample(x0, 9, 3, 10, **everything(x0)), by_steps.x)
    advanced = sampler.advance(state, 9)
    assert torch.equal(advanced.x, by_steps.x)
    assert torch.equal(advanced.key, by_steps.key)
    assert advanced.step == by_steps.step == 9


def test_sample_is_step_repeated_for_a_net():
    torch.manual_seed(0)
    convolution = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3, padding=1))
    net = nn.Sequential(convolution, nn.SiLU(), nn.Flatten(), nn.Linear(256, 1))
    sampler = Langevin(net, 1.0, linear(0.1, 0.0), dtype=torch.bfloat16)
    x0 = torch.rand(3, 1, 8, 8)
    state, info = steps_of(sampler, sampler.init(x0, seed=1, num_steps=4), 4)
    assert torch.equal(sampler.sample(x0, 4, seed=1), state.x)
    assert info.energy.shape == (3,)
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_an_update_is_the_operator(x0):
    sampler = Langevin(bowl, 0.3, 0.1, clamp=(-1, None), grad_clip=0.2)
    _, gradient = energy_gradient(bowl)(x0)
    expected = langevin_step(
        x0, gradient, step_size=0.3, noise_std=0.1, seed=5, step=7, chain_ids=2, clamp=(-1, None), grad_clip=0.2
    )
    assert torch.equal(sampler.sample(x0, 1, 5, 2, start_step=7), expected)


def test_step_leaves_the_state_as_it_was_and_reports(sampler, x0):
    state = sampler.init(x0, seed=3, num_steps=4)
    before = {name: value.clone() for name, value in state.state_dict().items() if isinstance(value, torch.Tensor)}
    after, info = sampler.step(state)
    assert all(torch.equal(value, getattr(state, name)) for name, value in before.items())
    assert (state.step, after.step) == (0, 1)
    assert after.key.tolist() == [3, 1, 1]
    torch.testing.assert_close(info.energy, bowl(x0))
    torch.testing.assert_close(info.gradient, x0**3 - x0)
    torch.testing.assert_close(info.gradient_norm, (x0**3 - x0).flatten(1).norm(dim=1))
    torch.testing.assert_close(info.displacement, (after.x - x0).flatten(1).norm(dim=1))


def test_inputs_are_left_as_they_were(sampler, x0):
    options = everything(x0)
    copies = [t.clone() for t in (x0, options["mask"], options["known"], options["data_term"][0])]
    result = sampler.sample(x0, 5, seed=3, **options)
    for tensor, copy in zip((x0, options["mask"], options["known"], options["data_term"][0]), copies, strict=True):
        assert torch.equal(tensor, copy)
    assert result.data_ptr() != x0.data_ptr()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_don_t_change_a_bit(sampler, x0, batch_size):
    options = everything(x0)
    whole = sampler.sample(x0, 6, 3, 2**33, keep="trajectory", thin=2, **options)
    for keep in ("last", "trajectory"):
        split = sampler.sample(x0, 6, 3, 2**33, keep=keep, thin=2, batch_size=batch_size, **options)
        assert torch.equal(split, whole if keep == "trajectory" else whole[-1])


def test_chain_ids_place_the_noise(sampler, x0):
    ids = torch.tensor([5, 6, 7, 8, 9, 10, 11])
    assert torch.equal(sampler.sample(x0, 4, 3, ids), sampler.sample(x0, 4, 3, 5))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    shuffled = sampler.sample(x0[order], 4, 3, ids[order], batch_size=2)
    assert torch.equal(shuffled, sampler.sample(x0, 4, 3, 5)[order])


def test_an_offset_is_a_later_step(x0):
    sampler = Langevin(bowl, 0.2, 0.1)
    half = sampler.sample(x0, 5, seed=3)
    assert torch.equal(sampler.sample(half, 5, seed=3, start_step=5), sampler.sample(x0, 10, seed=3))
    assert not torch.equal(sampler.sample(half, 5, seed=3), sampler.sample(x0, 10, seed=3))


def test_seed_none_follows_torch(sampler, x0):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(sampler.sample(x0, 3))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(sampler.sample(x0, 3), sampler.sample(x0, 3))


def test_memory_format_is_kept_and_changes_no_noise(x0):
    sampler = Langevin(bowl, 0.2, 0.1)
    result = sampler.sample(x0.contiguous(memory_format=torch.channels_last), 3, seed=1, keep="last")
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, sampler.sample(x0, 3, seed=1))


def test_works_where_autograd_is_on_or_off(sampler, x0):
    expected = sampler.sample(x0, 3, seed=1)
    result = sampler.sample(x0.clone().requires_grad_(), 3, seed=1)
    assert not result.requires_grad
    assert torch.equal(result, expected)
    with torch.inference_mode():
        born_in_inference = x0.clone()
        assert torch.equal(sampler.sample(x0, 3, seed=1), expected)
    assert torch.equal(sampler.sample(born_in_inference, 3, seed=1), expected)
    state, _ = sampler.step(sampler.init(x0.clone().requires_grad_(), seed=1, num_steps=3))
    assert not state.x.requires_grad


def test_float64(x0):
    result = Langevin(bowl, 0.2, 0.1).sample(x0.double(), 5, seed=1)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result.float(), Langevin(bowl, 0.2, 0.1).sample(x0, 5, seed=1))


@pytest.mark.parametrize("shape", [(5,), (0, 3), (4, 0)])
def test_odd_shapes(shape):
    sampler = Langevin(lambda x: x.square().reshape(x.shape[0], -1).sum(1) if x.dim() > 1 else x.square(), 0.1, 0.1)
    assert sampler.sample(torch.zeros(shape), 2, seed=0).shape == shape
    assert sampler.sample(torch.zeros(shape), 2, seed=0, keep="trajectory").shape == (3, *shape)


# What is kept ---------------------------------------------------------------------------------------------------------


def test_trajectory_and_callback_see_the_states_of_step(sampler, x0):
    states, infos = [sampler.init(x0, 3, num_steps=7)], []
    for _ in range(7):
        state, info = sampler.step(states[-1])
        states.append(state)
        infos.append(info)
    for thin, kept in ((1, range(8)), (3, (0, 3, 6)), (8, (0,))):
        frames = sampler.sample(x0, 7, 3, keep="trajectory", thin=thin)
        assert torch.equal(frames, torch.stack([states[k].x for k in kept]))
    seen = []
    last = sampler.sample(x0, 7, 3, keep=lambda k, x, info: seen.append((k, x, info)), thin=3)
    assert torch.equal(last, states[-1].x)
    assert [k for k, _, _ in seen] == [3, 6]
    for k, x, info in seen:
        assert torch.equal(x, states[k].x)  # also after the chain has gone on
        assert torch.equal(info.energy, infos[k - 1].energy)
        assert torch.equal(info.displacement, infos[k - 1].displacement)


def test_no_steps_return_a_pinned_copy(sampler, x0):
    assert torch.equal(sampler.sample(x0, 0, seed=1), x0)
    assert sampler.sample(x0, 0, seed=1, keep="trajectory").shape == (1, *SHAPE)
    pinned = sampler.sample(x0, 0, seed=1, mask=torch.ones(SHAPE, dtype=torch.bool), known=torch.tensor(0.5))
    assert (pinned == 0.5).all()


def test_progress_shows_the_energy(sampler, x0, capsys):
    expected = sampler.sample(x0, 4, seed=1)
    capsys.readouterr()
    assert torch.equal(sampler.sample(x0, 4, seed=1, progress=True, batch_size=4), expected)
    assert "8/8" in capsys.readouterr().err
    sampler.sample(x0, 4, seed=1)
    assert capsys.readouterr().err == ""


# Pins, pulls and limits -----------------------------------------------------------------------------------------------


def test_known_pixels_are_pinned_in_every_state(x0):
    mask = torch.zeros(SHAPE[1:], dtype=torch.bool)
    mask[:, 1:] = True
    known = torch.full((1, 1, 1, 5), 0.7)
    frames = Langevin(bowl, 0.3, 0.2).sample(x0, 5, seed=1, keep="trajectory", mask=mask, known=known)
    assert (frames[:, :, mask] == 0.7).all()
    free = Langevin(bowl, 0.3, 0.2).sample(x0, 5, seed=1, keep="trajectory")
    assert torch.equal(frames[:, :, ~mask], free[:, :, ~mask])


def test_clamp_and_clips(x0):
    def steep(x):
        return 100 * x.sum(dim=(1, 2, 3))

    def first_update(**options):
        return Langevin(steep, 0.1, 0.0, **options).sample(x0, 1, seed=0) - x0

    torch.testing.assert_close(first_update(), torch.full(SHAPE, -10.0))
    torch.testing.assert_close(first_update(grad_clip=0.5), torch.full(SHAPE, -0.05))
    torch.testing.assert_close(first_update(grad_norm_clip=2.0).flatten(1).norm(dim=1), torch.full((7,), 0.2))
    assert (Langevin(steep, 0.1, 0.0, clamp=(-2, None)).sample(x0, 1, seed=0) == -2).all()


CHANNELS = torch.tensor([-0.3, -0.6]).view(2, 1, 1)
BOUNDS = {
    "each channel": (CHANNELS, -CHANNELS),
    "each channel, with a batch of one": (CHANNELS[None], -CHANNELS[None]),
    "each entry": (torch.linspace(-1, -0.1, 30).view(SHAPE[1:]), torch.linspace(0.1, 1, 30).view(SHAPE[1:])),
    "each column below": (torch.linspace(-1, -0.1, 5).view(1, 1, 5), None),
    "each channel above, a number below": (-0.4, -CHANNELS),
    "float64": (CHANNELS.double(), 0.5),
    "whole numbers": (-torch.ones(2, 1, 1, dtype=torch.int64), 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_channels_hold_in_every_state(x0, name, dtype):
    """And are the update without a clamp, then the bounds, then the mask."""
    clamp, x0 = BOUNDS[name], x0.to(dtype)
    low, high = (
        b if isinstance(b, torch.Tensor) else torch.tensor(end if b is None else b, dtype=torch.float64)
        for b, end in zip(clamp, (-9.0, 9.0), strict=True)
    )
    options = {"mask": torch.arange(5) == 2, "known": torch.tensor(2.0), "data_term": (x0.flip(0), 0.3)}
    sampler, free = Langevin(bowl, 0.2, 0.3, clamp=clamp, grad_clip=1.0), Langevin(bowl, 0.2, 0.3, grad_clip=1.0)
    frames = sampler.sample(x0, 4, 3, keep="trajectory", **options)
    for k in range(4):
        wanted = free.sample(frames[k], 1, 3, start_step=k, **options)
        wanted = torch.where(options["mask"], wanted, wanted.maximum(low.to(dtype)).minimum(high.to(dtype)))
        assert torch.equal(frames[k + 1], wanted)
    for batch_size in (1, 3):
        assert torch.equal(sampler.sample(x0, 4, 3, batch_size=batch_size, **options), frames[-1])
    laid = sampler.sample(x0.contiguous(memory_format=torch.channels_last), 4, 3, **options)
    torch.testing.assert_close(laid, frames[-1])
    assert "bounds (" in repr(sampler)


def test_bounds_of_channels_in_a_fused_chain():
    """Small images of a net take many updates in one call."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(256, 1))
    low = torch.tensor([-0.1, -0.2, -0.3]).view(3, 1, 1)
    x0 = torch.rand(3, 3, 8, 8) - 0.5
    sampler = Langevin(net, 0.5, 0.1, clamp=(low, -low))
    ends, _ = steps_of(sampler, sampler.init(x0, 1), 40)
    assert torch.equal(sampler.sample(x0, 40, 1), ends.x)
    assert (ends.x >= low).all()
    assert (ends.x <= -low).all()
    assert (ends.x == low).any()


def test_bounds_are_copied(x0):
    high = torch.full((2, 1, 1), 0.25)
    sampler = Langevin(bowl, 0.2, 0.3, clamp=(None, high))
    before = sampler.sample(x0, 3, 1)
    high.fill_(-5)
    assert torch.equal(sampler.sample(x0, 3, 1), before)


@pytest.mark.parametrize(
    ("clamp", "error", "message"),
    [
        (
            (torch.zeros(2), None),
            ValueError,
            r"clamp's low must be a number or broadcast, with as many dimensions, to one sample of shape",
        ),
        ((None, torch.zeros(3, 1, 1)), ValueError, r"shape \(2, 3, 5\), as \(C, 1, 1\) does, got \(3, 1, 1\)"),
        ((None, torch.zeros(SHAPE)), ValueError, "broadcast, with as many dimensions, to one sample"),
        ((None, torch.zeros(1, 1, *SHAPE[1:])), ValueError, "broadcast, with as many dimensions, to one sample"),
        ((CHANNELS, CHANNELS - 1), ValueError, "low <= high in every entry"),
        ((CHANNELS, -0.5), ValueError, "low <= high in every entry"),
        ((CHANNELS * math.nan, None), ValueError, "low <= high in every entry"),
        ((CHANNELS * -math.inf, None), ValueError, "below inf"),
        ((None, CHANNELS * math.inf), ValueError, "above -inf"),
        ((CHANNELS > 0, None), TypeError, "clamp's low must be of real numbers"),
        ((CHANNELS + 0j, None), TypeError, "clamp's low must be of real numbers"),
        ((torch.zeros(2, 1, 1), torch.ones(3, 1, 1)), ValueError, "bounds of clamp must broadcast to one shape"),
        ((CHANNELS.to("meta"), None), TypeError, "clamp's low must be of real numbers"),
    ],
)
def test_wrong_bounds_are_refused(x0, clamp, error, message):
    with pytest.raises(error, match=message) as refused:
        Langevin(bowl, 0.1, 0.1, clamp=clamp).init(x0, 0)
    assert len(str(refused.value).splitlines()) == 1
    if "meta" not in str(clamp):
        with pytest.raises(error, match=message):
            langevin_step(x0, x0, step_size=0.1, noise_std=0.1, seed=0, clamp=clamp)


def test_anchor_pulls_beyond_its_hinge(x0):
    def flat(x):
        return 0 * x.sum(dim=(1, 2, 3))

    offset = torch.zeros(SHAPE)
    offset[:, 0, 0, 0] = torch.arange(7.0)
    result = Langevin(flat, 0.5, 0.0).sample(x0 + offset, 1, seed=0, data_term=(x0, 0.5, 6.5))
    moved = (x0 + offset - result)[:, 0, 0, 0]
    torch.testing.assert_close(moved, torch.tensor([0, 0, 0, 0.75, 1.0, 1.25, 1.5]))


# State ----------------------------------------------------------------------------------------------------------------


def test_a_resumed_chain_is_the_uninterrupted_one(sampler, x0, tmp_path):
    options = everything(x0)
    expected = sampler.sample(x0, 9, 2**64 - 1, 10, start_step=2**31, **options)
    half = sampler.advance(sampler.init(x0, 2**64 - 1, 10, start_step=2**31, num_steps=9, **options), 4)
    torch.save(half.state_dict(), tmp_path / "chain.pt")
    restored = ChainState.from_state_dict(torch.load(tmp_path / "chain.pt", weights_only=True))
    for name, value in half.state_dict().items():
        same = (
            torch.equal(value, getattr(restored, name))
            if isinstance(value, torch.Tensor)
            else value == getattr(restored, name)
        )
        assert same, name
    assert torch.equal(sampler.advance(restored, 5).x, expected)


def test_state_dict_holds_tensors_numbers_and_a_name_only(sampler, x0):
    state = sampler.init(x0, 3, num_steps=2)
    assert set(state.state_dict()) == {"x", "key", "chain_ids", "schedule", "step", "data_term_hinge", "sampler"}
    assert all(isinstance(value, torch.Tensor | int | float | str) for value in state.state_dict().values())


def test_what_is_no_state_is_refused(sampler, x0):
    state = sampler.init(x0, 3, num_steps=2).state_dict()
    with pytest.raises(ValueError, match=r"missing \['key'\]"):
        ChainState.from_state_dict({name: value for name, value in state.items() if name != "key"})
    with pytest.raises(ValueError, match=r"unknown \['speed'\]"):
        ChainState.from_state_dict({**state, "speed": 1})
    with pytest.raises(ValueError, match="stands at step 0 but its step is 4"):
        ChainState.from_state_dict({**state, "step": 4})
    with pytest.raises(ValueError, match="x is a tensor, got list"):
        ChainState.from_state_dict({**state, "x": [1.0]})


STRANGE = {
    "no mapping": lambda s: [1],
    "nothing": lambda s: {},
    "names that are no texts": lambda s: {**s, 5: 1, (): 2},
    "x of whole numbers": lambda s: {**s, "x": s["x"].int()},
    "x without dimensions": lambda s: {**s, "x": torch.tensor(1.0)},
    "x that is sparse": lambda s: {**s, "x": s["x"].to_sparse()},
    "x on no device": lambda s: {**s, "x": s["x"].to("meta")},
    "a key of two": lambda s: {**s, "key": s["key"][:2]},
    "a key of floats": lambda s: {**s, "key": s["key"].float()},
    "a key of another step": lambda s: {**s, "key": s["key"] + 1},
    "a key before the first row": lambda s: {**s, "key": s["key"] - torch.tensor([0, 0, 1])},
    "a step beyond the counter": lambda s: {**s, "key": torch.tensor([3, 2**32, 0]), "step": 2**32},
    "a step that is no number": lambda s: {**s, "step": "0"},
    "a step that is not whole": lambda s: {**s, "step": 0.0},
    "ids of another batch": lambda s: {**s, "chain_ids": torch.arange(3)},
    "ids out of range": lambda s: {**s, "chain_ids": torch.tensor([-1])},
    "an id out of range": lambda s: {**s, "chain_ids": torch.arange(7) + 2**56 - 5},
    "a schedule of one column": lambda s: {**s, "schedule": s["schedule"][:, :1]},
    "an empty schedule": lambda s: {**s, "schedule": s["schedule"][:0]},
    "a schedule in float64": lambda s: {**s, "schedule": s["schedule"].double()},
    "a schedule of NaN": lambda s: {**s, "schedule": s["schedule"] * math.nan},
    "a schedule of nothing": lambda s: {**s, "schedule": s["schedule"] * 0},
    "a negative noise": lambda s: {**s, "schedule": s["schedule"] * torch.tensor([1.0, -1.0])},
    "a schedule of other chains": lambda s: {**s, "schedule": s["schedule"][:, None].expand(-1, 3, -1)},
    "a mask alone": lambda s: {n: v for n, v in s.items() if n != "known"},
    "a mask of numbers": lambda s: {**s, "mask": s["mask"].float()},
    "a mask of other chains": lambda s: {**s, "mask": s["mask"][:3]},
    "known in float64": lambda s: {**s, "known": s["known"].double()},
    "a target alone": lambda s: {n: v for n, v in s.items() if n != "data_term_weight"},
    "a target of another shape": lambda s: {**s, "data_target": s["data_target"][..., :2]},
    "a weight of NaN": lambda s: {**s, "data_term_weight": s["data_term_weight"] * math.nan},
    "a negative weight": lambda s: {**s, "data_term_weight": s["data_term_weight"] - 9},
    "a hinge of NaN": lambda s: {**s, "data_term_hinge": math.nan},
    "an infinite hinge": lambda s: {**s, "data_term_hinge": math.inf},
    "a hinge that is no number": lambda s: {**s, "data_term_hinge": "far"},
}


@pytest.mark.parametrize("kind", STRANGE)
def test_damaged_and_foreign_states_are_refused_in_one_line(sampler, x0, kind):
    state = sampler.init(x0, 3, num_steps=4, **everything(x0)).state_dict()
    assert torch.equal(ChainState.from_state_dict(state).x, state["x"])
    assert ChainState.from_state_dict({**state, "mask": None, "known": None}).mask is None
    with pytest.raises(ValueError) as refused:
        ChainState.from_state_dict(STRANGE[kind](state))
    assert len(str(refused.value).splitlines()) == 1


def test_after_its_schedule_a_chain_keeps_the_last_row(x0):
    sampler = Langevin(bowl, linear(0.2, 0.1), 0.0)
    end = sampler.advance(sampler.init(x0, 3, num_steps=2), 2)
    again = sampler.advance(end, 1)
    assert torch.equal(again.x, Langevin(bowl, 0.1, 0.0).sample(end.x, 1, seed=3, start_step=2))


# Chains that are lost -------------------------------------------------------------------------------------------------


def cliff(x):
    """Its energy and gradient overflow float32 a little beyond 1."""
    return (x.square() + (100 * (x - 1).relu()).exp()).sum(dim=1)


@pytest.mark.parametrize("options", [{}, {"keep": "trajectory"}, {"keep": lambda k, x, info: None}])
@pytest.mark.parametrize("clamp", [None, (-1, 1)])
def test_energies_that_are_not_finite_are_an_error(clamp, options):
    """With the clamp the states stay finite and would hide it."""
    x0 = torch.tensor([[0.5], [2.0], [0.1], [3.0]])
    sampler = Langevin(cliff, 0.1, 0.0, clamp=clamp)
    with pytest.raises(
        FloatingPointError, match=r"2 of 4 chains .* chain 11, by its energy before update 1 of 5 \(step 20\)"
    ):
        sampler.sample(x0, 5, 0, 10, start_step=20, **options)
    lost = sampler.sample(x0, 5, 0, 10, check=False)
    assert lost.isfinite().all(1).tolist() == ([True, False, True, False] if clamp is None else [True] * 4)
    with pytest.raises(FloatingPointError):
        sampler.advance(sampler.init(x0, 0), 5)
    assert sampler.advance(sampler.init(x0, 0), 5, check=False).step == 5


def test_the_first_lost_step_is_named_in_long_chains():
    # Growth by 1.1 an update: from 0.1 and 0.0001 the chains pass 1e3 before updates 98 and 170 of 180.
    def runaway(x):
        return torch.where(x > 1e3, math.nan, -0.05 * x.square()).sum(dim=1)

    sampler = Langevin(runaway, 1.0, 0.0)
    frames = sampler.sample(torch.tensor([[1e-4], [0.1], [0.0]]), 180, 0, keep="trajectory", check=False)
    first = int((~(frames[:, 1, 0] <= 1e3)).nonzero()[0])
    assert 64 < first < 128
    with pytest.raises(
        FloatingPointError, match=rf"2 of 3 chains .* chain 1, by its energy before update {first + 1} of 180"
    ):
        sampler.sample(torch.tensor([[1e-4], [0.1], [0.0]]), 180, 0)


def test_a_last_state_that_is_not_finite_is_an_error():
    def kink(x):
        return x.abs().sqrt().sum(dim=1)  # finite at 0, its gradient is not

    with pytest.raises(FloatingPointError, match=r"1 of 2 chains .* chain 1, by its state at the end"):
        Langevin(kink, 0.1, 0.0).sample(torch.tensor([[1.0], [0.0]]), 1, 0)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_steps_end_where_the_counter_does(x0):
    sampler = Langevin(bowl, 0.1, 0.1)
    end = sampler.advance(sampler.init(x0, 0, start_step=rng.MAX_STEP - 3), 3)
    assert end.step == rng.MAX_STEP
    with pytest.raises(ValueError, match="leave the range"):
        sampler.step(end)
    for step, num_steps in ((rng.MAX_STEP - 3, 4), (-1, 2), (rng.MAX_STEP, 1)):
        with pytest.raises(ValueError, match="leave the range"):
            sampler.sample(x0, num_steps, 0, start_step=step)
    with pytest.raises(ValueError, match="must not be negative"):
        sampler.sample(x0, -1, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_size": 0.0}, ValueError, "step_size > 0"),
        ({"noise_std": -0.1}, ValueError, "noise_std >= 0"),
        ({"noise_std": "much"}, TypeError, "a number or a callable"),
        ({"clamp": (1, -1)}, ValueError, "low <= high"),
        ({"clamp": (math.nan, 1)}, ValueError, "low <= high"),
        ({"clamp": (0, 1, 2)}, TypeError, r"clamp must be \(low, high\), got \(0, 1, 2\)"),
        ({"grad_clip": 0.0}, ValueError, "grad_clip must be positive"),
        ({"grad_norm_clip": math.nan}, ValueError, "grad_norm_clip must be positive"),
        ({"grad_clip": 1.0, "grad_norm_clip": 1.0}, ValueError, "not both"),
        ({"engine": "warp"}, ValueError, "engine"),
        ({"energy": energy_gradient(bowl), "dtype": torch.bfloat16}, ValueError, "EnergyGradient already"),
        ({"energy": 3.0}, TypeError, "energy"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Langevin(**{"energy": bowl, "step_size": 0.1, "noise_std": 0.1, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": [0.0]}, TypeError, "must be a tensor, got list"),
        ({"x0": torch.zeros(SHAPE, dtype=torch.int32)}, TypeError, "float32 or float64, got x0 in torch.int32"),
        ({"x0": torch.zeros(SHAPE, dtype=torch.bfloat16)}, TypeError, "float32 or float64"),
        ({"x0": torch.zeros(())}, ValueError, "without dimensions"),
        ({"mask": torch.ones(SHAPE, dtype=torch.bool)}, ValueError, "got only mask"),
        ({"known": torch.ones(SHAPE)}, ValueError, "got only known"),
        (
            {"mask": torch.ones(4, dtype=torch.bool), "known": torch.ones(SHAPE)},
            ValueError,
            r"mask must broadcast .* got \(4,\)",
        ),
        ({"mask": torch.tensor(True), "known": 1.0}, TypeError, "known must be a tensor"),
        ({"data_term": torch.zeros(SHAPE)}, TypeError, "data_term is a tuple"),
        ({"data_term": (torch.zeros(1, *SHAPE), 1.0)}, ValueError, "target of data_term must broadcast"),
        ({"data_term": (torch.zeros(SHAPE), -1.0)}, ValueError, "weight >= 0"),
        ({"data_term": (torch.zeros(SHAPE), 1.0, -1.0)}, ValueError, "hinge >= 0"),
        ({"chain_ids": torch.arange(3)}, ValueError, "one id a chain"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"thin": 0}, ValueError, "thin must be at least 1"),
        ({"keep": "all"}, ValueError, "got 'all'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_wrong_chains_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Langevin(bowl, 0.1, 0.1).sample(**{"x0": torch.zeros(SHAPE), "num_steps": 2, "seed": 0, **options})


def test_schedules_need_a_length(x0):
    Langevin(bowl, constant(0.1), 0.1).init(x0, 0)
    for sampler, data_term in (
        (Langevin(bowl, linear(0.2, 0.1), 0.1), None),
        (Langevin(bowl, 0.1, lambda t: t), None),
        (Langevin(bowl, 0.1, 0.1), (x0, linear(1.0, 0.0))),
    ):
        with pytest.raises(ValueError, match="give num_steps"):
            sampler.init(x0, 0, data_term=data_term)


def test_a_single_start_is_repeated(sampler, x0):
    one = sampler.sample(x0[:1], 5, seed=1, num_chains=4)
    assert torch.equal(one, sampler.sample(x0[:1].expand(4, -1, -1, -1), 5, seed=1))
    ids = torch.arange(3, 7)
    assert torch.equal(sampler.sample(x0[:1], 5, 1, ids, num_chains=4), sampler.sample(x0[:1], 5, 1, 3, num_chains=4))
    assert torch.equal(sampler.sample(x0, 5, seed=1, num_chains=7), sampler.sample(x0, 5, seed=1))
    assert sampler.init(x0[:1], 1, num_steps=5, num_chains=4).x.shape == (4, *SHAPE[1:])
    with pytest.raises(ValueError, match="num_chains is 4, but x0 has 7 starts"):
        sampler.sample(x0, 5, seed=1, num_chains=4)
    with pytest.raises(ValueError, match=r"x0 has 1 starts, but chain_ids has shape \(8,\); num_chains=N repeats"):
        sampler.sample(x0[:1], 5, 1, torch.arange(8))
    with pytest.raises(ValueError, match=r"x0 has 4 starts, but chain_ids has shape \(8,\)"):
        sampler.sample(x0[:1], 5, 1, torch.arange(8), num_chains=4)


def test_a_projection_follows_every_update(x0):
    def project(x):
        return x - x.mean((2, 3), keepdim=True)

    sampler = Langevin(bowl, 0.01, 0.1)
    advanced = sampler.advance(sampler.init(x0, 1), 5, project=project)
    stepped = sampler.init(x0, 1)
    for _ in range(5):
        stepped, info = sampler.step(stepped, project=project)
        assert torch.equal(info.after, stepped.x)
    assert torch.equal(stepped.x, advanced.x)
    assert advanced.x.mean((2, 3)).abs().max() < 1e-6
    frames = sampler.sample(x0, 5, 1, keep="trajectory", project=project)
    assert torch.equal(frames[-1], advanced.x)
    assert torch.equal(frames[0], x0)
    assert advanced.step == 5
    seen = []
    sampler.sample(x0, 5, 1, keep=lambda k, x, info: seen.append(x), project=project)
    assert torch.equal(torch.stack(seen), frames[1:])
    with pytest.raises(ValueError, match="project acts on all 7 chains at once: batch_size must not be smaller, got 3"):
        sampler.sample(x0, 5, 1, project=project, batch_size=3)


EXAMPLES = {
    "langevin": 7,
    "cascade": 15,
    "schedules": 4,
    "mala": 4,
    "hmc": 4,
    "underdamped": 4,
    "mclmc": 8,
    "joint": 6,
    "tempering": 4,
}


@pytest.mark.parametrize(("module", "count"), EXAMPLES.items())
def test_docstring_examples(module, count):
    assert run_examples(f"fastebm.sampling.{module}") == (0, count)


def test_examples_are_those_of_the_module_alone():
    """Not those of the copies that torch.compile leaves in a module whose functions it traced."""
    module = importlib.import_module("fastebm.sampling.langevin")
    copy = types.FunctionType(bowl.__code__, vars(module), "resumed")
    copy.__doc__, copy.__module__ = Langevin.sample.__doc__, module.__name__
    setattr(module, "__resume_at_10000_0", copy)
    try:
        assert doctest.testmod(module).attempted > run_examples(module.__name__).attempted == 7
    finally:
        delattr(module, "__resume_at_10000_0")


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_chain_never_waits_for_the_device():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).cuda()
    sampler = Langevin(net, 0.1, linear(0.1, 0.0), clamp=(-1, 1))
    state = sampler.advance(sampler.init(torch.zeros(8, 1, 8, 8, device="cuda"), 0, num_steps=200), 2)
    with checking_finite(state, check=True) as observers:
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler.advance_(state, 100, observers)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_projection_that_changes_the_shape_is_refused():
    sampler = Langevin(lambda x: 0.5 * x.square().sum(1), 0.1, 0.0)
    with pytest.raises(ValueError, match=r"project must return \(3, 2\), like its input, got \(1, 2\)"):
        sampler.sample(torch.zeros(3, 2), 2, 0, project=lambda x: x[:1])
