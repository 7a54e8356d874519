"""The gallery: energies as people in the field hand them over, written afresh.

entry           one energy: its source, its factory, where its chains start
densities       formulas in a few dimensions
posteriors      likelihoods of fixed data and priors
physics         lattices, spins, particles, molecules
dense           networks of dense layers
convolutions    networks on images, signals and volumes
structures      attention, sequences, sets, graphs
"""

from .convolutions import CONVOLUTIONS
from .dense import DENSE
from .densities import DENSITIES
from .entry import Entry, true_gradient
from .physics import PHYSICS
from .posteriors import POSTERIORS
from .structures import STRUCTURES

GALLERY: tuple[Entry, ...] = (*DENSITIES, *POSTERIORS, *PHYSICS, *DENSE, *CONVOLUTIONS, *STRUCTURES)

__all__ = ["GALLERY", "Entry", "true_gradient"]
