"""The settings that EC-VAE, the calibrated posterior and the calibrated flow share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastebm.training.trainer.config import EnergyTrainerConfig, Ranges, TrainerConfig, lr_factor


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(TrainerConfig):
    """Settings of a run that trains a generator at one resolution, a power of two (ValueError otherwise)."""

    ranges: ClassVar[Ranges] = {
        "size": (8, 256),
        "iterations": (1, 10**9 - 1),
        "batch_size": (2, 2**20),
        "width": (1, 2**16),
        "learning_rate": (1e-12, 1.0),
        "warmup": (0, 10**9),
    }

    size: int = 32
    """resolution of the images, in pixels, a power of two"""
    iterations: int = 100_000
    """number of updates of the weights"""
    batch_size: int = 128
    """number of images, and as many samples and chains, in an update"""
    width: int
    """number of channels of the generator's narrowest layers"""
    learning_rate: float = 2e-4
    """learning rate of Adam for the generator"""
    warmup: int = 500
    """number of iterations before the calibration begins"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two, got {self.size}")

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def smallest_batch(self) -> int:
        return self.batch_size

    @property
    def total_iterations(self) -> int:
        return self.iterations

    @property
    def total_chains(self) -> int:
        return self.iterations * self.batch_size

    @property
    def dimension(self) -> int:
        """The number of values in an image, channels * size * size."""
        return self.channels * self.size**2

    def lr_factor_at(self, iteration: int) -> float:
        """The factor on learning rates in iteration number `iteration`, from 0 on."""
        return lr_factor(self.iterations - iteration, self.iterations, self.lr_decay)


@dataclass(frozen=True, kw_only=True)
class VAEConfig(GeneratorConfig):
    """Settings of a run that trains a VAE."""

    ranges: ClassVar[Ranges] = {"latent": (1, 2**16), "max_width": (1, 2**16), "kl_weight": (1e-12, 1e12)}

    latent: int = 128
    """number of dimensions of a latent vector"""
    width: int = 64
    """number of channels of decoder and encoder at full resolution; it doubles with every halving of the resolution"""
    max_width: int = 512
    """largest width of a layer, in channels"""
    spectral_norm: bool = True
    """put spectral norm on the decoder's 3x3 convolutions, and on all layers of an energy"""
    kl_weight: float = 0.1
    """weight of the KL term beside the squared error of an image; it is twice the decoder's variance of a pixel"""
    learned_variance: bool = False
    """learn that variance, one number for all pixels, which then sets the weight of the KL term"""


@dataclass(frozen=True, kw_only=True)
class CalibratedConfig(GeneratorConfig, EnergyTrainerConfig):
    """Settings of a run whose generator is calibrated by an energy.

    Raises ValueError where `lambda_start` is larger than `lambda_max`.
    """

    ranges: ClassVar[Ranges] = {
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

    energy_width: int = 128
    """number of channels of the energy's first residual layers; the later ones have twice as many"""
    energy_depth: int = 4
    """number of times that a branch of the energy halves the resolution"""
    spectral_norm: bool = True
    """put spectral norm on all layers of the energy"""
    energy_learning_rate: float = 1e-4
    """learning rate of Adam for the energy"""
    noise_std: float = 1e-3
    """standard deviation of the noise of a Langevin step"""
    data_term_weight: float = 0.0
    """weight of the pull of a chain to the sample that it started from, at its first step; it falls to zero; 0 for no
    pull"""
    data_term_hinge: float = 0.0
    """squared distance per pixel and channel below which the data term does not pull"""
    lambda_start: float
    """weight of the calibration loss at the start"""
    lambda_max: float
    """largest weight of the calibration loss"""
    dual_rate: float = 0.0
    """rate at which that weight follows the excess of the calibration loss over its threshold; 0 keeps the weight"""
    dual_threshold: float = 1e-4
    """squared distance per pixel and channel, beyond that of noise alone, at which the weight stays as it is"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_start > self.lambda_max:
            raise ValueError(f"lambda_start is {self.lambda_start}, above lambda_max, which is {self.lambda_max}")

    @property
    def calibrated(self) -> bool:
        """Whether there is an energy; without one this is a plain generator."""
        return self.lambda_start > 0 or self.dual_rate > 0

    @property
    def noise_floor(self) -> float:
        """The calibration loss of a chain that noise alone moves: `num_steps * noise_std**2 * dimension`."""
        return self.num_steps * self.noise_std**2 * self.dimension

    @property
    def threshold(self) -> float:
        """The calibration loss at which the dual update leaves its weight as it is."""
        return self.noise_floor + self.dual_threshold * self.dimension
