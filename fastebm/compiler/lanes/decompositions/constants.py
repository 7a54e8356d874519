"""Constant tensors within a trace, computed outside of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def computed(make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is computed with real numbers, not recorded."""
    with _disable_current_modes(), torch.no_grad():
        return make().clone()


def literal(given: Tensor | Callable[[], Tensor], like: Tensor) -> Tensor:
    """A tensor, or what is computed, as a literal of the graph, in the dtype of `like` unless it is of integers."""
    tensor = given if isinstance(given, Tensor) else computed(given)
    if tensor.is_floating_point():
        tensor = computed(lambda: tensor.to(like.dtype))
    return torch.ops.aten.lift_fresh_copy.default(tensor)
