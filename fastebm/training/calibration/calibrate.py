"""Energy-based calibration of a generator: short chains start at its samples, and it is trained towards their ends.

Luo et al., "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071. It works for any generator whose
samples have a gradient, such as a VAE's decoder or a normalising flow. At test time no chain is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastebm.sampling import Langevin, Schedule, linear
from fastebm.sampling.diagnostics import ChainReadings, run_observed
from fastebm.sampling.observers import checking_finite
from fastebm.sampling.schedules import evaluate
from fastebm.sampling.state import ChainState


@dataclass(frozen=True)
class DataTerm:
    """A pull of a chain back to the sample that it started from.

    It adds `weight * (x - x0)` to the energy's gradient where `||x - x0||^2 > hinge * dimension`, with a weight that
    falls linearly to zero over the chain. The default is no data term: in the authors' demo it is a drift of at most
    1e-6 beside the energy's 0.05, and a short chain stays near its start anyway.

    Attributes:
        weight: the weight at the first step, 0 or more.
        hinge: squared distance per pixel and channel below which there is no pull; the demo's 0.07 for 3x32x32 images
            is 2.3e-5.
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
    readings: Callable[[ChainState], ChainReadings | None] | None = None,
) -> Tensor:
    """The ends of chains of `num_steps` Langevin steps that start at `samples`: of their shape and dtype, and detached.

    Args:
        samples: samples of a generator, (B, ...), float32 or float64; no gradient flows into them.
        sampler: a sampler of the energy, low meaning real. The energy is in eval mode inside, with its weights folded
            once.
        seed, chain_ids, start_step, check: as in `Langevin.sample`. A second chain from the same samples takes another
            `start_step`.
        data_term: a pull of the chains back to their starts.
        readings: called with the chains at their start; returns what then reads them, or None, as in `Cascade.sample`.

    Raises FloatingPointError for samples that are not finite, unless `check` is False.

    Example:
        >>> import torch, fastebm
        >>> from fastebm.training import calibrate, calibration_loss
        >>> generator = torch.nn.Linear(2, 3)
        >>> sampler = fastebm.Langevin(lambda x: 0.5 * (x - 1).square().sum(1), step_size=0.1, noise_std=1e-3)
        >>> samples = generator(torch.randn(64, 2))
        >>> targets = calibrate(samples, sampler, num_steps=10, seed=0)
        >>> calibration_loss(samples, targets).backward()  # moves the samples' mean towards 1
    """
    start = samples.detach()
    if not start.isfinite().all() and check:
        raise FloatingPointError("a generator's samples are not finite: chains can't start there")
    target = None
    if data_term is not None and data_term.weight:
        weight: float | Schedule = linear(data_term.weight, 0.0) if num_steps > 1 else data_term.weight
        target = (start, weight, data_term.hinge * math.prod(start.shape[1:]))
    options: dict[str, Any] = {"start_step": start_step, "data_term": target}
    if readings is not None:
        state = sampler.init(start, seed, chain_ids, num_steps=num_steps, **options)
        if (reader := readings(state)) is not None:
            with torch.no_grad(), checking_finite(state, check) as watch:
                return run_observed(sampler, state, num_steps, reader, [*watch, reader]).x
    return sampler.sample(start, num_steps, seed, chain_ids, check=check, **options)


def calibration_loss(samples: Tensor, targets: Tensor) -> Tensor:
    """`||targets - samples||^2` summed over a sample and averaged over the batch; no gradient flows into `targets`.

    Raises ValueError for shapes that differ.
    """
    if samples.shape != targets.shape:
        raise ValueError(f"samples {tuple(samples.shape)} and targets {tuple(targets.shape)} must have one shape")
    return (targets.detach() - samples).square().flatten(1).sum(1).mean()


def noise_floor(sampler: Langevin, num_steps: int, dimension: int) -> float:
    """The calibration loss of a chain that noise alone moves: `dimension` times the sum of `noise_std**2`.

    Only the loss beyond it comes from the energy. It grows with the dimension, and a threshold on the loss must too.
    """
    return dimension * float(evaluate(sampler.noise_std, max(num_steps, 1)).square().sum()) if num_steps else 0.0


@dataclass(frozen=True)
class DualUpdate:
    """The update of the weight of the calibration loss: `weight + rate * (loss - threshold)`, clamped to [0, largest].

    It is the dual step of the problem "minimise the VAE's loss subject to a calibration loss of at most `threshold`".
    A rate of 0 keeps the weight as it is.
    """

    rate: float
    threshold: float
    largest: float

    def __call__(self, weight: float, loss: float) -> float:
        return min(max(weight + self.rate * (loss - self.threshold), 0.0), self.largest) if self.rate else weight


def mean_square_distance(one: Tensor, other: Tensor) -> Tensor:
    """The mean over a batch of the squared distance of samples, without gradient."""
    with torch.no_grad():
        return calibration_loss(one, other)
