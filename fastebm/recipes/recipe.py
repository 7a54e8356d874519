"""`Recipe`: one published way to train an energy, as a sampler, starts, a replay buffer, a loss and an optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastebm import rng
from fastebm.losses import contrastive_divergence, energy_l2
from fastebm.sampling import Cascade, Draw, Langevin, ReplayBuffer, Sampler, Schedule
from fastebm.sampling.langevin import LangevinOptions
from fastebm.sampling.sampler import Energy
from fastebm.sampling.starts import Start
from fastebm.scalars import as_count, as_int, shown

__all__ = ["ContrastiveLoss", "Loss", "Negatives", "Optimizer", "Overrides", "Recipe"]


class Overrides(LangevinOptions, total=False):
    """What a recipe's function takes in place of the published constants of its chain."""

    num_steps: int
    step_size: float | Schedule
    noise_std: float | Schedule


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The constants of an optimiser.

    Attributes:
        method: "Adam", "AdamW" or "SGD".
        learning_rate: before warm-up and decay.
        betas: of Adam and AdamW.
        momentum: of SGD.
        weight_decay: 0 or more.
        batch_size: the number of images, and of chains, in an update.
        grad_norm_clip: the largest norm of the gradient of all weights together; None for no limit.
        warmup: over how many iterations the learning rate grows linearly from 0.
        decay: the factor on the learning rate after each of `decay_epochs`.
        decay_epochs: the epochs, counted from 0, before which it decays; None for every epoch but the first.
        ema: the decay of the moving average of the weights, which samples are made with; 0 for none.
    """

    method: Literal["Adam", "AdamW", "SGD"] = "Adam"
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int
    grad_norm_clip: float | None = None
    warmup: int = 0
    decay: float = 1.0
    decay_epochs: tuple[int, ...] | None = ()
    ema: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of torch with these constants."""
        if self.method == "SGD":
            return torch.optim.SGD(
                parameters, self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
            )
        made = torch.optim.AdamW if self.method == "AdamW" else torch.optim.Adam
        return made(parameters, self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)

    def rate(self, iteration: int, epoch: int = 0) -> float:
        """The learning rate of an iteration in an epoch, both counted from 0."""
        iteration, epoch = as_count("iteration", iteration), as_count("epoch", epoch)
        grown = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        decays = epoch if self.decay_epochs is None else sum(epoch >= each for each in self.decay_epochs)
        return self.learning_rate * grown * self.decay**decays


@dataclass(frozen=True, eq=False)
class Negatives:
    """The ends of the chains of one training cycle.

    Attributes:
        x: the ends `(B, ...)`, without a graph.
        real: the batch of images for which they were made.
        start: where the chains started, `(B, ...)`.
        draw: what the replay buffer gave; None without a buffer.
        labels: int64 `(B,)`, the classes of the chains; None without.
    """

    x: Tensor
    real: Tensor
    start: Tensor
    draw: Draw | None = None
    labels: Tensor | None = None


