"""The settings of a run that trains a VAE on refined posteriors, or a plain one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastebm.training.calibration.config import VAE_RANGES, GeneratorSettings
from fastebm.training.trainer.config_fields import COMMON_FREE, Ranges

_RANGES: Ranges = {
    **VAE_RANGES,
    "num_steps": (0, 10**6),
    "temperature": (0, 1e6),
    "elbo_weight": (0, 1e12),
    "nll_weight": (0, 1e12),
}

FREE = COMMON_FREE


@dataclass(frozen=True)
class ECPosteriorConfig(GeneratorSettings):
    """Everything that a run of the calibrated posterior depends on, besides its images.

    With `num_steps=0` it is a plain VAE: no chain is run, and both nets are trained by the ELBO.
    """

    kind: ClassVar[str] = "ec_posterior"

    called: ClassVar[str] = "a run of the calibrated posterior"

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
    num_steps: int = 10
    """Langevin updates of a chain on latent vectors; 0: a plain VAE"""
    step_size: float = 0.005
    """of a Langevin update; stable below twice the smallest posterior variance of a latent number"""
    temperature: float = 1.0
    """of the noise of a Langevin update, whose variance is 2 * step_size * temperature; 1 samples the posterior"""
    elbo_weight: float = 1.0
    """in the encoder's loss, of the ELBO at the encoder's own draws"""
    nll_weight: float = 1.0
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
    retry_lr_factor: float = 0.5
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
        self.check(_RANGES)
        if self.num_steps and not self.elbo_weight + self.nll_weight:
            raise ValueError("elbo_weight and nll_weight are both 0: nothing would train the encoder")

    @property
    def noise_floor(self) -> float:
        """The mean squared way of a latent vector that noise alone moves."""
        return 2 * self.num_steps * self.step_size * self.temperature * self.latent

    @property
    def max_energy(self) -> float:
        """None: there is no energy of images. What is not finite the guard sees in the losses."""
        return math.inf

    @property
    def max_gap(self) -> float:
        return math.inf
