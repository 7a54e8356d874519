"""Training of CF-EBM, coarse to fine: one energy net per resolution, each grown from that of half the resolution.

Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR 2021, in the
variant that freezes a copy of the net at the end of each resolution's stage ("cascade"), and in the one with a single
growing net ("expanding"). A stage trains the sub-net of one size:

- chains start from uniform noise and pass through the frozen nets of the lower sizes and then the net in training; in
  the expanding variant they pass through that net only, from half the size while its newest block fades in;
- the loss is `mean E(data) - mean E(chain ends)`, optionally with an L2 term on the energies;
- the newest block fades in: `beta` rises from 0 to 1 over the first part of a stage.

All random choices of an iteration (images, their noise, the chains' noise) are a function of the seed and of the number
of images before it, so that a resumed run ends with the weights of an uninterrupted one, bit for bit. Where energies
explode, the guard rolls the run back to a good checkpoint, with fresh noise and a lower learning rate.
"""

from fastebm.training.coarse_to_fine.config import CoarseToFineConfig as Config
from fastebm.training.coarse_to_fine.run import CoarseToFineRun as Run
from fastebm.training.coarse_to_fine.trainer import CoarseToFineTrainer as Trainer

__all__ = ["Config", "Run", "Trainer"]
