"""Recipes whose chains go on from a replay buffer: IGEBM, the UvA tutorial, improved CD and CLEL."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fastebm import ops
from fastebm.losses import contrastive_divergence, energy_l2, improved_cd_kl, last_step, nearest_distance
from fastebm.ops.langevin import NoiseOrder
from fastebm.recipes.recipe import ContrastiveLoss, Negatives, Optimizer, Overrides, Recipe, energies, make_sampler
from fastebm.rng import Stream
from fastebm.sampling import Langevin, ReplayBuffer
from fastebm.sampling.replay_buffer import Augment
from fastebm.sampling.sampler import Energy
from fastebm.sampling.starts import uniform

__all__ = [
    "HalfSquaredNorm",
    "ImprovedCD",
    "ImprovedCDLoss",
    "ImprovedCDNegatives",
    "Negated",
    "clel",
    "igebm",
    "improved_cd",
    "uva_tutorial",
]

_IGEBM: dict[str, Any] = {
    "num_steps": 60,
    "step_size": 10.0,
    "noise_std": 0.005,
    "noise_first": True,
    "grad_clip": 0.01,
    "clamp": (0.0, 1.0),
}


def igebm(energy: Energy, **overrides: Unpack[Overrides]) -> Recipe:
    """IGEBM on CIFAR-10: noise, then the gradient there, clipped by value, then a clamp to [0, 1].

    `y = x + 0.005 ξ` and `x' = clamp(y - 10 clip(∇E(y), 0.01), 0, 1)`, 60 times. Chains start at U(0, 1), or go on from
    a ring of 10,000 ends that are stored as uint8, with 5 % restarts. The loss is `E⁺ - E⁻ + E⁺² + E⁻²`.

    Adam has the rates of decay (0, 0.999). For ImageNet at 128x128 the authors give 50 steps of size 100 without a
    clip: `igebm(energy, step_size=100.0, num_steps=50, grad_clip=None)`. The commit of `train.py` that we read keeps
    50,000 ends. A uint8 of theirs wraps around at 1.0; ours stays at 255.

    Args:
        energy: gives `(B,)` for images `(B, C, H, W)` in [0, 1]; low means real.
        overrides: `num_steps`, `step_size` and options of `Langevin`, in place of the published ones.

    Source: Du & Mordatch, "Implicit Generation and Modeling with EBMs", NeurIPS 2019; openai/ebm_code_release
    `train.py`.

    Example:
        >>> import torch, fastebm
        >>> energy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1))
        >>> recipe = fastebm.recipes.igebm(energy, num_steps=5)
        >>> buffer, real = recipe.buffer((3, 4, 4), seed=0), torch.rand(8, 3, 4, 4)
        >>> recipe.loss(energy, real, recipe.negatives(real, buffer)).shape, len(buffer)
        (torch.Size([]), 8)
    """
    sampler, num_steps = make_sampler("igebm", energy, _IGEBM, overrides)
    start = uniform(0.0, 1.0)
    return Recipe(
        name="igebm",
        source="Du & Mordatch, NeurIPS 2019; openai/ebm_code_release train.py",
        sampler=sampler,
        num_steps=num_steps,
        start=start,
        buffer=functools.partial(
            ReplayBuffer,
            capacity=10_000,
            restart=0.05,
            write="ring",
            start=start,
            dtype=torch.uint8,
            value_range=(0.0, 1.0),
        ),
        loss=ContrastiveLoss(l2=1.0),
        optimizer=Optimizer(learning_rate=3e-4, betas=(0.0, 0.999), batch_size=128),
    )


_UVA: dict[str, Any] = {
    "num_steps": 60,
    "step_size": 10.0,
    "noise_std": 0.005,
    "noise_first": True,
    "clamp_noise": True,
    "grad_clip": 0.03,
    "clamp": (-1.0, 1.0),
}


def uva_tutorial(energy: Energy, **overrides: Unpack[Overrides]) -> Recipe:
    """The UvA deep learning tutorial 8 on MNIST: noise and a clamp, the gradient there, clipped, a step and a clamp.

    `y = clamp(x + 0.005 ξ, -1, 1)` and `x' = clamp(y - 10 clip(∇E(y), 0.03), -1, 1)`, 60 times in training and 256 to
    generate. Chains start at U(-1, 1). The buffer keeps the 8,192 newest ends; in each draw a Binomial(n, 0.05) number
    of chains is new, in front. The loss is `E⁺ - E⁻ + 0.1 (E⁺² + E⁻²)`.

    Adam has the rates of decay (0, 0.999); the learning rate falls by 3 % an epoch. Real images get noise of 0.005,
    with a clamp (`recipe.noisy`). The tutorial's net gives f = -E: hand over
    `fastebm.recipes.Negated(net)`.

    Args:
        energy: gives `(B,)` for images `(B, C, H, W)` in [-1, 1]; low means real.
        overrides: `num_steps`, `step_size` and options of `Langevin`, in place of the published ones.

    Source: Lippe, UvA deep learning tutorials, tutorial 8: "Deep Energy Models".

    Example:
        >>> import torch, fastebm
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1), torch.nn.Flatten(0))
        >>> recipe = fastebm.recipes.uva_tutorial(net, num_steps=5)
        >>> buffer, real = recipe.buffer((1, 4, 4), seed=0), torch.rand(8, 1, 4, 4)
        >>> recipe.negatives(real, buffer).x.abs().max().item() <= 1
        True
    """
    sampler, num_steps = make_sampler("uva_tutorial", energy, _UVA, overrides)
    start = uniform(-1.0, 1.0)
    return Recipe(
        name="uva_tutorial",
        source="Lippe, UvA deep learning tutorials, tutorial 8",
        sampler=sampler,
        num_steps=num_steps,
        start=start,
        buffer=functools.partial(
            ReplayBuffer, capacity=8192, restart=0.05, write="newest_first", restart_law="binomial", start=start
        ),
        loss=ContrastiveLoss(l2=0.1),
        optimizer=Optimizer(
            learning_rate=1e-4,
            betas=(0.0, 0.999),
            batch_size=128,
            grad_norm_clip=0.1,
            decay=0.97,
            decay_epochs=None,
        ),
        data_noise=0.005,
        data_clamp=(-1.0, 1.0),
        generation_steps=256,
    )


_CLEL: dict[str, Any] = {
    "num_steps": 60,
    "step_size": 100.0,
    "noise_std": 0.001,
    "grad_clip": 100.0,
    "clamp": (0.0, 1.0),
}


class HalfSquaredNorm(nn.Module):
    """`E(x) = 1/2 ||f(x)||**2` of features `f(x)`, `(B, D)`. As a module, so that chains have f in eval mode."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).square().sum(1) / 2


