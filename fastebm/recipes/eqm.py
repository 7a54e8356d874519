"""The recipe of Equilibrium Matching: a field that leads to data, sampled by gradient ascent with a look ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastebm.recipes.recipe import Negatives, Optimizer, Recipe, address, check_real
from fastebm.sampling import ReplayBuffer
from fastebm.sampling.starts import normal
from fastebm.scalars import as_count, as_real

__all__ = ["EqM", "EqMLoss", "eqm"]

Field = Callable[..., Tensor]


@dataclass(frozen=True)
class EqMLoss:
    """`mean (f(x_t) - c(t) (real - x₀))**2` at `x_t = (1 - t) x₀ + t real`, with `c(t) = scale min(1, (1 - t) / (1 -
    cut))`.

    x₀ is standard normal noise and t uniform in [0, 1), in this order from torch's generator. `negatives` are not
    needed.
    """

    scale: float = 4.0
    cut: float = 0.8

    def __call__(
        self, energy: Field, real: Tensor, negatives: Negatives | None = None, labels: Tensor | None = None
    ) -> Tensor:
        noise = torch.randn_like(real)
        t = torch.rand(len(real), device=real.device, dtype=real.dtype).view(-1, *(1,) * (real.dim() - 1))
        x = (1 - t) * noise + t * real
        target = self.scale * ((1 - t) / (1 - self.cut)).clamp(max=1) * (real - noise)
        return (energy(x, *(() if labels is None else (labels,))) - target).square().mean()


@dataclass(frozen=True, eq=False, kw_only=True)
class EqM(Recipe):
    """The recipe `eqm`.

    Attributes (besides those of `Recipe`):
        field: f, which points towards data: the negative gradient of an energy, or a net of its own.
        step_size: η.
        lookahead: μ.
    """

    field: Field
    step_size: float
    lookahead: float

    def _run(
        self, start: Tensor, seed: int, chain_ids: Tensor, start_step: int, conditions: tuple[Tensor, ...], check: bool
    ) -> Tensor:
        x, m = start, torch.zeros_like(start)
        for _ in range(self.num_steps):
            m = self.field(x + self.step_size * self.lookahead * m, *conditions)
            x = x + self.step_size * m
        if check and not bool(x.isfinite().all()):
            raise FloatingPointError("the ends of eqm's chains are not finite")
        return x

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
        """Generates as many images as `real` has; its values are not read. Training needs none; see `Recipe.negatives`.

        `labels` are handed on to the field.
        """
        check_real(real)
        if buffer is not None:
            raise ValueError(f"{self.name} has no replay buffer, got {buffer!r}")
        seed, ids = address(real, seed, chain_ids)
        start = self._start(real, seed, ids)
        given = () if labels is None else (labels,)
        return Negatives(self._run(start, seed, ids, start_step, given, check), real, start, None, *given)


def eqm(field: Field, *, num_steps: int = 249, step_size: float = 0.0017, lookahead: float = 0.3) -> EqM:
    """Equilibrium Matching on ImageNet's latents: `m' = f(x + η μ m)` and `x' = x + η m'`, 249 times from N(0, I).

    η is 0.0017 and μ 0.3. The look ahead is along the field of the step before, which is not accumulated: this is no
    momentum, and differs from `Langevin(..., nesterov="lookahead")`. There is no noise. The authors' flag of 250 makes
    249 updates. With `lookahead=0.0` it is plain gradient ascent, their default.

    The loss regresses f on `c(t) (x - x₀)`, see `EqMLoss`; `recipe.loss(field, real, None)` needs no chains. AdamW has
    a learning rate of 1e-4, and the moving average a decay of 0.9999.

    Args:
        field: f(x), or f(x, labels), like x. It ascends: hand over `-∇E` of an energy.
        num_steps, step_size, lookahead: in place of the published ones.

    Source: Wang & Du, "Equilibrium Matching: Generative Modeling with Implicit Energy-Based Models", 2025;
    `sample_gd.py` (`--sampler ngd`), `transport/transport.py`.

    Example:
        >>> import torch, fastebm
        >>> recipe = fastebm.recipes.eqm(lambda x: 1 - x)
        >>> recipe.negatives(torch.zeros(2, 3), seed=0).x.shape
        torch.Size([2, 3])
    """
    return EqM(
        name="eqm",
        source="Wang & Du 2025; EqM sample_gd.py",
        sampler=None,
        num_steps=as_count("num_steps", num_steps, 1),
        start=normal(),
        loss=EqMLoss(),
        optimizer=Optimizer(method="AdamW", learning_rate=1e-4, batch_size=256, ema=0.9999),
        field=field,
        step_size=as_real("step_size", step_size),
        lookahead=as_real("lookahead", lookahead),
    )
