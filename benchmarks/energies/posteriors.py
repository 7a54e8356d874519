"""Posteriors of Bayesian statistics: a likelihood of fixed data and a prior."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

from .entry import Entry


class LogisticRegression(nn.Module):
    """Binary cross-entropy of 200 observations and a normal prior of the coefficients."""

    def __init__(self, observations: int = 200, features: int = 25):
        super().__init__()
        self.register_buffer("inputs", torch.randn(observations, features))
        self.register_buffer("labels", torch.bernoulli(torch.sigmoid(self.inputs @ torch.randn(features))))

    def forward(self, w: Tensor) -> Tensor:
        logits = w @ self.inputs.T
        loss = F.binary_cross_entropy_with_logits(logits, self.labels.expand_as(logits), reduction="none")
        return loss.sum(1) + 0.5 * w.square().sum(1)


class RobustRegression(nn.Module):
    """Huber's loss of the residuals and a Laplace prior."""

    def __init__(self, observations: int = 100, features: int = 10):
        super().__init__()
        self.register_buffer("inputs", torch.randn(observations, features))
        self.register_buffer("targets", torch.randn(observations))

    def forward(self, w: Tensor) -> Tensor:
        predicted = F.linear(w, self.inputs)
        loss = F.huber_loss(predicted, self.targets.expand_as(predicted), reduction="none", delta=0.5)
        return loss.sum(dim=1) + w.abs().sum(dim=1)


class EightSchools(nn.Module):
    """Treatment effects of eight schools under a common mean and spread, by `torch.distributions`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("effect", torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]))
        self.register_buffer("error", torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_spread, theta = x[:, :1], x[:, 1:2], x[:, 2:]
        prior = distributions.Normal(0.0, 5.0).log_prob(mean) + distributions.Normal(0.0, 1.0).log_prob(log_spread)
        schools = distributions.Normal(mean, log_spread.exp()).log_prob(theta)
        likelihood = distributions.Normal(theta, self.error).log_prob(self.effect)
        return -(prior.squeeze(1) + schools.sum(1) + likelihood.sum(1))


class CoxProcess(nn.Module):
    """Counts on a grid whose log rates are a Gaussian process, in whitened coordinates."""

    def __init__(self, side: int = 8):
        super().__init__()
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
        covariance = 1.5 * torch.exp(-torch.cdist(grid, grid) / (side / 4))
        self.register_buffer("root", torch.linalg.cholesky(covariance).float())
        self.register_buffer("counts", torch.poisson(torch.ones(side**2)))

    def forward(self, z: Tensor) -> Tensor:
        f = z @ self.root.T
        return 0.5 * z.pow(2).sum(1) + torch.sum(f.exp() - self.counts * f, dim=1)


class StochasticVolatility(nn.Module):
    """An autoregressive log-volatility of 50 daily returns."""

    def __init__(self, days: int = 50):
        super().__init__()
        self.register_buffer("returns", torch.randn(days))

    def forward(self, h: Tensor) -> Tensor:
        innovations = torch.cat([0.3 * h[:, :1], h[:, 1:] - 0.95 * h[:, :-1]], dim=1) / 0.2
        return 0.5 * (innovations**2 + h + self.returns**2 * torch.exp(-h)).sum(1)


def brownian_path(w: Tensor) -> Tensor:
    """Increments of a path in a double well that is seen at three times."""
    path = 0.2 * torch.cumsum(w, dim=1)
    drift = path * (1 - path**2)
    seen = (path[:, [9, 19, 29]] - torch.tensor([1.0, -1.0, 1.0]).to(w)) / 0.2
    return 0.5 * (w - 0.2 * drift).square().sum(1) + 0.5 * seen.square().sum(1)


class KernelDensity(nn.Module):
    """A kernel density estimate of 100 points."""

    def __init__(self, points: int = 100):
        super().__init__()
        self.register_buffer("points", torch.randn(points, 2))

    def forward(self, x: Tensor) -> Tensor:
        distances = torch.cdist(x, self.points)
        return math.log(len(self.points)) - torch.logsumexp(-(distances**2) / (2 * 0.3**2), dim=1)


class Network(nn.Module):
    """The weights of a 1-16-1 network as the state: unpacked by slices, applied by bmm to 32 points."""

    def __init__(self, points: int = 32, width: int = 16):
        super().__init__()
        self.width = width
        self.register_buffer("x", torch.linspace(-2, 2, points)[:, None])
        self.register_buffer("y", torch.sin(2 * self.x[:, 0] + 0.5))

    def forward(self, theta: Tensor) -> Tensor:
        n = self.width
        w1, b1, w2, b2 = theta.split([n, n, n, 1], dim=1)
        inputs = self.x.expand(len(theta), -1, -1)
        hidden = torch.tanh(torch.bmm(inputs, w1.unsqueeze(1)) + b1.unsqueeze(1))
        predicted = torch.bmm(hidden, w2.unsqueeze(2)).squeeze(2) + b2
        return 0.5 * ((predicted - self.y) / 0.2).square().sum(1) + 0.5 * theta.square().sum(1)


POSTERIORS: tuple[Entry, ...] = (
    Entry(
        "logistic regression", "posterior", "the 25 coefficients of the German credit tests", LogisticRegression, (25,)
    ),
    Entry("robust regression", "posterior", "Huber 1964 with a Laplace prior", RobustRegression, (10,)),
    Entry("eight schools", "posterior", "Rubin 1981: data and the centred model", EightSchools, (10,)),
    Entry("log-Gaussian Cox process", "posterior", "Møller et al. 1998, as in MCMC tests", CoxProcess, (64,)),
    Entry("stochastic volatility", "posterior", "Kim et al. 1998: the log-volatilities", StochasticVolatility, (50,)),
    Entry(
        "Brownian path", "posterior", "Inference Gym's Brownian motion, in a double well", lambda: brownian_path, (30,)
    ),
    Entry("kernel density", "posterior", "Parzen 1962: an estimate by cdist and logsumexp", KernelDensity, (2,)),
    Entry(
        "Bayesian network", "posterior", "Neal 1996: weights of a small network, by bmm", Network, (49,), step_size=1e-5
    ),
)
