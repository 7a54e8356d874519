"""One update of microcanonical Langevin chains in one pass: momentum of length 1 turned by the gradient, refreshed, and
the states moved along it.

The dynamics of d dimensions are dx/dt = u, du/dt = -(1 - u u^T) g / (d - 1), at |u| = 1. Their exact flow over `kick`,
with e = -g/|g|, p = e.u, delta = kick |g| / (d - 1) and zeta = exp(-delta), is

    u' = ((1 - zeta) (1 + p + zeta (1 - p)) e + 2 zeta u) / N,    N = 1 + p + zeta^2 (1 - p) = |what it divides|

and changes the kinetic energy by (d - 1) (delta + log(N / 2)). Sums over a chain are float64, in the order of
`fastebm/ops/langevin.py`, and so is all that is one number a chain. The new momentum is of_g g + of_u u + of_z z, with
the noise z, rounded once from float64; the state moves in its own dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..scalars import as_real, shown
from .backends import launch, refuse_autograd, register
from .memory import check_dense, share_memory, without_aliasing
from .normal import check_address, check_addressable, expand_chain_ids, fma, normals_from_words, philox_words
from .underdamped import ordered_sum

__all__ = ["mclmc_step_"]

_STATES = (torch.float32, torch.float64)
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A momentum whose 1 + p is less, an angle of 1e-6 from the direction against the force, stays: p is rounded to 1e-16.
AGAINST = 2.0**-40
# exp(-delta) of a larger delta has no influence on a momentum in float64.
LARGEST_DELTA = 700.0


def mclmc_step_(
    x: Tensor,
    momentum: Tensor,
    work: Tensor,
    grad: Tensor,
    *,
    closing: float | Tensor = 0.0,
    refresh: float | Tensor = 0.0,
    opening: float | Tensor = 0.0,
    drift: float | Tensor = 0.0,
    seed: int = 0,
    step: int = 0,
    chain_ids: int | Tensor = 0,
    inverse_mass: Tensor | None = None,
) -> Tensor:
    """What a microcanonical Langevin integrator does between two gradients, for every chain of a batch in one pass.

    It does, in this order, and without what is 0: the momentum is turned by the gradient over `closing`; it is
    partially refreshed, u = (u + refresh z) / |u + refresh z|; it is turned by the gradient over `opening`; the state
    moves, x += drift sqrt(inverse_mass) u. All is in place.

    Args:
        x: states (B, ...), float32 or (on the CPU, and on a GPU through the reference) float64, contiguous.
        momentum: like x, of length 1 over each chain, or 0 where the refresh draws it anew: refresh = 1 then gives a
            momentum of uniform direction. A length that is off by rounding does no harm.
        work: float64 (B, 2), contiguous; the changes of the kinetic energy by the closing and by the opening are added
            to its columns. With that of the potential energy they make the energy error of an integrator.
        grad: gradient of the energy at x, x's shape; float32, bfloat16 or float16 (any of these or float64 for float64
            x). Not read where closing and opening are 0.
        closing, opening, drift: not negative; each a number or one for each chain, (B,). A sampler at temperature T
            gives times divided by T to closing and opening.
        refresh: not negative, likewise; the standard deviation of each entry's noise.
        seed, step, chain_ids: where the noise falls, in stream REFRESH; see `fastebm.ops.normal`.
        inverse_mass: not negative, broadcastable to x, or None for 1: the gradient is multiplied by its square root,
            and so is the momentum that moves x. Entries of 0 stay as they are and count in no sum. At least 2 entries
            of a chain must not be 0; a chain of fewer dimensions has no such dynamics, and its states become NaN.

    Returns:
        x.

    Raises:
        ValueError, TypeError: for arguments of the wrong shape, dtype, device or range.
        RuntimeError: where autograd would record the step, which has no derivative; for tensors that are written and
            share memory.

    Source: Robnik, De Luca, Silverstein, Seljak, "Microcanonical Hamiltonian Monte Carlo", 2022 (the flow), and Robnik,
    Seljak, "Fluctuation without dissipation: Microcanonical Langevin Monte Carlo", 2023 (the refresh).

    Example:
        >>> import torch, fastebm
        >>> x, u, work = torch.ones(4, 10), torch.zeros(4, 10), torch.zeros(4, 2, dtype=torch.float64)
        >>> x = fastebm.ops.mclmc_step_(x, u, work, x, refresh=1.0, opening=0.5, drift=0.5, seed=0)
        >>> bool((u.norm(dim=1) - 1).abs().max() < 1e-6)
        True
    """
    for name, tensor in (("x", x), ("momentum", momentum), ("work", work), ("grad", grad)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    if x.dim() == 0:
        raise ValueError("x must be (chains, ...), got a tensor without dimensions")
    torch.ops.fastebm.mclmc_step_(
        x,
        momentum,
        work,
        grad,
        _coefficients(x, closing=closing, refresh=refresh, opening=opening, drift=drift),
        rng.make_key(seed, step, device=x.device),
        rng.make_chain_ids(chain_ids, x.shape[0], x.device),
        None if inverse_mass is None else flat_mass(inverse_mass, x),
    )
    return x


def _coefficients(x: Tensor, **given: float | Tensor) -> Tensor:
    """float64 (1, 4) or (B, 4) of closing, refresh, opening and drift."""
    columns = []
    for name, value in given.items():
        if isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_complex()):
            raise TypeError(f"{name} must be of real numbers, got {shown(value)}")
        value = value if isinstance(value, Tensor) else as_real(name, value)
        column = torch.as_tensor(value, dtype=torch.float64, device=x.device)
        if column.dim() and column.shape != x.shape[:1]:
            raise ValueError(
                f"{name} must be a number or one for each chain, shape ({x.shape[0]},), got {tuple(column.shape)}"
            )
        if x.device.type == "cpu" and not bool(((column >= 0) & (column < math.inf)).all()):  # a GPU is not read
            raise ValueError(f"{name} must be finite and not negative, got {shown(value)}")
        columns.append(column)
    rows = x.shape[0] if any(column.dim() for column in columns) else 1
    return torch.stack([column.expand(rows) for column in columns], dim=1)


def flat_mass(inverse_mass: Tensor, x: Tensor) -> Tensor:
    """(1 or B, 1 or N) of an inverse mass that broadcasts to x of N entries a chain, in x's dtype.

    Raises TypeError or ValueError for one that does not, and on the CPU for numbers that are negative or not finite.
    """
    if not isinstance(inverse_mass, Tensor) or not inverse_mass.is_floating_point():
        raise TypeError(f"inverse_mass must be a tensor of floating point numbers, got {shown(inverse_mass)}")
    check_dense("inverse_mass", inverse_mass)
    try:
        fits = torch.broadcast_shapes(inverse_mass.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"inverse_mass must be broadcastable to x's shape {tuple(x.shape)}, got {tuple(inverse_mass.shape)}"
        )
    mass = inverse_mass.detach().to(x.device, x.dtype)
    if mass.device.type == "cpu" and not bool(((mass >= 0) & (mass < math.inf)).all()):
        raise ValueError("inverse_mass must be finite and not negative, got other numbers")
    mass = mass.reshape((1,) * (x.dim() - mass.dim()) + mass.shape)
    if mass[:1].numel() == 1:
        return mass.reshape(-1, 1)
    return mass.expand(mass.shape[0], *x.shape[1:]).reshape(mass.shape[0], -1).contiguous()


# Operator -----------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    momentum: Tensor,
    work: Tensor,
    grad: Tensor,
    coefficients: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None,
) -> None:
    """Raises where the operator can't update x by these arguments."""
    if x.dim() == 0:
        raise ValueError("x must be (chains, ...), got a tensor without dimensions")
    refuse_autograd("mclmc_step_", x, momentum, work, grad, coefficients, inverse_mass)
    if x.dtype not in _STATES:
        raise TypeError(f"x must be float32 (or float64), got {x.dtype}")
    if momentum.dtype != x.dtype:
        raise TypeError(f"momentum must have x's dtype {x.dtype}, got {momentum.dtype}")
    if grad.dtype not in _GRADIENTS or (grad.dtype == torch.float64 and x.dtype != torch.float64):
        raise TypeError(
            f"grad must be float32, bfloat16 or float16 (float64 only with a float64 x), "
            f"got {grad.dtype} with x {x.dtype}"
        )
    for name, tensor in (("momentum", momentum), ("grad", grad)):
        if tensor.shape != x.shape or tensor.device != x.device:
            raise ValueError(
                f"{name} must have x's shape {tuple(x.shape)} and device {x.device}, "
                f"got {tuple(tensor.shape)} on {tensor.device}"
            )
    batch = x.shape[0]
    if work.dtype != torch.float64 or work.shape != (batch, 2):
        raise ValueError(f"work must be float64 ({batch}, 2), got {work.dtype} {tuple(work.shape)}")
    if coefficients.dtype != torch.float64 or coefficients.shape not in ((1, 4), (batch, 4)):
        raise ValueError(
            f"coefficients must be float64 (1, 4) or ({batch}, 4) of (closing, refresh, opening, drift), "
            f"got {coefficients.dtype} {tuple(coefficients.shape)}"
        )
    check_address(key, chain_ids, batch)
    for name, tensor in (("work", work), ("coefficients", coefficients), ("key", key)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    for name, tensor in (("x", x), ("momentum", momentum), ("work", work)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    if inverse_mass is not None:
        elements = math.prod(x.shape[1:])
        if (
            inverse_mass.dtype != x.dtype
            or inverse_mass.device != x.device
            or inverse_mass.dim() != 2
            or inverse_mass.shape[0] not in (1, batch)
            or inverse_mass.shape[1] not in (1, elements)
        ):
            raise ValueError(
                f"inverse_mass must be {x.dtype} (1 or {batch}, 1 or {elements}) on {x.device}, "
                f"got {inverse_mass.dtype} {tuple(inverse_mass.shape)} on {inverse_mass.device}"
            )


def _fake_step_(x: Tensor, momentum: Tensor, work: Tensor, *read: Any) -> None:
    _check(x, momentum, work, *read)


@register("mclmc_step_", fake=_fake_step_)
def _mclmc_step_(x: Tensor, momentum: Tensor, work: Tensor, *read: Any) -> None:
    _check(x, momentum, work, *read)
    written = {"x": x, "momentum": momentum, "work": work}
    for first, second in (("x", "momentum"), ("x", "work"), ("momentum", "work")):
        if share_memory(written[first], written[second]):
            raise RuntimeError(f"{first} and {second} can't be written in place: they share memory")
    if x.numel() == 0:
        return
    contiguous = (None if tensor is None else tensor.contiguous() for tensor in read)
    launch("mclmc_step", x, momentum, work, *without_aliasing(contiguous, x, momentum, work))


class RepeatedTurns:
    """`mclmc_step_` of one batch of chains, many times, without the checks of each call.

    The tensors given stay where they are; what lies in them may change. Coefficients and gradients come with each call:
    the former float64 and contiguous, the latter from an energy.
    """

    def __init__(
        self, x: Tensor, momentum: Tensor, work: Tensor, key: Tensor, chain_ids: Tensor, inverse_mass: Tensor | None
    ) -> None:
        self._written, self._address = (x, momentum, work), (key, chain_ids, inverse_mass)
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in self._written}
        read = [tensor for tensor in self._address if tensor is not None]
        self._possible = x.is_cpu and x.numel() > 0 and all(tensor.is_contiguous() for tensor in read)
        self._possible &= not any(share_memory(one, other) for one in self._written for other in read)
        self._checked = False

    def __call__(self, grad: Tensor, coefficients: Tensor) -> None:
        x = self._written[0]
        plain = grad.dtype is x.dtype and grad.shape == x.shape and grad.is_contiguous()
        if not (self._possible and self._checked and plain) or grad.untyped_storage().data_ptr() in self._storages:
            torch.ops.fastebm.mclmc_step_(*self._written, grad, coefficients, *self._address)
            self._checked = True
            return
        launch("mclmc_step", *self._written, grad, coefficients, *self._address)


# Reference ----------------------------------------------------------------------------------------------------------


def reference_mclmc_step(
    x: Tensor,
    momentum: Tensor,
    work: Tensor,
    grad: Tensor,
    coefficients: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None,
) -> None:
    """Kernel `mclmc_step` in plain PyTorch."""
    batch, elements = x.shape[0], x[0].numel()
    closing, refresh, opening, drift = coefficients.expand(batch, 4).unbind(1)
    ids = expand_chain_ids(chain_ids, batch)
    valid = check_addressable(key, ids)
    u, g = momentum.reshape(batch, -1), grad.reshape(batch, -1).to(x.dtype)
    z = normals_from_words(philox_words(key, ids, rng.Stream.REFRESH, -(-elements // 4))).flatten(1)[:, :elements]
    z = torch.where((refresh != 0)[:, None], z, 0.0).to(x.dtype)
    dimensions = torch.full_like(closing, elements)
    scale = None
    if inverse_mass is not None:
        scale = inverse_mass.double().sqrt().to(x.dtype).expand(batch, elements)
        g, z = scale * g, torch.where(scale == 0, 0.0, z)
        dimensions = (scale != 0).sum(1).double()
    g = torch.where(((closing != 0) | (opening != 0))[:, None], g, 0.0)

    pairs = ((g, g), (u, g), (u, u), (z, g), (z, u), (z, z))
    # Products of float32 are exact.
    gg, ug, uu, zg, zu, zz = (ordered_sum(one.double() * other.double()) for one, other in pairs)
    force, freedom = gg.sqrt(), dimensions - 1
    # The momentum is of_g g + of_u u + of_z z, and its length.
    of_g, of_u, of_z, length = torch.zeros_like(gg), torch.ones_like(gg), torch.zeros_like(gg), uu.sqrt()

    pulls = (closing != 0) & (gg != 0)
    toward, keep, change = _kick(closing * force / freedom, -(ug / (force * length)))
    of_g, of_u = torch.where(pulls, -(toward / force), of_g), torch.where(pulls, keep / length, of_u)
    length = torch.where(pulls, 1.0, length)
    closed = torch.where(pulls, freedom * change, 0.0)

    noise = refresh * (2 * (of_g * zg + of_u * zu) + refresh * zz)
    mixed = (length * length + noise).sqrt()
    drawn = (refresh != 0) & (mixed != 0)
    of_g, of_u, of_z = (
        torch.where(drawn, new / mixed, old) for new, old in ((of_g, of_g), (of_u, of_u), (refresh, of_z))
    )
    length = torch.where(drawn, 1.0, length)

    pulls = (opening != 0) & (gg != 0)
    along = of_g * gg + of_u * ug + of_z * zg
    toward, keep, change = _kick(opening * force / freedom, -(along / (force * length)))
    kept = keep / length
    of_g, of_u, of_z = (
        torch.where(pulls, new, old)
        for new, old in ((kept * of_g - toward / force, of_g), (kept * of_u, of_u), (kept * of_z, of_z))
    )
    opened = torch.where(pulls, freedom * change, 0.0)

    work += torch.stack((closed, opened), dim=1)
    # In float64, since a momentum nearly against the force comes out of large numbers that cancel.
    turned = of_z[:, None] * z + (of_g[:, None] * g + of_u[:, None] * u)
    turned = torch.where(valid[:, None], turned, torch.nan).to(x.dtype)
    drift = drift[:, None].to(x.dtype)
    momentum.copy_(turned.reshape(x.shape))
    moved = fma(drift, turned if scale is None else scale * turned, x.reshape(batch, -1))
    x.copy_(torch.where(drift != 0, moved, x.reshape(batch, -1)).reshape(x.shape))


def _kick(delta: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(toward, keep, change) of the flow over delta: u' = toward e + keep u for a unit u with e.u = along, and the
    change of the kinetic energy over (d - 1)."""
    along = along.clamp(-1, 1)
    zeta = torch.exp(-delta.clamp(max=LARGEST_DELTA))
    near = 1.0 + along
    length = (1.0 - along) * (zeta * zeta) + near
    toward, keep = (1.0 - zeta) * (zeta * (1.0 - along) + near) / length, 2.0 * zeta / length
    against = near < AGAINST
    return (
        torch.where(against, 0.0, toward),
        torch.where(against, 1.0, keep),
        torch.where(against, -delta, delta + torch.log(0.5 * length)),
    )
