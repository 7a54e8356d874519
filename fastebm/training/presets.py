"""Settings for known data. Each says whether and with what result it was run."""

from fastebm.training.coarse_to_fine_config import CoarseToFineConfig

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

PRESETS = {"digits": DIGITS}
