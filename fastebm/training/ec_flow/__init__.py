"""Training of a normalising flow whose samples are calibrated by an energy while it is trained.

Named as an extension by Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv
2311.04071; there is no public code, and the design is ours. A flow that is trained by likelihood alone also draws
samples that look like no image, which an energy can detect. In an update:

- the flow minimises, for one dimension, `-log2 p(x) + lambda * ||chain end - x(z)||^2`, where x are dequantised images
  and the chain starts at the flow's own sample `x(z) = decode(z)`, `z ~ N(0, I)`, and runs a few Langevin steps down
  the energy. The gradient of the second term flows through the inverse of the flow, but not through the chain;
- the energy minimises `mean E(data) - mean E(chain ends)`, on the same dequantised images;
- `lambda` is fixed, or follows the distance of chain ends from their starts (`DualUpdate`).

Chains start at samples that are not clamped. Values outside of the range of images are what the energy learns first,
and the effect of a clamp would be attributed to it. At test time a sample is one pass of the inverse. All random
numbers of an iteration are a function of the seed and of the number of images before it, so that a resumed run ends
with the weights of an uninterrupted one, bit for bit.
"""

from fastebm.training.ec_flow.config import ECFlowConfig as Config
from fastebm.training.ec_flow.run import ECFlowRun as Run
from fastebm.training.ec_flow.trainer import ECFlowTrainer as Trainer

__all__ = ["Config", "Run", "Trainer"]
