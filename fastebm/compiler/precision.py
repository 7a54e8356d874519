"""Autocast contexts that cost nothing where there is nothing to switch."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which operations run in the precision of their arguments, whatever the caller's autocast state."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def autocast_to(dtype: torch.dtype | None, device_type: str) -> AbstractContextManager:
    """Autocast to a 16-bit dtype; none at all for float32; for None the caller's autocast state as it is."""
    if dtype is None:
        return nullcontext()
    if dtype is torch.float32:
        return without_autocast(device_type)
    return torch.autocast(device_type, dtype=dtype)
