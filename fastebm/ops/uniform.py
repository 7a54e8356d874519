"""Uniform noise in (0, 1] as a pure function of (seed, step, chain, stream, element)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import register
from .normal import _arguments, draw, empty_noise, fill_from_words, uniforms_from_words

__all__ = ["uniform"]


def uniform(
    shape: Sequence[int],
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    chain_ids: int | Tensor = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Uniform noise in (0, 1], `fma(bits, 2^-32, 2^-33)` in float32 and then cast; arguments and errors as
    `fastebm.ops.normal`.

    Float16 has no numbers between 0 and 6e-8: there the smallest draws become 0.

    Example:
        >>> import fastebm
        >>> start = 2 * fastebm.ops.uniform((16, 1, 8, 8), seed=0, stream=fastebm.rng.Stream.INITIAL) - 1
    """
    return torch.ops.fastebm.uniform(*_arguments(shape, seed, step, stream, chain_ids, device, dtype))


register("uniform", fake=empty_noise)(functools.partial(draw, "uniform"))


# Reference ----------------------------------------------------------------------------------------------------------


def reference_uniform(out: Tensor, key: Tensor, chain_ids: Tensor, stream: int) -> None:
    """Kernel `uniform` in plain PyTorch."""
    fill_from_words(out, key, chain_ids, stream, uniforms_from_words)
