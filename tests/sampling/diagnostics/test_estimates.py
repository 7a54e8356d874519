"""R-hat, nested R-hat and effective sample sizes against plain formulas, closed forms, and ArviZ on kept trajectories.

ArviZ is needed by nothing else: where arviz-stats is missing, its tests say so and the closed forms still judge.
"""

from typing import Any

import numpy as np
import pytest
import torch

from fastebm.sampling.diagnostics import ChainSummary, Diagnostics

WITHOUT_ARVIZ = "arviz-stats is not installed: pip install arviz-stats"


def autoregression(rho: float, num_updates: int, chains: int, seed: int = 0) -> torch.Tensor:
    """Stationary AR(1) chains (n, B) with variance 1: x' = rho x + sqrt(1 - rho^2) noise. Their effective sample size
    is the number of draws times (1 - rho) / (1 + rho)."""
    noise = torch.randn(num_updates, chains, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = [noise[0]]
    for each in noise[1:]:
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * each)
    return torch.stack(x)


def streamed(trajectory: torch.Tensor, **options: Any) -> ChainSummary:
    """The summary of chains (n, B), whose mean is the first scalar summary."""
    diagnostics = Diagnostics(projections=0, **options)
    for x in trajectory:
        diagnostics.update(x[:, None])
    return diagnostics.summary()


# Closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
def test_the_ess_of_autoregressions_is_the_closed_form(rho: float) -> None:
    """To 10%: an autocorrelation time from a window of M lags and N draws has the relative error sqrt((4 M + 2) / N)
    (Sokal, "Monte Carlo methods in statistical mechanics", 1997), here 0.03 with all 63 lags, and Geyer's rule adds a
    bias of that order."""
    summary = streamed(autoregression(rho, 2500, 100))
    draws = 2500 * 100
    assert float(summary.ess[0]) == pytest.approx(draws * (1 - rho) / (1 + rho), rel=0.1)
    assert not bool(summary.ess_is_bound[0])
    assert float(summary.rhat[0]) < 1.02
    # A chain alone has a hundredth of the draws and ten times the error, which their mean makes as small again.
    assert float(summary.chain_ess[:, 0].mean()) == pytest.approx(float(summary.ess[0]) / 100, rel=0.2)
    # The mean is off by its own standard error, in 4 of which it lies but once in 16,000 times.
    assert abs(float(summary.mean[0])) < 4 * float(summary.mcse[0])


@pytest.mark.parametrize(("rho", "num_updates"), [(0.98, 20_000), (0.99, 30_000)])
def test_correlations_beyond_the_window_are_read_off_blocks(rho: float, num_updates: int) -> None:
    """Blocks of length b miss a share time / b of the sum at their ends: time 99 or 199 of 1,024 values, up to 20%;
    with the error of a variance of 19 or more blocks of 16 chains, 8%, that is up to 28%."""
    summary = streamed(autoregression(rho, num_updates, 16), lags=31)
    expected = num_updates * 16 * (1 - rho) / (1 + rho)
    assert bool(summary.ess_is_bound[0])
    assert float(summary.ess[0]) == pytest.approx(expected, rel=0.28)
    assert float(summary.chain_ess[:, 0].sum()) > 1.5 * expected  # the window alone, which chains of their own have


