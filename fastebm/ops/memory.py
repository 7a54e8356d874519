"""How tensors lie in memory: by strides, and so that what is written overlaps neither itself nor what is read."""

from __future__ import annotations

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
    begin, end = _byte_range(first)
    other_begin, other_end = _byte_range(second)
    return begin < other_end and other_begin < end


def without_aliasing(tensor: Tensor, *written: Tensor) -> Tensor:
    """The tensor, or a copy where it shares memory with one that is written: kernels write while they still read."""
    return tensor.clone() if any(share_memory(tensor, each) for each in written) else tensor
