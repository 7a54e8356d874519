"""The last part of a residual block that halves the resolution: pool, activate, add and blend, in one pass.

    p = avgpool2(main)     t = (act(p) + avgpool2(skip)) / sqrt(2)     out = t, or beta * t + (1 - beta) * fade

With g the gradient at the output and b = beta / sqrt(2) (beta = 1 without fade), backward is

    grad_main = b/4 act'(p) g     grad_skip = b/4 g     grad_fade = (1 - beta) g

(the first two for each pixel of a window), and the derivative of that along (v, u, w) for its three results

    out_grad = b (act'(p) avgpool2(v) + avgpool2(u)) + (1 - beta) w     out_main = b/4 act''(p) g avgpool2(v)

Kernels read NCHW or channels-last, the same for all their tensors. They don't write an odd last row or column of a
gradient, which stays zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATION_TABLE, activation_code, tail_activation
from .backends import launch, register, register_autograd
from .expand_blend import (
    beta_tensor,
    blended,
    check_beta,
    check_dtype,
    check_like,
    memory_format_of,
    refuse_beta_gradient,
)
from .memory import check_dense
from .options import TailOptions

__all__ = ["block_tail"]


def block_tail(
    main: Tensor,
    skip: Tensor,
    *,
    fade: Tensor | None = None,
    beta: float | Tensor = 1.0,
    activation: str = "scaled_swish",
    negative_slope: float = 0.2,
    alpha: float = 1.0,
) -> Tensor:
    """(act(avgpool2(main)) + avgpool2(skip)) / sqrt(2), and with `fade` beta times that plus (1 - beta) * fade.

    Computed in float32 (float64 for float64) and rounded once.

    Args:
        main, skip: (B, C, H, W), one dtype (float32, float64, bfloat16, float16) and device. With odd H or W the last
            row or column is left out, as `avg_pool2d` does. NCHW and channels-last are read as they lie, in the format
            of `main`.
        fade: (B, C, H // 2, W // 2), the features of the lower resolution that a growing net fades from.
        beta: in [0, 1], only with `fade`. Or a tensor of one element on the same device, whose value is not checked, so
            that it can change under a captured graph. At 0 the result is `fade` to the last bit, at 1 the tail (where
            both are finite).
        activation: one of `fastebm.ops.ACTIVATIONS`; "scaled_swish" is x * sigmoid(x) / 1.1.
        negative_slope, alpha: of leaky_relu and of elu.

    Returns:
        (B, C, H // 2, W // 2), in main's dtype and memory format. Twice differentiable in main, skip and fade, not in
        beta.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that disagree, an unknown activation, a beta out of range
            or without fade.
        RuntimeError: for a beta that requires grad, and where a third derivative is asked for.

    Source: Zhao, Xie and Li, "Learning Energy-Based Generative Models via Coarse-to-Fine Expanding and Sampling", ICLR
    2021.

    Example:
        >>> import torch, fastebm
        >>> main, skip = torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8)
        >>> fastebm.ops.block_tail(main, skip, fade=torch.zeros(2, 64, 4, 4), beta=0.3, activation="gelu").shape
        torch.Size([2, 64, 4, 4])
    """
    for name, tensor in (("main", main), ("skip", skip), ("fade", fade)):
        if tensor is None and name == "fade":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    if fade is None and (isinstance(beta, Tensor) or beta != 1):
        raise ValueError(f"beta = {beta} blends with `fade`, which is missing")
    weight = None if fade is None else beta_tensor(beta, main)
    code, parameter = activation_code(activation, negative_slope=negative_slope, alpha=alpha)
    return torch.ops.fastebm.block_tail(main, skip, fade, weight, code, parameter)


# Operators ----------------------------------------------------------------------------------------------------------


def _check_main(main: Tensor, options: TailOptions) -> None:
    beta, activation, _ = options
    if main.dim() != 4:
        raise ValueError(f"main must be (batch, channels, height, width), got {tuple(main.shape)}")
    check_dtype("main", main)
    if beta is not None:
        check_beta(beta, main)
    if not 0 <= activation < len(ACTIVATION_TABLE) or ACTIVATION_TABLE[activation].derivative is None:
        numbers = [number for number, row in enumerate(ACTIVATION_TABLE) if row.derivative is not None]
        raise ValueError(f"activation must be a number in {numbers}, got {activation}")


def _pooled(main: Tensor) -> tuple[Any, ...]:
    batch, channels, height, width = main.shape
    return batch, channels, height // 2, width // 2


def _new_pooled(main: Tensor) -> Tensor:
    return torch.empty(_pooled(main), dtype=main.dtype, device=main.device, memory_format=memory_format_of(main))


def _new_gradient(main: Tensor) -> Tensor:
    """Room for a gradient like main; zeros where an odd row or column that kernels don't touch will stay zero."""
    odd = main.shape[2] % 2 or main.shape[3] % 2
    return (torch.zeros_like if odd else torch.empty_like)(main, memory_format=memory_format_of(main))


def _allocate(main: Tensor, skip: Tensor, fade: Tensor | None, *options: Any) -> Tensor:
    _check_main(main, TailOptions(*options))
    beta = options[0]
    check_like("skip", skip, "main", main, tuple(main.shape))
    if (fade is None) != (beta is None):
        raise ValueError(f"fade and beta go together, got only {'beta' if fade is None else 'fade'}")
    if fade is not None:
        check_like("fade", fade, "main", main, _pooled(main))
    return _new_pooled(main)


@register("block_tail", fake=_allocate)
def _block_tail(main: Tensor, skip: Tensor, fade: Tensor | None, *options: Any) -> Tensor:
    out = _allocate(main, skip, fade, *options)
    if out.numel():
        launch("block_tail", out, *_same_memory_format(main, skip, fade), *options)
    return out


def _same_memory_format(first: Tensor, *others: Tensor | None) -> list[Any]:
    """The tensors in the memory format of the first."""
    layout = memory_format_of(first)
    return [x if x is None else x.contiguous(memory_format=layout) for x in (first, *others)]


def _allocate_backward(grad: Tensor, main: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_main(main, TailOptions(*options))
    check_like("grad", grad, "main", main, _pooled(main))
    return _new_gradient(main), _new_gradient(main), main.new_empty(0) if options[0] is None else _new_pooled(main)


@register("block_tail_backward", fake=_allocate_backward)
def _block_tail_backward(grad: Tensor, main: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_main, grad_skip, grad_fade = _allocate_backward(grad, main, *options)
    if grad.numel():
        main, grad = _same_memory_format(main, grad)
        faded = None if options[0] is None else grad_fade
        launch("block_tail_backward", grad_main, grad_skip, faded, grad, main, *options)
    return grad_main, grad_skip, grad_fade


def _allocate_double_backward(
    grad_main: Tensor, grad_skip: Tensor, grad_fade: Tensor | None, grad: Tensor, main: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    _check_main(main, TailOptions(*options))
    for name, tensor in (("grad_main", grad_main), ("grad_skip", grad_skip)):
        check_like(name, tensor, "main", main, tuple(main.shape))
    if (grad_fade is None) != (options[0] is None):
        raise ValueError(f"grad_fade and beta go together, got only {'beta' if grad_fade is None else 'grad_fade'}")
    for name, pooled in (("grad_fade", grad_fade), ("grad", grad)):
        if pooled is not None:
            check_like(name, pooled, "main", main, _pooled(main))
    return _new_pooled(main), _new_gradient(main)


@register("block_tail_double_backward", fake=_allocate_double_backward)
def _block_tail_double_backward(
    grad_main: Tensor, grad_skip: Tensor, grad_fade: Tensor | None, grad: Tensor, main: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    out_grad, out_main = _allocate_double_backward(grad_main, grad_skip, grad_fade, grad, main, *options)
    if grad.numel():
        main, *cotangents = _same_memory_format(main, grad_main, grad_skip, grad_fade, grad)
        launch("block_tail_double_backward", out_grad, out_main, *cotangents, main, *options)
    return out_grad, out_main


# Derivatives --------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    main, _, _, beta, ctx.activation, ctx.parameter = inputs
    refuse_beta_gradient(beta is not None and beta.requires_grad)
    ctx.save_for_backward(main, beta)


def _formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    main, beta = ctx.saved_tensors
    gradients = torch.ops.fastebm.block_tail_backward(grad, main, beta, ctx.activation, ctx.parameter)
    grad_main, grad_skip, grad_fade = gradients
    return grad_main, grad_skip, None if beta is None else grad_fade, None, None, None


def _save_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    grad, main, beta, ctx.activation, ctx.parameter = inputs
    refuse_beta_gradient(beta is not None and beta.requires_grad)
    ctx.save_for_backward(grad, main, beta)


def _backward_formula(ctx: Any, grad_main: Tensor, grad_skip: Tensor, grad_fade: Tensor) -> tuple[Tensor | None, ...]:
    grad, main, beta = ctx.saved_tensors
    out_grad, out_main = torch.ops.fastebm.block_tail_double_backward(
        grad_main, grad_skip, None if beta is None else grad_fade, grad, main, beta, ctx.activation, ctx.parameter
    )
    return out_grad, out_main, None, None, None


def _no_third_derivative(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError("block_tail is twice differentiable: a third derivative was asked for, which no kernel computes")


for _name, _derivative, _setup in (
    ("block_tail", _formula, _save),
    ("block_tail_backward", _backward_formula, _save_backward),
    ("block_tail_double_backward", _no_third_derivative, None),
):
    register_autograd(_name, _derivative, _setup)


# Reference ----------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(_wide(x), 2)


def _spread(gradient: Tensor, values: Tensor) -> None:
    """Write each pooled value to the four pixels of its window."""
    height, width = values.shape[2:]
    gradient[:, :, : 2 * height, : 2 * width] = values.repeat_interleave(2, 2).repeat_interleave(2, 3)


def _branch_weight(beta: Tensor | None) -> Tensor | float:
    return (1.0 if beta is None else beta.reshape(())) / math.sqrt(2)


def reference_block_tail(out: Tensor, main: Tensor, skip: Tensor, fade: Tensor | None, *options: Any) -> None:
    """Kernel `block_tail` in plain PyTorch."""
    beta, activation, parameter = options
    tail = (tail_activation(_mean(main), activation, parameter) + _mean(skip)) / math.sqrt(2)
    out.copy_(tail if fade is None or beta is None else blended(beta.reshape(()), tail, fade))


def reference_block_tail_backward(
    grad_main: Tensor, grad_skip: Tensor, grad_fade: Tensor | None, grad: Tensor, main: Tensor, *options: Any
) -> None:
    """Kernel `block_tail_backward` in plain PyTorch."""
    beta, activation, parameter = options
    share = 0.25 * _branch_weight(beta) * _wide(grad)
    _spread(grad_main, share * tail_activation(_mean(main), activation, parameter, order=1))
    _spread(grad_skip, share)
    if grad_fade is not None and beta is not None:
        grad_fade.copy_((1 - beta.reshape(())) * _wide(grad))


def reference_block_tail_double_backward(
    out_grad: Tensor,
    out_main: Tensor,
    grad_main: Tensor,
    grad_skip: Tensor,
    grad_fade: Tensor | None,
    grad: Tensor,
    main: Tensor,
    *options: Any,
) -> None:
    """Kernel `block_tail_double_backward` in plain PyTorch."""
    beta, activation, parameter = options
    pooled, by_main, weight = _mean(main), _mean(grad_main), _branch_weight(beta)
    along = weight * (tail_activation(pooled, activation, parameter, order=1) * by_main + _mean(grad_skip))
    if grad_fade is not None and beta is not None:
        along = along + (1 - beta.reshape(())) * _wide(grad_fade)
    out_grad.copy_(along)
    _spread(out_main, 0.25 * weight * _wide(grad) * tail_activation(pooled, activation, parameter, order=2) * by_main)
