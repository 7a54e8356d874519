"""What the configs of runs share that train a generator at one size: ranges, checks, and what follows from fields.

The classes here declare no fields: a config lists its own, so that `--help` and positions have the order of a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from fastebm.training.trainer.config_fields import Ranges, check_fields, config_from_json

_RANGES: Ranges = {
    "size": (8, 256),
    "channels": (1, 2**10),
    "iterations": (1, 10**9 - 1),
    "batch_size": (2, 2**20),
    "width": (1, 2**16),
    "learning_rate": (1e-12, 1.0),
    "warmup": (0, 10**9),
}
_CALIBRATION_RANGES: Ranges = {
    "energy_width": (1, 2**16),
    "energy_depth": (1, 6),
    "energy_learning_rate": (1e-12, 1.0),
    "noise_std": (0, 1e6),
    "data_term_weight": (0, 1e12),
    "data_term_hinge": (0, 1e12),
    "lambda_start": (0, 1e12),
    "lambda_max": (0, 1e12),
    "dual_rate": (0, 1e12),
    "dual_threshold": (0, 1e12),
}
VAE_RANGES: Ranges = {"latent": (1, 2**16), "max_width": (1, 2**16), "kl_weight": (1e-12, 1e12)}


class GeneratorSettings:
    """A run of one size and one stage.

    Attributes:
        called: what errors call the run.
    """

    called: ClassVar[str]
    size: int
    channels: int
    iterations: int
    batch_size: int
    lr_decay: float

    def check(self, ranges: Ranges) -> None:
        """Raises ValueError where a field is out of its range, of which a method gives its own."""
        check_fields(self, {**_RANGES, **ranges}, {})
        if self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two, got {self.size}")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """The config that was stored as JSON. Raises RunError if its fields are not ours."""
        return config_from_json(cls, stored, cls.called)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All resolutions that the run trains at: one."""
        return (self.size,)

    @property
    def total_iterations(self) -> int:
        return self.iterations

    @property
    def total_chains(self) -> int:
        """How many latent vectors, and images, the whole run uses."""
        return self.iterations * self.batch_size

    @property
    def dimension(self) -> int:
        """Numbers in an image."""
        return self.channels * self.size**2

    def learning_rate_factor_at(self, iteration: int) -> float:
        """What learning rates are multiplied with in iteration number `iteration`, from 0 on."""
        falling = self.lr_decay * self.iterations
        left = self.iterations - iteration
        return 0.1 + 0.9 * left / falling if left < falling else 1.0


class CalibratedSettings(GeneratorSettings):
    """A run whose generator an energy calibrates."""

    num_steps: int
    noise_std: float
    lambda_start: float
    lambda_max: float
    dual_rate: float
    dual_threshold: float

    def check(self, ranges: Ranges) -> None:
        super().check({**_CALIBRATION_RANGES, **ranges})
        if self.lambda_start > self.lambda_max:
            raise ValueError(f"lambda_start is {self.lambda_start}, above lambda_max, which is {self.lambda_max}")

    @property
    def calibrated(self) -> bool:
        """Whether there is an energy; without it this is a plain generator."""
        return self.lambda_start > 0 or self.dual_rate > 0

    @property
    def noise_floor(self) -> float:
        """The calibration loss of a chain that noise alone moves: `num_steps * noise_std**2 * dimension`."""
        return self.num_steps * self.noise_std**2 * self.dimension

    @property
    def threshold(self) -> float:
        """The calibration loss at which the dual update leaves its weight as it is."""
        return self.noise_floor + self.dual_threshold * self.dimension
