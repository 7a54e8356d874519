"""One Langevin update in one pass: x' = clamp(x - step_size * clip(gradient) + noise_std * noise), then the mask.

The arithmetic is part of the contract: `fma(noise_std, noise, fma(-step_size, g, x))`, then clamp, then the mask. Here
g is the clipped gradient, plus `weight * (x - target)` with a data term. A noise_std of 0 draws nothing. NaN passes
through clip and clamp.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..scalars import as_real, in_float32, shown
from .backends import launch, refuse_autograd, register
from .memory import check_dense, refuse_self_overlap, share_memory, without_aliasing
from .normal import (
    check_address,
    check_addressable,
    expand_chain_ids,
    fma,
    normals_from_words,
    philox_words,
    rounded_sqrt,
)
from .options import StepOptions

__all__ = ["Clamp", "DataTerm", "check_clamp", "check_mask", "expand_clamp", "langevin_step", "langevin_step_"]

Bound = float | Tensor | None
Clamp = tuple[Bound, Bound]
DataTerm = tuple[Tensor, float] | tuple[Tensor, float, float]

_STATES = (torch.float32, torch.float64)
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def langevin_step(
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float | Tensor,
    noise_std: float | Tensor,
    seed: int,
    step: int = 0,
    chain_ids: int | Tensor = 0,
    clamp: Clamp | None = None,
    grad_clip: float | None = None,
    grad_norm_clip: float | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    data_term: DataTerm | None = None,
    inplace: bool = False,
) -> Tensor:
    """One Langevin step of every chain of a batch, in one pass over the data.

    Args:
        x: state (B, ...), float32; float64 on the CPU, and on a GPU through the reference. Contiguous and
            channels-last images are read without a copy.
        grad: gradient of the energy (low = real) at x, x's shape; float32, bfloat16 or float16 (any of these or
            float64 for float64 x).
        step_size: eta > 0, or a tensor (B,) of one for each chain; taken as float32, for a float64 x too.
        noise_std: sigma >= 0, or a tensor (B,). `fastebm.schedules.from_epsilon(eps)` gives the pair of unadjusted
            Langevin dynamics.
        seed, step, chain_ids: where the noise falls; see `fastebm.ops.normal`.
        clamp: (low, high) for the new state; each is None, a number, or a tensor that broadcasts to one sample, such as
            (C, 1, 1) for a bound of each channel. Tensors on a GPU are not read: there NaN leaves an entry free.
        grad_clip: clip every entry of the gradient to [-grad_clip, grad_clip].
        grad_norm_clip: scale each chain's gradient down to at most this Euclidean norm. Not together with grad_clip.
            A norm beyond 1.8e19, whose square is no float32, counts as infinite: that gradient becomes 0.
        mask, known: broadcastable to x; where mask is True (or 1; it holds nothing but 0 and 1) the new state is
            `known`, of floating point numbers.
        data_term: (target, weight) or (target, weight, hinge): adds the gradient of weight/2 * max(|x - target|^2,
            hinge), by chain, after clipping. `target` is broadcastable to x.
        inplace: write the new state into x, as `langevin_step_` does.

    Returns:
        The new state, in x's dtype and memory format.

    Raises:
        ValueError, TypeError: for arguments of the wrong shape, dtype, device or range.
        RuntimeError: where autograd would record the step, which has no derivative; in place, for an x whose elements
            share memory.

    Source: step size and noise untied as in short-run MCMC (Nijkamp et al., NeurIPS 2019) and its followers.

    Example:
        >>> import torch, fastebm
        >>> x = torch.zeros(4, 1, 8, 8)
        >>> x = fastebm.langevin_step(x, x, step_size=0.1, noise_std=0.01, seed=0, step=0, clamp=(-1, 1))
    """
    _check_types(x, grad, mask, known, data_term)
    low, high, lower_bounds, upper_bounds = expand_clamp(check_clamp(clamp), x)
    options = StepOptions(
        _schedule_row(step_size, noise_std, x),
        rng.make_key(seed, step, device=x.device),
        rng.make_chain_ids(chain_ids, x.shape[0], x.device),
        low,
        high,
        check_clip("grad_clip", grad_clip),
        check_clip("grad_norm_clip", grad_norm_clip),
        lower_bounds,
        upper_bounds,
        None if mask is None else _broadcast("mask", check_mask(mask), x, torch.bool),
        None if known is None else _broadcast("known", known, x, x.dtype),
        *((None, None, 0.0) if data_term is None else _data_term_tensors(data_term, x)),
    )
    if not inplace:
        return torch.ops.fastebm.langevin_step(x, grad, *options)
    if not torch.compiler.is_compiling() and x.is_neg():
        raise RuntimeError("x can't be written in place: it is a negated view of other numbers; resolve_neg() it first")
    torch.ops.fastebm.langevin_step_(x, grad, *options)
    return x


def langevin_step_(x: Tensor, grad: Tensor, **options: Any) -> Tensor:
    """`langevin_step` in place: writes the new state into `x` and returns it. Takes the same options."""
    return langevin_step(x, grad, **options, inplace=True)


def _check_types(x: Tensor, grad: Tensor, mask: Any, known: Any, data_term: Any) -> None:
    if not isinstance(x, Tensor) or not isinstance(grad, Tensor):
        raise TypeError(f"x and grad must be tensors, got {type(x).__name__} and {type(grad).__name__}")
    if data_term is not None and not isinstance(data_term, tuple | list):
        raise TypeError(f"data_term must be (target, weight) or (target, weight, hinge), got {shown(data_term)}")
    if data_term is not None and len(data_term) not in (2, 3):
        raise ValueError(f"data_term must be (target, weight) or (target, weight, hinge), got {len(data_term)} entries")
    target = None if data_term is None else data_term[0]
    for name, value in (("mask", mask), ("known", known), ("the target of data_term", target)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    for name, value in (("x", x), ("grad", grad), ("mask", mask), ("known", known), ("target", target)):
        if value is not None:
            check_dense(name, value)
    for name, value in (("known", known), ("the target of data_term", target)):
        if value is not None and not value.is_floating_point():
            raise TypeError(f"{name} must be of floating point numbers, as x is, got {value.dtype}")
    if x.dim() == 0:
        raise ValueError("x must be (chains, ...), got a tensor without dimensions")


def check_mask(mask: Tensor) -> Tensor:
    """A mask as booleans. Raises ValueError for numbers but 0 and 1 (a GPU is not read: there all but 0 is True)."""
    if mask.dtype == torch.bool:
        return mask
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        other = mask[(mask != 0) & (mask != 1)]
        if other.numel():
            raise ValueError(f"mask must hold True and False, or 1 and 0, got {other[0].item():g}")
    return mask != 0


def check_clip(name: str, bound: Any) -> float | None:
    """A bound of gradients as a float. Raises ValueError for one that is not positive in float32, or NaN."""
    if bound is None:
        return None
    value = as_real(name, bound)
    if not in_float32(value) > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def check_clamp(clamp: Any) -> Clamp:
    """(low, high) of an argument `clamp`: each None, a float, or a tensor of bounds that is detached.

    Raises ValueError or TypeError for anything else, for NaN, and where low <= high does not hold.
    """
    if clamp is None:
        return None, None
    if not (isinstance(clamp, tuple | list) and len(clamp) == 2):
        raise TypeError(f"clamp must be (low, high), got {shown(clamp)}")
    low, high = (_bound(name, bound) for name, bound in zip(("low", "high"), clamp, strict=True))
    given = f"got ({shown(clamp[0])}, {shown(clamp[1])})"
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        least, most = -math.inf if low is None else low, math.inf if high is None else high
        if not (least <= most and in_float32(least) < math.inf and in_float32(most) > -math.inf):
            raise ValueError(f"clamp must be (low, high) with low <= high, below inf and above -inf, {given}")
        return low, high
    below, above = (
        bound if isinstance(bound, Tensor) else torch.tensor(default if bound is None else bound, device="cpu")
        for bound, default in ((low, -math.inf), (high, math.inf))
    )
    try:
        torch.broadcast_shapes(below.shape, above.shape)
    except RuntimeError:
        raise ValueError(f"the bounds of clamp must broadcast to one shape, {given}") from None
    if below.device.type == above.device.type == "cpu" and not torch.compiler.is_compiling():
        ordered = (below <= above) & (below.float() < math.inf) & (above.float() > -math.inf)
        if not bool(ordered.all()):
            entry = tuple((~ordered).nonzero()[0].tolist())
            pair = ", ".join(f"{float(bound.expand(ordered.shape)[entry]):g}" for bound in (below, above))
            raise ValueError(
                f"clamp must be (low, high) with low <= high in every entry, below inf and above -inf, got ({pair}) at "
                f"entry {entry}"
            )
    return low, high


def _bound(name: str, bound: Any) -> Bound:
    if bound is None:
        return None
    if not isinstance(bound, Tensor) or bound.dim() == 0:
        return as_real(f"clamp's {name}", bound)
    if bound.dtype == torch.bool or bound.is_complex() or bound.layout is not torch.strided or bound.is_meta:
        raise TypeError(f"clamp's {name} must be of real numbers, got {shown(bound)}")
    return bound.detach()


def expand_clamp(clamp: Clamp, x: Tensor) -> tuple[float | None, float | None, Tensor | None, Tensor | None]:
    """clamp_min, clamp_max, lower_bounds and upper_bounds of `StepOptions` for states like x."""
    low, high = clamp
    return (
        None if isinstance(low, Tensor) else low,
        None if isinstance(high, Tensor) else high,
        _expand_bound("low", low, x) if isinstance(low, Tensor) else None,
        _expand_bound("high", high, x) if isinstance(high, Tensor) else None,
    )


def _expand_bound(name: str, bound: Tensor, x: Tensor) -> Tensor:
    sample = torch.Size((1, *x.shape[1:]))
    try:
        fits = x.dim() - bound.dim() in (0, 1) and torch.broadcast_shapes(bound.shape, sample) == sample
    except RuntimeError:
        fits = False
    if not fits:
        example = "(C, 1, 1)" if x.dim() == 4 else str((1,) * (x.dim() - 1))
        raise ValueError(
            f"clamp's {name} must be a number or broadcast, with as many dimensions, to one sample of shape "
            f"{tuple(x.shape[1:])}, as {example} does, got {tuple(bound.shape)}"
        )
    return bound.to(x.device, x.dtype).expand(x.shape)


def _data_term_tensors(data_term: DataTerm, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """data_target, data_term_weight and data_term_hinge."""
    weight = as_real("the weight of data_term", data_term[1])
    if not math.isfinite(in_float32(weight)):
        raise ValueError(f"the weight of data_term must be finite, got {weight}")
    hinge = as_real("the hinge of data_term", data_term[2]) if len(data_term) == 3 else 0.0
    if hinge == math.inf:
        raise ValueError("the hinge of data_term must be finite, got inf")
    target = _broadcast("the target of data_term", data_term[0], x, x.dtype)
    return target, torch.tensor([weight], dtype=torch.float32, device=x.device), hinge


def _schedule_row(step_size: float | Tensor, noise_std: float | Tensor, x: Tensor) -> Tensor:
    if not isinstance(step_size, Tensor) and not isinstance(noise_std, Tensor):
        row = [as_real("step_size", step_size), as_real("noise_std", noise_std)]
        _check_range(*(in_float32(value) for value in row))
        return torch.tensor([row], dtype=torch.float32, device=x.device)
    pair = []
    for name, value in (("step_size", step_size), ("noise_std", noise_std)):
        if isinstance(value, Tensor) and (
            value.dtype == torch.bool or value.is_complex() or value.is_meta != x.is_meta
        ):
            raise TypeError(f"{name} must be of real numbers, got {shown(value)}")
        value = value if isinstance(value, Tensor) else as_real(name, value)
        pair.append(torch.as_tensor(value, dtype=torch.float32, device=x.device))
        if pair[-1].dim() and pair[-1].shape != x.shape[:1]:
            raise ValueError(
                f"{name} must be a number or one for each chain, shape ({x.shape[0]},), got {tuple(pair[-1].shape)}"
            )
    if x.device.type == "cpu":  # a GPU is not read, which would stall it
        _check_range(*(v.tolist() for v in pair))
    return torch.stack([v.expand(x.shape[0]) for v in pair], dim=-1)[None]


def _check_range(step_size: float | list[float], noise_std: float | list[float]) -> None:
    if not all(v > 0 and math.isfinite(v) for v in _listed(step_size)):
        raise ValueError(f"step_size must be positive and finite in float32, got {shown(step_size)}")
    if not all(v >= 0 and math.isfinite(v) for v in _listed(noise_std)):
        raise ValueError(f"noise_std must be finite and not negative in float32, got {shown(noise_std)}")


def _listed(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def _broadcast(name: str, value: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return value.to(x.device, dtype).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must be broadcastable to x's shape {tuple(x.shape)}, got {tuple(value.shape)}"
        ) from None


class NoiseOrder(IntEnum):
    """When a chain draws its noise: in one pass with the gradient's step, or before the gradient is evaluated.

    csrc/cpu/lanes.cpp numbers them so too. BEFORE_AND_BOUNDED imposes clamp and bounds between the two.
    """

    WITH_GRADIENT = 0
    BEFORE = 1
    BEFORE_AND_BOUNDED = 2


def noise_options(options: StepOptions, order: NoiseOrder) -> StepOptions:
    """Options with which a step, of a gradient that is zero, adds nothing but the noise."""
    schedule = torch.stack((torch.ones_like(options.schedule[..., 0]), options.schedule[..., 1]), -1)
    bare = options._replace(
        schedule=schedule,
        grad_clip=None,
        grad_norm_clip=None,
        data_target=None,
        data_term_weight=None,
        data_term_hinge=0.0,
    )
    if order == NoiseOrder.BEFORE_AND_BOUNDED:
        return bare
    return bare._replace(clamp_min=None, clamp_max=None, lower_bounds=None, upper_bounds=None)


def drift_options(options: StepOptions) -> StepOptions:
    """Options with which a step draws no noise."""
    schedule = torch.stack((options.schedule[..., 0], torch.zeros_like(options.schedule[..., 1])), -1)
    return options._replace(schedule=schedule)


# Operator -----------------------------------------------------------------------------------------------------------


def check(operator: str, x: Tensor, grad: Tensor, options: StepOptions) -> None:
    """Raises where `operator` can't update x by these arguments."""
    schedule, key, chain_ids, clamp_min, clamp_max, grad_clip, grad_norm_clip = options[:7]
    lower_bounds, upper_bounds, mask, known, target, weight, hinge = options[7:]
    if x.dim() == 0:
        raise ValueError("x must be (chains, ...), got a tensor without dimensions")
    refuse_autograd(operator, x, grad, known, target, schedule, weight, lower_bounds, upper_bounds)
    if x.dtype not in _STATES:
        raise TypeError(f"x must be float32 (or float64), got {x.dtype}")
    if grad.dtype not in _GRADIENTS or (grad.dtype == torch.float64 and x.dtype != torch.float64):
        raise TypeError(
            f"grad must be float32, bfloat16 or float16 (float64 only with a float64 x), "
            f"got {grad.dtype} with x {x.dtype}"
        )
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(
            f"grad must have x's shape {tuple(x.shape)} and device {x.device}, got {tuple(grad.shape)} on {grad.device}"
        )
    batch = x.shape[0]
    if schedule.dtype != torch.float32 or not (
        (schedule.dim() == 2 or (schedule.dim() == 3 and schedule.shape[1] == batch))
        and schedule.shape[-1] == 2
        and schedule.shape[0] > 0
    ):
        raise ValueError(
            f"schedule must be a float32 table (steps, 2) or (steps, {batch}, 2) of (step size, noise std), "
            f"got {schedule.dtype} {tuple(schedule.shape)}"
        )
    check_address(key, chain_ids, batch)
    for name, tensor in (("schedule", schedule), ("key", key)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if grad_clip is not None or grad_norm_clip is not None or clamp_min is not None or clamp_max is not None:
        _check_limits(clamp_min, clamp_max, grad_clip, grad_norm_clip)
    if lower_bounds is not None:
        _check_side("lower_bounds", lower_bounds, x.dtype, x)
    if upper_bounds is not None:
        _check_side("upper_bounds", upper_bounds, x.dtype, x)
    if mask is not None or known is not None:
        _check_pair("mask", mask, torch.bool, "known", known, x)
    if target is not None or weight is not None:
        _check_data_term(x, target, weight, hinge)


def _check_limits(
    clamp_min: float | None, clamp_max: float | None, grad_clip: float | None, grad_norm_clip: float | None
) -> None:
    low, high = -math.inf if clamp_min is None else clamp_min, math.inf if clamp_max is None else clamp_max
    if not low <= high:
        raise ValueError(f"clamp must be (low, high) with low <= high, got ({clamp_min}, {clamp_max})")
    if grad_clip is not None and grad_norm_clip is not None:
        raise ValueError("give grad_clip (by value) or grad_norm_clip (by a chain's norm), not both")
    for name, value in (("grad_clip", grad_clip), ("grad_norm_clip", grad_norm_clip)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _check_pair(
    first: str, mask: Tensor | None, dtype: torch.dtype, second: str, known: Tensor | None, x: Tensor
) -> None:
    if mask is None or known is None:
        raise ValueError(f"{first} and {second} go together, got only {second if mask is None else first}")
    _check_side(first, mask, dtype, x)
    _check_side(second, known, x.dtype, x)


def _check_side(name: str, tensor: Tensor, needed: torch.dtype, x: Tensor) -> None:
    if tensor.shape != x.shape or tensor.dtype != needed or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {needed} of x's shape {tuple(x.shape)} on {x.device} (expand it), "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def _check_data_term(
    x: Tensor, data_target: Tensor | None, data_term_weight: Tensor | None, data_term_hinge: float
) -> None:
    # The weight is not of x's shape: only that both are there is checked of it here.
    pair = data_target if data_term_weight is not None else None
    _check_pair("data_target", data_target, x.dtype, "data_term_weight", pair, x)
    if data_term_weight is not None and (
        data_term_weight.dtype != torch.float32 or data_term_weight.dim() != 1 or not len(data_term_weight)
    ):
        raise ValueError(
            "data_term_weight must be a float32 table (steps,), "
            f"got {data_term_weight.dtype} {tuple(data_term_weight.shape)}"
        )
    if data_term_weight is not None and data_term_weight.device != x.device:
        raise ValueError(f"data_term_weight must be on x's device {x.device}, got {data_term_weight.device}")
    if not data_term_hinge >= 0:
        raise ValueError(f"data_term_hinge must not be negative, got {data_term_hinge}")


def images(*tensors: Any) -> list[Any]:
    """Tensors (or None) of one shape as kernels take them.

    They are unchanged if all are contiguous, else views (batch, channel, pixel) with strides. A tensor whose pixels are
    not evenly spaced is copied.
    """
    if all(t is None or t.is_contiguous() for t in tensors):
        return list(tensors)
    return [t if t is None else t.flatten(2) if t.dim() > 2 else t.reshape(t.shape[0], 1, -1) for t in tensors]


def _fake_step(x: Tensor, grad: Tensor, *options: Any) -> Tensor:
    check("langevin_step", x, grad, StepOptions(*options))
    return torch.empty_like(x)


def _fake_step_(x: Tensor, grad: Tensor, *options: Any) -> None:
    check("langevin_step", x, grad, StepOptions(*options))


@register("langevin_step", fake=_fake_step)
def _langevin_step(x: Tensor, grad: Tensor, *arguments: Any) -> Tensor:
    options = StepOptions._make(arguments)
    check("langevin_step", x, grad, options)
    out = torch.empty_like(x)
    _run(out, x, grad, options, *options[:3], *options[7:-1])
    return out


@register("langevin_step_", fake=_fake_step_)
def _langevin_step_(x: Tensor, grad: Tensor, *arguments: Any) -> None:
    options = StepOptions._make(arguments)
    check("langevin_step", x, grad, options)
    refuse_self_overlap("x", x)
    # An element of the gradient that lies where x's does is read before it is written.
    if not (grad.data_ptr() == x.data_ptr() and grad.dtype == x.dtype and grad.stride() == x.stride()):
        (grad,) = without_aliasing((grad,), x)
    _run(x, x, grad, options, *without_aliasing((*options[:3], *options[7:-1]), x))


class RepeatedStep:
    """`langevin_step_` of one state with one set of options, many times, without the checks of each call.

    Made after a first `langevin_step_(x, ..., *options)`. x, the key and the options stay where they are; what lies in
    them may change.
    """

    def __init__(self, x: Tensor, options: tuple[Any, ...]) -> None:
        self._x = x
        self._options = StepOptions._make(options)
        self._possible = x.is_cpu and x.is_contiguous() and x.numel() > 0
        read = [t for t in (*self._options[:3], *self._options[7:-1]) if t is not None]
        self._possible &= all(t.is_contiguous() for t in read) and not any(share_memory(x, t) for t in read)

    def __call__(self, grad: Tensor) -> None:
        x = self._x
        plain = grad.dtype is x.dtype and grad.shape == x.shape and grad.is_contiguous()
        if not self._possible or not plain or grad.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            torch.ops.fastebm.langevin_step_(x, grad, *self._options)
            return
        launch("langevin_step", x, x, grad, *self._options)


def _run(
    out: Tensor,
    x: Tensor,
    grad: Tensor,
    options: StepOptions,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    *sides: Tensor | None,
) -> None:
    """Launches the kernel with tensors as it reads them. Those behind `options` stand for the ones in it."""
    target, x_view, grad_view, *views = images(out, x, grad, *sides[:-1])
    weight = sides[-1]
    address = (schedule.contiguous(), key.contiguous(), chain_ids.contiguous())
    weight = None if weight is None else weight.contiguous()
    launch("langevin_step", target, x_view, grad_view, *address, *options[3:7], *views, weight, options.data_term_hinge)
    if target.data_ptr() != out.data_ptr():
        # The state itself had to be copied to be seen as images.
        out.copy_(target.view(out.shape))


# Reference ----------------------------------------------------------------------------------------------------------

# The order of summation that every backend keeps: lane l adds elements l, l + 1024, ... in turn, then lanes fold in
# halves.
SUM_LANES = 1024


def reference_langevin_step(out: Tensor, x: Tensor, grad: Tensor, *options: Any) -> None:
    """Kernel `langevin_step` in plain PyTorch."""
    schedule, key, chain_ids, clamp_min, clamp_max, grad_clip, grad_norm_clip, *sides = options
    lower_bounds, upper_bounds, mask, known, data_target, data_term_weight, data_term_hinge = sides
    if x.numel() == 0:
        return
    batch = x.shape[0]
    by_chain = (batch,) + (1,) * (x.dim() - 1)
    check_index(key)
    row = schedule[key[2].clamp(0, schedule.shape[0] - 1)].to(x.dtype)
    step_size, noise_std = (v.expand(batch).reshape(by_chain) for v in row.unbind(-1))
    g = grad.to(x.dtype)
    if grad_clip is not None:
        g = torch.where(g < -grad_clip, -grad_clip, torch.where(g > grad_clip, grad_clip, g))
    if grad_norm_clip is not None:
        norm = rounded_sqrt(ordered_square_sum(g))
        limit = torch.tensor(grad_norm_clip, dtype=x.dtype, device=x.device)
        g = g * torch.where(norm > limit, limit / norm, 1.0).reshape(by_chain)
    if data_target is not None and data_term_weight is not None:
        weight = data_term_weight[key[2].clamp(0, data_term_weight.shape[0] - 1)].to(x.dtype).expand(batch)
        if data_term_hinge > 0:
            weight = torch.where(ordered_square_sum(x - data_target) > data_term_hinge, weight, 0.0)
        weight = weight.reshape(by_chain)
        g = torch.where(weight == 0, g, fma(weight, x - data_target, g))
    ids = expand_chain_ids(chain_ids, batch)
    valid = check_addressable(key, ids) & (key[2] >= 0)
    elements = x[0].numel()
    noise = normals_from_words(philox_words(key, ids, rng.Stream.LANGEVIN, -(-elements // 4))).flatten(1)[:, :elements]
    drifted = fma(-step_size, g, x)
    moved = torch.where(noise_std == 0, drifted, fma(noise_std, noise.reshape(x.shape).to(x.dtype), drifted))
    moved = torch.where(valid.reshape(by_chain), moved, torch.nan)
    if clamp_min is not None:
        moved = torch.where(moved < clamp_min, clamp_min, moved)
    if clamp_max is not None:
        moved = torch.where(moved > clamp_max, clamp_max, moved)
    if lower_bounds is not None:
        moved = torch.where(moved < lower_bounds, lower_bounds, moved)
    if upper_bounds is not None:
        moved = torch.where(moved > upper_bounds, upper_bounds, moved)
    out.copy_(moved if mask is None or known is None else torch.where(mask, known, moved))


def check_index(key: Tensor) -> None:
    """Refuse a negative schedule index. On the CPU it raises; a GPU is not read, its new states are NaN."""
    if key.device.type == "cpu" and int(key[2]) < 0:
        raise RuntimeError(f"the schedule index must not be negative, got {int(key[2])}")


def ordered_square_sum(values: Tensor) -> Tensor:
    """(B,) sums of squares of (B, ...) in the order that every backend keeps."""
    flat = values.reshape(values.shape[0], -1)
    rows = -(-flat.shape[1] // SUM_LANES)
    flat = torch.nn.functional.pad(flat, (0, rows * SUM_LANES - flat.shape[1])).reshape(-1, rows, SUM_LANES)
    lanes = torch.zeros_like(flat[:, 0])
    for row in range(rows):
        lanes = fma(flat[:, row], flat[:, row], lanes)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
