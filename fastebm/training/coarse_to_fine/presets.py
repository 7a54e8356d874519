"""Presets of coarse-to-fine training for known data sets. The docstring of each says whether it was run.

Widths, batches and chains are those of the authors' repository (YangNaruto/ProEBM), whose own logs show 7 of 8 runs
exploding. All presets but the digits are therefore more cautious: an L2 term on the energies, noise on the data, half
the length of a stage, a learning rate that falls over the second half of each stage, and bounds of the guard far below
the authors' 1000, so that it rolls back before every checkpoint is of an exploding run. Noise of 0.05 kept each of
three runs on CIFAR-10 from exploding that exploded with 0.02, at no cost (docs/results/stability); all presets for
colour images have it. Up to 16x16 the learning rates are the authors', and nothing that we ran there exploded.
Photographs of zebras at 128x128 exploded with their rates, and did not with a quarter of them and a larger L2 term
(docs/results/zebra128); presets from 128x128 on have those. That for 64x64 has the settings of docs/results/zebra64.
"""

import dataclasses
from typing import Any

from fastebm.training.coarse_to_fine.config import CoarseToFineConfig

DIGITS = CoarseToFineConfig(
    sizes=(4, 8),
    iterations=(150, 750),
    batch_sizes=(64, 64),
    learning_rates=(2e-3, 2e-3),
    fade=0.4,
    lr_decay=0.3,
    channels=1,
    base_width=8,
    data_noise=0.03,
)
"""scikit-learn's handwritten digits, 8x8, gray: the demo. Run: docs/results/digits has the result."""

_BATCHES = {8: 256, 16: 128, 32: 64, 64: 64, 128: 32, 256: 16, 512: 16}
_RATES = {8: 1e-3, 16: 1e-3, 32: 7e-4, 64: 3e-4, 128: 2e-4, 256: 2e-4, 512: 2e-4}


def _large_image_config(largest: int, images: int, **changes: Any) -> CoarseToFineConfig:
    """A run from 8x8 to `largest` whose stages see `images` images each, the last one twice as many."""
    sizes = tuple(size for size in _BATCHES if size <= largest)
    batches = tuple(_BATCHES[size] for size in sizes)
    seen = [images * (2 if size == largest else 1) for size in sizes]
    settings: dict[str, Any] = {
        "sizes": sizes,
        "iterations": tuple(-(-count // batch) for count, batch in zip(seen, batches, strict=True)),
        "batch_sizes": batches,
        "learning_rates": tuple(_RATES[size] for size in sizes),
        "fade": 0.5,
        "lr_decay": 0.5,
        "flip": True,
        "data_noise": 0.05,
        "energy_l2": 1e-3 if largest <= 32 else 0.02,
        "ema": 0.0 if largest <= 32 else 0.99,
        "max_energy": 200.0,
        "max_gap": 50.0,
        "max_loss": 100.0,
        "log_every": 50,
        "checkpoint_every": 500,
        "pictures_every": 2000,
    }
    return CoarseToFineConfig(**(settings | changes))


MNIST = CoarseToFineConfig(
    sizes=(8, 16, 32),
    iterations=(2000, 2000, 3000),
    batch_sizes=(64, 64, 64),
    learning_rates=(1e-3, 1e-3, 1e-3),
    fade=0.5,
    lr_decay=0.5,
    channels=1,
    base_width=16,
    spectral_norm=False,
    num_steps=20,
    data_noise=0.01,
    clamp_ends=True,
    noisy_starts=0.25,
    start_temperature=0.006,
    hole_starts=0.125,
    energy_l2=1e-3,
    ema=0.99,
    max_energy=200.0,
    max_gap=50.0,
    max_loss=100.0,
    log_every=20,
)
"""MNIST, padded to 32x32, gray. Run: docs/results/mnist has the result."""

PICTURES = dataclasses.replace(
    MNIST,
    iterations=(600, 600, 1200),
    learning_rates=(1e-3, 1e-3, 5e-4),
    channels=3,
    base_width=8,
    step_size=4.0,
    data_noise=0.05,
    start_temperature=0.0003,
    energy_l2=0.004,
)
"""Any pictures, 32x32, in colour; what `--data` alone takes. Run: docs/results/pictures has the result."""

CIFAR10 = _large_image_config(
    32, 1_200_000, learning_rates=(1e-3, 1e-3, 1e-3), spectral_norm=False, clamp_ends=True, ema=0.99
)
"""CIFAR-10, and other colour images at 32x32 (a smaller one was: docs/results/cifar10). Not run."""

CELEBA64 = _large_image_config(
    64,
    1_500_000,
    learning_rates=(1e-3, 1e-3, 5e-4, 2e-4),
    spectral_norm=False,
    clamp_ends=True,
    num_steps=20,
    step_size=4.0,
    energy_l2=0.004,
)
"""CelebA's faces, the middle 140x140 at 64x64 (photographs in smaller nets: docs/results/zebra64). Not run."""

CHURCH128 = _large_image_config(
    128,
    1_000_000,
    learning_rates=(1e-3, 1e-3, 5e-4, 2e-4, 1e-4),
    spectral_norm=False,
    clamp_ends=True,
    num_steps=20,
    step_growth=4.0,
    energy_l2=0.004,
)
"""LSUN's churches, and other photographs at 128x128 (a smaller one was: docs/results/zebra128). Not run."""

CELEBAHQ256 = _large_image_config(256, 800_000, recompute_from=256)
"""CelebA-HQ at 256x256. Not run."""

CELEBAHQ512 = _large_image_config(512, 800_000, base_width=48, recompute_from=256)
"""CelebA-HQ at 512x512. Not run."""

PRESETS = {
    "digits": DIGITS,
    "mnist": MNIST,
    "pictures": PICTURES,
    "cifar10": CIFAR10,
    "celeba64": CELEBA64,
    "church128": CHURCH128,
    "celebahq256": CELEBAHQ256,
    "celebahq512": CELEBAHQ512,
}

SHAPING: dict[str, dict[str, Any]] = {"mnist": {"fit": "pad"}, "celeba64": {"crop": 140}}
"""How a preset's images get their size, where not by default: arguments of `fastebm.data.open_images`."""
