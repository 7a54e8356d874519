"""Nets as PyTorch modules: energies E(x) of shape (batch,), low where x looks real, a VAE and a flow."""

from fastebm.models.coarse_to_fine import CoarseToFineEnergy
from fastebm.models.flow import Flow, dequantized, quantized
from fastebm.models.multi_scale import MultiScaleEnergy
from fastebm.models.vae import ELBO, VAE

__all__ = ["ELBO", "VAE", "CoarseToFineEnergy", "Flow", "MultiScaleEnergy", "dequantized", "quantized"]
