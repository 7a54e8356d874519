"""Settings of the calibrated posterior for known data. Each says whether and with what result it was run.

Nets, batches and rates are those of EC-VAE's presets; the chain's are ours.
"""

from typing import Any

from fastebm.training.ec_posterior.config import ECPosteriorConfig

EC_POSTERIOR_DIGITS = ECPosteriorConfig(
    size=8,
    channels=1,
    iterations=1500,
    batch_size=64,
    latent=16,
    width=16,
    max_width=64,
    learning_rate=1e-3,
    lr_decay=0.3,
    warmup=200,
    ema=0.99,
)
"""scikit-learn's handwritten digits, 8x8, gray: for a CPU. Run, without a gain: docs/results/ec-posterior."""

_AT_LENGTH: dict[str, Any] = {"ema": 0.9999, "log_every": 50, "checkpoint_every": 1000, "pictures_every": 5000}

EC_POSTERIOR_MNIST = ECPosteriorConfig(
    size=32,
    channels=1,
    iterations=6000,
    batch_size=64,
    latent=32,
    width=16,
    max_width=128,
    learning_rate=1e-3,
    lr_decay=0.3,
    step_size=0.002,
    warmup=300,
    ema=0.995,
    log_every=20,
    pictures_every=1000,
)
"""MNIST, padded to 32x32, gray: small nets for a CPU. Not run; a shorter one at 16x16 was, without a gain:
docs/results/ec-posterior."""

EC_POSTERIOR_CIFAR10 = ECPosteriorConfig(flip=True, step_size=0.001, **_AT_LENGTH)
"""CIFAR-10. Not run."""

EC_POSTERIOR_PRESETS = {
    "digits": EC_POSTERIOR_DIGITS,
    "mnist": EC_POSTERIOR_MNIST,
    "cifar10": EC_POSTERIOR_CIFAR10,
}