class Loss(Protocol):
    """A loss `(energy, real, negatives, labels=None) -> ()`; `labels` are those of `real`, where there are classes."""

    def __call__(
        self, energy: Callable[..., Tensor], real: Tensor, negatives: Any, labels: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class ContrastiveLoss:
    """`mean E(real) - mean E(ends) + l2 (mean E(real)**2 + mean E(ends)**2)`."""

    l2: float = 0.0

    def __call__(
        self, energy: Callable[..., Tensor], real: Tensor, negatives: Negatives, labels: Tensor | None = None
    ) -> Tensor:
        data, samples = energies(energy, real, labels), energies(energy, negatives.x, negatives.labels)
        loss = contrastive_divergence(data, samples)
        return loss + self.l2 * energy_l2(data, samples) if self.l2 else loss


@dataclass(frozen=True, eq=False, kw_only=True)
class Recipe:
    """A published recipe with its constants. `fastebm.recipes` has a function for each that makes it for an energy.

    Attributes:
        name: of the recipe's function.
        source: the paper, and the file of its authors' repository that has the constants.
        sampler: of the chains, any but `ParallelTempering`; None where a subclass makes one for each batch.
        num_steps: the length of a chain in training.
        start: where chains start that don't go on from a buffer.
        buffer: a function that makes the replay buffer, `buffer(shape, seed=0)`, whose keywords can be overridden; None
            for a recipe without.
        loss: `loss(energy, real, negatives, labels=None)`, a tensor without dimensions.
        optimizer: its constants.
        data_noise: the standard deviation of the noise on real images; see `noisy`.
        data_clamp: bounds of the images behind that noise.
        generation_steps: the length of a chain that generates, where it is another one.
    """

    name: str
    source: str
    sampler: Sampler[Any] | Cascade | None
    num_steps: int
    start: Start | None
    loss: Loss
    optimizer: Optimizer
    buffer: Callable[..., ReplayBuffer] | None = None
    data_noise: float = 0.0
    data_clamp: tuple[float, float] | None = None
    generation_steps: int | None = None

    def noisy(self, real: Tensor) -> Tensor:
        """Real images with the recipe's noise, drawn from torch's generator."""
        if not self.data_noise:
            return real
        x = real + self.data_noise * torch.randn_like(real)
        return x if self.data_clamp is None else x.clamp(*self.data_clamp)

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
        """One cycle of sampling: as many chains as images start or are drawn, run, and are put back.

        Args:
            real: images `(B, ...)`, which give the number, shape, dtype and device of the chains.
            buffer: what `self.buffer` made, for a recipe with one; it gives seed, ids and steps.
            seed, chain_ids, start_step: of the chains of a recipe without a buffer; None draws a seed from torch's
                generator, so that every call has noise of its own.
            labels: int64 `(B,)`, the classes of the chains of a buffer with classes; None draws them.
            check: raises FloatingPointError where energies or ends are not finite. With False, the buffer starts such
                chains anew.

        Raises ValueError or TypeError for a buffer where there is none, or the reverse.
        """
        draw = self._draw(real, buffer, labels)
        if draw is not None:
            start, seed, chain_ids, start_step = draw.x.to(real), draw.seed, draw.chain_ids, draw.start_step
            labels = draw.labels
        else:
            if labels is not None:
                raise ValueError(f"labels of chains need a buffer with classes, and {self.name} has none")
            seed, chain_ids = address(real, seed, chain_ids)
            start = self._start(real, seed, chain_ids)
        given = () if labels is None else (labels.to(real.device),)
        ends = self._run(start, seed, chain_ids.to(real.device), start_step, given, check)
        if buffer is not None and draw is not None:
            buffer.put(draw, ends)
        return Negatives(ends, real, start, draw, *given)

    def _draw(self, real: Tensor, buffer: ReplayBuffer | None, labels: Tensor | None) -> Draw | None:
        check_real(real)
        if self.buffer is None:
            if buffer is not None:
                raise ValueError(f"{self.name} has no replay buffer, got {buffer!r}")
            return None
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(
                f"{self.name} needs its replay buffer, recipe.buffer({tuple(real.shape[1:])}), got {shown(buffer)}"
            )
        if buffer.shape != tuple(real.shape[1:]):
            raise ValueError(f"the buffer has states of {buffer.shape}, but the images are {tuple(real.shape[1:])}")
        # A step of MALT takes several steps of the random numbers.
        steps = self.num_steps * (self.sampler.key_steps if isinstance(self.sampler, Sampler) else 1)
        return buffer.draw(len(real), steps, labels=labels)

    def _start(self, real: Tensor, seed: int, chain_ids: Tensor) -> Tensor:
        if self.start is None:
            raise ValueError(f"{self.name} has no start of chains")
        return self.start(real.shape, seed=seed, chain_ids=chain_ids).to(real)

    def _run(
        self, start: Tensor, seed: int, chain_ids: Tensor, start_step: int, conditions: tuple[Tensor, ...], check: bool
    ) -> Tensor:
        if not isinstance(self.sampler, Sampler):
            raise TypeError(f"{self.name} runs no chain of its own")
        options: dict[str, Any] = {"start_step": start_step, "conditions": conditions, "check": check}
        return self.sampler.sample(start, self.num_steps, seed, chain_ids, **options)


def make_sampler(name: str, energy: Energy, constants: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The sampler and the number of steps. Raises TypeError for overrides that no chain has."""
    options = merged(name, constants, overrides)
    num_steps = as_count("num_steps", options.pop("num_steps"), 1)
    return Langevin(energy, **options), num_steps


def merged(name: str, constants: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`constants` with `overrides` in their place. Raises TypeError for overrides that no chain has."""
    allowed = {"num_steps", "step_size", "noise_std", *LangevinOptions.__annotations__}
    if unknown := sorted(overrides.keys() - allowed):
        raise TypeError(f"{name} can override {', '.join(sorted(allowed))}, got {', '.join(unknown)}")
    return {**constants, **overrides}


def address(real: Tensor, seed: int | None, chain_ids: int | Tensor) -> tuple[int, Tensor]:
    """The seed, and one id for each of the chains on the images' device."""
    ids = chain_ids
    if not isinstance(ids, Tensor) or not ids.dim():
        ids = torch.arange(len(real), device=real.device) + as_int("chain_ids", ids)
    ids = rng.make_chain_ids(ids, len(real), device=real.device)
    return rng.draw_seed() if seed is None else seed, ids


def energies(energy: Callable[..., Tensor], x: Tensor, *conditions: Tensor | None) -> Tensor:
    """`energy(x, *conditions)` as `(B,)`; conditions that are None are left out."""
    found = energy(x, *(each for each in conditions if each is not None))
    return found[:, 0] if found.dim() == 2 and found.shape[1] == 1 else found


def check_real(real: Tensor) -> None:
    """Raises TypeError or ValueError for what are no images `(B, ...)`."""
    if not isinstance(real, Tensor) or real.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"real images are float32 or float64 (B, ...), got {shown(real)}")
    if real.dim() < 2 or not math.prod(real.shape):
        raise ValueError(f"real images are (B, ...) with B >= 1, got {tuple(real.shape)}")
