"""Energy-based calibration of a generator: short chains from its own samples, and a pull towards where they end.

Luo et al., "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071. It works for any generator that draws
samples with a gradient: a VAE's decoder, a normalising flow. At test time no chain is run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.sampling import Langevin, Schedule, linear
from fastebm.sampling.schedules import evaluate


@dataclass(frozen=True)
class DataTerm:
    """The pull of a conditional chain back to the sample that it started from.

    Adds `weight * (x - x0)` to the energy's gradient where `||x - x0||^2 > hinge * dimension`, with a weight that falls
    linearly to zero over the chain. In the authors' demo it is almost inert, as a drift of at most 1e-6 beside 0.05 of
    the energy; and what tells a conditional chain most is that it is short and starts there. So none is the default.

    Attributes:
        weight: at the first step, 0 or more.
        hinge: squared distance per pixel and colour that is free; the demo's 0.07 for 3x32x32 is 2.3e-5.
    """

    weight: float
    hinge: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("hinge", self.hinge)):
            if not 0 <= value < math.inf:
                raise ValueError(f"a data term's {name} must be finite and not negative, got {value}")


def calibrate(
    samples: Tensor,
    sampler: Langevin,
    num_steps: int,
    seed: int | None = None,
    chain_ids: int | Tensor = 0,
    *,
    start_step: int = 0,
    data_term: DataTerm | None = None,
    check: bool = True,
) -> Tensor:
    """Where chains of `num_steps` updates of the sampler's energy end that start at `samples`, like these and detached.

    Args:
        samples: a generator's, (B, ...), float32 or float64; no gradient flows into them.
        sampler: of the energy, low meaning real; a sampler is made of an energy and holds it, so that none is given
            beside it. Its energy is in eval mode inside, with its weights folded once.
        seed, chain_ids, start_step, check: as in `Langevin.sample`. A second chain from the same samples takes another
            `start_step`.
        data_term: pulls chains back to where they started.

    Example:
        >>> import torch, fastebm
        >>> from fastebm.training import calibrate, calibration_loss
        >>> generator = torch.nn.Linear(2, 3)
        >>> sampler = fastebm.Langevin(lambda x: 0.5 * (x - 1).square().sum(1), step_size=0.1, noise_std=1e-3)
        >>> samples = generator(torch.randn(64, 2))
        >>> targets = calibrate(samples, sampler, num_steps=10, seed=0)
        >>> calibration_loss(samples, targets).backward()  # pulls the samples' mean to 1
    """
    start = samples.detach()
    if not start.isfinite().all() and check:
        raise FloatingPointError("a generator's samples are not finite: chains can't start there")
    held = None
    if data_term is not None and data_term.weight:
        weight: float | Schedule = linear(data_term.weight, 0.0) if num_steps > 1 else data_term.weight
        held = (start, weight, data_term.hinge * math.prod(start.shape[1:]))
    return sampler.sample(start, num_steps, seed, chain_ids, start_step=start_step, data_term=held, check=check)


def calibration_loss(samples: Tensor, targets: Tensor) -> Tensor:
    """`||targets - samples||^2` summed over a sample and averaged over the batch; no gradient flows into `targets`.

    Raises ValueError for shapes that differ.
    """
    if samples.shape != targets.shape:
        raise ValueError(f"samples {tuple(samples.shape)} and targets {tuple(targets.shape)} must have one shape")
    return (targets.detach() - samples).square().flatten(1).sum(1).mean()


def noise_floor(sampler: Langevin, num_steps: int, dimension: int) -> float:
    """The calibration loss of a chain that noise alone moves: `dimension` times the sum of its `noise_std**2`.

    What is measured above it is the energy's doing. It grows with the dimension, and so must any threshold on it.
    """
    return dimension * float(evaluate(sampler.noise_std, max(num_steps, 1)).square().sum()) if num_steps else 0.0


@dataclass(frozen=True)
class DualUpdate:
    """How the weight of the calibration loss follows it: `weight + rate * (loss - threshold)`, within [0, largest].

    The dual half of a primal-dual solution of "minimise the VAE's loss where the calibration loss is at most
    `threshold`". A rate of 0 keeps the weight as it is.
    """

    rate: float
    threshold: float
    largest: float

    def __call__(self, weight: float, loss: float) -> float:
        return min(max(weight + self.rate * (loss - self.threshold), 0.0), self.largest) if self.rate else weight


def mean_square_distance(one: Tensor, other: Tensor) -> Tensor:
    """The mean over a batch of the squared distance of samples, without gradient: what the dual update looks at."""
    with torch.no_grad():
        return calibration_loss(one, other)
