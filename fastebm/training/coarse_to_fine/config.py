"""The settings of a coarse-to-fine run, and what follows from them for each iteration."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from fastebm.training.trainer.config import MUTABLE_FIELDS, EnergyTrainerConfig, Ranges, lr_factor

_PER_STAGE = ("sizes", "iterations", "batch_sizes", "learning_rates")


@dataclass(frozen=True)
class Stage:
    """The part of a run that trains one resolution, and how many iterations and images came before it."""

    size: int
    iterations: int
    batch_size: int
    learning_rate: float
    first_iteration: int
    first_image: int


LEAST_START_NOISE = 1e-6
"""Least noise of a noisy image with a data term, whose weight is the temperature over the square of the noise."""


class ChainCounts(NamedTuple):
    """The chains of an update by where they start, in their order in a batch: from noise, where chains of the update
    before ended, at images with holes, and at noisy images."""

    noise: int
    continued: int
    holes: int
    noisy: int


@dataclass(frozen=True, kw_only=True)
class CoarseToFineConfig(EnergyTrainerConfig):
    """All settings of a coarse-to-fine run; together with the images they determine its result.

    The fields `sizes`, `iterations`, `batch_sizes` and `learning_rates` have one entry per stage. Defaults are those of
    the authors' repository for 32x32 images; what that does not have is off.

    In `mutable_fields`, `max_batch` too changes numbers by their rounding and has to stay for a resume to the last bit.
    """

    kind: ClassVar[str] = "coarse_to_fine"
    method_name: ClassVar[str] = "coarse-to-fine training"
    mutable_fields: ClassVar[frozenset[str]] = MUTABLE_FIELDS | {"max_batch", "recompute_from"}
    ranges: ClassVar[Ranges] = {
        "sizes": (4, 512),
        "base_width": (1, 2**16),
        "iterations": (1, 10**9 - 1),
        "batch_sizes": (1, 2**20),
        "learning_rates": (1e-12, 1.0),
        "fade": (0, 1),
        "noise_start": (0, 1e6),
        "noise_end": (0, 1e6),
        "noisy_starts": (0, 0.99),
        "start_noise": (0, 1e6),
        "start_temperature": (0, 1e6),
        "hole_starts": (0, 0.99),
        "continued_starts": (0, 0.99),
        "restart": (0, 1),
        "step_growth": (1e-3, 1e3),
        "step_shrink": (1e-3, 1),
        "domain": (-1, 2**31),
        "max_batch": (0, 2**20),
        "recompute_from": (0, 2**20),
    }

    sizes: tuple[int, ...]
    """resolution of each stage, in pixels, powers of two, each twice the one before"""
    iterations: tuple[int, ...]
    """number of updates of the weights in each stage"""
    batch_sizes: tuple[int, ...]
    """number of images, and as many chains, in an update of each stage"""
    learning_rates: tuple[float, ...]
    """learning rate of Adam in each stage"""
    fade: float = 0.5
    """share of a stage over which its new block fades in; in the first stage none does"""
    base_width: int = 32
    """base width of the net, in channels, as CoarseToFineEnergy defines it"""
    activation: str = "scaled_swish"
    """name of the activation, one that fastebm.ops.activation knows"""
    spectral_norm: bool = True
    """put spectral norm on the 3x3 and 4x4 convolutions"""
    variant: Literal["cascade", "expanding"] = "cascade"
    """path of chains from noise: "cascade" runs them through the frozen nets of all lower sizes; "expanding" trains one
    growing net, whose chains start at half the size while its newest block fades in, and at full size afterwards"""
    num_steps: int = 15
    """number of Langevin steps of a chain at each resolution"""
    step_size: float = 1.0
    step_growth: float = 1.0
    """factor on the step size from each resolution to the next; with 4, chains move the image that a new level averages
    as they moved it before, whose gradient is a quarter as large in each of its four pixels"""
    step_shrink: float = 1.0
    """factor on the step size of a chain, up to the end of its resolution, after each Langevin step that raised its
    energy; 1 for none"""
    noise_start: float = 0.015
    """standard deviation of the noise of a chain's first Langevin step, at the lowest resolution"""
    noise_end: float = 0.0
    """standard deviation of the noise of a chain's last Langevin step; linear in between (expanding: in each level)"""
    noisy_starts: float = 0.0
    """share of an update's chains that start at noisy training images and run at the stage's resolution only, as chains
    that restore images do; the other chains start from noise"""
    start_noise: float = 0.4
    """largest standard deviation of the noise on those images; each chain draws its own, uniformly from 0 on"""
    start_temperature: float = 0.0
    """temperature of the energy, at the lowest resolution, beside a data term that pulls chains of noisy_starts back to
    their starts, as in denoising; all chains of an update then share one noise level; 0 for no data term"""
    hole_starts: float = 0.0
    """share of an update's chains that start at training images with a hole, set to the mean of its surroundings, and
    fill it in at the stage's resolution only with all other pixels fixed, as inpainting does"""
    continued_starts: float = 0.0
    """share of an update's chains that go on, at the stage's resolution, from where those of the update before ended
    (persistent contrastive divergence)"""
    restart: float = 0.05
    """probability that such a chain is replaced, after an update, by one that started from noise in it"""
    domain: int = -1
    """label of the images that are learned; chains of noisy_starts then start at images with other labels, to be
    translated; -1 learns all images"""
    adam_betas: tuple[float, float] = (0.5, 0.999)
    clamp_ends: bool = False
    """clamp the ends of chains, and images after their noise, to [-1, 1] before the loss, as samples are when they are
    shown; the loss then does not tell samples from data by values beyond that range"""
    ema: float = 0.0
    max_batch: int = 0
    """largest number of images, and as many chains, in the net at a time; gradients of larger batches are summed; 0 for
    no limit"""
    recompute_from: int = 0
    """lowest resolution, in pixels, at which an update recomputes the activations inside blocks instead of keeping
    them; 0 for never"""
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {name: len(getattr(self, name)) for name in _PER_STAGE}
        if len(set(lengths.values())) != 1 or not self.sizes:
            given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(
                f"each stage needs an entry of its own in {', '.join(_PER_STAGE)}: {given} "
                "(what is not given has as many as the preset)"
            )
        if any(high != 2 * low for low, high in itertools.pairwise(self.sizes)):
            raise ValueError(f"each size must be twice the one before, got sizes {self.sizes}")
        if self.sizes[0] & (self.sizes[0] - 1):
            raise ValueError(f"sizes must be powers of two, got {self.sizes}")
        if self.step_growth != 1 and self.variant == "expanding":
            raise ValueError(f"step_growth must be 1 for the variant expanding, got {self.step_growth}")
        if self.noisy_starts and self.start_temperature and self.start_noise < LEAST_START_NOISE:
            raise ValueError(
                f"start_noise must be at least {LEAST_START_NOISE:g} where chains from noisy images have a "
                f"start_temperature, got {self.start_noise:g}"
            )
        shares = {name: getattr(self, name) for name in ("noisy_starts", "hole_starts", "continued_starts")}
        if sum(shares.values()) >= 1:
            given = " and ".join(f"{name} {share}" for name, share in shares.items() if share)
            raise ValueError(f"some chains must start from noise: {given} make a sum that is not below 1")

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        iteration = image = 0
        for fields in zip(self.sizes, self.iterations, self.batch_sizes, self.learning_rates, strict=True):
            stages.append(Stage(*fields, first_iteration=iteration, first_image=image))
            iteration += stages[-1].iterations
            image += stages[-1].iterations * stages[-1].batch_size
        return tuple(stages)

    @property
    def smallest_batch(self) -> int:
        return min(self.batch_sizes, default=self.microbatches)

    @property
    def total_iterations(self) -> int:
        return sum(self.iterations)

    @property
    def total_chains(self) -> int:
        """How many chains, and images, the whole run uses."""
        return sum(stage.iterations * stage.batch_size for stage in self.stages)

    def step_size_at(self, size: int) -> float:
        """The step size of chains at a resolution of the run."""
        return self.step_size * self.step_growth ** self.sizes.index(size)

    def chains_by_start(self, stage: Stage) -> ChainCounts:
        """How many of an update's chains start where."""
        shares = (self.continued_starts, self.hole_starts, self.noisy_starts)
        others = [int(share * stage.batch_size) for share in shares]
        return ChainCounts(stage.batch_size - sum(others), *others)

    def stage_at(self, iteration: int) -> Stage:
        """The stage that iteration number `iteration`, from 0 on, belongs to; the last one for those beyond."""
        return next(s for s in reversed(self.stages) if s.first_iteration <= iteration)

    def beta_at(self, iteration: int) -> float:
        """How far the newest block has faded in, in [0, 1]."""
        stage = self.stage_at(iteration)
        fading = self.fade * stage.iterations
        if stage is self.stages[0] or not fading:
            return 1.0
        return min(1.0, (iteration - stage.first_iteration) / fading)

    def learning_rate_at(self, iteration: int) -> float:
        stage = self.stage_at(iteration)
        remaining = stage.first_iteration + stage.iterations - iteration
        return stage.learning_rate * lr_factor(remaining, stage.iterations, self.lr_decay)
