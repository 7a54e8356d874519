"""Updates that keep less: activations inside of blocks are computed again on the way back instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.checkpoint import checkpoint

from fastebm.models import CoarseToFineEnergy


@contextmanager
def recomputed_blocks(net: CoarseToFineEnergy, enabled: bool = True) -> Iterator[None]:
    """Within the block, `net` keeps only what goes into each of its blocks; gradients are the same to the last bit.

    It costs a second forward pass. The maps between a block's two convolutions, the largest of all, are there for one
    block at a time. The net must be in eval mode: in train mode a spectral norm would be
    another one the second time.
    """
    if not enabled:
        yield
        return
    if net.training:
        raise ValueError("a net in train mode can't be computed again: its spectral norms move on with every pass")
    blocks = list(net.blocks.values())
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
