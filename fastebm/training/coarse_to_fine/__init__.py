"""Training of CF-EBM, coarse to fine: one energy per resolution, each grown out of the one below.

Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR 2021, in the
variant that keeps each resolution's net as it stood when its stage ended ("cascade"), and in the one with a single
growing net ("expanding"). A stage trains the sub-net of one size:

- chains run from uniform noise through the frozen nets of the lower sizes and then through the net in training, or,
  expanding, through that net alone, from half the size while its newest block fades in;
- the loss is `mean E(data) - mean E(chain ends)`, optionally with an L2 term on the energies;
- the newest block fades in: `beta` rises from 0 to 1 over the first part of a stage.

Everything an iteration draws (images, their noise, the chains' noise) is a pure function of the seed and of how many
images and chains came before, so that a resumed run ends with the weights of an uninterrupted one, bit for bit. Where
energies explode, the guard goes back to a good checkpoint and on with fresh noise and a lower learning rate.
"""

from fastebm.training.coarse_to_fine.config import CoarseToFineConfig as Config
from fastebm.training.coarse_to_fine.run import CoarseToFineRun as Run
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer as Trainer

__all__ = ["Config", "Run", "Trainer"]
