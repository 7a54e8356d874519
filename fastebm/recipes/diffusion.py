"""Recipes of diffusion recovery likelihood: an energy for each noise level, given the image of the level above."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastebm import ops
from fastebm.losses import recovery_likelihood as recovery_loss
from fastebm.recipes.recipe import Negatives, Optimizer, Recipe, address, check_real, energies
from fastebm.rng import Stream
from fastebm.sampling import Langevin, ReplayBuffer
from fastebm.sampling.sampler import Gradient, gradient_of
from fastebm.scalars import as_count

__all__ = ["CDRL", "RecoveryLikelihood", "RecoveryLoss", "RecoveryNegatives", "cdrl", "recovery_likelihood"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RecoveryNegatives(Negatives):
    """Ends of chains, and the pairs of images that they belong to.

    Attributes:
        data: images at the level of the ends, `(B, ...)`.
        noisier: the same images at the level above, `(B, ...)`.
        level: what the energy takes besides x, `(B,)`.
        scale: `(B, 1, ...)`, the factor on images and ends where energies are evaluated.
        weight: of each pair in the loss, `(B,)`.
        noise: what was added to the proposals of CDRL, `(B, ...)`; None without.
        proposal_level: what the proposal takes besides the noisier image, `(B,)`; None without.
    """

    data: Tensor
    noisier: Tensor
    level: Tensor
    scale: Tensor
    weight: Tensor
    noise: Tensor | None = None
    proposal_level: Tensor | None = None


@dataclass(frozen=True)
class RecoveryLoss:
    """`mean of weight (E(scale data, level) - E(scale ends, level))`."""

    def __call__(
        self, energy: Callable[..., Tensor], real: Tensor, negatives: Any, labels: Tensor | None = None
    ) -> Tensor:
        if not isinstance(negatives, RecoveryNegatives):
            raise TypeError(f"this loss needs the negatives of its recipe, got {type(negatives).__name__}")
        data = energies(energy, negatives.scale * negatives.data, negatives.level)
        samples = energies(energy, negatives.scale * negatives.x, negatives.level)
        return recovery_loss(data, samples, negatives.weight)


class _Pulled(nn.Module):
    """`factor E(x, level) + pull ||x - noisier||**2`, `(B,)`."""

    def __init__(self, energy: Callable[..., Tensor]) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, noisier: Tensor, level: Tensor, factor: Tensor, pull: Tensor) -> Tensor:
        return factor * energies(self.energy, x, level) + pull * (x - noisier).flatten(1).square().sum(1)


def _column(values: Tensor, x: Tensor) -> Tensor:
    """Values `(B,)` as `(B, 1, ...)`, like x."""
    return values.to(x).view(-1, *(1,) * (x.dim() - 1))


def _levels(count: int, num_levels: int, seed: int, step: int, ids: Tensor) -> Tensor:
    """A level in [0, num_levels) for each chain, each as likely as the others."""
    u = ops.uniform((count, 1), seed=seed, step=step, stream=Stream.INITIAL, chain_ids=ids)[:, 0]
    return (u.double() * num_levels).ceil().long() - 1  # u is in (0, 1]


@dataclass(frozen=True, eq=False, kw_only=True)
class RecoveryLikelihood(Recipe):
    """The recipe `recovery_likelihood`, with an energy `E(x, level)`, level int64 in [0, 6).

    Attributes (besides those of `Recipe`; there is a sampler for the levels of a batch):
        gradient: of the energy given a noisier image.
        sigmas: the noise from level t - 1 to t, float64 `(7,)`; 0 is the first that images have.
        scales: the factor on images on the way to each level, float64 `(7,)`.
        step_squared: b**2, the factor of squared step sizes.
    """

    gradient: Gradient
    sigmas: Tensor
    scales: Tensor
    step_squared: float

    def _chain(
        self, noisier: Tensor, level: Tensor, seed: int, ids: Tensor, start_step: int, noise_scale: float, check: bool
    ) -> Tensor:
        """The ends at `level` of chains that start at `noisier`, the images of the level above."""
        on_cpu = level.cpu()
        last = on_cpu + 1 == len(self.sigmas) - 1
        sigma = self.sigmas[on_cpu + 1]
        cumulated = (1 - self.scales.cumprod(0).square()).sqrt()
        squared = cumulated[on_cpu] / cumulated[0] * self.step_squared * sigma.square()
        pull = torch.where(last, 0.0, 1 / (2 * sigma.square()))
        sampler = Langevin(self.gradient, squared / 2, squared.sqrt() * noise_scale)
        conditions = (noisier, level, (1 / squared).to(noisier), pull.to(noisier))
        options: dict[str, Any] = {"start_step": start_step, "conditions": conditions, "check": check}
        ends = sampler.sample(noisier, self.num_steps, seed, ids, **options)
        return ends / self._scale(level, noisier)

    def _scale(self, level: Tensor, x: Tensor) -> Tensor:
        """The factor on the way to the level above, 1 for the last."""
        on_cpu = level.cpu()
        scale = torch.where(on_cpu + 1 == len(self.scales) - 1, 1.0, self.scales[on_cpu + 1])
        return _column(scale, x)

    @torch.no_grad()
    def negatives(  # type: ignore[override]
        self,
        real: Tensor,
        buffer: ReplayBuffer | None = None,
        *,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        start_step: int = 0,
        level: Tensor | None = None,
        check: bool = True,
    ) -> RecoveryNegatives:
        """Images at a level each, int64 `(B,)` or drawn, and the ends of chains from the level above."""
        check_real(real)
        if buffer is not None:
            raise ValueError(f"{self.name} has no replay buffer, got {buffer!r}")
        seed, ids = address(real, seed, chain_ids)
        if level is None:
            level = _levels(len(real), len(self.sigmas) - 1, seed, start_step, ids)
        on_cpu = level.cpu()
        where: dict[str, Any] = {"seed": seed, "step": start_step, "chain_ids": ids, "dtype": real.dtype}
        scale = self.scales.cumprod(0)[on_cpu]
        noise = ops.normal(real.shape, stream=Stream.DATA_NOISE, **where)
        data = _column(scale, real) * real + _column((1 - scale.square()).sqrt(), real) * noise
        noise = ops.normal(real.shape, stream=Stream.NOISY_START, **where)
        noisier = _column(self.scales[on_cpu + 1], real) * data + _column(self.sigmas[on_cpu + 1], real) * noise
        ends = self._chain(noisier, level, seed, ids, start_step, 1.0, check)
        weight = (self.sigmas[1] / self.sigmas[on_cpu + 1]).to(real)
        return RecoveryNegatives(
            ends,
            real,
            noisier,
            data=data,
            noisier=noisier,
            level=level,
            scale=self._scale(level, real),
            weight=weight,
        )

    @torch.no_grad()
    def generate(
        self,
        x0: Tensor,
        *,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        noise_scale: float = 0.99,
        check: bool = True,
    ) -> Tensor:
        """Images `(B, ...)` from standard normal noise x0, by a chain at each level from the highest down.

        The noise of chains is scaled by 0.99 where images are generated, and by 1 in training.
        """
        check_real(x0)
        seed, ids = address(x0, seed, chain_ids)
        x = x0
        for done, each in enumerate(range(len(self.sigmas) - 2, -1, -1)):
            level = torch.full((len(x),), each, device=x.device)
            x = self._chain(x, level, seed, ids, done * self.num_steps, noise_scale, check)
        return x


def _recovery_schedule(levels: int) -> tuple[Tensor, Tensor]:
    """The authors' sigmas and scales: products over parts of 1,000 linear betas, and a last level of pure noise."""
    whole: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    betas = torch.cat((torch.linspace(1e-4, 0.02, 1000, **whole), torch.ones(1, **whole)))
    roots = (1 - betas).sqrt()
    stops = [level * (1000 // ((levels - 1) * 2)) for level in range(levels)] + [999]
    starts = [0, *(stop + 1 for stop in stops[:-1])]
    scales = torch.stack([roots[a : b + 1].prod() for a, b in zip(starts, stops, strict=True)])
    return (1 - scales.square()).sqrt(), scales


def recovery_likelihood(
    energy: Callable[..., Tensor],
    *,
    num_steps: int = 30,
    dtype: torch.dtype | None = None,
    engine: str = "auto",
    reproducible: bool = True,
) -> RecoveryLikelihood:
    """Diffusion recovery likelihood on CIFAR-10 (T6): 6 noise levels, and 30 steps at a level from the level above.

    At level t the chain starts at the noisier image x̃ and samples `E(y, t) / s² + ||y - x̃||² / (2 σ²)`, without the
    second term at the last level: `y' = y - ½ s² ∇ + s ξ` with `s² = (σ̄_t / σ̄_0) b² σ²`, b² = 2e-4, where σ is the
    noise from t to t + 1 and σ̄_t that from the image to t. The end is divided by the scale of that level. The loss is
    the mean of `(σ_1 / σ) (E(a x_t, t) - E(a x', t))` with that scale a. Each image has a level of its own, drawn anew.

    Adam has a learning rate of 1e-4, which grows over 1,000 iterations, and a moving average of 0.999. Images are
    generated from noise by `recipe.generate`.

    Args:
        energy: gives `(B,)` for images `(B, C, H, W)` in [-1, 1] and levels, int64 `(B,)`; low means real. The
            published net gives f = -E.
        num_steps: of a chain at a level.
        dtype, engine, reproducible: as in `Langevin`.

    Source: Gao et al., "Learning Energy-Based Models by Diffusion Recovery Likelihood", ICLR 2021;
    ruiqigao/recovery_likelihood `model.py`, `config.py`.

    Example:
        >>> import torch, fastebm
        >>> def energy(x, level):
        ...     return 1e-3 * (1 + level) * x.square().flatten(1).sum(1)
        >>> recipe = fastebm.recipes.recovery_likelihood(energy, num_steps=3)
        >>> real = torch.rand(8, 3, 4, 4)
        >>> recipe.loss(energy, real, recipe.negatives(real)).shape
        torch.Size([])
    """
    sigmas, scales = _recovery_schedule(6)
    return RecoveryLikelihood(
        name="recovery_likelihood",
        source="Gao et al., ICLR 2021; ruiqigao/recovery_likelihood model.py",
        sampler=None,
        num_steps=as_count("num_steps", num_steps, 1),
        start=None,
        loss=RecoveryLoss(),
        optimizer=Optimizer(learning_rate=1e-4, batch_size=64, warmup=1000, ema=0.999),
        gradient=gradient_of(_Pulled(energy), dtype, engine, reproducible),
        sigmas=sigmas,
        scales=scales,
        step_squared=2e-4,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class CDRL(Recipe):
    """The recipe `cdrl`, with an energy and a proposal that take a logarithm of a signal-to-noise ratio, `(B,)`.

    Attributes (besides those of `Recipe`; `loss` and `optimizer` are the energy's):
        gradient: of the energy given a noisier image.
        proposal: gives a start `(B, ...)` from an image of the level above, and that level.
        proposal_optimizer: the constants of its optimiser.
        num_levels: the number of levels.
        log_snr: those of the image with least noise and of pure noise.
        step_squared: b**2, the factor of squared step sizes.
    """

    gradient: Gradient
    proposal: Callable[[Tensor, Tensor], Tensor]
    proposal_optimizer: Optimizer
    num_levels: int
    log_snr: tuple[float, float]
    step_squared: float

    def log_snr_at(self, level: Tensor) -> Tensor:
        """The logarithm of the signal-to-noise ratio at levels in [0, num_levels], float64 on the CPU."""
        high, low = self.log_snr
        b = math.atan(math.exp(-0.5 * high))
        a = math.atan(math.exp(-0.5 * low)) - b
        return -2 * torch.tan(a * level.double().cpu() / self.num_levels + b).log()

    def _proposed(self, noisier: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """The proposal for the images of level - 1, with its noise."""
        after, before = self.log_snr_at(level).sigmoid(), self.log_snr_at(level - 1).sigmoid()
        step = after / before
        kept = torch.where(level.cpu() == self.num_levels, 1.0, step)
        std = ((1 - before) / (1 - after) * (1 - step) * kept).sqrt()
        return self.proposal(noisier, self.log_snr_at(level).to(noisier)) + _column(std, noisier) * noise

    def _chain(
        self, start: Tensor, noisier: Tensor, level: Tensor, seed: int, ids: Tensor, start_step: int, check: bool
    ) -> Tensor:
        """The ends at `level - 1` of chains from proposals."""
        after, before = self.log_snr_at(level).sigmoid(), self.log_snr_at(level - 1).sigmoid()
        final = level.cpu() == self.num_levels
        ratio = (1 - before).sqrt() / math.sqrt(1 - 1 / (1 + math.exp(-self.log_snr[0])))
        squared = self.step_squared * ratio * (1 - after / before)
        pull = torch.where(final, 0.0, ratio * self.step_squared / 2)
        sampler = Langevin(self.gradient, 0.5, squared.sqrt())
        levels = self.log_snr_at(level - 1).to(noisier)
        conditions = (noisier, levels, torch.ones_like(levels), pull.to(noisier))
        options: dict[str, Any] = {"start_step": start_step, "conditions": conditions, "check": check}
        ends = sampler.sample(start, self.num_steps, seed, ids, **options)
        return ends / (self._scale(level, ends) + 1e-8)

    def _scale(self, level: Tensor, x: Tensor) -> Tensor:
        step = self.log_snr_at(level).sigmoid() / self.log_snr_at(level - 1).sigmoid()
        return _column(torch.where(level.cpu() == self.num_levels, 1.0, step.sqrt()), x)

    @torch.no_grad()
    def negatives(  # type: ignore[override]
        self,
        real: Tensor,
        buffer: ReplayBuffer | None = None,
        *,
        seed: int | None = None,
        chain_ids: int | Tensor = 0,
        start_step: int = 0,
        level: Tensor | None = None,
        check: bool = True,
    ) -> RecoveryNegatives:
        """Images at a level each, and the ends of chains from proposals for it.

        Args:
            level: of the noisier images, int64 `(B,)` in [1, num_levels]; drawn if None.
        """
        check_real(real)
        if buffer is not None:
            raise ValueError(f"{self.name} has no replay buffer, got {buffer!r}")
        seed, ids = address(real, seed, chain_ids)
        if level is None:
            level = _levels(len(real), self.num_levels, seed, start_step, ids) + 1
        where: dict[str, Any] = {"seed": seed, "step": start_step, "chain_ids": ids, "dtype": real.dtype}
        shared = ops.normal(real.shape, stream=Stream.DATA_NOISE, **where)  # both levels have the same noise

        def diffused(at: Tensor) -> Tensor:
            signal = self.log_snr_at(at).sigmoid()
            return _column(signal.sqrt(), real) * real + _column((1 - signal).sqrt(), real) * shared

        noisier, data = diffused(level), diffused(level - 1)
        noise = ops.normal(real.shape, stream=Stream.NOISY_START, **where)
        start = self._proposed(noisier, level, noise)
        ends = self._chain(start, noisier, level, seed, ids, start_step, check)
        sigma = (1 - self.log_snr_at(level).sigmoid() / self.log_snr_at(level - 1).sigmoid()).sqrt()
        first = torch.tensor([0, 1], device="cpu")
        signal = self.log_snr_at(first).sigmoid()
        return RecoveryNegatives(
            ends,
            real,
            start,
            data=data,
            noisier=noisier,
            level=self.log_snr_at(level - 1).to(real),
            scale=self._scale(level, real),
            weight=((1 - signal[1] / signal[0]).sqrt() / sigma).to(real),
            noise=noise,
            proposal_level=level,
        )

    def proposal_loss(self, negatives: RecoveryNegatives) -> Tensor:
        """`mean ||scale ends - proposal||**2`, which trains the proposal."""
        if negatives.noise is None or negatives.proposal_level is None:
            raise TypeError("the proposal's loss needs the negatives of cdrl")
        start = self._proposed(negatives.noisier, negatives.proposal_level, negatives.noise)
        return (negatives.scale * negatives.x - start).square().flatten(1).sum(1).mean()

    @torch.no_grad()
    def generate(
        self, x0: Tensor, *, seed: int | None = None, chain_ids: int | Tensor = 0, check: bool = True
    ) -> Tensor:
        """Images `(B, ...)` from standard normal noise x0: a proposal and a chain a level, then Tweedie's formula."""
        check_real(x0)
        seed, ids = address(x0, seed, chain_ids)
        x = x0
        for done, each in enumerate(range(self.num_levels, 0, -1)):
            level = torch.full((len(x),), each, device=x.device)
            where: dict[str, Any] = {"seed": seed, "step": done * self.num_steps, "chain_ids": ids, "dtype": x.dtype}
            start = self._proposed(x, level, ops.normal(x.shape, stream=Stream.NOISY_START, **where))
            x = self._chain(start, x, level, seed, ids, done * self.num_steps, check)
        after, before = self.log_snr_at(level).sigmoid(), self.log_snr_at(level - 1).sigmoid()
        ratio = (1 - before).sqrt() / math.sqrt(1 - 1 / (1 + math.exp(-self.log_snr[0])))
        squared = self.step_squared / 2 * ratio * (1 - after / before)
        scale = self._scale(level, x)
        zero = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        conditions = (x, self.log_snr_at(level - 1).to(x), (1 / squared).to(x), zero)
        _, gradient = self.gradient(scale * x, conditions)
        return (x - _column(1 - before, x) * scale * gradient) / _column(before.sqrt(), x)


def cdrl(
    energy: Callable[..., Tensor],
    proposal: Callable[[Tensor, Tensor], Tensor],
    *,
    num_steps: int = 15,
    dtype: torch.dtype | None = None,
    engine: str = "auto",
    reproducible: bool = True,
) -> CDRL:
    """Cooperative diffusion recovery likelihood on CIFAR-10: a net proposes the start of a chain at each of 6 levels.

    The chain at a level starts at `proposal(x̃, level above)` and noise, and makes 15 steps
    `x' = x - ½ ∇(E(x, λ) + ½ b² c ||x - x̃||²) + s ξ`, b² = 4e-4, `s² = b² c σ²`, without the pull at the last level,
    where λ is the logarithm of the level's signal-to-noise ratio (a cosine schedule from 9.8 to -5.1), σ the noise from
    that level to the one above, and c the ratio of its standard deviation to that of the lowest. The end is divided by
    the level's scale. The loss is the mean of `(σ_1 / σ) (E(a x_t) - E(a x'))` with that scale a, and the proposal's
    `||a x' - proposal||²` (`recipe.proposal_loss`). Each image has a level of its own, drawn anew.

    Adam has a learning rate of 1e-4 for the energy, AdamW one of 1e-5 for the proposal; both grow over 10,000
    iterations, with a clip of 1 and a moving average of 0.9999. `recipe.generate` ends with Tweedie's formula.

    Args:
        energy: gives `(B,)` for images `(B, C, H, W)` in [-1, 1] and λ `(B,)`; low means real. The published net gives
            f = -E.
        proposal: gives images for images and λ of the level above.
        num_steps: of a chain at a level.
        dtype, engine, reproducible: as in `Langevin`.

    Source: Zhu et al., "Learning Energy-Based Models by Cooperative Diffusion Recovery Likelihood", ICLR 2024;
    AlvinZhuyx/CDRL `main_uncond.py`.

    Example:
        >>> import torch, fastebm
        >>> def energy(x, log_snr):
        ...     return 1e-3 * (12 + log_snr) * x.square().flatten(1).sum(1)
        >>> recipe = fastebm.recipes.cdrl(energy, lambda x, log_snr: 0.9 * x, num_steps=3)
        >>> real = torch.rand(8, 3, 4, 4)
        >>> recipe.loss(energy, real, recipe.negatives(real)).shape
        torch.Size([])
    """
    common: dict[str, Any] = {"batch_size": 32, "grad_norm_clip": 1.0, "warmup": 10_000, "ema": 0.9999}
    return CDRL(
        name="cdrl",
        source="Zhu et al., ICLR 2024; AlvinZhuyx/CDRL main_uncond.py",
        sampler=None,
        num_steps=as_count("num_steps", num_steps, 1),
        start=None,
        loss=RecoveryLoss(),
        optimizer=Optimizer(learning_rate=1e-4, **common),
        gradient=gradient_of(_Pulled(energy), dtype, engine, reproducible),
        proposal=proposal,
        proposal_optimizer=Optimizer(method="AdamW", learning_rate=1e-5, **common),
        num_levels=6,
        log_snr=(9.8, -5.1),
        step_squared=4e-4,
    )
