"""A context manager that puts a module into eval mode and restores its mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Puts `net` in eval mode within the block; afterwards each of its modules is in its previous mode."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
