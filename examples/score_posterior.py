"""Posterior sampling with a score as the prior, for images of which a part is measured with noise: no energy is needed.

The prior is a normal distribution of smooth images, whose score stands in for a denoiser's, so that the result can be
compared with the exact posterior.

python examples/score_posterior.py            # seconds
python examples/score_posterior.py --quick
"""

import argparse

import torch
from torch import Tensor

import fastebm

parser = argparse.ArgumentParser(description="Sample a posterior from a score and a measurement.")
parser.add_argument("--quick", action="store_true", help="fewer chains and steps")
arguments = parser.parse_args()

SIZE, NOISE = 8, 0.2
places = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).double()
covariance = 0.25 * (-torch.cdist(places, places).square() / 8).exp() + 0.01 * torch.eye(SIZE**2, dtype=torch.float64)
precision = covariance.inverse()


def prior_score(x: Tensor) -> Tensor:
    """`∇ log p(x)` of images `(B, 1, 8, 8)`; a denoiser D gives `(D(x) - x) / σ²`."""
    return -(x.flatten(1) @ precision.to(x)).view_as(x)


def posterior_score(x: Tensor, measured: Tensor, seen: Tensor) -> Tensor:
    """The prior's score and the gradient of the data's log likelihood; both conditions have a row for each chain."""
    return prior_score(x) + seen * (measured - x) / NOISE**2


generator = torch.Generator().manual_seed(0)
truth = torch.linalg.cholesky(covariance) @ torch.randn(SIZE**2, 1, dtype=torch.float64, generator=generator)
seen = (torch.rand(SIZE**2, generator=generator) < 0.4).double()
measured = seen * (truth[:, 0] + NOISE * torch.randn(SIZE**2, dtype=torch.float64, generator=generator))

chains, num_steps = (200, 300) if arguments.quick else (2000, 2000)
sampler = fastebm.Langevin(fastebm.score_gradient(posterior_score), **fastebm.schedules.from_epsilon(0.06))
given = [each.float().view(1, 1, SIZE, SIZE) for each in (measured, seen)]
# Pixels stay in [-2, 2], which is far from where the posterior is: the projection acts on all chains after each step.
x = sampler.sample(
    torch.zeros(1, 1, SIZE, SIZE), num_steps, 0, num_chains=chains, conditions=given, project=lambda x: x.clamp(-2, 2)
)

exact = (precision + torch.diag(seen) / NOISE**2).inverse()
mean, std = exact @ (measured / NOISE**2), exact.diagonal().sqrt()
found = x.flatten(1).double()
print(f"largest error of a mean {float(((found.mean(0) - mean).abs() / std).max()):.2f} standard deviations")
print(f"mean ratio of standard deviations {float((found.std(0) / std).mean()):.3f}")
