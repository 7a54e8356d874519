"""Presets of EC-VAE for known data sets. The docstring of each says whether it was run, and with what result.

Latent size, batches, learning rates, widths of the energy and the weight of the KL term are those of the authors' demo
(Luo-Yihong/EC-VAE) at 32x32; all else, and everything about larger images, is our own choice and not tuned.
"""

from fastebm.training.calibration.presets import DIGITS_VAE, LONG_RUN, MNIST_VAE, PICTURES_VAE
from fastebm.training.ec_vae.config import ECVAEConfig

_SMALL_ENERGY = {"energy_width": 16, "energy_depth": 3, "num_chains": 1}
_BOUNDED_CHAINS = {
    "energy_learning_rate": 3e-4,
    "lambda_start": 3.0,
    "num_steps": 8,
    "step_size": 0.1,
    "energy_l2": 0.02,
}

EC_VAE_DIGITS = ECVAEConfig(
    **(DIGITS_VAE | _SMALL_ENERGY | {"iterations": 4500, "width": 32, "max_width": 128}),
    energy_learning_rate=5e-4,
    lambda_start=1.0,
)
"""scikit-learn's handwritten digits, 8x8, gray: minutes on a CPU. Run: docs/results/ec-vae has the result."""

EC_VAE_MNIST = ECVAEConfig(**(MNIST_VAE | _SMALL_ENERGY | _BOUNDED_CHAINS | {"iterations": 3500}))
"""MNIST, padded to 32x32, gray: small nets for a CPU. Run: docs/results/ec-vae has the result, and that of shorter ones
at 16x16. Without the L2 term energies exploded there in the first hundred updates."""

EC_VAE_PICTURES = ECVAEConfig(**(PICTURES_VAE | _SMALL_ENERGY | _BOUNDED_CHAINS))
"""Any pictures, 32x32, in colour; what `--data` alone takes. Run, on CIFAR-10: docs/results/ec-vae has the result."""

EC_VAE_CIFAR10 = ECVAEConfig(**LONG_RUN)
"""CIFAR-10. Not run."""

EC_VAE_STL10 = ECVAEConfig(**LONG_RUN)
"""STL-10 at 32x32. Not run."""

EC_VAE_IMAGENET32 = ECVAEConfig(iterations=300_000, latent=256, width=128, max_width=1024, **LONG_RUN)
"""ImageNet at 32x32. Not run."""

EC_VAE_CELEBA64 = ECVAEConfig(size=64, width=32, energy_depth=5, **LONG_RUN)
"""CelebA's faces, the middle 140x140 at 64x64. Not run."""

EC_VAE_CHURCH64 = ECVAEConfig(size=64, width=32, energy_depth=5, **LONG_RUN)
"""LSUN's churches at 64x64. Not run."""

EC_VAE_CELEBAHQ256 = ECVAEConfig(
    size=256, batch_size=32, width=16, latent=256, energy_width=32, energy_depth=6, **LONG_RUN
)
"""CelebA-HQ at 256x256. Not run."""

EC_VAE_PRESETS = {
    "digits": EC_VAE_DIGITS,
    "mnist": EC_VAE_MNIST,
    "pictures": EC_VAE_PICTURES,
    "cifar10": EC_VAE_CIFAR10,
    "stl10-32": EC_VAE_STL10,
    "imagenet32": EC_VAE_IMAGENET32,
    "celeba64": EC_VAE_CELEBA64,
    "church64": EC_VAE_CHURCH64,
    "celebahq256": EC_VAE_CELEBAHQ256,
}
