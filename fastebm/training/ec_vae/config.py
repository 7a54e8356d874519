"""The settings of a run that trains an energy-calibrated VAE, or a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastebm.training.calibration.config import CalibratedConfig, VAEConfig


@dataclass(frozen=True, kw_only=True)
class ECVAEConfig(VAEConfig, CalibratedConfig):
    """All settings of an EC-VAE run; together with the images they determine its result.

    Defaults are the numbers of the authors' demo (Luo-Yihong/EC-VAE) where those work. The settings of the chain are
    our own: `step_size` is in units of the energy itself, as in jcui1224/dual-MCMC, the noise is 1e-3, and there is no
    data term. In the units of the demo the data term is almost inert, and the dual threshold lies at the noise floor.

    With `lambda_start=0` and `dual_rate=0` it is a plain VAE: no energy is trained and no chain is run.
    """

    kind: ClassVar[str] = "ec_vae"
    method_name: ClassVar[str] = "EC-VAE"

    num_chains: Literal[1, 2] = 2
    """number of chains per sample in an update: with 2 the energy learns from a chain of its own, which starts at the
    decoder that was just updated; with 1 it learns from the chain of the calibration, which costs half"""
    lambda_start: float = 30.0
    lambda_max: float = 100.0
