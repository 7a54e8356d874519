"""Metrics of an energy: gap between samples and real images, Metropolis acceptance of its updates, long-run chains."""

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
from fastebm.distributed import shared_rows
from fastebm.ops import normal
from fastebm.sampling import Langevin
from fastebm.sampling.cascade import LevelSampler

Energy = Callable[[Tensor], Tensor]

TIMES_LONGER = 10
ACCEPTANCE_COUNT = 200
FIRST_CHAIN_ID = 2**40
"""Chains of these metrics have ids from here on, which no samples have."""
_BATCH = 250


@dataclass(frozen=True, eq=False, kw_only=True)
class EnergyGap:
    """Energies of real images and of samples.

    Attributes:
        count: how many real images and how many samples were evaluated.
        energy_data, energy_samples: mean energies, low for real images.
        energy_data_std: standard deviation of the energies of real images, the scale to compare the gap with.
    """

    count: int
    energy_data: float
    energy_data_std: float
    energy_samples: float

    @property
    def gap(self) -> float:
        """Energy of samples minus energy of data; near 0 for a well-trained model."""
        return self.energy_samples - self.energy_data

    def to_json(self) -> dict[str, Any]:
        """All numbers; those that are not finite become None."""
        numbers = vars(self) | {"gap": self.gap} | self._derived()
        numbers = {name: value for name, value in numbers.items() if not isinstance(value, Tensor | LongRunMetrics)}
        return {name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()}

    def _derived(self) -> dict[str, float | None]:
        return {}


