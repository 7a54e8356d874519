"""Presets of the calibrated posterior for known data sets. The docstring of each says whether it was run.

Nets, batches and learning rates are those of EC-VAE's presets; the settings of the chains are our own choice.
"""

from fastebm.training.calibration.presets import DIGITS_VAE, LONG_RUN, MNIST_VAE, PICTURES_VAE
from fastebm.training.ec_posterior.config import ECPosteriorConfig

EC_POSTERIOR_DIGITS = ECPosteriorConfig(**DIGITS_VAE)
"""scikit-learn's handwritten digits, 8x8, gray: for a CPU. Run, without a gain: docs/results/ec-posterior."""

EC_POSTERIOR_MNIST = ECPosteriorConfig(**(MNIST_VAE | {"iterations": 6000, "step_size": 0.002}))
"""MNIST, padded to 32x32, gray: small nets for a CPU. Not run; a shorter one at 16x16 was, without a gain:
docs/results/ec-posterior."""

EC_POSTERIOR_PICTURES = ECPosteriorConfig(**(PICTURES_VAE | {"step_size": 0.001}))
"""Any pictures, 32x32, in colour, in nets for a CPU; what `--data` alone takes. Not run."""

EC_POSTERIOR_CIFAR10 = ECPosteriorConfig(step_size=0.001, **LONG_RUN)
"""CIFAR-10. Not run."""

EC_POSTERIOR_PRESETS = {
    "digits": EC_POSTERIOR_DIGITS,
    "mnist": EC_POSTERIOR_MNIST,
    "pictures": EC_POSTERIOR_PICTURES,
    "cifar10": EC_POSTERIOR_CIFAR10,
}
