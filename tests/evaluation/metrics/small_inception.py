"""A TorchScript module with the face of `inception-2015-12-05.pt`, in a file because TorchScript reads its source."""

import warnings
from pathlib import Path

import torch
from torch import Tensor


def script(module: type[torch.nn.Module], path: Path, seed: int = 0) -> Path:
    """Writes a module of this file as TorchScript, with weights drawn by the seed."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module()).save(path)
    return path


class SmallInception(torch.nn.Module):
    """Takes uint8 (B, 3, H, W); 12 features, or probabilities of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(3 * 16, 12)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        small = torch.nn.functional.adaptive_avg_pool2d(img.float() / 255, [4, 4])
        features = torch.tanh(self.mix(small.flatten(1)))
        if return_features:
            return features
        logits = features @ self.head.weight.t()
        if not no_output_bias:
            logits = logits + self.head.bias
        return logits.softmax(dim=1)


class Bare(torch.nn.Module):
    """Without the arguments."""

    def forward(self, img: Tensor) -> Tensor:
        return img.float().flatten(1)