def energy_gap(energy: Energy, samples: Tensor, real: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The first samples and real images (N, C, H, W), as many of both, and the attributes of their `EnergyGap`.

    Raises ValueError for images of different shapes, none, or not finite.
    """
    if samples.shape[1:] != real.shape[1:] or not len(samples) or not len(real):
        raise ValueError(f"samples and real images must be alike, got {tuple(samples.shape)} and {tuple(real.shape)}")
    for name, images in (("samples", samples), ("real images", real)):
        if not images.isfinite().all():
            raise ValueError(f"{name} must be finite, and some pixels are infinite or not a number")
    count = min(len(samples), len(real))
    samples, real = samples[:count], real[:count]
    of_data, of_samples = energies(energy, real), energies(energy, samples)
    return (
        samples,
        real,
        {
            "count": count,
            "energy_data": float(of_data.mean()),
            "energy_data_std": float(of_data.std(correction=0)),
            "energy_samples": float(of_samples.mean()),
        },
    )


@dataclass(frozen=True, eq=False)
class LongRunMetrics:
    """Chains that continue from samples.

    Attributes:
        num_steps: updates that they continued for.
        images: their ends, clamped to [-1, 1]; only finite ones.
        finite_share: share of chains that end finite.
        motion: mean of abs(end - start) over pixels and finite chains, in units of images in [-1, 1].
        energy_start, energy_end: mean energies of finite chains.
    """

    num_steps: int
    images: Tensor
    finite_share: float
    motion: float
    energy_start: float
    energy_end: float


@dataclass(frozen=True, eq=False, kw_only=True)
class EnergyMetrics(EnergyGap):
    """The energy gap, the acceptance of Langevin updates, and long-run chains.

    Attributes:
        step_size, noise_std: of the updates below.
        acceptance_samples, acceptance_data: mean Metropolis acceptance of one update from samples, and from real
            images; None without noise, where an update is a descent and no proposal.
        long_run: chains that continue from samples for ten times the steps.
    """

    step_size: float
    noise_std: float
    acceptance_samples: float | None
    acceptance_data: float | None
    long_run: LongRunMetrics

    @property
    def temperature(self) -> float:
        """`noise_std^2 / (2 step_size)`."""
        return self.noise_std**2 / (2 * self.step_size)

    def _derived(self) -> dict[str, float | None]:
        long_run = {f"long_{name}": value for name, value in vars(self.long_run).items() if name != "images"}
        return {"temperature": self.temperature, **long_run}


def energy_metrics(
    energy: Energy,
    samples: Tensor,
    real: Tensor,
    *,
    step_size: float,
    noise_std: float,
    num_steps: int,
    dtype: torch.dtype | None = None,
    grad_norm_clip: float | None = None,
    seed: int = 0,
) -> EnergyMetrics:
    """Metrics of `energy`, low for real images, at samples and real images (N, C, H, W) in [-1, 1].

    Args:
        step_size, noise_std: of the Langevin updates that generate samples; for a cascade, see `last_level_settings`.
        num_steps: updates in a chain that generates samples; long-run chains have ten times as many.
        dtype, grad_norm_clip: of long-run chains, as in `Langevin`; use those of the chains of samples. The acceptance
            is that of updates without a clip.
        seed: of the noise.

    Raises ValueError for images of different shapes or none.
    """
    samples, real, gap = energy_gap(energy, samples, real)
    accepted: list[float | None] = [None, None]
    if noise_std > 0:
        exact = in_double(energy)
        accepted = [
            acceptance_rate(exact, x[:ACCEPTANCE_COUNT].double(), step_size, noise_std, seed=seed)
            for x in (samples, real)
        ]
    long_steps = TIMES_LONGER * num_steps
    chains: dict[str, Any] = {"dtype": dtype, "grad_norm_clip": grad_norm_clip, "seed": seed}
    return EnergyMetrics(
        **gap,
        step_size=step_size,
        noise_std=noise_std,
        acceptance_samples=accepted[0],
        acceptance_data=accepted[1],
        long_run=long_chains(energy, samples, step_size, noise_std, long_steps, **chains),
    )


def last_level_settings(cascade: LevelSampler) -> dict[str, Any]:
    """Arguments of `energy_metrics` for a cascade: the mean `step_size` and the root mean square `noise_std` over its
    highest level, and `num_steps` over all levels."""
    rows = cascade.schedule[-cascade.levels[-1].num_steps :].double()
    return {
        "step_size": float(rows[:, 0].mean()),
        "noise_std": float(rows[:, 1].square().mean().sqrt()),
        "num_steps": len(cascade.schedule),
    }


def energies(energy: Energy, images: Tensor) -> Tensor:
    """Energies of images in eval mode, computed in batches: float64 (N,) on the CPU."""
    evaluate = energy_gradient(energy)
    with evaluate.chain():
        return shared_rows(
            len(images),
            lambda rows: torch.cat(
                [evaluate(part)[0].double().cpu() for part in images[rows.start : rows.stop].split(_BATCH)]
            ),
        )


def long_chains(
    energy: Energy,
    start: Tensor,
    step_size: float,
    noise_std: float,
    num_steps: int,
    *,
    dtype: torch.dtype | None = None,
    grad_norm_clip: float | None = None,
    seed: int = 0,
) -> LongRunMetrics:
    """Continues chains from `start` (N, ...) for `num_steps` updates; they are clamped only at the end.

    Chains that become infinite or NaN are counted and left out.
    """
    sampler = Langevin(energy, step_size, noise_std, dtype=dtype, grad_norm_clip=grad_norm_clip)
    ends = sampler.sample(start, num_steps, seed, chain_ids=FIRST_CHAIN_ID, batch_size=_BATCH, check=False)
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

    At equilibrium, 1 means that chains sample exp(-E / T). At energies far above equilibrium an update that lowers E by
    many T is accepted as well: 1 then means a descent. Values near 0 mean that updates overshoot.

    Example:
        >>> import torch
        >>> from fastebm.evaluation import acceptance_rate
        >>> x = torch.randn(1000, 2, dtype=torch.float64)
        >>> acceptance_rate(lambda x: 0.5 * x.square().sum(1), x, step_size=1e-4, noise_std=2e-4**0.5) > 0.999
        True
    """
    return float(log_acceptance(energy, x, step_size, noise_std, seed=seed).clamp(max=0).exp().mean())


def log_acceptance(energy: Energy, x: Tensor, step_size: float, noise_std: float, *, seed: int = 0) -> Tensor:
    """The log of the Metropolis-Hastings ratio of one Langevin update from each `x`: float64 (N,).

    The update x' = x - η ∇E(x) + σ ξ is a proposal q(x'|x) ~ exp(-|x' - x + η ∇E(x)|^2 / (2 σ^2)) for the density
    exp(-E(x) / T). At T = σ^2 / (2 η) it is that of MALA (Roberts and Tweedie, 1996) with U = E / T and τ = η T:
    x' = x - τ ∇U(x) + sqrt(2 τ) ξ. So

        log a = (E(x) - E(x')) / T + (|x' - x + η ∇E(x)|^2 - |x - x' + η ∇E(x')|^2) / (2 σ^2),

    where the first square is |σ ξ|^2. Image recipes have T near 1e-6, for which float32 energies are too coarse: pass
    `x` and the energy in float64 (`in_double`).

    Args:
        x: (N, ...), floating point; the energy is evaluated in its dtype.
        step_size, noise_std: η and σ, positive.
        seed: of ξ, stream LANGEVIN, one chain for each x.

    Raises ValueError for an η or σ that is not positive.
    """
    if not (step_size > 0 and noise_std > 0):
        raise ValueError(
            f"a proposal needs a positive step_size and noise_std, got {step_size} and {noise_std}; without noise an "
            "update is a descent that no chain reverses"
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
    """A float64 copy of a module, or of a `functools.partial` of one; other functions are returned as they are."""
    if isinstance(energy, functools.partial):
        return functools.partial(in_double(energy.func), *energy.args, **energy.keywords)
    return copy.deepcopy(energy).double() if isinstance(energy, nn.Module) else energy
