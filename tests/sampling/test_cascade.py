"""Cascades over resolutions against the recipe written out plainly, and their contracts."""

import math

import pytest
import torch
from torch import nn

import fastebm
from fastebm import rng
from fastebm.compiler import energy_gradient
from fastebm.sampling import Cascade, ExpandingCascade, constant, cosine, linear

SEED, CHAINS, COUNT, CHANNELS = 5, 2**33, 7, 2


def bowl(scale):
    """An energy with an elementwise gradient, whose bits don't depend on the batch; `scale` tells levels apart."""

    def energy(x):
        return scale * (0.25 * x**4 - 0.5 * x**2).sum(dim=(1, 2, 3))

    return energy


class GrowingBowl(nn.Module):
    """The same with a blend: the energy at twice the size fades from that of the average-pooled image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.betas = set()

    def forward(self, x, beta=1.0):
        self.betas.add(float(beta))
        return beta * bowl(self.scale)(x) + (1 - beta) * (0.1 * x.square()).sum(dim=(1, 2, 3))


def uniform_noise(size, step, stream):
    """U(-1, 1)."""
    shape = (COUNT, CHANNELS, size, size)
    return 2 * fastebm.ops.uniform(shape, seed=SEED, step=step, stream=stream, chain_ids=CHAINS) - 1


def updates(x, energy, step_sizes, noise_stds, step):
    for k, (step_size, noise_std) in enumerate(zip(step_sizes, noise_stds, strict=True)):
        _, gradient = energy_gradient(energy)(x)
        x = fastebm.langevin_step(
            x, gradient, step_size=step_size, noise_std=noise_std, seed=SEED, step=step + k, chain_ids=CHAINS
        )
    return x


def enlarged(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def float32_line(start, end, num_steps):
    return torch.linspace(start, end, num_steps, dtype=torch.float64).float().tolist()


@pytest.fixture
def cascade():
    levels = {8: bowl(0.5), 4: bowl(1.0), 16: bowl(-0.1)}
    return Cascade(levels, num_steps=5, step_size=cosine(0.5, 0.2))


@pytest.fixture
def expanding():
    return ExpandingCascade(GrowingBowl(), size=8, beta=0.3, num_steps=10, step_size=0.5)


# The recipes ----------------------------------------------------------------------------------------------------------


def test_cascade_is_the_recipe():
    levels = {4: bowl(1.0), 8: bowl(-2.0), 16: bowl(0.5)}  # the middle one drives pixels beyond the clamp
    noise = float32_line(0.015, 0.0, 9)
    x = uniform_noise(4, 0, rng.Stream.INITIAL)
    ends = {4: updates(x, levels[4], [1.0] * 3, noise[:3], 0)}
    ends[8] = updates(enlarged(ends[4]).clamp(-1, 1), levels[8], [1.0] * 3, noise[3:6], 3)
    assert ends[8].abs().max() > 1
    ends[16] = updates(enlarged(ends[8]).clamp(-1, 1), levels[16], [1.0] * 3, noise[6:], 6)
    cascade = Cascade(levels, num_steps=3)
    result = cascade.sample_levels(COUNT, SEED, CHAINS, channels=CHANNELS)
    assert list(result) == [4, 8, 16]
    for size, end in ends.items():
        assert torch.equal(result[size], end), size
    assert torch.equal(cascade.sample(COUNT, SEED, CHAINS, channels=CHANNELS), ends[16])


def test_levels_need_not_be_clamped():
    levels = {4: bowl(-2.0), 8: bowl(0.1)}
    x = updates(uniform_noise(4, 0, rng.Stream.INITIAL), levels[4], [0.5] * 2, [0.1] * 2, 0)
    x = updates(enlarged(x), levels[8], [0.5] * 2, [0.1] * 2, 2)
    cascade = Cascade(levels, num_steps=2, step_size=0.5, noise_std=0.1, clamp_levels=False)
    assert torch.equal(cascade.sample(COUNT, SEED, CHAINS, channels=CHANNELS), x)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.97])
@pytest.mark.parametrize("with_previous", [False, True])
def test_expanding_cascade_is_the_recipe(beta, with_previous):
    net, num_steps, previous = GrowingBowl(), 10, bowl(0.8) if with_previous else None
    low = round(num_steps * (1 - beta))
    assert low == {0.0: 10, 0.3: 7, 0.97: 0}[beta]
    x = uniform_noise(4, 0, rng.Stream.INITIAL)
    if low:
        x = updates(x, previous or net, [1.0] * low, float32_line(0.03, 5e-4, low), 0)
    noise = uniform_noise(8, low, rng.Stream.RESTART)
    x = (enlarged(x) * math.sqrt(1 - beta**2) + noise * beta).clamp(-1, 1)

    def blended(x):
        return net(x, torch.tensor(beta))

    x = updates(x, blended, [1.0] * num_steps, float32_line(0.03, 5e-4, num_steps), low)
    cascade = ExpandingCascade(net, size=8, previous=previous, beta=beta, num_steps=num_steps)
    assert torch.equal(cascade.sample(COUNT, SEED, CHAINS, channels=CHANNELS), x)


def test_expanding_cascade_at_the_end_starts_from_noise():
    net = GrowingBowl()
    expected = updates(uniform_noise(8, 0, rng.Stream.INITIAL), net, [1.0] * 10, float32_line(0.03, 5e-4, 10), 0)
    cascade = ExpandingCascade(net, size=8, num_steps=10)
    assert torch.equal(cascade.sample(COUNT, SEED, CHAINS, channels=CHANNELS), expected)


def test_levels_say_where_they_start():
    starts: dict[int, list[torch.Tensor]] = {4: [], 8: []}
    cascade = ExpandingCascade(GrowingBowl(), size=8, beta=0.3, num_steps=10)
    ends = cascade.sample_levels(
        COUNT,
        SEED,
        CHAINS,
        channels=CHANNELS,
        batch_size=2,
        on_level_start=lambda level, x: starts[level.size].append(x.clone()),
    )
    first, second = (torch.cat(parts) for parts in starts.values())
    assert torch.equal(first, uniform_noise(4, 0, rng.Stream.INITIAL))
    noise = uniform_noise(8, 7, rng.Stream.RESTART)
    assert torch.equal(second, (enlarged(ends[4]) * math.sqrt(1 - 0.3**2) + noise * 0.3).clamp(-1, 1))


def test_noise_enlarges_to_the_same_spread():
    """sqrt(1 - beta**2) x + beta u keeps the variance of U(-1, 1); images and noise are independent."""
    cascade = ExpandingCascade(
        GrowingBowl(), size=8, beta=0.6, num_steps=1, step_size=1e-30, noise_std=0.0, clamp_levels=False
    )
    x = cascade.sample(20_000, seed=1, channels=1)
    assert x.var().item() == pytest.approx(1 / 3, rel=0.01)
    neighbours = (x[:, :, ::2, ::2] * x[:, :, 1::2, ::2]).mean().item()
    assert neighbours == pytest.approx((1 - 0.6**2) / 3, rel=0.02)


def test_beta_is_read_anew_for_every_chain(expanding):
    for beta in (0.1, 0.5, 1.0, 0.0):
        expanding.beta = beta
        fresh = ExpandingCascade(GrowingBowl(), size=8, beta=beta, num_steps=10, step_size=0.5)
        assert expanding.beta == beta
        arguments = {"seed": SEED, "channels": 1}
        assert torch.equal(expanding.sample(3, **arguments), fresh.sample(3, **arguments))


def test_previous_replaces_the_net_at_half_the_size():
    net = GrowingBowl()
    ExpandingCascade(net, size=8, previous=bowl(2.0), beta=0.5, num_steps=4).sample(2, seed=0, channels=1)
    assert net.betas == {0.5}
    ExpandingCascade(net, size=8, beta=0.5, num_steps=4).sample(2, seed=0, channels=1)
    assert net.betas == {0.5, 1.0}


# Contracts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cascade", "expanding"])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_batches_don_t_change_a_bit(name, batch_size, request):
    sampler = request.getfixturevalue(name)
    whole = sampler.sample_levels(COUNT, SEED, CHAINS, channels=3)
    split = sampler.sample_levels(COUNT, SEED, CHAINS, channels=3, batch_size=batch_size)
    assert list(whole) == list(split)
    assert all(torch.equal(whole[size], split[size]) for size in whole)
    by_ids = sampler.sample(3, SEED, torch.tensor([4, 1, 6]) + CHAINS, channels=3, batch_size=2)
    assert torch.equal(by_ids, whole[max(whole)][[4, 1, 6]])


@pytest.mark.parametrize("name", ["cascade", "expanding"])
def test_seeds_and_steps(name, request):
    sampler = request.getfixturevalue(name)
    torch.manual_seed(0)
    first = sampler.sample(4, channels=1)
    torch.manual_seed(0)
    assert torch.equal(sampler.sample(4, channels=1), first)
    assert not torch.equal(sampler.sample(4, channels=1), first)
    assert not torch.equal(sampler.sample(4, 1, channels=1), sampler.sample(4, 1, channels=1, start_step=1))


def test_callback_counts_through_the_levels(cascade):
    seen = []
    expected = cascade.sample_levels(4, SEED, channels=1)
    result = cascade.sample(4, SEED, channels=1, thin=5, keep=lambda k, x, info: seen.append((k, x)))
    assert torch.equal(result, expected[16])
    assert [(k, x.shape[-1]) for k, x in seen] == [(5, 4), (10, 8), (15, 16)]
    assert all(torch.equal(x, expected[x.shape[-1]]) for _, x in seen)
    seen.clear()
    cascade.sample(
        4, SEED, channels=1, thin=4, keep=lambda k, x, info: seen.append((k, info.energy.shape)), start_step=100
    )
    assert seen == [(4, (4,)), (8, (4,)), (12, (4,))]


def test_progress_counts_all_levels(cascade, capsys):
    cascade.sample(4, SEED, channels=1, progress=True, batch_size=2)
    assert "30/30" in capsys.readouterr().err


def test_options_reach_every_update():
    cascade = Cascade({4: bowl(50.0), 8: bowl(50.0)}, clamp=(-0.25, 0.25))
    ends = cascade.sample_levels(4, SEED, channels=1)
    assert all(x.abs().max() <= 0.25 for x in ends.values())


def test_nets_are_left_as_they_were():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)
    )
    Cascade({4: net, 8: energy_gradient(net)}, num_steps=2).sample(2, SEED, channels=1)
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_one_level_and_no_chains(cascade):
    assert Cascade({4: bowl(1.0)}).sample(3, SEED, channels=1).shape == (3, 1, 4, 4)
    assert cascade.sample(0, SEED, channels=1).shape == (0, 1, 16, 16)


def test_lost_chains_are_an_error():
    cascade = Cascade({4: bowl(1.0), 8: bowl(1e4)}, num_steps=3)
    with pytest.raises(FloatingPointError, match="of 4 chains are not finite"):
        cascade.sample(4, SEED, channels=1)
    assert cascade.sample(4, SEED, channels=1, check=False).shape == (4, 1, 8, 8)


def test_representation_tells_the_recipe(cascade, expanding):
    assert "5 steps at 4, 5 steps at 8, 5 steps at 16" in repr(cascade)
    assert "7 steps at 4, 10 steps at 8" in repr(expanding)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cascade({}), "sizes \\[\\]"),
        (lambda: Cascade({4: bowl(1.0), 16: bowl(1.0)}), r"doubles .* got sizes \[4, 16\]"),
        (lambda: Cascade({4: bowl(1.0)}, num_steps=0), "at least one step a level"),
        (lambda: Cascade({4: bowl(1.0)}, step_size=0.0), "step_size > 0"),
        (lambda: Cascade({4: bowl(1.0)}, noise_std=linear(0.1, -0.1)), "noise_std >= 0"),
        (lambda: ExpandingCascade(GrowingBowl(), size=7), "even size, got 7"),
        (lambda: ExpandingCascade(GrowingBowl(), size=8, beta=1.1), r"beta must be in \[0, 1\], got 1.1"),
        (lambda: ExpandingCascade(GrowingBowl(), size=8, num_steps=0), "at least one step a level"),
    ],
)
def test_wrong_cascades_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": -1}, "count must not be negative, got -1"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"thin": 0}, "thin must be at least 1"),
        ({"keep": "trajectory"}, "got 'trajectory'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"start_step": rng.MAX_STEP - 14}, "leave the range"),
        ({"chain_ids": torch.arange(3)}, "one id a chain"),
    ],
)
def test_wrong_requests_are_refused(cascade, options, message):
    with pytest.raises(ValueError, match=message):
        cascade.sample(**{"count": 4, "channels": 1, "seed": 0, **options})


def test_chains_from_images_go_on_as_chains_from_noise_do():
    cascade = Cascade({4: bowl(0.7), 8: bowl(0.4)}, num_steps=3, step_size=linear(0.5, 0.2), noise_std=linear(0.2, 0.1))
    starts = []
    whole = cascade.sample_levels(
        COUNT, SEED, CHAINS, channels=CHANNELS, on_level_start=lambda level, x: starts.append(x.clone())
    )
    kept = starts[-1].clone()
    for batch_size in (None, 2):
        assert torch.equal(cascade.sample(None, SEED, CHAINS, x0=starts[-1], batch_size=batch_size), whole[8])
    assert torch.equal(starts[-1], kept)
    growing = ExpandingCascade(GrowingBowl(), size=8, beta=0.5, num_steps=4, step_size=0.1, noise_std=linear(0.2, 0.1))
    starts.clear()
    whole = growing.sample_levels(
        COUNT, SEED, CHAINS, channels=CHANNELS, on_level_start=lambda level, x: starts.append(x.clone())
    )
    assert torch.equal(growing.sample(None, SEED, CHAINS, x0=starts[-1]), whole[8])
    with pytest.raises(ValueError, match="x0 of 4x4 can't be averaged down to start_size 8"):
        cascade.sample(x0=starts[0], start_size=8, seed=SEED)
    with pytest.raises(ValueError, match=r"x0 must be float32 \(B, C, H, W\), got torch.float64 \(7, 2, 8, 8\)"):
        cascade.sample(x0=starts[-1].double(), seed=SEED)


def both_cascades():
    noise = linear(0.2, 0.1)
    return {
        "cascade": Cascade(
            {s: bowl(0.4) for s in (4, 8, 16)}, num_steps=3, step_size=linear(0.5, 0.2), noise_std=noise
        ),
        "expanding": ExpandingCascade(GrowingBowl(), size=8, beta=0.5, num_steps=4, step_size=0.1, noise_std=noise),
    }


@pytest.mark.parametrize("name", ["cascade", "expanding"])
def test_any_level_may_be_the_start_and_keeps_the_steps_of_the_whole_cascade(name):
    sampler = both_cascades()[name]
    starts = {}
    ends = sampler.sample_levels(
        COUNT, SEED, CHAINS, channels=CHANNELS, on_level_start=lambda level, x: starts.update({level.size: x.clone()})
    )
    for size, start in starts.items():
        for batch_size in (None, 3):
            again = sampler.sample_levels(None, SEED, CHAINS, x0=start, batch_size=batch_size)
            assert list(again) == [level for level in ends if level >= size]
            assert all(torch.equal(again[level], ends[level]) for level in again)
        offset = sampler.sample_levels(None, SEED, CHAINS, x0=start, start_step=5)
        assert not torch.equal(offset[max(ends)], ends[max(ends)])
    seen = []
    sampler.sample(x0=starts[8], seed=SEED, thin=3, keep=lambda k, x, info: seen.append(k))
    assert seen == list(range(3, 3 * len(seen) + 1, 3))


def test_larger_starts_are_averaged_down_and_a_single_one_is_repeated():
    sampler = both_cascades()["cascade"]
    images = uniform_noise(16, 0, rng.Stream.INITIAL)
    low = nn.functional.avg_pool2d(images, 2)
    expected = sampler.sample(x0=low, seed=SEED)
    assert torch.equal(sampler.sample(x0=images, start_size=8, seed=SEED), expected)
    one = sampler.sample(3, SEED, x0=images[:1])
    assert torch.equal(one, sampler.sample(x0=images[:1].expand(3, -1, -1, -1), seed=SEED))
    assert sampler.sample(3, SEED, start_size=16, channels=2).shape == (3, 2, 16, 16)


def test_constraints_hold_at_the_levels_they_are_given_for():
    sampler = both_cascades()["cascade"]
    masks = {s: torch.arange(s) < s // 2 for s in (4, 16)}
    known = {
        s: torch.full((COUNT, CHANNELS, s, s), 0.7) * torch.arange(1, COUNT + 1)[:, None, None, None] for s in (4, 16)
    }
    for batch_size in (None, 3):
        ends = sampler.sample_levels(COUNT, SEED, channels=CHANNELS, mask=masks, known=known, batch_size=batch_size)
        for size in masks:
            assert torch.equal(ends[size][..., : size // 2], known[size].expand_as(ends[size])[..., : size // 2])
        assert float((ends[8][..., :4] - 0.7).abs().min()) > 0
    last = sampler.sample_levels(COUNT, SEED, channels=CHANNELS, mask=masks[16], known=known[16])
    free = sampler.sample_levels(COUNT, SEED, channels=CHANNELS)
    assert torch.equal(last[8], free[8])
    assert torch.equal(last[16][..., :8], known[16].expand_as(last[16])[..., :8])
    calls = []

    def project(x):
        calls.append(x.shape)
        return x - x.mean((2, 3), keepdim=True)

    ends = sampler.sample_levels(COUNT, SEED, channels=CHANNELS, project={8: project})
    assert calls == [(COUNT, CHANNELS, 8, 8)] * 3
    assert float(ends[8].mean((2, 3)).abs().max()) < 1e-6
    assert torch.equal(ends[4], free[4])
    kept = []
    by_callback = sampler.sample(
        COUNT, SEED, channels=CHANNELS, project={8: project}, keep=lambda k, x, info: kept.append(x)
    )
    assert torch.equal(by_callback, ends[16])
    assert torch.equal(kept[5], ends[8])


def test_a_weight_may_follow_a_schedule():
    """It runs as the step sizes do; where it is constant, its bits are those of the number."""
    target = torch.full((CHANNELS, 8, 8), 0.5)

    def sample(weight, **options):
        cascade = Cascade({4: bowl(1.0), 8: bowl(1.0)}, num_steps=4, step_size=0.1, noise_std=0.0)
        return cascade.sample(COUNT, SEED, channels=CHANNELS, data_term=(target, weight), **options)

    assert torch.equal(sample(lambda t: torch.full_like(t, 0.7)), sample(0.7))
    assert torch.equal(sample(constant(0.7), batch_size=2), sample(0.7))
    frames = []
    sample(linear(0.0, 14.0), keep=lambda k, x, info: frames.append((info.before, info.gradient, x)))
    for k, (before, gradient, after) in enumerate(frames[4:], start=4):
        step_size, weight = 0.1, 14.0 * k / 7
        step_size /= 1 + step_size * weight
        torch.testing.assert_close(after, before - step_size * (gradient + weight * (before - target)))


@pytest.mark.parametrize("sampler", both_cascades())
def test_bounds_of_channels_hold_at_every_level(sampler):
    low = torch.linspace(-0.3, -0.1, CHANNELS).view(CHANNELS, 1, 1)
    options = {"clamp": (low, -low), "step_size": 0.3, "noise_std": 0.5, "num_steps": 3}
    if sampler == "cascade":
        cascade = Cascade({4: bowl(1.0), 8: bowl(2.0)}, **options)
    else:
        cascade = ExpandingCascade(GrowingBowl(), size=8, beta=0.25, **options)
    for ends in cascade.sample_levels(COUNT, SEED, channels=CHANNELS).values():
        assert (ends >= low).all()
        assert (ends <= -low).all()
    calls = []
    wrong = Cascade({4: lambda x: calls.append(1), 8: bowl(1.0)}, clamp=(torch.zeros(CHANNELS + 1, 1, 1), None))
    with pytest.raises(
        ValueError, match="clamp's low must be a number or broadcast, with as many dimensions, to one sample"
    ):
        wrong.sample(COUNT, SEED, channels=CHANNELS)
    each_pixel = Cascade({4: lambda x: calls.append(1), 8: bowl(1.0)}, clamp=(torch.zeros(CHANNELS, 8, 8), None))
    with pytest.raises(ValueError, match=r"one sample of shape \(2, 4, 4\)"):
        each_pixel.sample(COUNT, SEED, channels=CHANNELS)
    assert not calls


def test_counts_that_disagree_are_refused(cascade):
    x0 = torch.zeros(4, CHANNELS, 4, 4)
    with pytest.raises(ValueError, match="count is 8, but x0 has 4 starts: only a single one can be repeated"):
        cascade.sample(8, SEED, x0=x0)
    with pytest.raises(ValueError, match="channels is 1, but x0 has 2"):
        cascade.sample(4, SEED, x0=x0, channels=1)
    with pytest.raises(TypeError, match="levels must be a mapping from sizes to energies, got list"):
        Cascade([bowl(1.0)])


def test_an_expanding_cascade_made_in_inference_mode():
    expected = both_cascades()["expanding"].sample(COUNT, SEED, channels=CHANNELS)
    with torch.inference_mode():
        cascade = both_cascades()["expanding"]
    assert torch.equal(cascade.sample(COUNT, SEED, channels=CHANNELS), expected)


def test_nets_that_know_their_channels_need_not_be_told():
    class Gray(nn.Module):
        channels = 1

        def forward(self, x, beta=1.0):
            return x.square().sum((1, 2, 3))

    assert Cascade({4: bowl(1.0), 8: Gray()}).sample(3, SEED).shape == (3, 1, 8, 8)
    assert ExpandingCascade(Gray(), size=8, beta=0.5).sample(3, SEED).shape == (3, 1, 8, 8)
    assert Cascade({4: energy_gradient(Gray())}).sample(3, SEED).shape == (3, 1, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": None}, ValueError, "starts from noise needs count or x0"),
        ({"channels": None}, ValueError, "needs channels, which no net has"),
        ({"start_size": 5}, ValueError, r"one of the levels, \[4, 8, 16\], got 5"),
        ({"x0": torch.zeros(4, 1, 32, 32)}, ValueError, r"one of the levels, \[4, 8, 16\], got 32"),
        ({"x0": torch.zeros(3, 1, 8, 8)}, ValueError, "count is 4, but x0 has 3 starts"),
        ({"x0": [1.0]}, ValueError, "x0 must be float32 .* got list"),
        ({"mask": torch.ones(16, dtype=torch.bool)}, ValueError, "got only mask"),
        (
            {"mask": torch.ones(3, 1, 16, 16, dtype=torch.bool), "known": torch.zeros(16)},
            ValueError,
            "mask, known or target holds 3 images, but there are 4 chains",
        ),
        ({"data_term": {5: (torch.zeros(5), 1.0)}}, ValueError, r"values are given for \[5\]"),
        ({"data_term": (torch.zeros(16), 1.0, 0.1)}, TypeError, r"tuple \(target, weight\)"),
        ({"data_term": (torch.zeros(16), -0.5)}, ValueError, "weight >= 0"),
        ({"project": lambda x: x, "batch_size": 2}, ValueError, "all 4 chains at once"),
    ],
)
def test_wrong_starts_and_constraints_are_refused(cascade, options, error, message):
    with pytest.raises(error, match=message):
        cascade.sample(**{"count": 4, "channels": 1, "seed": 0, **options})


def shrinking_by_hand(x, stiffness, step_size, shrink, num_steps):
    steps, before = torch.full((len(x),), step_size), None
    factors = torch.ones(len(x))
    for _ in range(num_steps):
        steps = steps * factors
        energies = 0.5 * (stiffness * x.square()).sum((1, 2, 3))
        factors = torch.where(energies > before, shrink, 1.0) if before is not None else torch.ones(len(x))
        before = energies
        x = x - steps[:, None, None, None] * stiffness * x
    return x


def test_steps_shrink_where_the_energy_rose():
    torch.manual_seed(0)
    stiffness = torch.tensor([[[[0.5, 3.0], [0.1, 1.0]]]])

    def energy(x):
        return 0.5 * (stiffness * x.square()).sum((1, 2, 3))

    start = torch.randn(6, 1, 2, 2)
    start[:3, :, 0, 1] = 0  # nothing overshoots in these
    options = {"num_steps": 12, "step_size": 1.0, "noise_std": 0.0}
    plain = fastebm.Cascade({2: energy}, **options)
    shrinking = fastebm.Cascade({2: energy}, step_shrink=0.25, **options)
    ends = shrinking.sample(x0=start, seed=1)
    torch.testing.assert_close(ends, shrinking_by_hand(start, stiffness, 1.0, 0.25, 12))
    assert energy(ends).max() < 1
    assert energy(plain.sample(x0=start, seed=1)).max() > 100
    assert torch.equal(ends[:3], plain.sample(x0=start, seed=1)[:3])
    # The same bits however the chains are run.
    noisy = fastebm.Cascade({2: energy}, step_shrink=0.25, **(options | {"noise_std": 0.1}))
    whole = noisy.sample(x0=start, seed=1)
    assert torch.equal(noisy.sample(x0=start, seed=1, batch_size=2), whole)
    assert torch.equal(noisy.sample(x0=start, seed=1, keep=lambda k, x, info: None), whole)
    assert torch.equal(noisy.sample(x0=start, seed=1, diagnostics=True)[0], whole)
    with pytest.raises(ValueError, match=r"step_shrink must be in \(0, 1\]"):
        fastebm.Cascade({2: energy}, step_shrink=0.0)
