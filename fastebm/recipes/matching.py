"""The recipe of Energy Matching: a potential trained by flow matching, and by chains that start at data and at
noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastebm import ops
from fastebm.losses import contrastive_divergence
from fastebm.recipes.recipe import Negatives, Optimizer, Recipe, address, check_real, energies
from fastebm.rng import Stream
from fastebm.sampling import Langevin, ReplayBuffer, per_chain
from fastebm.sampling.sampler import Energy, Gradient, gradient_of
from fastebm.scalars import as_count, as_real

__all__ = ["EnergyMatching", "EnergyMatchingLoss", "energy_matching"]


@dataclass(frozen=True)
class EnergyMatchingLoss:
    """Flow matching plus `max(weight (mean V(data) - trimmed mean V(ends)), -bound)`.

    The trimmed mean leaves out the share `trim` of the ends that has the highest energies. Flow matching pairs `real`
    with standard normal noise x₀ by the assignment of least squared distance, draws pairs with replacement and times t
    in [0, 1), and returns the mean of `(-∇V(x_t) - (real - x₀))**2` at `x_t = (1 - t) x₀ + t real`. It draws from
    torch's generator: the noise, the pairs, the times. The data of the second term are those of `negatives`, which may
    be another batch than `real`.
    """

    weight: float = 1e-3
    trim: float = 0.1
    bound: float = 1.0

    def __call__(
        self, energy: Callable[..., Tensor], real: Tensor, negatives: Negatives, labels: Tensor | None = None
    ) -> Tensor:
        data, samples = energies(energy, negatives.real), energies(energy, negatives.x)
        kept = samples.sort().values[: len(samples) - int(self.trim * len(samples))]
        contrast = self.weight * contrastive_divergence(data, kept)
        return flow_matching(energy, real) + contrast.clamp(min=-self.bound)


def flow_matching(energy: Callable[..., Tensor], real: Tensor) -> Tensor:
    """The first term of `EnergyMatchingLoss`."""
    noise = torch.randn_like(real)
    cost = torch.cdist(noise.flatten(1).double(), real.flatten(1).double()).square()
    _, partner = linear_sum_assignment(cost.detach().cpu().numpy())
    chosen = torch.randint(len(real), (len(real),), device=real.device)
    noise, data = noise[chosen], real[torch.from_numpy(partner).to(real.device)[chosen]]
    t = torch.rand(len(real), device=real.device, dtype=real.dtype).view(-1, *(1,) * (real.dim() - 1))
    with torch.enable_grad():
        x = ((1 - t) * noise + t * data).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energies(energy, x).sum(), x, create_graph=True)
    return (-gradient - (data - noise)).square().mean()


@dataclass(frozen=True, eq=False, kw_only=True)
class EnergyMatching(Recipe):
    """The recipe `energy_matching`.

    Attributes (besides those of `Recipe`; there is a sampler for each number of chains, `sampler_of`):
        gradient: of the potential.
        step_size: of a step, and of the times of the schedule.
        epsilon: the temperature of chains from data, and of those from noise from time 1 on.
        clamp: bounds of the ends.
    """

    gradient: Gradient
    step_size: float
    epsilon: float
    clamp: tuple[float, float]

    def sampler_of(self, count: int) -> Langevin:
        """The sampler of `count` chains, of which the first half starts at data."""
        late = torch.arange(self.num_steps, device="cpu") * self.step_size >= 1
        hot = late[:, None] | (torch.arange(count, device="cpu") < count // 2)
        noise = per_chain(hot * (2 * self.step_size * self.epsilon) ** 0.5)
        return Langevin(self.gradient, self.step_size, noise, clamp=self.clamp, clamp_at="end")

    @torch.no_grad()
    def negatives(
        self,
        real: Tensor,
        buffer: ReplayBuffer | None = None,
        *,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        start_step: int = 0,
        labels: Tensor | None = None,
        check: bool = True,
    ) -> Negatives:
        """The ends of chains, half of which starts at `real` and the rest at noise; see `Recipe.negatives`."""
        check_real(real)
        if buffer is not None or labels is not None:
            raise ValueError("energy_matching has no replay buffer and no labels")
        seed, ids = address(real, seed, chain_ids)
        half = len(real) // 2
        start = ops.normal(
            real.shape, seed=seed, step=start_step, stream=Stream.INITIAL, chain_ids=ids, dtype=real.dtype
        )
        start[:half] = real[:half]
        options: dict[str, Any] = {"start_step": start_step, "check": check}
        ends = self.sampler_of(len(real)).sample(start, self.num_steps, seed, ids, **options)
        return Negatives(ends, real, start)

    @torch.no_grad()
    def flow(self, x0: Tensor, num_steps: int) -> Tensor:
        """Images, by `num_steps` steps of Heun's method along `dx/dt = -∇V(x)` from noise x0, `(B, ...)`."""
        x = x0
        with self.gradient.chain():
            for _ in range(as_count("num_steps", num_steps)):
                _, first = self.gradient(x)
                first = first.clone()
                _, second = self.gradient(x - self.step_size * first)
                x = x - self.step_size / 2 * (first + second)
        return x


