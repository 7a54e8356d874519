"""Presets of the calibrated flow for known data sets, all our own choice.

The docstring of each says whether it was run, and with what result.
"""

from typing import Any

from fastebm.training.calibration.presets import LONG_RUN
from fastebm.training.ec_flow.config import ECFlowConfig

_SMALL: dict[str, Any] = {
    "batch_size": 32,
    "flow_steps": 4,
    "energy_width": 16,
    "energy_depth": 3,
    "energy_l2": 0.02,
    "gap_hinge": 0.5,
    "lr_decay": 0.3,
    "num_steps": 10,
}

EC_FLOW_DIGITS = ECFlowConfig(
    **_SMALL,
    size=8,
    channels=1,
    brightnesses=17,
    iterations=1800,
    levels=2,
    width=24,
    learning_rate=2e-3,
    energy_learning_rate=5e-4,
    warmup=100,
    ema=0.98,
)
"""scikit-learn's handwritten digits, 8x8, gray: minutes on a CPU. Run: docs/results/ec-flow has the result."""

EC_FLOW_MNIST = ECFlowConfig(
    channels=1,
    iterations=6000,
    flow_steps=6,
    width=48,
    energy_width=16,
    energy_learning_rate=3e-4,
    lr_decay=0.3,
    warmup=1000,
    ema=0.995,
    log_every=20,
    pictures_every=1000,
)
"""MNIST, padded to 32x32, gray: small nets for a CPU. Not run."""

EC_FLOW_PICTURES = ECFlowConfig(
    **_SMALL,
    iterations=1500,
    width=32,
    energy_learning_rate=3e-4,
    flip=True,
    warmup=200,
    ema=0.99,
    log_every=20,
    pictures_every=500,
)
"""Any pictures, 32x32, in colour, in nets for a CPU; what `--data` alone takes. Not run."""

EC_FLOW_CIFAR10 = ECFlowConfig(warmup=5000, **LONG_RUN)
"""CIFAR-10. Not run."""

EC_FLOW_PRESETS = {
    "digits": EC_FLOW_DIGITS,
    "mnist": EC_FLOW_MNIST,
    "pictures": EC_FLOW_PICTURES,
    "cifar10": EC_FLOW_CIFAR10,
}
