"""The weights that a run's nets begin with, which its seed alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fork_rng(seed: int) -> Iterator[None]:
    """Within the block nets draw their weights from `seed`; afterwards torch's own generator is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
