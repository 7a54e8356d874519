"""Train and eval mode of modules, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Within the block all of `net` is in eval mode; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
