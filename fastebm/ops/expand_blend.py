"""The blend of a growing net's new and old features: beta * primal + (1 - beta) * fade, in one pass (Expand blend).

`fma(beta, primal, (1 - beta) * fade)` is to the last bit `fade` at beta = 0 and `primal` at beta = 1 (where both are
finite), so a net that grows starts from exactly the energy it had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scalars import as_real, shown
from .backends import launch, register, register_autograd
from .memory import check_dense

__all__ = ["expand_blend"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def expand_blend(primal: Tensor, fade: Tensor, beta: float | Tensor) -> Tensor:
    """beta * primal + (1 - beta) * fade, computed in float32 (float64 for float64) and rounded once.

    Args:
        primal, fade: one shape, dtype (float32, float64, bfloat16, float16) and device.
        beta: in [0, 1]; or a tensor of one element on that device, whose value is not checked, so that it can change
            under a captured graph.

    Returns:
        The blend, in primal's memory format. Differentiable any number of times in primal and fade, not in beta.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices that disagree, or a beta out of range.
        RuntimeError: for a beta that requires grad.

    Source: Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR
    2021.

    Example:
        >>> import torch, fastebm
        >>> old, new = torch.zeros(1, 8, 4, 4), torch.ones(1, 8, 4, 4)
        >>> float(fastebm.ops.expand_blend(new, old, 0.25).mean())
        0.25
    """
    if not isinstance(primal, Tensor) or not isinstance(fade, Tensor):
        raise TypeError(f"primal and fade must be tensors, got {type(primal).__name__} and {type(fade).__name__}")
    for name, tensor in (("primal", primal), ("fade", fade)):
        check_dense(name, tensor)
    return torch.ops.fastebm.expand_blend(primal, fade, beta_tensor(beta, primal))


def beta_tensor(beta: float | Tensor, like: Tensor) -> Tensor:
    """beta as operators take it: one element on the device of `like`, float64 for a float64 `like`, else float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(beta, Tensor):
        if beta.dtype == torch.bool or beta.is_complex():
            raise TypeError(f"beta must be a real number, got {shown(beta)}")
        return beta.to(dtype)
    beta = as_real("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    return torch.full((1,), beta, dtype=dtype, device=like.device)


def check_dtype(name: str, x: Tensor) -> None:
    """Refuse a tensor of a dtype that operators don't compute in."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_like(name: str, x: Tensor, reference_name: str, reference: Tensor, shape: tuple[Any, ...]) -> None:
    """Refuse x unless it has `shape`, and dtype and device of `reference`."""
    if tuple(x.shape) != shape:
        given = f"for a {reference_name} of {tuple(reference.shape)}, got {tuple(x.shape)}"
        raise ValueError(f"{name} must have shape {shape} {given}")
    if x.dtype != reference.dtype:
        raise TypeError(f"{name} must have {reference_name}'s dtype {reference.dtype}, got {x.dtype}")
    if x.device != reference.device:
        raise ValueError(f"{name} must be on {reference_name}'s device {reference.device}, got {x.device}")


def check_beta(beta: Tensor, like: Tensor) -> None:
    """Refuse a beta that a kernel can't read."""
    needed = torch.float64 if like.dtype == torch.float64 else torch.float32
    if beta.dtype != needed or beta.numel() != 1:
        given = f"{beta.dtype} {tuple(beta.shape)}"
        raise ValueError(f"beta must be a number or a {needed} tensor of one element, got {given}")
    if beta.device != like.device:
        raise ValueError(f"beta must be on the device of what it blends, {like.device}, got {beta.device}")


def refuse_beta_gradient(needed: bool) -> None:
    """beta is a schedule, not a parameter: a gradient that silently stayed away would be worse than an error."""
    if needed:
        raise RuntimeError("beta requires grad, but the Expand blend has no derivative with respect to beta: detach it")


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels-last where x lies so and not row by row; contiguous for everything else."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


# Operators ----------------------------------------------------------------------------------------------------------


def _allocate(primal: Tensor, fade: Tensor, beta: Tensor) -> Tensor:
    check_dtype("primal", primal)
    check_like("fade", fade, "primal", primal, tuple(primal.shape))
    check_beta(beta, primal)
    return torch.empty_like(primal, memory_format=memory_format_of(primal))


@register("expand_blend", fake=_allocate)
def _expand_blend(primal: Tensor, fade: Tensor, beta: Tensor) -> Tensor:
    out = _allocate(primal, fade, beta)
    layout = memory_format_of(primal)
    if out.numel():
        primal, fade = (x.contiguous(memory_format=layout) for x in (primal, fade))
        launch("expand_blend", out, primal, fade, beta)
    return out


def _allocate_backward(grad: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    check_dtype("grad", grad)
    check_beta(beta, grad)
    layout = memory_format_of(grad)
    return torch.empty_like(grad, memory_format=layout), torch.empty_like(grad, memory_format=layout)


@register("expand_blend_backward", fake=_allocate_backward)
def _expand_blend_backward(grad: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    grad_primal, grad_fade = _allocate_backward(grad, beta)
    if grad.numel():
        grad = grad.contiguous(memory_format=memory_format_of(grad))
        launch("expand_blend_backward", grad_primal, grad_fade, grad, beta)
    return grad_primal, grad_fade


def _save_beta(ctx: Any, inputs: tuple, output: Any) -> None:
    beta = inputs[-1]
    refuse_beta_gradient(beta.requires_grad)
    ctx.save_for_backward(beta)


def _blend_formula(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    (beta,) = ctx.saved_tensors
    return *torch.ops.fastebm.expand_blend_backward(grad, beta), None


def _blend_backward_formula(ctx: Any, grad_primal: Tensor, grad_fade: Tensor) -> tuple[Tensor, None]:
    (beta,) = ctx.saved_tensors
    return torch.ops.fastebm.expand_blend(grad_primal, grad_fade, beta), None


for _name, _derivative in (("expand_blend", _blend_formula), ("expand_blend_backward", _blend_backward_formula)):
    register_autograd(_name, _derivative, _save_beta)


# Reference ----------------------------------------------------------------------------------------------------------


def blended(beta: Tensor, primal: Tensor, fade: Tensor) -> Tensor:
    """The blend in beta's dtype, exact at both ends."""
    return beta * primal.to(beta.dtype) + (1 - beta) * fade.to(beta.dtype)


def reference_expand_blend(out: Tensor, primal: Tensor, fade: Tensor, beta: Tensor) -> None:
    """Kernel `expand_blend` in plain PyTorch."""
    out.copy_(blended(beta.reshape(()), primal, fade))


def reference_expand_blend_backward(grad_primal: Tensor, grad_fade: Tensor, grad: Tensor, beta: Tensor) -> None:
    """Kernel `expand_blend_backward` in plain PyTorch."""
    beta = beta.reshape(())
    wide = grad.to(beta.dtype)
    grad_primal.copy_(beta * wide)
    grad_fade.copy_((1 - beta) * wide)
