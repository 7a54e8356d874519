"""Energy nets as ordinary modules: E(x) of shape (batch,), low where x is real."""

from fastebm.models.coarse_to_fine import CoarseToFineEnergy

__all__ = ["CoarseToFineEnergy"]
