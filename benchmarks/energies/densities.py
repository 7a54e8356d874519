"""Densities in a few dimensions, by their formulas: what tests of samplers and tutorials draw from."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Generator, Tensor, distributions, nn

from .entry import OF_DENSITIES, Entry, image, unit


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum(dim=1)


def double_well(x: Tensor) -> Tensor:
    return ((x**2 - 1) ** 2).sum(dim=-1)


def rings(x: Tensor) -> Tensor:
    radii = torch.tensor([1.0, 2.0, 3.0]).to(x)
    distances = (x.norm(dim=1, keepdim=True) - radii) / 0.15
    return 0.5 * distances.square().min(dim=1).values


def two_moons(z: Tensor) -> Tensor:
    z1 = z[:, 0]
    ring = 0.5 * ((z.norm(p=2, dim=1) - 2) / 0.4) ** 2
    return ring - torch.log(torch.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + torch.exp(-0.5 * ((z1 + 2) / 0.6) ** 2))


def sine_ridge(z: Tensor) -> Tensor:
    z1, z2 = z.unbind(dim=1)
    w1 = torch.sin(2 * math.pi * z1 / 4)
    w2 = 3 * torch.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    return -torch.logaddexp(-0.5 * ((z2 - w1) / 0.4) ** 2, -0.5 * ((z2 - w1 + w2) / 0.35) ** 2)


def eight_gaussians(x: Tensor) -> Tensor:
    angles = torch.arange(8, dtype=x.dtype, device=x.device) * (2 * math.pi / 8)
    centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return -torch.logsumexp(-(x[:, None, :] - centres).pow(2).sum(-1) / (2 * 0.2**2), dim=1)


def many_gaussians(x: Tensor, centres: Tensor) -> Tensor:
    return -torch.logsumexp(-0.5 * torch.cdist(x, centres.to(x)).square(), dim=-1)


def make_many_gaussians() -> partial[Tensor]:
    return partial(many_gaussians, centres=3 * torch.randn(40, 5))


class Mixture(nn.Module):
    """A mixture made with `torch.distributions` at each call, from buffers."""

    def __init__(self, components: int = 6, dim: int = 2):
        super().__init__()
        self.register_buffer("weights", torch.rand(components) + 0.5)
        self.register_buffer("means", 2 * torch.randn(components, dim))
        self.register_buffer("scales", torch.rand(components, dim) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        parts = distributions.Independent(distributions.Normal(self.means, self.scales), 1)
        mixture = distributions.MixtureSameFamily(distributions.Categorical(probs=self.weights), parts)
        return -mixture.log_prob(x)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(dim=1) / 20


def funnel(x: Tensor) -> Tensor:
    v, rest = x[:, 0], x[:, 1:]
    return v**2 / 18 + 0.5 * (rest**2).sum(1) * torch.exp(-v) + 0.5 * rest.shape[1] * v


def banana(x: Tensor) -> Tensor:
    a, b = x[..., 0], x[..., 1]
    return 0.5 * (a.square() / 4 + (b + 0.5 * (a.square() - 4)).square())


def student_t(x: Tensor, nu: float = 3.0) -> Tensor:
    return (0.5 * (nu + 1) * torch.log1p(x * x / nu)).sum(1)


def student_t_distribution(x: Tensor) -> Tensor:
    return -distributions.StudentT(4.0, 0.5, 2.0).log_prob(x).sum(-1)


class PrecisionGaussian(nn.Module):
    """A Gaussian by its precision matrix."""

    def __init__(self, dim: int = 20):
        super().__init__()
        root = torch.randn(dim, dim) / math.sqrt(dim)
        self.register_buffer("precision", root @ root.T + 0.5 * torch.eye(dim))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x @ self.precision * x).sum(-1)


class CholeskyGaussian(nn.Module):
    """A Gaussian by the Cholesky factor of its covariance, which is solved against at each call."""

    def __init__(self, dim: int = 20):
        super().__init__()
        root = torch.randn(dim, dim) / math.sqrt(dim)
        self.mean = nn.Parameter(torch.randn(dim))
        self.register_buffer("factor", torch.linalg.cholesky(root @ root.T + 0.5 * torch.eye(dim)))

    def forward(self, x: Tensor) -> Tensor:
        whitened = torch.linalg.solve_triangular(self.factor, (x - self.mean).T, upper=False)
        return 0.5 * whitened.square().sum(0)


class DistributionGaussian(CholeskyGaussian):
    """The same by `MultivariateNormal`."""

    def forward(self, x: Tensor) -> Tensor:
        return -distributions.MultivariateNormal(self.mean, scale_tril=self.factor).log_prob(x)


def beta(x: Tensor) -> Tensor:
    return -distributions.Beta(2.0, 5.0).log_prob(x).sum(-1)


def logarithmic_barrier(x: Tensor) -> Tensor:
    return x.sum(1) - 0.1 * (torch.log(x) + torch.log(1 - x)).sum(1)


def gamma(x: Tensor) -> Tensor:
    return -distributions.Gamma(3.0, 2.0).log_prob(x).sum(-1)


def positive(shape: tuple[int, ...], generator: Generator, scale: float) -> Tensor:
    return 0.05 + scale * torch.rand(shape, generator=generator)


def soft_walls(x: Tensor) -> Tensor:
    outside = torch.where(x.abs() > 1, (x.abs() - 1) ** 2, torch.zeros_like(x))
    return (10 * outside + torch.clamp(x, min=-0.5, max=0.5)).sum(1)


def styblinski_tang(x: Tensor) -> Tensor:
    return 0.05 * (x**4 - 16 * x**2 + 5 * x).sum(-1)


def rastrigin(x: Tensor) -> Tensor:
    return (x**2 - 1.5 * torch.cos(2 * math.pi * x) + 1.5).sum(dim=1)


def ackley(x: Tensor) -> Tensor:
    first = -20 * torch.exp(-0.2 * torch.sqrt(torch.mean(x**2, dim=1)))
    return first - torch.exp(torch.mean(torch.cos(2 * math.pi * x), dim=1)) + 20 + math.e


def himmelblau(x: Tensor) -> Tensor:
    a, b = x[:, 0], x[:, 1]
    return 0.1 * ((a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2)


def mueller_brown(x: Tensor) -> Tensor:
    height = torch.tensor([-200.0, -100.0, -170.0, 15.0]).to(x)
    a, b, c = torch.tensor([[-1.0, -1, -6.5, 0.7], [0, 0, 11, 0.6], [-10, -10, -6.5, 0.7]]).to(x)
    centres = torch.tensor([[1.0, 0], [0, 0.5], [-0.5, 1.5], [-1, 1]]).to(x)
    dx, dy = (x.unsqueeze(1) - centres).unbind(-1)
    return 0.05 * (height * torch.exp(a * dx**2 + b * dx * dy + c * dy**2)).sum(1)


def spiral(x: Tensor) -> Tensor:
    angle = torch.atan2(x[:, 1], x[:, 0])
    radius = torch.hypot(x[:, 0], x[:, 1])
    return 4 * (1 - torch.cos(angle - 3 * radius)) + 0.1 * radius**2


def roots_of_unity(x: Tensor) -> Tensor:
    z = torch.complex(x[:, 0], x[:, 1])
    return (z**3 - 1).abs() ** 2


def product(x: Tensor) -> Tensor:
    return (x.prod(dim=1) - 1) ** 2 + 0.5 * x.square().sum(dim=1)


def generalized_normal(x: Tensor) -> Tensor:
    return x.abs().pow(1.5).sum(1)


def group_lasso(x: Tensor) -> Tensor:
    return x.view(-1, 5, 4).norm(dim=2).sum(dim=1)


def skew_normal(x: Tensor) -> Tensor:
    return (0.5 * x**2 - torch.special.log_ndtr(4 * x)).sum(1)


def error_function(x: Tensor) -> Tensor:
    return (0.5 * x**2 - 2 * torch.erf(2 * x)).sum(1)


def order_statistics(x: Tensor) -> Tensor:
    """The squared distance of the sorted state from the quantiles of a normal distribution."""
    levels = (torch.arange(x.shape[1], dtype=x.dtype, device=x.device) + 0.5) / x.shape[1]
    return (torch.sort(x, dim=1).values - math.sqrt(2) * torch.erfinv(2 * levels - 1)).square().sum(1)


def of_one_state(x: Tensor) -> Tensor:
    return torch.sin(x).sum() ** 2 + 0.5 * torch.dot(x, x)


def von_mises(x: Tensor) -> Tensor:
    return -distributions.VonMises(0.5, 3.0).log_prob(x).sum(-1)


OTHER_DIMENSIONS = (1, 64, 1000)


def _density(name, function, dim, source, **options) -> Entry:
    batches = OF_DENSITIES if dim in (2, 20) else OTHER_DIMENSIONS
    return Entry(name, "density", source, lambda: function, (dim,), **{"batches": batches} | options)


def _module(name, build, dim, source) -> Entry:
    batches = OF_DENSITIES if dim in (2, 20) else OTHER_DIMENSIONS
    return Entry(name, "density", source, build, (dim,), batches)


BOUNDED = {"states": unit, "scales": (0.1, 1.0), "clamp": (0.01, 0.99)}

DENSITIES: tuple[Entry, ...] = (
    _density("quadratic", quadratic, 20, "the standard normal distribution"),
    _density("double well", double_well, 20, "the quartic double well of rare-event studies, in each coordinate"),
    _density("rings", rings, 2, "concentric rings, the usual figure of flow tutorials; nearest ring by a minimum"),
    _density("two moons", two_moons, 2, "Rezende and Mohamed 2015, normalizing flows: potential U1"),
    _density("sine ridge", sine_ridge, 2, "Rezende and Mohamed 2015, normalizing flows: potential U3"),
    _density("eight Gaussians", eight_gaussians, 2, "the ring of eight modes of GAN and flow papers"),
    _module("40 Gaussians", make_many_gaussians, 5, "GMM-40 of Midgley et al. 2023 (FAB), here in 5-D; by cdist"),
    _module("mixture, distributions", Mixture, 2, "MixtureSameFamily of torch.distributions, as its manual shows"),
    _density("Rosenbrock", rosenbrock, 20, "Goodman and Weare 2010: exp(-Rosenbrock / 20)", step_size=1e-4),
    _density("funnel", funnel, 20, "Neal 2003, slice sampling: the funnel, with 19 dependent coordinates"),
    _density("banana", banana, 2, "Haario et al. 1999: a twisted Gaussian"),
    _density("Student t", student_t, 20, "independent t, 3 degrees of freedom, by log1p"),
    _density("Student t, distributions", student_t_distribution, 20, "StudentT of torch.distributions"),
    _module("Gaussian by precision", PrecisionGaussian, 20, "a correlated Gaussian: x P x"),
    _module("Gaussian by Cholesky", CholeskyGaussian, 20, "a correlated Gaussian by solve_triangular"),
    _module("Gaussian, distributions", DistributionGaussian, 20, "MultivariateNormal of torch.distributions"),
    _density("Beta", beta, 20, "Beta of torch.distributions on [0, 1]", **BOUNDED, step_size=1e-5),
    _density("log barrier", logarithmic_barrier, 20, "barrier of the unit cube", **BOUNDED, step_size=1e-4),
    _density(
        "Gamma",
        gamma,
        20,
        "Gamma of torch.distributions on positive numbers",
        states=positive,
        clamp=(0.01, 50.0),
        step_size=1e-4,
    ),
    _density("soft walls", soft_walls, 20, "a box with quadratic walls by where, and a clamped slope"),
    _density("Styblinski-Tang", styblinski_tang, 20, "Styblinski and Tang 1990, a benchmark of optimizers"),
    _density("Rastrigin", rastrigin, 20, "Rastrigin 1974, a benchmark of optimizers, of lower barriers"),
    _density("Ackley", ackley, 20, "Ackley 1987, a benchmark of optimizers"),
    _density("Himmelblau", himmelblau, 2, "Himmelblau 1972: four minima"),
    _density(
        "Mueller-Brown",
        mueller_brown,
        2,
        "Müller and Brown 1979: reaction paths, scaled by 0.05",
        states=image,
        scales=(0.3, 1.0),
        step_size=1e-5,
    ),
    _density("spiral", spiral, 2, "a spiral by atan2 and hypot", scales=(0.3, 1.0, 3.0)),
    _density(
        "roots of unity", roots_of_unity, 2, "the squared distance of z^3 from 1, by complex numbers", step_size=1e-5
    ),
    _density("product", product, 5, "a product over coordinates"),
    _density("generalized normal", generalized_normal, 20, "Subbotin 1923: powers of 1.5"),
    _density("group lasso", group_lasso, 20, "Yuan and Lin 2006: norms of groups"),
    # At a scale of 3 PyTorch's own float32 derivative of log_ndtr errs by 2.6e-5.
    _density("skew normal", skew_normal, 20, "Azzalini 1985, by log_ndtr", scales=(0.1, 1.0)),
    _density("error function", error_function, 20, "a smoothed step by erf"),
    _density("order statistics", order_statistics, 20, "a one-dimensional Wasserstein distance, by sort"),
    _density("vmap", torch.vmap(of_one_state), 5, "a formula for one state, batched by torch.vmap"),
    _density("von Mises", von_mises, 20, "VonMises of torch.distributions: angles"),
)
