"""Uniform noise in (0, 1] as a pure function of (seed, step, chain, stream, element)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import rng
from .backends import launch, register
from .normal import _arguments, empty_noise, fill_from_words, uniforms_from_words

__all__ = ["uniform"]


def uniform(
    shape: Sequence[int],
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    chains: int | Tensor = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Uniform noise in (0, 1], `fma(bits, 2^-32, 2^-33)` in float32 and then cast; arguments and errors as
    `fastebm.normal`.

    Float16 has no numbers between 0 and 6e-8: there the smallest draws become 0.

    Example:
        >>> import fastebm
        >>> start = 2 * fastebm.uniform((16, 1, 8, 8), seed=0, stream=fastebm.rng.Stream.INITIAL) - 1
    """
    return torch.ops.fastebm.uniform(*_arguments(shape, seed, step, stream, chains, device, dtype))


@register("uniform", fake=empty_noise)
def _uniform(shape: Sequence[int], key: Tensor, chains: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    out = empty_noise(shape, key, chains, stream, dtype)
    launch("uniform", out, key.contiguous(), chains.contiguous(), rng.check_stream(stream))
    return out


# Reference ----------------------------------------------------------------------------------------------------------


def reference_uniform(out: Tensor, key: Tensor, chains: Tensor, stream: int) -> None:
    """Kernel `uniform` in plain PyTorch."""
    fill_from_words(out, key, chains, stream, uniforms_from_words)
