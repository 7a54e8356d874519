"""Langevin chains with minibatches of data (SGLD): which rows, closed forms, and the same bits however they are run."""

from __future__ import annotations

import pytest
import torch

import fastebm
from fastebm import rng
from fastebm.sampling import ChainState
from tests.docstrings import run_examples

N, SIZE, PRIOR = 60, 8, 4.0
Y = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 0.5]) + 1
PRECISION = N + 1 / PRIOR


def energy(x, rows):
    """Of the means of normal numbers of width 1, with a normal prior."""
    terms = 0.5 * (x[:, None] - rows).square().sum((1, 2))
    return terms * (N / rows.shape[1]) + 0.5 * x.square().sum(1) / PRIOR


def sampler_of(step_size=2e-3, data=(Y,), noise=None, shared=False, of=energy, size=SIZE, **options):
    batches = fastebm.Minibatches(*data, size=size, shared=shared)
    return fastebm.Langevin(
        of, step_size, (2 * step_size) ** 0.5 if noise is None else noise, minibatches=batches, **options
    )


def by_hand(seed, step, chain, draws=1):
    """The rows of a step of a chain, from the words of its address."""
    u = fastebm.ops.uniform((1, 2 * draws * SIZE), seed=seed, step=step, chain_ids=chain, stream=rng.Stream.MINIBATCH)
    half = (u[0].double() * 65536).floor().clamp(max=65535).long()
    return [int(w) * N // 2**32 for w in half[0::2] * 65536 + half[1::2]]


@pytest.mark.parametrize("corrected", [False, True])
def test_chains_are_those_of_a_plain_loop(corrected):
    eta, sigma = (float(torch.tensor(v)) for v in (2e-3, 0.06))
    sampler = sampler_of(data=(Y.double(),), noise=sigma, noise_correction=corrected, engine="autograd")
    start = torch.zeros(4, 3, dtype=torch.float64)
    found = sampler.sample(start, 6, seed=5, chain_ids=3, start_step=2)
    x, v = start, torch.zeros_like(start)
    for step in range(2, 8):
        rows = Y.double()[torch.tensor([by_hand(5, step, chain, 2 if corrected else 1) for chain in range(3, 7)])]
        slopes = [(x[:, None] - part).sum(1) * (N / SIZE) + x / PRIOR for part in rows.split(SIZE, dim=1)]
        slope, share = sum(slopes) / len(slopes), 1.0
        if corrected:
            v = 0.99 * v + 0.01 * (slopes[0] - slopes[1]).square() / 4
            share = (1 - (eta / sigma) ** 2 * v).clamp(min=0).sqrt()
        noise = fastebm.ops.normal((4, 3), seed=5, step=step, chain_ids=3, stream=rng.Stream.LANGEVIN, dtype=x.dtype)
        x = x - eta * slope + share * sigma * noise
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    assert not corrected or float(share.max()) < 1


def test_rows_are_functions_of_seed_step_and_id():
    state = sampler_of().init(torch.zeros(5, 3), seed=9, chain_ids=torch.tensor([4, 0, 7, 7, 2**40]), start_step=11)
    batches = fastebm.Minibatches(Y, size=SIZE)
    found = batches.indices(state)
    assert found.tolist() == [by_hand(9, 11, chain) for chain in (4, 0, 7, 7, 2**40)]
    assert batches.indices(state, 2)[:, :SIZE].equal(found)
    shared = fastebm.Minibatches(Y, Y[:, 0], size=SIZE, shared=True)
    assert shared.indices(state).tolist() == [by_hand(9, 11, 0)]
    rows, of_first = shared.draw(state)[0]
    assert rows.shape == (5, SIZE, 3)
    assert torch.equal(rows[4, :, 0], of_first[0])
    assert torch.equal(rows[1], Y[by_hand(9, 11, 0)])


def test_rows_are_drawn_alike():
    """Counts of each of 60 rows over 24,000 draws: chi-square of 59 degrees, within 5 of its standard deviations."""
    state = sampler_of().init(torch.zeros(3000, 3), seed=1)
    counts = fastebm.Minibatches(Y, size=SIZE).indices(state).flatten().bincount(minlength=N).double()
    expected = 3000 * SIZE / N
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - (N - 1)) < 5 * (2 * (N - 1)) ** 0.5


