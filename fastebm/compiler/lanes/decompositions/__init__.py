"""Operations that are traced as simpler ones, chosen so that float32 loses nothing.

PyTorch's own decompositions are taken where they are as exact as its kernels. Ours take the place of others, or write
as a product with a constant matrix what is linear in the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table

from . import activations, distances, elementary, linear_algebra, norms, ordering, resampling

__all__ = ["DECOMPOSITIONS"]

aten = torch.ops.aten

# Of PyTorch's decompositions, those that are not among the core ones.
_ALSO = (
    aten.linalg_vector_norm.default,
    aten.embedding.default,
    aten.index_select.default,
)


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, of_a: list[int], of_b: list[int], of_c: list[int], summed: list[int], *_: int
) -> Tensor:
    def expanded(x: Tensor, axes: list[int]) -> Tensor:
        for axis in sorted(axes):
            x = x.unsqueeze(axis)
        return x

    return (expanded(a, of_a) * expanded(b, of_b) * expanded(c, of_c)).sum(summed)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **core_aten_decompositions(),
    **{op: decomposition_table[op] for op in _ALSO},
    **activations.TABLE,
    **norms.TABLE,
    **distances.TABLE,
    **resampling.TABLE,
    **ordering.TABLE,
    **elementary.TABLE,
    **linear_algebra.TABLE,
    aten._trilinear.default: _trilinear,
}
