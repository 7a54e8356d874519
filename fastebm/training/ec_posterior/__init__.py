"""Training of a VAE on refined posteriors: the "calibrated posterior" of EC-VAE.

Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071, say that what
calibrates samples can calibrate the posterior too, and publish no code for it. The energy of latent vectors is here
known, minus `log p(x | z) + log p(z)`, so that nothing but the VAE is trained: short Langevin chains go from the
encoder's draws towards the posterior, the decoder learns from where they end, and the encoder learns to draw there. The
decoder then nearly follows the gradient of `log p(x)` instead of that of a bound that gives way to the encoder's lacks.

At test time a sample is one pass of the decoder, and images are encoded with or without a chain. Everything an
iteration draws is a pure function of the seed and of how many images came before, so that a resumed run ends with the
weights of an uninterrupted one, bit for bit.
"""

from fastebm.training.ec_posterior.config import ECPosteriorConfig as Config
from fastebm.training.ec_posterior.run import ECPosteriorRun as Run
from fastebm.training.ec_posterior.trainer import ECPosteriorTrainer as Trainer

__all__ = ["Config", "Run", "Trainer"]