class Negated(nn.Module):
    """`E(x) = -f(x)` of a net that gives f, high for real images. As a module, so that chains have f in eval mode.

    Example:
        >>> import torch, fastebm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0))
        >>> x = torch.ones(2, 4)
        >>> torch.equal(fastebm.recipes.Negated(net)(x), -net(x))
        True
    """

    def __init__(self, net: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        return -self.net(x, *conditions)


def clel(energy: Energy, *, augment: Augment | None = None, **overrides: Unpack[Overrides]) -> Recipe:
    """The energy's part of CLEL on CIFAR-10: `x' = clamp(x - 100 clip(∇E, 100) + 0.001 ξ, 0, 1)`, 60 times.

    The clip is the step size, which the authors' code hands over as `step_clip`. Chains start at U(0, 1). The buffer
    has 10,000 places; a chain starts anew with probability 0.001, and its end goes back to the place it was drawn from.
    The loss is `E⁺ - E⁻ + E⁺² + E⁻²`.

    CLEL's energy is `1/2 ||f(x)||**2` of features `f(x)`, `(B, D)`: `fastebm.recipes.HalfSquaredNorm(f)`. The encoder,
    its SimCLR loss, and the term that aligns the energy's projection with it are not part of the chains and are yours
    to add to the loss. The authors draw places without replacement, and augment chains that start anew too.

    Args:
        energy: gives `(B,)` for images `(B, C, H, W)` in [0, 1]; low means real.
        augment: of the drawn states, as in `ReplayBuffer`.
        overrides: `num_steps`, `step_size` and options of `Langevin`, in place of the published ones.

    Source: Lee et al., "Guiding Energy-Based Models via Contrastive Latent Variables", ICLR 2023; hankook/CLEL
    `models/sampler.py`, `models/ebm.py`.

    Example:
        >>> import torch, fastebm
        >>> features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16))
        >>> energy = fastebm.recipes.HalfSquaredNorm(features)
        >>> recipe = fastebm.recipes.clel(energy, num_steps=5)
        >>> buffer, real = recipe.buffer((3, 4, 4), seed=0), torch.rand(8, 3, 4, 4)
        >>> recipe.loss(energy, real, recipe.negatives(real, buffer)).requires_grad
        True
    """
    sampler, num_steps = make_sampler("clel", energy, _CLEL, overrides)
    start = uniform(0.0, 1.0)
    return Recipe(
        name="clel",
        source="Lee et al., ICLR 2023; hankook/CLEL models/sampler.py",
        sampler=sampler,
        num_steps=num_steps,
        start=start,
        buffer=functools.partial(ReplayBuffer, capacity=10_000, restart=0.001, start=start, augment=augment),
        loss=ContrastiveLoss(l2=1.0),
        optimizer=Optimizer(
            learning_rate=1e-4, betas=(0.0, 0.999), batch_size=64, warmup=2000, ema=0.5 ** (64 / 20_000)
        ),
    )


_IMPROVED_CD: dict[str, Any] = {
    "num_steps": 40,
    "step_size": 100.0,
    "noise_std": 0.001,
    "noise_first": True,
    "clamp": (0.0, 1.0),
}


@dataclass(frozen=True, eq=False)
class ImprovedCDNegatives(Negatives):
    """Ends, and what the loss needs besides them.

    Attributes:
        before_last: the states behind the noise of the last step, where its gradient is evaluated, `(B, ...)`.
        kept: states of the buffer, `(100, ...)`; None while it holds no more than 1,000.
    """

    before_last: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class ImprovedCDLoss:
    """`E⁺ - E⁻ + E⁺² + E⁻² + E'(x') - 0.3 log(distance of x' to the nearest kept state)`, means over the batch.

    x' are the ends of a last step of `step_size` that is differentiable in the weights, with bounds `clamp`.
    """

    step_size: float
    clamp: tuple[float | None, float | None]
    kl: float = 1.0
    repel: float = 0.3

    def __call__(
        self,
        energy: Callable[..., Tensor],
        real: Tensor,
        negatives: ImprovedCDNegatives,
        labels: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(negatives, ImprovedCDNegatives) or negatives.before_last is None:
            raise TypeError(f"this loss needs the negatives of improved_cd, got {type(negatives).__name__}")
        given = () if negatives.labels is None else (negatives.labels,)

        def conditioned(x: Tensor) -> Tensor:
            return energies(energy, x, *given)

        ends = last_step(conditioned, negatives.before_last, self.step_size, clamp=self.clamp)
        data, samples = energies(energy, real, labels), conditioned(negatives.x)
        loss = contrastive_divergence(data, samples) + energy_l2(data, samples)
        loss = loss + self.kl * improved_cd_kl(conditioned, ends)
        if negatives.kept is None:
            return loss
        return loss - self.repel * nearest_distance(ends, negatives.kept.to(ends)).log().mean()


@dataclass(frozen=True, eq=False, kw_only=True)
class ImprovedCD(Recipe):
    """The recipe `improved_cd`, whose negatives are `ImprovedCDNegatives`.

    Attributes (besides those of `Recipe`):
        repel_from: the number of states in the buffer above which ends are held apart from kept ones.
        num_kept: the number of kept states that are drawn for that.
    """

    repel_from: int = 1000
    num_kept: int = 100

    @torch.no_grad()
    def negatives(  # type: ignore[override]
        self,
        real: Tensor,
        buffer: ReplayBuffer,
        *,
        labels: Tensor | None = None,
        check: bool = True,
    ) -> ImprovedCDNegatives:
        """One cycle: chains are drawn, run, with the last step by itself, and put back. See `Recipe.negatives`."""
        draw = self._draw(real, buffer, labels)
        sampler = self.sampler
        if draw is None or not isinstance(sampler, Langevin):
            raise TypeError("improved_cd needs its replay buffer and a Langevin sampler")
        start, ids = draw.x.to(real), draw.chain_ids.to(real.device)
        given = () if draw.labels is None else (draw.labels.to(real.device),)
        state = sampler.init(
            start, draw.seed, ids, start_step=draw.start_step, num_steps=self.num_steps, conditions=given
        )
        with sampler.gradient.chain():
            state = sampler.advance(state, self.num_steps - 1, check=check)
            after, _ = sampler.step(state)
        row = min(self.num_steps, len(state.schedule)) - 1
        noise = ops.normal(
            start.shape, seed=draw.seed, step=state.step, stream=Stream.LANGEVIN, chain_ids=ids, dtype=start.dtype
        )
        before_last = state.x + float(state.schedule[row, 1]) * noise
        buffer.put(draw, after.x)
        kept = buffer.draw(self.num_kept, 0).x if len(buffer) > self.repel_from else None
        return ImprovedCDNegatives(
            after.x, real, start, draw, given[0] if given else None, before_last=before_last, kept=kept
        )


def improved_cd(energy: Energy, *, augment: Augment | None = None, **overrides: Unpack[Overrides]) -> ImprovedCD:
    """Improved contrastive divergence on CIFAR-10, whose loss has the KL term through a differentiable last step.

    `y = x + 0.001 ξ` and `x' = clamp(y - 100 ∇E(y), 0, 1)`, 40 times. Chains start at U(0, 1), or go on from a uniform
    sample of all ends (a reservoir of 10,000, uint8) with 0.1 % restarts. The loss is `E⁺ - E⁻ + E⁺² + E⁻² + E'(x')`,
    and from 1,000 kept states on `- 0.3 log(distance of x' to the nearest of 100 of them)`; E' has fixed weights, and
    x' comes from a last step that is differentiable in the weights.

    Adam has the rates of decay (0, 0.9); gradients are clipped to a norm of 0.5, and the moving average of the weights
    has a decay of 0.99. The authors augment drawn images by crops, flips, blur and colours: `augment`.

    Args:
        energy: gives `(B,)` for images `(B, C, H, W)` in [0, 1], its gradient differentiable once more; low means real.
        augment: of the drawn states, as in `ReplayBuffer`.
        overrides: `num_steps`, a `step_size` that is a number, and options of `Langevin`, in place of the published
            ones. The loss repeats the last step, so it stays one with the noise first and without a clip.

    Source: Du, Li, Tenenbaum & Mordatch, "Improved Contrastive Divergence Training of EBMs", ICML 2021;
    yilundu/improved_contrastive_divergence `train.py`.

    Example:
        >>> import torch, fastebm
        >>> energy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1), torch.nn.Sigmoid())
        >>> recipe = fastebm.recipes.improved_cd(energy, num_steps=5)
        >>> buffer, real = recipe.buffer((3, 4, 4), seed=0), torch.rand(8, 3, 4, 4)
        >>> recipe.loss(energy, real, recipe.negatives(real, buffer)).requires_grad
        True
    """
    sampler, num_steps = make_sampler("improved_cd", energy, _IMPROVED_CD, overrides)
    step_size, clamp = {**_IMPROVED_CD, **overrides}["step_size"], {**_IMPROVED_CD, **overrides}["clamp"]
    if not isinstance(step_size, int | float):
        raise TypeError(f"improved_cd differentiates a step of one size: step_size is a number, got {step_size!r}")
    if sampler.noise_order != NoiseOrder.BEFORE or sampler.grad_clip or sampler.grad_norm_clip:
        raise ValueError(
            "improved_cd differentiates a step with the noise first and without a clip: it takes no noise_first=False, "
            "clamp_noise, grad_clip and grad_norm_clip"
        )
    start = uniform(0.0, 1.0)
    return ImprovedCD(
        name="improved_cd",
        source="Du et al., ICML 2021; yilundu/improved_contrastive_divergence train.py",
        sampler=sampler,
        num_steps=num_steps,
        start=start,
        buffer=functools.partial(
            ReplayBuffer,
            capacity=10_000,
            restart=0.001,
            write="reservoir",
            start=start,
            dtype=torch.uint8,
            value_range=(0.0, 1.0),
            augment=augment,
        ),
        loss=ImprovedCDLoss(step_size, clamp or (None, None)),
        optimizer=Optimizer(learning_rate=2e-4, betas=(0.0, 0.9), batch_size=128, grad_norm_clip=0.5, ema=0.99),
    )
