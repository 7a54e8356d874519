"""Settings of EC-VAE for known data. Each says whether and with what result it was run.

Latent size, batches, rates, widths of the energy and the weight of the KL term are those of the authors' demo
(Luo-Yihong/EC-VAE) at 32x32; all else about larger images is our choice, untuned.
"""

from typing import Any

from fastebm.training.ec_vae.config import ECVAEConfig

EC_VAE_DIGITS = ECVAEConfig(
    size=8,
    channels=1,
    iterations=1500,
    batch_size=64,
    latent=16,
    width=16,
    max_width=64,
    energy_width=16,
    energy_depth=3,
    learning_rate=1e-3,
    energy_learning_rate=5e-4,
    lr_decay=0.3,
    num_chains=1,
    warmup=200,
    lambda_start=2.0,
    ema=0.99,
)
"""scikit-learn's handwritten digits, 8x8, gray: minutes on a CPU. Run: docs/results/ec-vae has the result."""

_AT_LENGTH: dict[str, Any] = {"ema": 0.9999, "log_every": 50, "checkpoint_every": 1000, "pictures_every": 5000}

EC_VAE_MNIST = ECVAEConfig(
    size=32,
    channels=1,
    iterations=3500,
    batch_size=64,
    latent=32,
    width=16,
    max_width=128,
    energy_width=16,
    energy_depth=3,
    learning_rate=1e-3,
    energy_learning_rate=3e-4,
    lr_decay=0.3,
    num_chains=1,
    num_steps=8,
    step_size=0.1,
    warmup=300,
    lambda_start=3.0,
    energy_l2=0.02,
    ema=0.995,
    log_every=20,
    pictures_every=1000,
)
"""MNIST, padded to 32x32, gray: small nets for a CPU. Run: docs/results/ec-vae has the result, and that of shorter ones
at 16x16. Without the L2 term energies exploded there in the first hundred updates."""

EC_VAE_CIFAR10 = ECVAEConfig(flip=True, **_AT_LENGTH)
"""CIFAR-10. Not run."""

EC_VAE_STL10 = ECVAEConfig(flip=True, **_AT_LENGTH)
"""STL-10 at 32x32. Not run."""

EC_VAE_IMAGENET32 = ECVAEConfig(iterations=300_000, latent=256, width=128, max_width=1024, flip=True, **_AT_LENGTH)
"""ImageNet at 32x32. Not run."""

EC_VAE_CELEBA64 = ECVAEConfig(size=64, width=32, energy_depth=5, flip=True, **_AT_LENGTH)
"""CelebA's faces, the middle 140x140 at 64x64. Not run."""

EC_VAE_CHURCH64 = ECVAEConfig(size=64, width=32, energy_depth=5, flip=True, **_AT_LENGTH)
"""LSUN's churches at 64x64. Not run."""

EC_VAE_CELEBAHQ256 = ECVAEConfig(
    size=256, batch_size=32, width=16, latent=256, energy_width=32, energy_depth=6, flip=True, **_AT_LENGTH
)
"""CelebA-HQ at 256x256. Not run."""

EC_VAE_PRESETS = {
    "digits": EC_VAE_DIGITS,
    "mnist": EC_VAE_MNIST,
    "cifar10": EC_VAE_CIFAR10,
    "stl10-32": EC_VAE_STL10,
    "imagenet32": EC_VAE_IMAGENET32,
    "celeba64": EC_VAE_CELEBA64,
    "church64": EC_VAE_CHURCH64,
    "celebahq256": EC_VAE_CELEBAHQ256,
}