@pytest.mark.parametrize("corrected", [False, True])
def test_the_stationary_variance_is_that_of_step_size_and_both_noises(corrected):
    """x' - m = (1 - eta k)(x - m) + noise: the variance is that of the noise over 1 - (1 - eta k)^2.

    The rows' noise has the variance N^2 s^2 / size in an entry of the gradient; two minibatches halve it, and the
    correction takes it out.
    """
    eta, chains = 2e-3, 6000
    sampler = sampler_of(eta, noise_correction=corrected, rms_decay=0.98)
    x = sampler.sample(Y.mean(0)[None], 220, seed=2, num_chains=chains).double()
    spread = Y.double().var(0, correction=0)
    own = 0 if corrected else N**2 * spread / SIZE
    expected = (2 * eta + eta**2 * own) / (1 - (1 - eta * PRECISION) ** 2) * torch.ones(3)
    assert eta**2 * N**2 * spread.max() / SIZE > 2 * eta  # what is taken out is no small part
    assert bool(((x.var(0) - expected).abs() < 4 * expected * (2 / chains) ** 0.5).all()), (x.var(0), expected)
    mean = Y.double().sum(0) / PRECISION
    assert bool(((x.mean(0) - mean).abs() < 4 * (x.var(0) / chains).sqrt()).all())


def test_chains_are_independent_unless_they_share_their_rows():
    """Without noise of their own, chains from one start differ by their rows, which shared ones have in common."""
    for shared in (False, True):
        x = sampler_of(noise=0.0, shared=shared).sample(torch.zeros(1, 3), 5, seed=1, num_chains=6)
        assert bool((x[1:] == x[0]).all()) is shared


