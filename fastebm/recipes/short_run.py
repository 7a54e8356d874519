"""The recipe of short-run MCMC: chains from noise, without a buffer."""

from __future__ import annotations

from typing import Any, Unpack

from fastebm.recipes.recipe import ContrastiveLoss, Optimizer, Overrides, Recipe, make_sampler
from fastebm.sampling.sampler import Energy
from fastebm.sampling.starts import uniform

__all__ = ["short_run"]

_SHORT_RUN: dict[str, Any] = {"num_steps": 100, "step_size": 1.0, "noise_std": 0.01}


def short_run(energy: Energy, **overrides: Unpack[Overrides]) -> Recipe:
    """Short-run MCMC on CIFAR-10: `x' = x - ∇E(x) + 0.01 ξ`, 100 times from U(-1, 1), without a clamp or a buffer.

    The loss is `E⁺ - E⁻`. Adam has a learning rate of 1e-4. Real images get noise of 0.03 (`recipe.noisy`), which the
    authors lower until the training is unstable. The published net gives f = -E
    (`fastebm.recipes.Negated`).

    Args:
        energy: gives `(B,)` for images `(B, C, H, W)` in [-1, 1]; low means real.
        overrides: `num_steps`, `step_size` and options of `Langevin`, in place of the published ones.

    Source: Nijkamp, Hill, Zhu & Wu, "Learning Non-Convergent Non-Persistent Short-Run MCMC Toward Energy-Based Model",
    NeurIPS 2019; enijkamp/short_run `train_cifar10_minimal.py`.

    Example:
        >>> import torch, fastebm
        >>> energy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1))
        >>> recipe = fastebm.recipes.short_run(energy, num_steps=5)
        >>> real = torch.rand(8, 3, 4, 4) * 2 - 1
        >>> recipe.loss(energy, real, recipe.negatives(real)).requires_grad
        True
    """
    sampler, num_steps = make_sampler("short_run", energy, _SHORT_RUN, overrides)
    return Recipe(
        name="short_run",
        source="Nijkamp et al., NeurIPS 2019; enijkamp/short_run train_cifar10_minimal.py",
        sampler=sampler,
        num_steps=num_steps,
        start=uniform(-1.0, 1.0),
        loss=ContrastiveLoss(),
        optimizer=Optimizer(learning_rate=1e-4, batch_size=64),
        data_noise=0.03,
    )
