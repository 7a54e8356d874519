"""The settings of a run that trains an energy-calibrated flow, or a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastebm.training.calibration.config import CalibratedSettings
from fastebm.training.trainer.config_fields import COMMON_FREE, Ranges

_RANGES: Ranges = {
    "brightnesses": (2, 2**16),
    "levels": (1, 8),
    "flow_steps": (1, 2**10),
    "bound": (1e-6, 1e6),
    "flow_betas": (0, 1 - 1e-9),
    "max_gradient_norm": (0, 1e30),
}

FREE = COMMON_FREE


@dataclass(frozen=True)
class ECFlowConfig(CalibratedSettings):
    """Everything that a run of a calibrated flow depends on, besides its images.

    The paper names calibrated flows among its extensions, without public code: everything here is our choice.

    With `lambda_start=0` and `dual_rate=0` it is a plain flow: no energy is trained and no chain is run.
    """

    kind: ClassVar[str] = "ec_flow"

    called: ClassVar[str] = "a run of a calibrated flow"

    size: int = 32
    """resolution of the images, a power of two"""
    channels: int = 3
    """colours of an image"""
    brightnesses: int = 256
    """values that a pixel and colour can have: likelihoods are of discrete images, to which images are rounded"""
    iterations: int = 100_000
    """updates of the weights"""
    batch_size: int = 64
    """images, and as many samples and chains, in an update"""
    levels: int = 3
    """how often the flow halves the resolution"""
    flow_steps: int = 16
    """steps of the flow (norm, 1x1 convolution, coupling) in a level"""
    width: int = 128
    """channels inside of a coupling's net"""
    bound: float = 1.5
    """of the log-scales of a coupling"""
    energy_width: int = 128
    """channels of the energy's first residual layers; those after them have twice as many"""
    energy_depth: int = 4
    """how many times a branch of the energy halves its image"""
    spectral_norm: bool = True
    """on all layers of the energy"""
    learning_rate: float = 1e-3
    """of Adam for the flow"""
    flow_betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of Adam's moments for the flow"""
    max_gradient_norm: float = 10.0
    """the flow's gradient is shortened to this norm where it is longer; 0: never"""
    energy_learning_rate: float = 1e-4
    """of Adam for the energy"""
    lr_decay: float = 0.0
    """share of the run, at its end, over which learning rates fall linearly to a tenth"""
    adam_betas: tuple[float, float] = (0.0, 0.9)
    """decay rates of Adam's moments for the energy"""
    num_steps: int = 15
    """Langevin updates of a chain"""
    step_size: float = 0.05
    """of a Langevin update"""
    noise_std: float = 1e-3
    """noise of a Langevin update"""
    data_term_weight: float = 0.0
    """pull of a chain to the sample it started from, at its first update; falls to zero; 0: none"""
    data_term_hinge: float = 0.0
    """squared distance per pixel and colour that the data term leaves free"""
    warmup: int = 500
    """iterations before the calibration begins, in which the energy learns already"""
    lambda_start: float = 10.0
    """weight of the calibration, in bits for a squared distance of 1"""
    dual_rate: float = 0.0
    """how fast that weight follows the calibration loss above its threshold; 0 keeps it"""
    dual_threshold: float = 1e-4
    """squared distance per pixel and colour, above that of noise alone, at which the weight stays as it is"""
    lambda_max: float = 1000.0
    """largest weight"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """in which the energy runs inside chains"""
    update_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the energy's convolutions in an update of its weights; the flow always runs in float32, or its inverse would
    be none"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """of the chains' gradients"""
    flip: bool = False
    """mirrors each training image with probability 1/2"""
    data_noise: float = 0.0
    """std of the noise on the real images that the energy sees, besides that of dequantisation"""
    energy_l2: float = 0.0
    """weight of the mean squared energy in the energy's loss"""
    ema: float = 0.999
    """decay of the averaged flow that is sampled from; 0 samples from the trained one"""
    max_energy: float = 1000.0
    """the guard rolls back where an energy has a larger magnitude"""
    max_gap: float = 1000.0
    """and where mean energies of data and samples are further apart"""
    max_loss: float = 1000.0
    """and where the energy's loss has a larger magnitude"""
    retries: int = 3
    """times that the guard goes back to a checkpoint, with fresh noise, before the run is given up"""
    retry_lr_factor: float = 0.5
    """factor on the learning rates, for the rest of the run, each time"""
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
        if 2**self.levels > self.size:
            raise ValueError(f"images of size {self.size} can't be halved {self.levels} times, as levels wants")
