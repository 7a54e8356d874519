"""Which kernels are compiled on their way: Triton tells of each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .backends import unavailable_reason

__all__ = ["Compilation", "watch_compilation"]


@dataclass
class Compilation:
    """Names of Triton's kernels that any thread compiled, and of those that were found in Triton's cache on disk."""

    compiled: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)


@contextmanager
def watch_compilation(device: torch.device) -> Iterator[Compilation]:
    """Collects what is compiled within the block. Nothing is where Triton doesn't run on that device."""
    found = Compilation()
    if unavailable_reason("triton", device.type, device.index) is not None:
        yield found
        return
    knobs = importlib.import_module("triton.knobs")
    before = knobs.compilation.listener

    def tell(*, src: Any, cache_hit: bool, **told: Any) -> None:
        (found.loaded if cache_hit else found.compiled).append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **told)

    knobs.compilation.listener = tell
    try:
        yield found
    finally:
        knobs.compilation.listener = before
