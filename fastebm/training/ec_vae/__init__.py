"""Training of EC-VAE: a variational autoencoder whose samples are calibrated by an energy while it is trained.

Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv 2311.04071. A VAE is never
trained on what it generates, so that its samples blur; an energy samples well but needs a chain. So, in an update:

- the VAE minimises `||x - G(z_q)||^2 + kl_weight * KL + lambda * ||chain end - G(z)||^2`, where the chain starts at the
  decoder's own sample `G(z)`, `z ~ N(0, I)`, and runs a few Langevin steps down the energy, without a gradient;
- the energy minimises `mean E(data) - mean E(chain ends)`;
- `lambda` is fixed, or follows the distance that chains go (`DualUpdate`).

At test time a sample is one pass of the decoder. Everything an iteration draws is a pure function of the seed and of
how many images came before, so that a resumed run ends with the weights of an uninterrupted one, bit for bit.
"""

from fastebm.training.ec_vae.config import ECVAEConfig as Config
from fastebm.training.ec_vae.run import ECVAERun as Run
from fastebm.training.ec_vae.trainer import ECVAETrainer as Trainer

__all__ = ["Config", "Run", "Trainer"]
