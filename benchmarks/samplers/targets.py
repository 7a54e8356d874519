"""Densities with known moments, written once for PyTorch and JAX.

An energy is a function of states (..., dim), of the target's constants as arrays of that library, and of the few
functions in which the libraries differ. Truth and starts are numpy's, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Energy = Callable[[Any, Mapping[str, Any], Any], Any]
"""Of x (..., dim), the constants, and an object with `softplus`: the energies (...)."""

# The scalars whose autocorrelations are measured: nothing else of a state is kept.
SUMMARIES = ("x_1", "x_1^2", "energy")


@dataclass(frozen=True)
class Target:
    """A density `p(x) ~ exp(-E(x))`.

    Attributes:
        name, dim: of the density.
        energy: see `Energy`.
        constants: what the energy needs.
        draw: draws that many states, (count, dim), from a generator: exact ones, or of weighted draws.
        starts_exact: whether chains that start at draws need no burn-in.
    """

    name: str
    dim: int
    energy: Energy
    constants: Mapping[str, Array]
    draw: Callable[[int, np.random.Generator], Array]
    starts_exact: bool = True

    def starts(self, count: int, seed: int) -> NDArray[np.float32]:
        return self.draw(count, np.random.default_rng(seed)).astype(np.float32)

    def energies(self, x: Array) -> Array:
        """Energies in float64."""
        return self.energy(x, self.constants, Numpy)

    def summaries(self, x: Array) -> Array:
        """(3, ...), in the order of SUMMARIES."""
        return np.stack([x[..., 0], x[..., 0] ** 2, self.energies(x)])

    @functools.cached_property
    def truth(self) -> tuple[Array, Array, Array]:
        """Means and standard deviations of the summaries, and standard errors of the means: of draws, in float64."""
        generator, parts = np.random.default_rng(1), 20
        values = np.concatenate([self.summaries(self.draw(20_000, generator)) for _ in range(parts)], axis=1)
        deviations = values.std(1)
        return values.mean(1), deviations, deviations / np.sqrt(values.shape[1])


class Numpy:
    """What energies need besides operators, for numpy."""

    @staticmethod
    def softplus(x: Array) -> Array:
        return np.logaddexp(0, x)


# Gaussians ------------------------------------------------------------------------------------------------------------


def quadratic(x: Any, constants: Mapping[str, Any], ops: Any) -> Any:
    return 0.5 * ((x @ constants["precision"]) * x).sum(-1)


def gaussian(name: str, covariance: Array) -> Target:
    factor = np.linalg.cholesky(covariance)

    def draw(count: int, generator: np.random.Generator) -> Array:
        return generator.standard_normal((count, len(factor))) @ factor.T

    return Target(name, len(factor), quadratic, {"precision": np.linalg.inv(covariance)}, draw)


def autoregressive(dim: int, correlation: float) -> Array:
    """The covariance of a stationary autoregression: unit variances, neighbours correlated."""
    places = np.arange(dim)
    return correlation ** np.abs(places[:, None] - places)


def scaled_correlated(dim: int) -> Array:
    """Random correlations, and scales from 0.5 to 2."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((dim, 2 * dim))
    covariance = mixing @ mixing.T
    scales = np.geomspace(0.5, 2, dim) / np.sqrt(np.diag(covariance))
    return covariance * scales[:, None] * scales


# Banana ---------------------------------------------------------------------------------------------------------------

WIDTH = 0.5


def banana(x: Any, constants: Mapping[str, Any], ops: Any) -> Any:
    """The hybrid Rosenbrock density of Pagani, Wiegand, Nadarajah 2022: pairs of a and b near a^2."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return 0.5 * ((a - 1) ** 2).sum(-1) + (0.5 / WIDTH**2) * ((b - a * a) ** 2).sum(-1)


def bananas(pairs: int) -> Target:
    def draw(count: int, generator: np.random.Generator) -> Array:
        a = 1 + generator.standard_normal((count, pairs))
        return np.concatenate([a, a**2 + WIDTH * generator.standard_normal((count, pairs))], axis=1)

    return Target(f"banana, {2 * pairs}-D", 2 * pairs, banana, {}, draw)


# Logistic regression --------------------------------------------------------------------------------------------------


def logistic(x: Any, constants: Mapping[str, Any], ops: Any) -> Any:
    """Of features with the signs of their labels, (observations, dim), and a standard normal prior."""
    margins = x @ constants["signed"].T
    return ops.softplus(-margins).sum(-1) + 0.5 * (x * x).sum(-1)


def logistic_regression(dim: int, observations: int) -> Target:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((observations, dim)) / np.sqrt(dim)
    weights = generator.standard_normal(dim)
    labels = np.where(generator.random(observations) < 1 / (1 + np.exp(-features @ weights)), 1, -1)
    constants = {"signed": features * labels[:, None]}
    mode, factor = _laplace(constants["signed"])

    def draw(count: int, generator: np.random.Generator) -> Array:
        # Weighted draws of a Student t around the mode, resampled: four for each that is returned.
        spread, freedom = 1.1, 8
        normal = generator.standard_normal((4 * count, dim))
        chi = np.sqrt(generator.chisquare(freedom, (4 * count, 1)) / freedom)
        proposals = mode + (normal / chi) @ (spread * factor.T)
        log_proposal = -(freedom + dim) / 2 * np.log1p(((normal / chi) ** 2).sum(1) / freedom)
        log_weight = -logistic(proposals, constants, Numpy) - log_proposal
        weight = np.exp(log_weight - log_weight.max())
        return proposals[_systematic(weight / weight.sum(), count, generator)]

    return Target(f"logistic regression, {dim}-D", dim, logistic, constants, draw, starts_exact=False)


def _laplace(signed: Array) -> tuple[Array, Array]:
    """The mode, by Newton's method, and a factor of the inverse of the curvature there."""
    x = np.zeros(signed.shape[1])
    for _ in range(50):
        share = 1 / (1 + np.exp(signed @ x))
        curvature = (signed.T * (share * (1 - share))) @ signed + np.eye(len(x))
        x = x - np.linalg.solve(curvature, x - signed.T @ share)
    return x, np.linalg.cholesky(np.linalg.inv(curvature))


def _systematic(shares: Array, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`count` places, each about as often as its share says, in random order."""
    points = (generator.random() + np.arange(count)) / count
    return generator.permutation(np.searchsorted(np.cumsum(shares), points).clip(max=len(shares) - 1))


TARGETS = {
    target.name: target
    for target in (
        gaussian("Gaussian, 100-D", autoregressive(100, 0.5)),
        gaussian("correlated Gaussian, 10-D", scaled_correlated(10)),
        bananas(5),
        logistic_regression(10, 200),
    )
}
