"""Langevin's orders of noise, clamps at the end and momentum, against plain loops in float64."""

from __future__ import annotations

import pytest
import torch

import fastebm
from fastebm import rng

ETA, SIGMA, CLAMP, CLIP, SHARE = 0.05, 0.3, (-0.9, 1.1), 0.8, 0.7


def energy(x):
    return (x.square() - 1).square().flatten(1).sum(1)


def slope(x):
    return 4 * x * (x.square() - 1)


def noise(x, step):
    ids = torch.arange(len(x))
    return fastebm.ops.normal(tuple(x.shape), seed=5, step=step, chain_ids=ids, stream=rng.Stream.LANGEVIN).to(x.dtype)


def clipped(g):
    return g.clamp(-CLIP, CLIP)


def plain(
    x, steps, noise_first=False, clamp_noise=False, clamp_at="step", momentum=0.0, nesterov=None, preconditioner=None
):
    """The same chain, written as research code would."""
    eta, sigma = (float(torch.tensor(v)) for v in (ETA, SIGMA))
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    if preconditioner is not None:
        for k in range(steps):
            g = clipped(slope(x))
            v = 0.99 * v + 0.01 * g.square()
            p = 1 / (v.sqrt() + 1e-5) if preconditioner == "rms" else preconditioner.double()
            x = (x - eta * p * g + sigma * p.sqrt() * noise(x, k)).clamp(*CLAMP)
        return x
    for k in range(steps):
        if noise_first:
            x = x + sigma * noise(x, k)
            x = x.clamp(*CLAMP) if clamp_noise else x
        g = slope(x - eta * momentum * m if nesterov == "lookahead" else x)
        g = clipped(g)
        m = momentum * m + g
        x = x - eta * (g if not momentum else g + momentum * m if nesterov == "corrected" else m)
        if not noise_first:
            x = x + sigma * noise(x, k)
        x = x.clamp(*CLAMP) if clamp_at == "step" else x
    return x.clamp(*CLAMP)


KINDS = {
    "plain": {},
    "noise first": {"noise_first": True},
    "noise first, clamped": {"noise_first": True, "clamp_noise": True},
    "clamp at the end": {"clamp_at": "end"},
    "noise first, clamp at the end": {"noise_first": True, "clamp_at": "end"},
    "heavy ball": {"momentum": SHARE},
    "lookahead": {"momentum": SHARE, "nesterov": "lookahead"},
    "corrected": {"momentum": SHARE, "nesterov": "corrected"},
    "preconditioned": {"preconditioner": torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0])},
    "rms": {"preconditioner": "rms"},
    "all": {"momentum": SHARE, "nesterov": "lookahead", "noise_first": True, "clamp_noise": True},
}
every = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def sampler_of(kind, **more):
    return fastebm.Langevin(energy, ETA, SIGMA, clamp=CLAMP, grad_clip=CLIP, **kind, **more)


@every
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_chains_are_those_of_a_plain_loop(kind, engine):
    start = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = plain(start, 6, **kind)
    assert torch.allclose(sampler_of(kind, engine="autograd").sample(start, 6, seed=5), expected, atol=1e-6)
    narrow = sampler_of(kind, engine=engine).sample(start.float(), 6, seed=5)
    assert torch.allclose(narrow.double(), expected, atol=5e-5)


@every
def test_the_same_bits_however_a_chain_is_cut(kind):
    start = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    sampler = sampler_of(kind)
    whole = sampler.sample(start, 9, seed=5)
    assert torch.equal(whole, sampler.sample(start, 9, seed=5, batch_size=4))
    assert torch.equal(whole[7:8], sampler.sample(start[7:8], 9, seed=5, chain_ids=7))
    state = sampler.init(start, seed=5, num_steps=9)
    half = sampler.advance(state, 4)
    restored = type(half).from_state_dict(
        {k: v.clone() if hasattr(v, "clone") else v for k, v in half.state_dict().items()}
    )
    ends = [sampler.advance(restored, 5).x]
    for _ in range(9):
        state, _ = sampler.step(state)
    ends.append(state.x)
    for end in ends:
        assert torch.equal(whole, end.clamp(*CLAMP))


def test_the_energies_are_those_of_the_gradient():
    """With the noise first they are those of the noised states."""
    start = torch.zeros(3, 2)
    sampler = fastebm.Langevin(energy, ETA, SIGMA, noise_first=True)
    _, info = sampler.step(sampler.init(start, seed=5))
    assert torch.allclose(info.energy, energy(SIGMA * noise(start, 0)))
    assert torch.equal(info.before, start)


def test_a_mask_holds_between_noise_and_gradient():
    mask = torch.tensor([True, False])
    seen = []

    def watched(x):
        seen.append(x.detach().clone())
        return energy(x)

    sampler = fastebm.Langevin(watched, ETA, SIGMA, noise_first=True, engine="autograd")
    x = sampler.sample(torch.zeros(3, 2), 4, seed=5, mask=mask, known=torch.full((2,), 0.5))
    assert torch.equal(x[:, 0], torch.full((3,), 0.5))
    assert all(torch.equal(each[:, 0], torch.full_like(each[:, 0], 0.5)) for each in seen)


