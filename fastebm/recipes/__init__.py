"""Published recipes that train energies: their chains, starts, buffers, losses and optimisers, with their constants.

>>> import torch, fastebm
>>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1), torch.nn.Flatten(0))
>>> recipe = fastebm.recipes.uva_tutorial(net)
>>> buffer, optimizer = recipe.buffer((1, 4, 4), seed=0), recipe.optimizer.build(net.parameters())
>>> real = torch.rand(8, 1, 4, 4)
>>> loss = recipe.loss(net, real, recipe.negatives(real, buffer))
>>> loss.backward()
"""

from fastebm.recipes.calibration import ECVAE, CalibratedNegatives, ec_vae
from fastebm.recipes.coarse_to_fine import CoarseToFine, cf_ebm
from fastebm.recipes.diffusion import (
    CDRL,
    RecoveryLikelihood,
    RecoveryLoss,
    RecoveryNegatives,
    cdrl,
    recovery_likelihood,
)
from fastebm.recipes.eqm import EqM, EqMLoss, eqm
from fastebm.recipes.jem import ClassifierEnergy, JEMLoss, JEMPlusPlus, jem, jem_pp
from fastebm.recipes.matching import EnergyMatching, EnergyMatchingLoss, energy_matching
from fastebm.recipes.persistent import (
    HalfSquaredNorm,
    ImprovedCD,
    ImprovedCDLoss,
    ImprovedCDNegatives,
    Negated,
    clel,
    igebm,
    improved_cd,
    uva_tutorial,
)
from fastebm.recipes.recipe import ContrastiveLoss, Negatives, Optimizer, Overrides, Recipe
from fastebm.recipes.short_run import short_run
from fastebm.recipes.vaebm import VAEBM, VAEBMLoss, spectral_norms, vaebm

__all__ = [
    "CDRL",
    "ECVAE",
    "VAEBM",
    "CalibratedNegatives",
    "ClassifierEnergy",
    "CoarseToFine",
    "ContrastiveLoss",
    "EnergyMatching",
    "EnergyMatchingLoss",
    "EqM",
    "EqMLoss",
    "HalfSquaredNorm",
    "ImprovedCD",
    "ImprovedCDLoss",
    "ImprovedCDNegatives",
    "JEMLoss",
    "JEMPlusPlus",
    "Negated",
    "Negatives",
    "Optimizer",
    "Overrides",
    "Recipe",
    "RecoveryLikelihood",
    "RecoveryLoss",
    "RecoveryNegatives",
    "VAEBMLoss",
    "cdrl",
    "cf_ebm",
    "clel",
    "ec_vae",
    "energy_matching",
    "eqm",
    "igebm",
    "improved_cd",
    "jem",
    "jem_pp",
    "recovery_likelihood",
    "short_run",
    "spectral_norms",
    "uva_tutorial",
    "vaebm",
]
