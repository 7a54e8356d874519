"""The settings that every training method has, with their ranges; each method adds its own in a subclass."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from fastebm.runs.fields import check_fields, shown
from fastebm.runs.folder import RunError

Ranges = Mapping[str, tuple[float, float]]
Precision = Literal["float32", "bfloat16"]
Engine = Literal["auto", "fused", "autograd"]

MUTABLE_FIELDS = frozenset(
    {
        "flight_updates",
        *("engine", "retries", "log_every", "checkpoint_every", "keep_checkpoints", "pictures_every", "tensorboard"),
        "shard_optimizer",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(ABC):
    """Settings that every training method has.

    A subclass adds fields, and lists the range of each of its numeric fields in `ranges`. Each value is checked against
    the type hint of its field, by the rules of `fastebm.runs.fields.checked`, and then against its range.

    Raises TypeError for a value of another type, ValueError for one out of range.

    Attributes:
        kind: the name of the method in a run's config.json.
        method_name: the name of the method in error messages.
        mutable_fields: fields that may have other values when a run is resumed. They change which files are kept, and
            numbers at most by rounding (`engine`, which has to stay for a resume to the last bit).
    """

    kind: ClassVar[str]
    method_name: ClassVar[str]
    mutable_fields: ClassVar[frozenset[str]] = MUTABLE_FIELDS
    ranges: ClassVar[Ranges] = {
        "channels": (1, 2**10),
        "num_steps": (1, 10**6),
        "step_size": (1e-12, 1e12),
        "adam_betas": (0, 1 - 1e-9),
        "lr_decay": (0, 1),
        "ema": (0, 1 - 1e-9),
        "microbatches": (1, 2**20),
        "max_loss": (1e-12, 1e30),
        "retries": (0, 10**6),
        "retry_lr_factor": (1e-6, 1),
        "log_every": (1, 10**9),
        "checkpoint_every": (1, 10**9),
        "keep_checkpoints": (1, 10**9),
        "pictures_every": (0, 10**9),
        "flight_updates": (0, 10**5),
    }

    channels: int = 3
    """number of colour channels of an image"""
    num_steps: int = 15
    """number of Langevin steps of a chain"""
    step_size: float = 0.05
    """step size of a Langevin step, the factor on the gradient of the energy"""
    dtype: Precision = "float32"
    """dtype of the net inside Langevin chains; the state of a chain is always float32"""
    update_dtype: Precision = "float32"
    """autocast dtype of the convolutions in an update; weights, losses and norm layers stay in float32"""
    engine: Engine = "auto"
    """engine that computes the gradients of Langevin chains, and those of the weights of an energy"""
    adam_betas: tuple[float, float] = (0.0, 0.9)
    """decay rates of Adam's two moments"""
    lr_decay: float = 0.0
    """share of the run (of each stage, if there are several), at its end, over which learning rates fall linearly to a
    tenth"""
    flip: bool = False
    """mirror each training image left to right with probability 1/2"""
    ema: float = 0.999
    """decay of the exponential moving average of the weights, which samples are drawn from; 0 draws them from the
    trained weights"""
    microbatches: int = 1
    """number of parts of an update's batch, each with a gradient of its own; with 2 or more, weights are the same to
    the last bit for any number of processes up to it; 1 cuts batches by the number of processes"""
    shard_optimizer: bool = False
    """spread Adam's moments over the processes, each of which keeps those of its share of the weights"""
    max_loss: float = 1000.0
    """magnitude of the loss above which the guard rolls the run back"""
    retries: int = 3
    """number of times that the guard rolls the run back to a checkpoint, with fresh noise, before it gives up"""
    retry_lr_factor: float = 0.5
    """factor on all learning rates, for the rest of the run, after each rollback"""
    seed: int = 0
    """seed of the initial weights, the order of the images and all noise"""
    log_every: int = 10
    """number of iterations between lines of the log, each of which holds means over them"""
    checkpoint_every: int = 500
    """number of iterations between checkpoints; the end of a stage always makes one"""
    keep_checkpoints: int = 3
    """number of checkpoints that are kept, the newest ones"""
    pictures_every: int = 0
    """number of iterations between pictures; the end of a stage always makes some; 0 makes no others"""
    flight_updates: int = 200
    """number of the last updates that the flight recorder keeps in memory, to be written when the guard goes back; 0
    for no recorder"""
    tensorboard: bool = False
    """write the log and the samples for TensorBoard too"""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, (low, high) in ranges_of(type(self)).items():
            for value in values if isinstance(values := getattr(self, name), tuple) else (values,):
                if value is not None and not low <= value <= high:
                    bound = f"{high:g}]" if float(f"{high:g}") <= high else f"{high:g})"  # 1 - 1e-9 is short of 1
                    raise ValueError(f"{name} must lie in [{low:g}, {bound}, got {shown(value)}")
        if self.microbatches > self.smallest_batch:
            raise ValueError(
                f"microbatches must be at most the number of images in a batch, got {self.microbatches} and "
                f"{self.smallest_batch}"
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be in [-2^63, 2^64), got {shown(self.seed)}")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """The config of a stored JSON object. Raises RunError if it has other fields or values out of range."""
        try:
            names = {field.name for field in dataclasses.fields(cls)}
            if unknown := stored.keys() - names:
                raise ValueError(f"it has no field {shown(min(unknown))}")
            required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
            if missing := required - stored.keys():
                raise ValueError(f"the field {min(missing)} is missing")
            return cls(**stored)
        except (TypeError, ValueError) as error:
            raise RunError(f"not the config of a run of {cls.method_name}: {error}") from error

    if TYPE_CHECKING:  # in some methods it is a field, which would take an inherited property for its default

        @property
        def sizes(self) -> tuple[int, ...]:
            """All resolutions that the run trains at, in pixels, ascending."""

    @property
    @abstractmethod
    def smallest_batch(self) -> int:
        """The number of images in the smallest batch of an update."""

    @property
    @abstractmethod
    def total_iterations(self) -> int:
        """The number of updates of the whole run."""

    @property
    @abstractmethod
    def total_chains(self) -> int:
        """The number of chains, or of latent vectors, that the whole run uses: the first id that it leaves free."""

    @property
    def guard_bounds(self) -> dict[str, float]:
        """The bounds of the guard, as arguments of `Guard`."""
        return {"max_loss": self.max_loss}


@dataclass(frozen=True, kw_only=True)
class EnergyTrainerConfig(TrainerConfig):
    """Settings of the methods that train an energy of images."""

    ranges: ClassVar[Ranges] = {
        "data_noise": (0, 1e6),
        "energy_l2": (0, 1e6),
        "chain_clip": (0, 1e30),
        "gap_brake": (0, 1e30),
        "gap_hinge": (-1e30, 1e30),
        "trim": (0, 0.9),
        "gradient_penalty": (0, 1e6),
        "chain_kl": (0, 1e6),
        "max_energy": (1e-12, 1e30),
        "max_gap": (1e-12, 1e30),
    }

    data_noise: float = 0.0
    """standard deviation of the noise on the real images that the energy sees, which lie in [-1, 1]"""
    energy_l2: float = 0.0
    """weight of the mean squared energy in the loss of the energy"""
    chain_clip: float = 0.0
    """largest norm of the energy's gradient in a step of a chain; larger ones are shortened to it; 0 for no clip"""
    gap_brake: float = 0.0
    """gap, samples minus data, above which the learning rate of an update is multiplied by gap_brake / gap; 0 for no
    brake"""
    gap_hinge: float | None = None
    """gap above which the loss of an update leaves out the energies of data and samples and keeps its other terms, so
    that samples are not driven further up; by default there is none"""
    trim: float = 0.0
    """share of the samples, those of the highest energies, that the loss leaves out of their mean"""
    gradient_penalty: float = 0.0
    """weight of the mean squared norm of the energy's gradient at the ends of chains in the loss of the energy"""
    chain_kl: float = 0.0
    """weight of the KL term of improved contrastive divergence in the loss of the energy, which is differentiated
    through one more step from the ends of chains"""
    max_energy: float = 1000.0
    """magnitude of an energy above which the guard rolls the run back"""
    max_gap: float = 1000.0
    """distance between the mean energies of data and samples above which the guard rolls the run back"""

    @property
    def guard_bounds(self) -> dict[str, float]:
        return {"max_energy": self.max_energy, "max_gap": self.max_gap, "max_loss": self.max_loss}


@functools.cache
def ranges_of(config: type[TrainerConfig]) -> dict[str, tuple[float, float]]:
    """The ranges of the numeric fields of a config, by field."""
    ranges: dict[str, tuple[float, float]] = {}
    for base in reversed(config.__mro__):
        ranges |= vars(base).get("ranges", {})
    return ranges


def lr_factor(remaining: float, iterations: int, lr_decay: float) -> float:
    """The factor on a learning rate with `remaining` iterations to go: 1, then linear to 0.1 over the last share."""
    falling = lr_decay * iterations
    return 0.1 + 0.9 * remaining / falling if remaining < falling else 1.0
