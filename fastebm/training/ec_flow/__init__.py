"""Training of a normalising flow whose samples are calibrated by an energy while it is trained.

Named as an extension by Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv
2311.04071; there is no public code, and the design is ours. Likelihood spreads a flow over everything that it can't
exclude, so that many of its samples look like nothing; an energy sees that. In an update:

- the flow minimises, for one dimension, `-log2 p(x) + lambda * ||chain end - x(z)||^2`, where x are dequantised images
  and the chain starts at the flow's own sample `x(z) = decode(z)`, `z ~ N(0, I)`, and runs a few Langevin steps down
  the energy. The gradient of the second term flows through the inverse of the flow, but not through the chain;
- the energy minimises `mean E(data) - mean E(chain ends)`, on the same dequantised images;
- `lambda` is fixed, or follows the distance that chains go (`DualUpdate`).

Chains start at samples as they are, not clamped: what lies outside of the range of images is what the energy learns
first, and a clamp would count the way back into it as the energy's doing. At test time a sample is one pass of the
inverse. Everything an iteration draws is a pure function of the seed and of how many images came before, so that a
resumed run ends with the weights of an uninterrupted one, bit for bit.
"""

from fastebm.training.ec_flow.config import ECFlowConfig as Config
from fastebm.training.ec_flow.run import ECFlowRun as Run
from fastebm.training.ec_flow.trainer import ECFlowTrainer as Trainer

__all__ = ["Config", "Run", "Trainer"]
