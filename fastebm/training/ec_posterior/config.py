"""The settings of a run that trains a VAE on refined posteriors, or a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastebm.training.calibration.config import VAEConfig
from fastebm.training.trainer.config import Ranges


@dataclass(frozen=True, kw_only=True)
class ECPosteriorConfig(VAEConfig):
    """All settings of a run of the calibrated posterior; together with the images they determine its result.

    With `num_steps=0` it is a plain VAE: no chain is run, and both nets are trained by the ELBO.
    """

    kind: ClassVar[str] = "ec_posterior"
    method_name: ClassVar[str] = "the calibrated posterior"
    ranges: ClassVar[Ranges] = {
        "num_steps": (0, 10**6),
        "temperature": (0, 1e6),
        "elbo_weight": (0, 1e12),
        "nll_weight": (0, 1e12),
    }

    num_steps: int = 10
    """number of Langevin steps of a chain on latent vectors; 0 trains a plain VAE"""
    step_size: float = 0.005
    """step size of a Langevin step; chains are stable below twice the smallest posterior variance of a latent number"""
    temperature: float = 1.0
    """temperature of a Langevin step, whose noise has the variance 2 * step_size * temperature; 1 samples the
    posterior, 0 walks to its nearest mode"""
    elbo_weight: float = 1.0
    """weight of the negative ELBO, at the encoder's own draws, in the encoder's loss"""
    nll_weight: float = 1.0
    """weight of -log q(z | x), in nats, at refined latent vectors in the encoder's loss"""
    max_loss: float = 1e6
    """magnitude of the loss, in squared errors of an image, above which the guard rolls the run back"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps and not self.elbo_weight + self.nll_weight:
            raise ValueError("elbo_weight and nll_weight are both 0: nothing would train the encoder")

    @property
    def noise_floor(self) -> float:
        """The mean squared distance that noise alone moves a latent vector."""
        return 2 * self.num_steps * self.step_size * self.temperature * self.latent
