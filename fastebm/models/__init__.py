"""PyTorch modules: energy nets E(x) of shape (batch,), where low means real; a VAE; a normalising flow."""

from fastebm.models.coarse_to_fine import CoarseToFineEnergy
from fastebm.models.flow import Flow, dequantize, quantize
from fastebm.models.multi_scale import MultiScaleEnergy
from fastebm.models.vae import ELBO, VAE

__all__ = ["ELBO", "VAE", "CoarseToFineEnergy", "Flow", "MultiScaleEnergy", "dequantize", "quantize"]