def test_chains_that_stay_where_they_are_count_once_each() -> None:
    """200 chains, each around a place of its own, are worth 200 draws, to 40%: 4 errors of the variance of places."""
    places = torch.randn(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    trajectory = places + 0.1 * autoregression(0.5, 60, 200)
    summary = streamed(trajectory, lags=15)
    assert float(summary.ess[0]) == pytest.approx(200, rel=0.4)
    assert not bool(summary.ess_is_bound[0])
    assert float(summary.rhat[0]) > 5
    assert bool(streamed(trajectory[:, :20], lags=15).ess_is_bound[0])
    # Chains that go one way together have about one mean, which tells nothing: what the window says stays a bound.
    together = autoregression(0.5, 60, 200) + torch.linspace(0, 30, 60)[:, None]
    assert bool(streamed(together, lags=15).ess_is_bound[0])


def test_gaussian_moments_are_within_their_errors() -> None:
    """A mean of N draws has the error 1 / sqrt(N), a variance sqrt(2 / N): 5 of them, once in 10^6 times for each."""
    generator = torch.Generator().manual_seed(1)
    diagnostics, draws = Diagnostics(), 300 * 50
    scale = torch.tensor([0.5, 1.0, 4.0])
    for _ in range(300):
        diagnostics.update(7 + scale * torch.randn(50, 3, generator=generator))
    summary = diagnostics.summary()
    assert summary.element_mean is not None
    assert summary.element_variance is not None
    assert bool(((summary.element_mean - 7).abs() < 5 * scale / draws**0.5).all())
    assert bool(((summary.element_variance / scale**2 - 1).abs() < 5 * (2 / draws) ** 0.5).all())


def test_nested_rhat_is_the_formula_of_the_paper() -> None:
    """Margossian et al. (2023), equations 6 to 8, in loops."""
    chains, draws, groups = 12, 30, np.array([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 1, 2])
    trajectory = autoregression(0.7, draws, chains) + torch.from_numpy(0.4 * groups)
    found = streamed(trajectory, superchains=torch.from_numpy(10 * groups - 3)).nested_rhat
    x = trajectory.numpy()
    means, within = [], []
    for k in range(3):
        members = [x[:, m] for m in range(chains) if groups[m] == k]
        of_chains = [sum(member) / draws for member in members]
        mean = sum(of_chains) / len(members)
        between = sum((each - mean) ** 2 for each in of_chains) / (len(members) - 1)
        variances = [sum((member - c) ** 2) / (draws - 1) for member, c in zip(members, of_chains, strict=True)]
        means.append(mean)
        within.append(between + sum(variances) / len(members))
    middle = sum(means) / 3
    between = sum((mean - middle) ** 2 for mean in means) / 2
    assert found is not None
    assert float(found[0]) == pytest.approx((1 + between / (sum(within) / 3)) ** 0.5, rel=1e-12)


def test_nested_rhat_of_single_draws_and_of_single_chains() -> None:
    """Many short chains: with one draw each, chains of a group differ and nothing else; with one chain a group, its own
    variance is all there is."""
    groups = torch.arange(2000) // 50
    one_draw = streamed(autoregression(0.5, 1, 2000), superchains=groups).nested_rhat
    assert one_draw is not None
    # (1 + 1/M), with the error sqrt(2 / 39) of a variance of 40 means on its second term
    assert float(one_draw[0]) ** 2 - 1 == pytest.approx(1 / 50, rel=4 * (2 / 39) ** 0.5)
    alone = streamed(autoregression(0.5, 50, 8), superchains=torch.arange(8)).nested_rhat
    x = autoregression(0.5, 50, 8).numpy()
    assert alone is not None
    assert float(alone[0]) == pytest.approx((1 + x.mean(0).var(ddof=1) / x.var(0, ddof=1).mean()) ** 0.5, rel=1e-12)


def test_few_updates_give_no_number_but_no_error_either() -> None:
    for num_updates in (1, 2, 3, 4, 5):
        summary = streamed(autoregression(0.5, num_updates, 3))
        assert bool(summary.rhat.isnan().all()) == (num_updates < 4)
        assert bool(summary.ess.isnan().all()) == (num_updates < 2)
        assert str(summary)
        assert summary.verdict()


# ArviZ ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def arviz() -> Any:
    return pytest.importorskip("arviz_stats.base", reason=WITHOUT_ARVIZ).array_stats


@pytest.mark.parametrize("rho", [-0.6, 0.0, 0.6, 0.9])
@pytest.mark.parametrize(("num_updates", "chains"), [(400, 4), (401, 1), (1000, 30)])
def test_the_ess_is_that_of_arviz(arviz: Any, rho: float, num_updates: int, chains: int) -> None:
    """The same formula wherever it stops within the window: to 1e-9, as sums of up to 30,000 products in another order
    (ArviZ takes a Fourier transform) differ by some 1e-12. Chains are not split (method "identity"), as streaming
    autocovariances are of whole chains."""
    x = autoregression(rho, num_updates, chains)
    summary = streamed(x, lags=199)
    assert not bool(summary.ess_is_bound[0])
    expected = arviz.ess(x.T.numpy(), chain_axis=0, draw_axis=1, method="identity")
    assert float(summary.ess[0]) == pytest.approx(float(expected), rel=1e-9)
    for chain in range(chains):
        alone = arviz.ess(x.T[chain : chain + 1].numpy(), chain_axis=0, draw_axis=1, method="identity")
        assert float(summary.chain_ess[chain, 0]) == pytest.approx(float(alone), rel=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_the_ess_of_split_chains_is_near(arviz: Any, rho: float) -> None:
    """ArviZ's default for means splits chains first, which counts what is left of a drift. On chains at rest both
    estimate one number; they differ by the ends of half as many draws: a few percent, at most 10% here."""
    x = autoregression(rho, 1000, 30)
    expected = arviz.ess(x.T.numpy(), chain_axis=0, draw_axis=1, method="mean")
    assert float(streamed(x, lags=199).ess[0]) == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("apart", [0.0, 0.5])
@pytest.mark.parametrize("num_updates", [4, 7, 30, 31, 512, 1000])
def test_split_rhat_is_that_of_arviz(arviz: Any, num_updates: int, apart: float) -> None:
    """On the draws of the halves to 1e-12: the same formula. On all draws to 0.03: the halves leave out at most an
    eighth of them, and R-hat - 1 of chains that mix is of the order of 1 / (effective draws of half a chain)."""
    x = autoregression(0.5, num_updates, 6) + apart * torch.arange(6)
    found = float(streamed(x).rhat[0])
    length = 1
    while num_updates // length >= 32:
        length *= 2
    full = num_updates // length
    half = full // 2 * length
    end = full * length
    used = torch.cat((x[:half], x[end - half : end]))
    exact = arviz.rhat(used.T.numpy(), chain_axis=0, draw_axis=1, method="split")
    assert found == pytest.approx(float(exact), rel=1e-12)
    if num_updates >= 512:
        whole = arviz.rhat(x.T.numpy(), chain_axis=0, draw_axis=1, method="split")
        assert found == pytest.approx(float(whole), abs=0.03)


def test_nested_rhat_is_that_of_arviz(arviz: Any) -> None:
    groups = torch.arange(20) % 5
    x = autoregression(0.5, 40, 20) + 0.3 * groups
    found = streamed(x, superchains=groups).nested_rhat
    expected = arviz.rhat_nested(x.T.numpy(), groups.numpy(), method="identity", chain_axis=0, draw_axis=1)
    assert found is not None
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-12)


def test_arviz_takes_the_kept_scalars() -> None:
    pytest.importorskip("arviz_base", reason="arviz-base is not installed: pip install arviz-base")
    x = autoregression(0.5, 10, 3)
    tree = streamed(x, keep_scalars=True).to_arviz()
    assert tree["posterior"].sizes == {"chain": 3, "draw": 10}
    np.testing.assert_array_equal(tree["posterior"]["mean"].values, x.T.numpy())
