"""Energy nets as ordinary modules: E(x) of shape (batch,), low where x is real; and a normalising flow."""

from fastebm.models.coarse_to_fine import CoarseToFineEnergy
from fastebm.models.flow import Flow, dequantized

__all__ = ["CoarseToFineEnergy", "Flow", "dequantized"]