def test_a_look_ahead_leaves_what_is_known():
    """Known entries have the momentum of their gradients, but stand still in all that the energy is asked for."""
    seen = []

    def watched(x):
        seen.append(x.detach().clone())
        return (x - 3).square().sum(1)

    options = {"momentum": 0.9, "nesterov": "lookahead", "engine": "autograd"}
    sampler = fastebm.Langevin(watched, ETA, SIGMA, **options)
    x = sampler.sample(torch.zeros(3, 2), 6, seed=5, mask=torch.tensor([True, False]), known=torch.full((2,), 0.5))
    assert len(seen) >= 6
    assert all(torch.equal(each[:, 0], x[:, 0]) for each in seen)


@pytest.mark.parametrize("keep", ["last", "trajectory"])
def test_a_clamp_at_the_end_leaves_what_is_known(keep):
    sampler = fastebm.Langevin(energy, ETA, 0.5, clamp=CLAMP, clamp_at="end")
    far = {"mask": torch.tensor([True, False]), "known": torch.full((2,), 7.0)}
    ends = sampler.sample(torch.zeros(30, 2), 4, seed=5, keep=keep, **far)
    ends = ends[-1] if keep == "trajectory" else ends
    assert torch.equal(ends[:, 0], torch.full((30,), 7.0))
    assert bool(((ends[:, 1] >= CLAMP[0]) & (ends[:, 1] <= CLAMP[1])).all())


def test_a_clamp_at_the_end_leaves_what_is_no_end():
    sampler = fastebm.Langevin(energy, ETA, 0.5, clamp=CLAMP, clamp_at="end")
    frames = sampler.sample(torch.zeros(30, 2), 5, seed=5, keep="trajectory", thin=2)
    assert torch.equal(frames[2], sampler.advance(sampler.init(torch.zeros(30, 2), 5), 4).x)
    assert float(frames[2].max()) > CLAMP[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clamp_noise": True}, "clamp_noise needs noise_first"),
        ({"clamp_at": "level"}, '"step" or "end"'),
        ({"clamp_at": "end"}, "needs a clamp"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\)"),
        ({"preconditioner": torch.zeros(5)}, "positive, finite"),
        ({"preconditioner": torch.ones(5), "momentum": 0.5}, "not for momentum"),
        ({"preconditioner": "rms", "noise_first": True}, "not for momentum, noise_first"),
        ({"preconditioner": "rms", "rms_decay": 1.0}, "rms_decay must be in"),
        ({"momentum": 0.5, "grad_norm_clip": 1.0}, "takes no grad_norm_clip"),
        ({"nesterov": "lookahead"}, "nesterov needs a momentum"),
        ({"momentum": 0.5, "nesterov": "both"}, '"lookahead", "corrected" or None'),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fastebm.Langevin(energy, ETA, SIGMA, **options)


def test_a_preconditioner_keeps_the_target():
    """Scales of 0.1 and 10 at once: with P = scale^2 both variances are those of the plain chain of scale 1."""
    scale = torch.tensor([0.1, 1.0, 10.0])
    eta = 0.2
    sampler = fastebm.Langevin(
        lambda x: 0.5 * (x / scale).square().sum(1), eta, (2 * eta) ** 0.5, preconditioner=scale.square()
    )
    x = sampler.sample(torch.zeros(8000, 3), 60, seed=1) / scale
    assert torch.allclose(x.var(0), torch.full((3,), 1 / (1 - eta / 2)), rtol=5 * (2 / 8000) ** 0.5)


def test_rms_samples_the_target_over_its_preconditioner_and_a_kept_one_the_target():
    """At small steps and no decay P is 1 / (|x| + 1) for a standard normal distribution: without a correction the
    density is p (|x| + 1), of variance (1 + E|x|^3) / (1 + E|x|) = 1.444. What is kept depends on x no more."""

    def bowl(x):
        return 0.5 * x.square().sum(1)

    eta, start = 0.005, torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    noise = (2 * eta) ** 0.5
    learner = fastebm.Langevin(bowl, eta, noise, preconditioner="rms", rms_decay=0.0, rms_epsilon=1.0)
    state = learner.advance(learner.init(start, seed=1), 1500)
    biased = (1 + 2 * (2 / torch.pi) ** 0.5) / (1 + (2 / torch.pi) ** 0.5)
    assert abs(float(state.x.var()) - biased) < 0.05
    kept = 1 / (state.second_moment.mean(0).sqrt() + 1)
    exact = fastebm.Langevin(bowl, eta, noise, preconditioner=kept).sample(state.x, 1500, seed=2)
    assert abs(float(exact.var()) - 1) < 0.05


def test_a_preconditioner_that_does_not_fit_is_refused():
    for given, error, words in (
        (torch.ones(4), ValueError, r"broadcast to one sample \(3,\)"),
        ("adam", TypeError, '"rms"'),
        (torch.ones(3, dtype=torch.int64), TypeError, "positive numbers"),
    ):
        with pytest.raises(error, match=words):
            fastebm.Langevin(energy, ETA, SIGMA, preconditioner=given).sample(torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match="not for a data term"):
        fastebm.Langevin(energy, ETA, SIGMA, preconditioner="rms").sample(
            torch.zeros(2, 3), 1, data_term=(torch.zeros(3), 0.1)
        )
