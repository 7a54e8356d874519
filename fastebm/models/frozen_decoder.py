"""A fast copy of a VAE's decoder for sampling: batch norms are folded into convolutions, in float32 or bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastebm.models.modes import in_eval_mode
from fastebm.models.vae_nets import Decoder


class FrozenDecoder:
    """The function of `decoder` in eval mode: latent vectors (B, latent) to float32 images (B, channels, size, size).

    With running statistics a batch norm is a factor and a shift of each channel. Both are folded into the convolution
    before it, and so are spectral norms; this happens in float32, before weights are rounded. The weights are copies,
    which later changes of the decoder do not reach.

    Args:
        dtype: dtype of weights and activations, float32 or bfloat16.

    Raises ValueError for another dtype.
    """

    def __init__(self, decoder: Decoder, dtype: torch.dtype = torch.float32):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"a decoder runs in float32 or bfloat16, got {dtype}")
        self.dtype = dtype
        # In train mode, reading a weight with spectral norm would run a power iteration.
        with torch.no_grad(), in_eval_mode(decoder):
            weight, bias = _fold(decoder.start, decoder.norm, transposed=True)
            self.side = weight.shape[3]
            # On a 1x1 input a transposed convolution is a product with a matrix.
            self.start = weight.flatten(1).to(dtype), bias.repeat_interleave(self.side**2).to(dtype)
            self.blocks = [self._channels_last(*_fold(block.conv, block.norm)) for block in decoder.doublings()]
            last = decoder.to_image
            assert last.bias is not None
            self.to_image = self._channels_last(last.weight, last.bias)

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        weight, bias = self.start
        h = torch.addmm(bias, z.to(self.dtype), weight).unflatten(1, (-1, self.side, self.side))
        h = F.glu(h.contiguous(memory_format=torch.channels_last), dim=1)
        for weight, bias in self.blocks:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = F.glu(F.conv2d(h, weight, bias, padding=1), dim=1)
        weight, bias = self.to_image
        return torch.tanh(F.conv2d(h, weight, bias, padding=1)).float().contiguous()

    def _channels_last(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight.to(self.dtype, memory_format=torch.channels_last, copy=True), bias.to(self.dtype, copy=True)


def _fold(
    conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution without bias together with the batch norm after it."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return fuse_conv_bn_weights(
        conv.weight, None, mean, variance, norm.eps, norm.weight, norm.bias, transpose=transposed
    )
