"""The settings of a run that trains a VAE on refined posteriors, or a plain one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastebm.training.config_fields import COMMON_FREE, check_fields, config_from_json

_RANGES: dict[str, tuple[float, float]] = {
    "size": (8, 256),
    "channels": (1, 2**10),
    "iterations": (1, 10**9 - 1),
    "batch_size": (2, 2**20),
    "latent": (1, 2**16),
    "width": (1, 2**16),
    "max_width": (1, 2**16),
    "kl_weight": (1e-12, 1e12),
    "learning_rate": (1e-12, 1.0),
    "steps": (0, 10**6),
    "temperature": (0, 1e6),
    "elbo_weight": (0, 1e12),
    "pull_weight": (0, 1e12),
    "warmup": (0, 10**9),
}

FREE = COMMON_FREE


@dataclass(frozen=True)
class EcPosteriorConfig:
    """Everything that a run of the calibrated posterior depends on, besides its images.

    With `steps=0` it is a plain VAE: no chain is run, and both nets are trained by the ELBO.
    """

    size: int = 32
    """resolution of the images, a power of two"""
    channels: int = 3
    """colours of an image"""
    iterations: int = 100_000
    """updates of the weights"""
    batch_size: int = 128
    """images, and as many chains, in an update"""
    latent: int = 128
    """length of a latent vector"""
    width: int = 64
    """channels of decoder and encoder at full resolution; they double with every halving of it"""
    max_width: int = 512
    """where that ends"""
    spectral_norm: bool = True
    """on the decoder's 3x3 convolutions"""
    kl_weight: float = 0.1
    """of the KL term beside the squared error; that is a variance of half of it for each pixel"""
    learned_variance: bool = False
    """makes that variance, one number, a parameter, which then gives the weight"""
    learning_rate: float = 2e-4
    """of Adam for decoder and encoder"""
    lr_decay: float = 0.0
    """share of the run, at its end, over which the learning rate falls linearly to a tenth"""
    adam_betas: tuple[float, float] = (0.0, 0.9)
    """decay rates of Adam's moments"""
    steps: int = 10
    """Langevin updates of a chain on latent vectors; 0: a plain VAE"""
    step_size: float = 0.005
    """of a Langevin update; stable below twice the smallest posterior variance of a latent number"""
    temperature: float = 1.0
    """of the noise of a Langevin update, whose variance is 2 * step_size * temperature; 1 samples the posterior"""
    elbo_weight: float = 1.0
    """in the encoder's loss, of the ELBO at the encoder's own draws"""
    pull_weight: float = 1.0
    """in the encoder's loss, of the nats by which refined latent vectors surprise it, -log q(z | x)"""
    warmup: int = 500
    """iterations before chains are run, in which it is a plain VAE"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """in which the decoder runs inside chains"""
    update_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the convolutions in an update of the weights, which themselves are always float32; losses and norms too"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """of the chains' gradients"""
    flip: bool = False
    """mirrors each training image with probability 1/2"""
    ema: float = 0.999
    """decay of the averaged decoder and encoder that are sampled from; 0 samples from the trained ones"""
    max_loss: float = 1e6
    """the guard rolls back where the loss, in squared errors of an image, has a larger magnitude"""
    retries: int = 3
    """times that the guard goes back to a checkpoint, with fresh noise, before the run is given up"""
    retry_rate: float = 0.5
    """factor on the learning rate, for the rest of the run, each time"""
    seed: int = 0
    """of the weights, the order of the images and all noise"""
    log_every: int = 10
    """iterations between lines of the log, which hold means over them"""
    checkpoint_every: int = 500
    """iterations between checkpoints; the end always makes one"""
    keep_checkpoints: int = 3
    """how many of the newest checkpoints stay"""
    pictures_every: int = 0
    """iterations between pictures; the end always makes some; 0: only that"""
    tensorboard: bool = False
    """also writes the log and the samples for TensorBoard"""

    def __post_init__(self) -> None:
        check_fields(self, _RANGES, {})
        if self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two, got {self.size}")
        if self.steps and not self.elbo_weight + self.pull_weight:
            raise ValueError("elbo_weight and pull_weight are both 0: nothing would train the encoder")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> EcPosteriorConfig:
        """The config that was stored as JSON. Raises RunError if its fields are not ours."""
        return config_from_json(cls, stored, "a run of the calibrated posterior")

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

    @property
    def noise_floor(self) -> float:
        """The mean squared way of a latent vector that noise alone moves."""
        return 2 * self.steps * self.step_size * self.temperature * self.latent

    @property
    def max_energy(self) -> float:
        """None: there is no energy of images. What is not finite the guard sees in the losses."""
        return math.inf

    @property
    def max_gap(self) -> float:
        return math.inf

    def learning_rate_factor_at(self, iteration: int) -> float:
        """What the learning rate is multiplied with in iteration number `iteration`, from 0 on."""
        falling = self.lr_decay * self.iterations
        left = self.iterations - iteration
        return 0.1 + 0.9 * left / falling if left < falling else 1.0
