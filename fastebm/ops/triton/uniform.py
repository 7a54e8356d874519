"""Triton: uniform noise in (0, 1] as a function of (seed, step, chain, stream, element)."""

from __future__ import annotations

from torch import Tensor

from .normal import fill


def uniform(out: Tensor, key: Tensor, chain_ids: Tensor, stream: int) -> None:
    """Kernel `uniform` of fastebm.ops.schemas."""
    fill(out, key, chain_ids, stream, normal=False)
