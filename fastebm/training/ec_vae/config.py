"""The settings of a run that trains an energy-calibrated VAE, or a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastebm.training.calibration.config import VAE_RANGES, CalibratedSettings
from fastebm.training.trainer.config_fields import COMMON_FREE, Ranges

_RANGES: Ranges = {**VAE_RANGES, "num_chains": (1, 2)}

FREE = COMMON_FREE


@dataclass(frozen=True)
class ECVAEConfig(CalibratedSettings):
    """Everything that a run of EC-VAE depends on, besides its images.

    Where the authors' demo (Luo-Yihong/EC-VAE) has a number that works it is the default; the chain is the one of our
    own trial and of jcui1224/dual-MCMC, `step_size` in units of the energy itself, with noise of 1e-3 and no data term:
    in the demo's units the data term is almost inert, and its dual threshold lies at the noise floor of its chain.

    With `lambda_start=0` and `dual_rate=0` it is a plain VAE: no energy is trained and no chain is run.
    """

    kind: ClassVar[str] = "ec_vae"

    called: ClassVar[str] = "a run of EC-VAE"

    size: int = 32
    """resolution of the images, a power of two"""
    channels: int = 3
    """colours of an image"""
    iterations: int = 100_000
    """updates of the weights"""
    batch_size: int = 128
    """images, and as many samples and chains, in an update"""
    latent: int = 128
    """length of a latent vector"""
    width: int = 64
    """channels of decoder and encoder at full resolution; they double with every halving of it"""
    max_width: int = 512
    """where that ends"""
    energy_width: int = 128
    """channels of the energy's first residual layers; those after them have twice as many"""
    energy_depth: int = 4
    """how many times a branch of the energy halves its image"""
    spectral_norm: bool = True
    """on all layers of the energy, and on the decoder's 3x3 convolutions"""
    kl_weight: float = 0.1
    """of the KL term beside the squared error; that is a variance of half of it for each pixel"""
    learned_variance: bool = False
    """makes that variance, one number, a parameter, which then gives the weight"""
    learning_rate: float = 2e-4
    """of Adam for decoder and encoder"""
    energy_learning_rate: float = 1e-4
    """of Adam for the energy"""
    lr_decay: float = 0.0
    """share of the run, at its end, over which learning rates fall linearly to a tenth"""
    adam_betas: tuple[float, float] = (0.0, 0.9)
    """decay rates of Adam's moments"""
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
    num_chains: Literal[1, 2] = 2
    """chains of each sample in an update: 2 runs the energy's chain from the decoder that was just updated; 1 uses
    that of the calibration again, which costs half"""
    warmup: int = 500
    """iterations before the calibration begins, in which the energy learns already"""
    lambda_start: float = 30.0
    """weight of the calibration loss"""
    dual_rate: float = 0.0
    """how fast that weight follows the calibration loss above its threshold; 0 keeps it; 0.01 in the demo"""
    dual_threshold: float = 1e-4
    """squared distance per pixel and colour, above that of noise alone, at which the weight stays as it is"""
    lambda_max: float = 100.0
    """largest weight"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """in which the energy runs inside chains"""
    update_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the convolutions in an update of the weights, which themselves are always float32; losses and norms too"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """of the chains' gradients"""
    flip: bool = False
    """mirrors each training image with probability 1/2"""
    data_noise: float = 0.0
    """std of the noise on the real images that the energy sees, which lie in [-1, 1]"""
    energy_l2: float = 0.0
    """weight of the mean squared energy in the energy's loss"""
    ema: float = 0.999
    """decay of the averaged decoder and encoder that are sampled from; 0 samples from the trained ones"""
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
