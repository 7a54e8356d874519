"""The settings of a coarse-to-fine run, and what follows from them for each iteration."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastebm.training.trainer.config_fields import COMMON_FREE, check_fields, config_from_json

_PER_STAGE = ("sizes", "iterations", "batch_sizes", "learning_rates")
_RANGES: dict[str, tuple[float, float]] = {
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
    "domain": (-1, 2**31),
    "max_batch": (0, 2**20),
    "recompute_from": (0, 2**20),
}
_CHOICES: dict[str, tuple[str, ...]] = {"variant": ("cascade", "expanding")}

FREE = COMMON_FREE | {"max_batch", "recompute_from"}
"""Fields that a run may be taken up with other values of: they change what is kept and shown, and numbers by their
rounding at most (engine, max_batch; those two must stay for a resume to the last bit)."""


@dataclass(frozen=True)
class Stage:
    """One resolution's part of a run, and what the stages before it have used up."""

    size: int
    iterations: int
    batch_size: int
    learning_rate: float
    first_iteration: int
    first_image: int


@dataclass(frozen=True)
class CoarseToFineConfig:
    """Everything that a coarse-to-fine run depends on, besides its images.

    The first four fields have one entry a stage. Defaults are what the authors' repository has for 32x32 images;
    what it has nothing for is off.
    """

    kind: ClassVar[str] = "coarse_to_fine"

    sizes: tuple[int, ...]
    """resolution of each stage, powers of two, each twice the one before"""
    iterations: tuple[int, ...]
    """updates of the weights in each stage"""
    batch_sizes: tuple[int, ...]
    """images, and as many chains, in an update"""
    learning_rates: tuple[float, ...]
    """of Adam"""
    fade: float = 0.5
    """share of a stage over which its new block fades in; the first stage has none"""
    lr_decay: float = 0.0
    """share of a stage, at its end, over which the learning rate falls linearly to a tenth"""
    channels: int = 3
    """colours of an image"""
    base_width: int = 32
    """channels of the net, in the units of CoarseToFineEnergy"""
    activation: str = "scaled_swish"
    """any that fastebm.ops.activation knows"""
    spectral_norm: bool = True
    """on the 3x3 and 4x4 convolutions"""
    variant: Literal["cascade", "expanding"] = "cascade"
    """cascade: chains climb through the frozen nets of all lower sizes; expanding: one growing net, whose chains start
    at half the size while its newest block fades in, and from noise at full size afterwards"""
    num_steps: int = 15
    """Langevin updates at each resolution"""
    step_size: float = 1.0
    """of a Langevin update"""
    noise_start: float = 0.015
    """noise std of a chain's first update, at the lowest resolution"""
    noise_end: float = 0.0
    """noise std of a chain's last update; linear in between (expanding: within each level)"""
    noisy_starts: float = 0.0
    """share of an update's chains that start at training images under noise and run at the stage's resolution alone, as
    chains that restore images do; the others start from noise"""
    start_noise: float = 0.4
    """largest std of that noise; each chain draws its own, evenly from 0 on"""
    start_temperature: float = 0.0
    """of the energy beside a data term that pulls chains of `noisy_starts` back to where they start, as denoising has
    it; the std of their noise is then one for all chains of an update; 0: no data term"""
    hole_starts: float = 0.0
    """share of an update's chains that start at training images with a hole, at the mean of what is around it, and fill
    it in with all else pinned, at the stage's resolution alone, as inpainting does"""
    domain: int = -1
    """label of the images that are learned; chains of `noisy_starts` then begin at images with other labels, to be
    translated; -1: all images are learned, whatever their labels"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """in which the net runs inside chains"""
    update_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the convolutions in an update of the weights, which themselves are always float32; loss and norms too"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """of the chains' gradients"""
    adam_betas: tuple[float, float] = (0.5, 0.999)
    """decay rates of Adam's moments"""
    flip: bool = False
    """mirrors each training image with probability 1/2"""
    data_noise: float = 0.0
    """std of the noise on training images, which lie in [-1, 1]"""
    clamp_ends: bool = False
    """clamps chain ends, and images after their noise, to [-1, 1] before an update sees them, as they will be shown: a
    chain may then leave that range without being told from real images by it"""
    energy_l2: float = 0.0
    """weight of the mean squared energy in the loss"""
    ema: float = 0.0
    """decay of the averaged weights that are sampled from; 0 samples from the trained ones"""
    max_batch: int = 0
    """images, and as many chains, that are in the net at a time; of larger batches gradients are summed up; 0: all"""
    recompute_from: int = 0
    """resolution from which on an update keeps no activations inside of blocks but computes them twice; 0: none"""
    max_energy: float = 1000.0
    """the guard rolls back where an energy has a larger magnitude"""
    max_gap: float = 1000.0
    """and where mean energies of data and samples are further apart"""
    max_loss: float = 1000.0
    """and where the loss has a larger magnitude"""
    retries: int = 3
    """times that the guard goes back to a checkpoint, with fresh noise, before the run is given up"""
    retry_lr_factor: float = 0.5
    """factor on the learning rate, for the rest of the run, each time"""
    seed: int = 0
    """of the weights, the order of the images and all noise"""
    log_every: int = 10
    """iterations between lines of the log, which hold means over them"""
    checkpoint_every: int = 100
    """iterations between checkpoints; the end of a stage always makes one"""
    keep_checkpoints: int = 3
    """how many of the newest checkpoints stay"""
    pictures_every: int = 0
    """iterations between pictures of samples; the end of a stage always makes some; 0: only that"""
    tensorboard: bool = False
    """also writes the log and the samples for TensorBoard"""

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _PER_STAGE}
        if len(set(lengths.values())) != 1 or not self.sizes:
            raise ValueError(f"each stage needs its entry in {', '.join(_PER_STAGE)}, got {lengths} entries")
        if any(high != 2 * low for low, high in itertools.pairwise(self.sizes)):
            raise ValueError(f"each size must be twice the one before, got sizes {self.sizes}")
        check_fields(self, _RANGES, _CHOICES)
        if self.noisy_starts + self.hole_starts >= 1:
            shares = f"noisy_starts {self.noisy_starts} and hole_starts {self.hole_starts}"
            raise ValueError(f"some chains must start from noise: {shares} make a sum below 1")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> CoarseToFineConfig:
        """The config that was stored as JSON. Raises RunError if its fields are not ours."""
        return config_from_json(cls, stored, "a coarse-to-fine run")

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
    def total_iterations(self) -> int:
        return sum(self.iterations)

    @property
    def total_chains(self) -> int:
        """How many chains, and images, the whole run uses."""
        return sum(stage.iterations * stage.batch_size for stage in self.stages)

    def chains_by_start(self, stage: Stage) -> tuple[int, int, int]:
        """How many of an update's chains start from noise, at images with holes, and at noisy images, in that order."""
        holes, noisy = (int(share * stage.batch_size) for share in (self.hole_starts, self.noisy_starts))
        return stage.batch_size - holes - noisy, holes, noisy

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
        falling = self.lr_decay * stage.iterations
        left = stage.first_iteration + stage.iterations - iteration
        return stage.learning_rate * (0.1 + 0.9 * left / falling if left < falling else 1.0)
