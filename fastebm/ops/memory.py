"""How tensors lie in memory: by strides, and so that what is written overlaps neither itself nor what is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_dense", "refuse_self_overlap", "share_memory", "without_aliasing"]


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor whose elements don't lie in memory by strides, as all operators read them."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "a nested" if tensor.is_nested else f"a {tensor.layout}".replace("torch.", "")
        raise TypeError(f"{name} must be a dense tensor, got {'a quantized' if tensor.is_quantized else kind} one")


def refuse_self_overlap(name: str, tensor: Tensor) -> None:
    """Raises RuntimeError where elements of a tensor that is written in place lie at one address.

    There the result would depend on the order of work.
    """
    if not tensor.is_contiguous() and _overlaps_itself(tensor):
        raise RuntimeError(f"{name} can't be written in place: its elements share memory; clone it first")


def _overlaps_itself(tensor: Tensor) -> bool:
    dimensions = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in dimensions:
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False  # each stride passes over all that lies within the smaller ones: every slice of a dense tensor
    if any(stride == 0 for stride, _ in dimensions):
        return True
    # Dimensions that interleave may still miss one another; only their addresses tell. No usual layout comes here.
    addresses = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dimensions:
        addresses = (addresses[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    return len(addresses.unique()) < len(addresses)


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor to behind its last one."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * tensor.itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether the addresses of two tensors overlap, of whatever type they are and whatever storage they belong to.

    Tensors that interleave without a common byte count as overlapping.
    """
    begin, end = _byte_range(second)
    return _overlaps(first, begin, end)


def _overlaps(tensor: Tensor, begin: int, end: int) -> bool:
    start = tensor.data_ptr()
    return start < end and (start >= begin or _byte_range(tensor)[1] > begin) and tensor.numel() > 0


def without_aliasing(tensors: Iterable[Tensor | None], *written: Tensor) -> list[Any]:
    """The tensors, with a copy of each that shares memory with a written one: kernels write while they still read."""
    apart = list(tensors)
    for begin, end in [_byte_range(each) for each in written]:
        for i, tensor in enumerate(apart):
            if tensor is not None and _overlaps(tensor, begin, end):
                apart[i] = tensor.clone()
    return apart
