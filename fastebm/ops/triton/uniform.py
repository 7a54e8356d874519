"""Triton: uniform noise in (0, 1] as a function of (seed, step, chain, stream, element)."""

from __future__ import annotations

from torch import Tensor

from .normal import fill, fill_specimens
from .specimens import Specimen


def uniform(out: Tensor, key: Tensor, chains: Tensor, stream: int) -> None:
    """Kernel `uniform` of fastebm.ops.schemas."""
    fill(out, key, chains, stream, normal=False)


def specimens() -> list[Specimen]:
    """A quad of uniforms is four fused multiply-adds."""
    return fill_specimens("uniform", False, 4)
