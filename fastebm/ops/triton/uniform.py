"""Triton: uniform noise in (0, 1] as a function of (seed, step, chain, stream, element)."""

from __future__ import annotations

from torch import Tensor

from .launch_examples import LaunchExample
from .normal import fill, fill_specimens


def uniform(out: Tensor, key: Tensor, chain_ids: Tensor, stream: int) -> None:
    """Kernel `uniform` of fastebm.ops.schemas."""
    fill(out, key, chain_ids, stream, normal=False)


def launch_examples() -> list[LaunchExample]:
    """A quad of uniforms is four fused multiply-adds."""
    return fill_specimens("uniform", False, 4)
