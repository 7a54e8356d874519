"""Training of EC-VAE: a variational autoencoder whose samples are calibrated by an energy while it is trained.

Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071. A VAE is never
trained on what it generates, so that its samples are blurred; an energy samples well but needs a chain. In an update:

- the VAE minimises `||x - G(z_q)||^2 + kl_weight * KL + lambda * ||chain end - G(z)||^2`, where the chain starts at the
  decoder's own sample `G(z)`, `z ~ N(0, I)`, and runs a few Langevin steps down the energy, without a gradient;
- the energy minimises `mean E(data) - mean E(chain ends)`;
- `lambda` is fixed, or follows the distance of chain ends from their starts (`DualUpdate`).

At test time a sample is one pass of the decoder. All random numbers of an iteration are a function of the seed and of
the number of images before it, so that a resumed run ends with the weights of an uninterrupted one, bit for bit.
"""

from fastebm.training.ec_vae.config import ECVAEConfig as Config
from fastebm.training.ec_vae.run import ECVAERun as Run
from fastebm.training.ec_vae.trainer import ECVAETrainer as Trainer

__all__ = ["Config", "Run", "Trainer"]