def energy_matching(
    energy: Energy,
    *,
    num_steps: int = 200,
    step_size: float = 0.01,
    epsilon: float = 0.01,
    dtype: torch.dtype | None = None,
    engine: str = "auto",
    reproducible: bool = True,
) -> EnergyMatching:
    """Energy Matching on CIFAR-10: half of the chains starts at data, the other half at N(0, I), with a clamp at the
    end.

    `x' = x - 0.01 ∇V(x) + √(2 · 0.01 ε) ξ`, 200 times. For chains from data ε is 0.01; for those from noise it is 0 for
    100 steps, up to time 1, and 0.01 from there on. Ends are clamped to [-1, 1]. The loss is that of flow matching,
    plus `1e-3 (V⁺ - V⁻)` without the tenth of the ends that has the highest energies, bounded from below by -1. The
    authors train with flow matching alone first, and take different images for the two terms: `recipe.loss(net, real,
    recipe.negatives(other))`. Images are generated by Heun's method, `recipe.flow(noise, num_steps)`.

    Adam has the rates of decay (0.9, 0.95), a learning rate of 1.2e-3 that grows over 10,000 iterations, a clip of 1,
    and a moving average of 0.9999.

    Args:
        energy: the potential V, `(B,)` for images `(B, C, H, W)` in [-1, 1], its gradient differentiable once more.
        num_steps, step_size, epsilon: in place of the published ones.
        dtype, engine, reproducible: as in `Langevin`.

    Source: Balcerak et al., "Energy Matching: Unifying Flow Matching and Energy-Based Models for Generative Modeling",
    NeurIPS 2025; m1balcerak/EnergyMatching `experiments/cifar10/train_cifar_multigpu.py`.

    Example:
        >>> import torch, fastebm
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1), torch.nn.Sigmoid())
        >>> recipe = fastebm.recipes.energy_matching(net, num_steps=5)
        >>> real = torch.rand(8, 3, 4, 4) * 2 - 1
        >>> negatives = recipe.negatives(real)
        >>> recipe.loss(net, real, negatives).requires_grad, torch.equal(negatives.start[:4], real[:4])
        (True, True)
    """
    return EnergyMatching(
        name="energy_matching",
        source="Balcerak et al., NeurIPS 2025; m1balcerak/EnergyMatching experiments/cifar10",
        sampler=None,
        num_steps=as_count("num_steps", num_steps, 1),
        start=None,
        loss=EnergyMatchingLoss(),
        optimizer=Optimizer(
            learning_rate=1.2e-3, betas=(0.9, 0.95), batch_size=128, grad_norm_clip=1.0, warmup=10_000, ema=0.9999
        ),
        gradient=gradient_of(energy, dtype, engine, reproducible),
        step_size=as_real("step_size", step_size),
        epsilon=as_real("epsilon", epsilon),
        clamp=(-1.0, 1.0),
    )
