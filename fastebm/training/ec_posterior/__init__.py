"""Training of a VAE on refined posteriors: the "calibrated posterior" of EC-VAE.

Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071, say that the posterior
can be calibrated like samples, and publish no code for it. The energy of latent vectors is known here: it is
`-log p(x | z) - log p(z)`, so that only the VAE is trained. Short Langevin chains start at the encoder's draws and move
towards the posterior. The decoder learns from their ends, and the encoder learns to draw there. The decoder then nearly
follows the gradient of `log p(x)`, and not that of a bound which an inaccurate encoder loosens.

At test time a sample is one pass of the decoder, and images are encoded with or without a chain. All random numbers of
an iteration are a function of the seed and of the number of images before it, so that a resumed run ends with the
weights of an uninterrupted one, bit for bit.
"""

from fastebm.training.ec_posterior.config import ECPosteriorConfig as Config
from fastebm.training.ec_posterior.run import ECPosteriorRun as Run
from fastebm.training.ec_posterior.trainer import ECPosteriorTrainer as Trainer

__all__ = ["Config", "Run", "Trainer"]