KINDS = {
    "plain": {},
    "shared": {"shared": True},
    "corrected": {"noise_correction": True},
    "momentum": {"momentum": 0.5, "nesterov": "lookahead"},
    "preconditioned": {"preconditioner": torch.tensor([0.5, 1.0, 2.0])},
    "noise first": {"noise_first": True, "clamp": (-3, 3)},
    "corrected in a box": {"noise_correction": True, "clamp": (-0.5, 1.0)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_any_batch_call_and_resume(kind, tmp_path):
    sampler, start = sampler_of(**KINDS[kind]), torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    held = {"mask": torch.tensor([False, False, True]), "known": torch.tensor(0.25).expand(3)}
    whole = sampler.sample(start, 12, seed=3, **held)
    assert sampler.gradient.batch_invariant
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sampler.sample(start, 12, seed=3, **held), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sampler.sample(start, 12, seed=3, batch_size=3, **held), whole)
    assert bool((whole[:, 2] == 0.25).all())
    state = sampler.advance(sampler.init(start, seed=3, **held), 5)
    torch.save(state.state_dict(), tmp_path / "chains.pt")
    another = sampler_of(**KINDS[kind])
    resumed = another.load_state(torch.load(tmp_path / "chains.pt"))
    assert torch.equal(another.advance(resumed, 7).x, whole)
    for _ in range(7):
        state, info = sampler.step(state)
    assert torch.equal(state.x, whole)
    assert torch.isfinite(info.energy).all()


def test_rows_come_after_conditions_and_several_tensors_together():
    inputs, targets = torch.randn(N, 2), torch.arange(N)

    def of(x, scale, a, b):
        assert a.shape == (len(x), SIZE, 2)
        assert b.shape == (len(x), SIZE)
        return ((x[:, None] - a).square().sum(2) * scale[:, None]).sum(1) + (0 * b).sum(1) + (a[..., 0] - a0(b)).sum(1)

    def a0(b):
        return inputs[:, 0][b]  # of one row: the sum of differences is 0

    chains = sampler_of(data=(inputs, targets), of=of, engine="autograd")
    state = chains.init(torch.zeros(4, 2), seed=0, conditions=[torch.rand(4)])
    _, info = chains.step(state)
    a, b = chains.minibatches.draw(state)[0]
    assert torch.equal(a, inputs[b])
    torch.testing.assert_close(info.energy, of(state.x, *state.conditions, a, b))


REFUSED = {
    "nothing": (lambda: fastebm.Minibatches(size=3), ValueError, "minibatches need data"),
    "a list": (lambda: fastebm.Minibatches([1.0], size=3), TypeError, "data are tensors"),
    "other lengths": (lambda: fastebm.Minibatches(Y, Y[1:], size=3), ValueError, "a row for each observation"),
    "a number": (lambda: fastebm.Minibatches(torch.tensor(1.0), size=3), ValueError, "a row for each observation"),
    "no rows": (lambda: fastebm.Minibatches(Y[:0], size=3), ValueError, "number of rows of data must be"),
    "no size": (lambda: fastebm.Minibatches(Y, size=0), ValueError, "size must be"),
    "that learn": (lambda: fastebm.Minibatches(Y.clone().requires_grad_(), size=3), ValueError, "not require a grad"),
    "elsewhere": (lambda: sampler_of(data=(Y.to("meta"),)).init(Y[:1]), ValueError, "are on meta, x0 on"),
    "shared by a number": (lambda: sampler_of(shared=1), TypeError, "shared is True or False"),
    "a tensor": (lambda: fastebm.Langevin(energy, 0.1, 0.1, minibatches=Y), TypeError, "is a fastebm.Minibatches"),
    "corrected alone": (lambda: fastebm.Langevin(energy, 0.1, 0.1, noise_correction=True), ValueError, "needs minib"),
    "corrected momentum": (lambda: sampler_of(noise_correction=True, momentum=0.5), ValueError, "no momentum"),
    "corrected clip": (lambda: sampler_of(noise_correction=True, grad_clip=0.5), ValueError, "no momentum, noise_fi"),
    "corrected scale": (lambda: sampler_of(noise_correction=True, preconditioner="rms"), ValueError, "preconditioner"),
    "a data term": (
        lambda: sampler_of(noise_correction=True).init(torch.zeros(1, 3), data_term=(torch.zeros(1, 3), 1.0)),
        ValueError,
        "not for a data term",
    ),
    "a state without": (
        lambda: sampler_of(noise_correction=True).step(sampler_of().init(torch.zeros(1, 3))),
        ValueError,
        "goes on from a state that this sampler's init made",
    ),
    "tempered": (
        lambda: fastebm.ParallelTempering(
            energy, (1.0, 2.0), lambda e, t: sampler_of(of=e, step_size=0.01 * t, noise=0.1)
        ).init(torch.zeros(1, 3)),
        ValueError,
        "swaps need the energy of all data",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(kind):
    make, error, words = REFUSED[kind]
    with pytest.raises(error, match=words) as refused:
        make()
    assert len(str(refused.value).splitlines()) == 1


def test_a_state_keeps_what_the_correction_learned():
    sampler = sampler_of(noise_correction=True)
    state = sampler.advance(sampler.init(torch.zeros(4, 3), seed=0), 3)
    assert bool((state.gradient_variance > 0).all())
    assert state.rows(1, 3).gradient_variance.equal(state.gradient_variance[1:3])
    with pytest.raises(ValueError, match="gradient_variance must be like x"):
        ChainState.from_state_dict({**state.state_dict(), "gradient_variance": torch.zeros(4, 2)})


def test_docstring_examples():
    assert run_examples("fastebm.sampling.minibatches") == (0, 7)
