"""Autocast contexts, which do nothing if autocast already is in the wanted state."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context without autocast: operations run in the dtype of their arguments."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def autocast_to(dtype: torch.dtype | None, device_type: str) -> AbstractContextManager:
    """Autocast to a 16-bit dtype; no autocast for float32; the caller's autocast state for None."""
    if dtype is None:
        return nullcontext()
    if dtype is torch.float32:
        return without_autocast(device_type)
    return torch.autocast(device_type, dtype=dtype)
