"""Health of an energy model: its gap, whether its samples last, and what Metropolis thinks of its Langevin steps."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastebm.compiler import energy_gradient
from fastebm.ops import normal
from fastebm.sampling import Langevin
from fastebm.sampling.cascade import LevelSampler

Energy = Callable[[Tensor], Tensor]

TIMES_LONGER = 10
ACCEPTANCE_COUNT = 200
_BATCH = 250


@dataclass(frozen=True, eq=False)
class LongRunMetrics:
    """Where chains end that go on from samples.

    Attributes:
        num_steps: updates that they went on for.
        images: their ends, clamped to [-1, 1]; only those that are finite.
        finite_share: share of chains that are.
        motion: mean of abs(end - start) over pixels and finite chains, in units of images in [-1, 1].
        energy_start, energy_end: mean energies of finite chains.
    """

    num_steps: int
    images: Tensor
    finite_share: float
    motion: float
    energy_start: float
    energy_end: float


@dataclass(frozen=True, eq=False)
class EnergyMetrics:
    """What an energy thinks of real images and samples, and what its chains do.

    Attributes:
        count: real images, and as many samples, whose energies were taken.
        energy_data, energy_samples: their mean energies; `gap` is samples minus data, near 0 in health.
        energy_data_std: standard deviation of the energies of real images, the scale to see the gap on.
        step_size, noise_std, temperature: of the updates below; the temperature is `noise_std^2 / (2 step_size)`.
        acceptance_samples, acceptance_data: mean Metropolis acceptance of one update from samples, and from real
            images; None without noise, where an update is no proposal but a descent.
        long: chains that go on from samples for ten times the steps.
    """

    count: int
    energy_data: float
    energy_data_std: float
    energy_samples: float
    step_size: float
    noise_std: float
    acceptance_samples: float | None
    acceptance_data: float | None
    long: LongRunMetrics

    @property
    def gap(self) -> float:
        return self.energy_samples - self.energy_data

    @property
    def temperature(self) -> float:
        return self.noise_std**2 / (2 * self.step_size)

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "long"}
        long = {f"long_{name}": value for name, value in vars(self.long).items() if name != "images"}
        numbers = values | {"gap": self.gap, "temperature": self.temperature} | long
        return {name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()}


def energy_metrics(
    energy: Energy,
    samples: Tensor,
    real: Tensor,
    *,
    step_size: float,
    noise_std: float,
    num_steps: int,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> EnergyMetrics:
    """The health of `energy`, low meaning real, at samples and real images (N, C, H, W) in [-1, 1].

    Args:
        step_size, noise_std: of the Langevin updates that samples are made by; `last_level` says those of a cascade.
        num_steps: updates in the chain that they are made by; here chains go on for ten times as many.
        dtype: in which the energy runs inside those chains, as in `Langevin`; that of the samples' own says most.
        seed: of the noise.

    Raises ValueError for images of different shapes or none.
    """
    if samples.shape[1:] != real.shape[1:] or not len(samples) or not len(real):
        raise ValueError(f"samples and real images must be alike, got {tuple(samples.shape)} and {tuple(real.shape)}")
    count = min(len(samples), len(real))
    samples, real = samples[:count], real[:count]
    of_data, of_samples = energies(energy, real), energies(energy, samples)
    accepted: list[float | None] = [None, None]
    if noise_std > 0:
        exact = in_double(energy)
        accepted = [
            acceptance_rate(exact, x[:ACCEPTANCE_COUNT].double(), step_size, noise_std, seed=seed)
            for x in (samples, real)
        ]
    return EnergyMetrics(
        count=count,
        energy_data=float(of_data.mean()),
        energy_data_std=float(of_data.std(correction=0)),
        energy_samples=float(of_samples.mean()),
        step_size=step_size,
        noise_std=noise_std,
        acceptance_samples=accepted[0],
        acceptance_data=accepted[1],
        long=long_chains(energy, samples, step_size, noise_std, TIMES_LONGER * num_steps, dtype=dtype, seed=seed),
    )


def last_level(cascade: LevelSampler) -> dict[str, Any]:
    """`step_size` and `noise_std` (means over the highest level, of the noise the root mean square) and `num_steps` (of all
    levels) of a cascade, as `energy_metrics` takes them."""
    rows = cascade.schedule[-cascade.levels[-1].num_steps :].double()
    return {
        "step_size": float(rows[:, 0].mean()),
        "noise_std": float(rows[:, 1].square().mean().sqrt()),
        "num_steps": len(cascade.schedule),
    }


def energies(energy: Energy, images: Tensor) -> Tensor:
    """float64 (N,): energies of images in batches, in eval mode."""
    evaluate = energy_gradient(energy)
    with evaluate.chain():
        return torch.cat([evaluate(part)[0].double().cpu() for part in images.split(_BATCH)])


def long_chains(
    energy: Energy,
    start: Tensor,
    step_size: float,
    noise_std: float,
    num_steps: int,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> LongRunMetrics:
    """Lets chains go on from `start` (N, ...) for `num_steps` updates, without a clamp but at the end.

    Chains that leave the finite numbers are counted and left out.
    """
    # The ids of these chains begin where nobody's samples do.
    sampler = Langevin(energy, step_size, noise_std, dtype=dtype)
    ends = sampler.sample(start, num_steps, seed, chain_ids=2**40, batch_size=_BATCH, check=False)
    before = energies(energy, start)
    finite = ends.flatten(1).isfinite().all(dim=1)
    after = energies(energy, ends.where(finite.view(-1, *[1] * (ends.ndim - 1)), torch.zeros_like(ends)))
    finite &= after.isfinite().to(finite.device)
    ends = ends[finite].clamp(-1, 1)
    if not len(ends):
        return LongRunMetrics(num_steps, ends, 0.0, math.nan, math.nan, math.nan)
    return LongRunMetrics(
        num_steps=num_steps,
        images=ends,
        finite_share=float(finite.double().mean()),
        motion=float((ends - start[finite]).abs().double().mean()),
        energy_start=float(before[finite.cpu()].mean()),
        energy_end=float(after[finite.cpu()].mean()),
    )


def acceptance_rate(energy: Energy, x: Tensor, step_size: float, noise_std: float, *, seed: int = 0) -> float:
    """The mean over `x` of min(1, exp(`log_acceptance`)): the share of Langevin updates that Metropolis would accept.

    At equilibrium 1 means that chains sample exp(-E / T). Far above it, where an update lowers E by many T, it is 1 as
    well and means a descent, and near 0 that updates overshoot.

    Example:
        >>> import torch
        >>> from fastebm.evaluation import acceptance_rate
        >>> x = torch.randn(1000, 2, dtype=torch.float64)
        >>> acceptance_rate(lambda x: 0.5 * x.square().sum(1), x, step_size=1e-4, noise_std=2e-4**0.5) > 0.999
        True
    """
    return float(log_acceptance(energy, x, step_size, noise_std, seed=seed).clamp(max=0).exp().mean())


def log_acceptance(energy: Energy, x: Tensor, step_size: float, noise_std: float, *, seed: int = 0) -> Tensor:
    """float64 (N,): the log of the Metropolis-Hastings ratio of one Langevin update from each `x`.

    The update x' = x - η ∇E(x) + σ ξ is a proposal q(x'|x) ~ exp(-|x' - x + η ∇E(x)|^2 / (2 σ^2)) for the density
    exp(-E(x) / T). At T = σ^2 / (2 η) it is the one of MALA (Roberts and Tweedie, 1996), with U = E / T and τ = η T:
    x' = x - τ ∇U(x) + sqrt(2 τ) ξ. So

        log a = (E(x) - E(x')) / T + (|x' - x + η ∇E(x)|^2 - |x - x' + η ∇E(x')|^2) / (2 σ^2),

    whose first square is |σ ξ|^2. Image recipes have T near 1e-6, where energies in float32 are too coarse: give `x`
    and the energy in float64 (`in_double`).

    Args:
        x: (N, ...), floating point; the energy is evaluated in its type.
        step_size, noise_std: η and σ, positive.
        seed: of ξ, stream LANGEVIN, one chain for each x.

    Raises ValueError for an η or σ that is not positive.
    """
    if not (step_size > 0 and noise_std > 0):
        raise ValueError(
            f"a proposal needs a positive step_size and noise_std, got {step_size} and {noise_std}; without noise an "
            "update is a descent, which no chain could go back"
        )
    evaluate = energy_gradient(energy, engine="autograd")
    temperature = noise_std**2 / (2 * step_size)
    noise = normal(x.shape, seed=seed, device=x.device).to(x.dtype)
    logs = []
    with evaluate.chain():
        for here, draws in zip(x.split(_BATCH), noise.split(_BATCH), strict=True):
            energy_here, gradient_here = (tensor.clone() for tensor in evaluate(here))
            there = here - step_size * gradient_here + noise_std * draws
            energy_there, gradient_there = evaluate(there)
            back = here - there + step_size * gradient_there
            squares = (noise_std * draws).double().square() - back.double().square()
            fall = (energy_here.double() - energy_there.double()) / temperature
            logs.append(fall + squares.flatten(1).sum(dim=1) / (2 * noise_std**2))
    return torch.cat(logs).cpu()


def in_double(energy: Energy) -> Energy:
    """A copy of an energy with weights in float64, of a module or a `functools.partial` of one; others as they are."""
    if isinstance(energy, functools.partial):
        return functools.partial(in_double(energy.func), *energy.args, **energy.keywords)
    return copy.deepcopy(energy).double() if isinstance(energy, nn.Module) else energy
