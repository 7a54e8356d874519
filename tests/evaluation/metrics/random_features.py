"""Random features for the tests of distances."""

import torch
from torch import Tensor


def features(count: int, width: int = 6, shift: float = 0.0, seed: int = 0) -> Tensor:
    """Correlated, and away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=generator) @ mixing + 3 + shift
