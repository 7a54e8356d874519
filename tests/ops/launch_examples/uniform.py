"""Launches of the Triton kernels of uniform noise, and what their machine code must show."""

from __future__ import annotations

from . import LaunchExample
from .normal import fill_examples


def launch_examples() -> list[LaunchExample]:
    """A quad of uniforms is four fused multiply-adds."""
    return fill_examples("uniform", False, 4)
