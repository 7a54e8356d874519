"""Underdamped Langevin and Hamiltonian dynamics: kicks, drifts and the exact O step of velocities, in one pass.

A step has two half kicks of the same gradient's field, one before its drift and one after the gradient at its end. A
loop evaluates the gradient and then calls the operator once, which closes the step before and opens the next one: the
first call of a chain only opens, the last one only closes.

With h, c and sigma of a row of the schedule and w the inverse mass, the parts are

    kick      v = fma(-((h/2) w), g, v)
    O         v = fma(sigma sqrt(w), noise, c v)        no noise is drawn where sigma is 0
    drift d   x = fma(d, v, x); beyond a wall x is mirrored there once, and v changes its sign; where it then is beyond
              the other wall, x is NaN, which ends the trajectory

and the steps

    BAOAB     kick, drift h/2, O, drift h/2 | kick      where c = 1 and sigma = 0: kick, drift h | kick
    OBABO     O, kick, drift h | kick, O                the second O draws from a stream of its own
    leapfrog  kick, drift h | kick                      c and sigma are not read

with the bar where the new gradient is evaluated. With c = 1 and sigma = 0 all three are equal to the bit.
"""

# ruff: noqa: A002 (a step opens and closes; no file is opened here)

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..scalars import as_real, in_float32
from .backends import launch, refuse_autograd, register
from .langevin import SUM_LANES, check_index
from .memory import check_dense, share_memory, without_aliasing
from .normal import (
    check_address,
    check_addressable,
    expand_chain_ids,
    fma,
    normals_from_words,
    philox_words,
    rounded_sqrt,
)

__all__ = ["baoab_step_", "kinetic_energy", "leapfrog_", "obabo_step_"]

# Numbers that the kernels know: csrc/cpu/underdamped.cpp has the same.
BAOAB, OBABO, LEAPFROG = 0, 1, 2

STATES = (torch.float32, torch.float64)
GRADIENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def baoab_step_(
    x: Tensor,
    velocity: Tensor,
    grad: Tensor,
    *,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    work: Tensor | None = None,
    close: bool = True,
    open: bool = True,
) -> None:
    """Closes one step of BAOAB and opens the next, in place and in one pass over the data.

    Args:
        x: positions (B, ...), float32, contiguous; float64 on the CPU, and on a GPU through the reference.
        velocity: like x.
        grad: gradient of the energy (low = real) at x, x's shape; float32, bfloat16 or float16 (any of these or
            float64 for float64 x).
        schedule: float32 (S, 3) or (S, B, 3) of (step size h, decay c in [0, 1], noise std sigma >= 0). A friction
            gamma at temperature T is c = exp(-gamma h), sigma = sqrt(T (1 - c^2)). What opens reads row
            `min(key[2], S - 1)`; what closes, the row before it, and row 0 where there is none.
        key: int64 (seed, step, schedule index), as `fastebm.rng.make_key` gives it, of the step that opens.
        chain_ids: int64 (1,), the id of the first of consecutive chains, or (B,).
        inverse_mass: w >= 0 in x's dtype, a table (1 or B, 1 or N) for chains of N elements; None is 1. An entry with
            w = 0 and velocity 0 stays where it is.
        low, high: walls, None or low < high. An entry beyond one is mirrored there once; one that then is beyond the
            other becomes NaN, for a drift must not be longer than the walls are apart.
        work: float64 (B,). The kinetic energy is added to it after the kick that closes and subtracted before the
            kick that opens: over a trajectory it becomes the difference between the kinetic energies at its ends,
            without what the O steps of OBABO change. A step of BAOAB has its O step inside, which counts.
        close, open: the halves to compute.

    Raises:
        ValueError, TypeError: for arguments of the wrong shape, dtype, device or range.
        RuntimeError: where autograd would record the step, which has no derivative; for tensors that share memory
            where both are written; for a key or id that no noise has.

    Source: Leimkuhler & Matthews, "Rational Construction of Stochastic Numerical Methods for Molecular Sampling", 2013.

    Example:
        >>> import torch, fastebm
        >>> x, velocity = torch.ones(4, 2), torch.zeros(4, 2)
        >>> schedule, key, ids = torch.tensor([[0.1, 0.9, 0.4]]), fastebm.rng.make_key(0), torch.tensor([0])
        >>> fastebm.ops.baoab_step_(x, velocity, x, schedule=schedule, key=key, chain_ids=ids, close=False)
        >>> key += torch.tensor([0, 1, 1])
        >>> fastebm.ops.baoab_step_(x, velocity, x, schedule=schedule, key=key, chain_ids=ids, open=False)
    """
    _step(BAOAB, x, velocity, work, grad, schedule, key, chain_ids, inverse_mass, low, high, close, open)


def obabo_step_(
    x: Tensor,
    velocity: Tensor,
    grad: Tensor,
    *,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    work: Tensor | None = None,
    close: bool = True,
    open: bool = True,
) -> None:
    """`baoab_step_` for OBABO: an O step at both ends and leapfrog between them, which a Metropolis test can correct.

    Arguments and errors are those of `baoab_step_`, but that c = exp(-gamma h / 2), since a step has two O steps. What
    closes draws at step `key[1] - 1`, which must not be negative. `work` leaves out what the O steps change.

    Source: Bussi & Parrinello, "Accurate sampling using Langevin dynamics", 2007.

    Example:
        >>> import torch, fastebm
        >>> x, velocity = torch.ones(4, 2), torch.zeros(4, 2)
        >>> schedule, key, ids = torch.tensor([[0.1, 0.9, 0.4]]), fastebm.rng.make_key(0), torch.tensor([0])
        >>> fastebm.ops.obabo_step_(x, velocity, x, schedule=schedule, key=key, chain_ids=ids, close=False)
    """
    _step(OBABO, x, velocity, work, grad, schedule, key, chain_ids, inverse_mass, low, high, close, open)


def leapfrog_(
    x: Tensor,
    velocity: Tensor,
    grad: Tensor,
    *,
    schedule: Tensor,
    key: Tensor,
    inverse_mass: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    work: Tensor | None = None,
    close: bool = True,
    open: bool = True,
) -> None:
    """`baoab_step_` without friction and noise: the leapfrog steps of Hamiltonian dynamics.

    Arguments and errors are those of `baoab_step_`. The schedule has three columns here too; the last two are not read.

    Source: Neal, "MCMC Using Hamiltonian Dynamics", 2011.

    Example:
        >>> import torch, fastebm
        >>> x, velocity, work = torch.ones(4, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.float64)
        >>> schedule, key = torch.tensor([[0.1, 1.0, 0.0]]), fastebm.rng.make_key(0)
        >>> for step in range(11):
        ...     ends = {"close": step > 0, "open": step < 10}
        ...     fastebm.ops.leapfrog_(x, velocity, x, schedule=schedule, key=key, work=work, **ends)
        >>> energy_error = work + x.double().square().sum(1) / 2 - 1
        >>> bool((energy_error.abs() < 0.01).all())
        True
    """
    chain_ids = key.new_zeros(1) if isinstance(key, Tensor) else key
    _step(LEAPFROG, x, velocity, work, grad, schedule, key, chain_ids, inverse_mass, low, high, close, open)


def kinetic_energy(velocity: Tensor, inverse_mass: Tensor | None = None) -> Tensor:
    """The kinetic energy of each chain, `sum(v^2 / w) / 2`, where entries with w = 0 count nothing.

    Args:
        velocity: (B, ...), float32 or float64.
        inverse_mass: w >= 0 in velocity's dtype, a table (1 or B, 1 or N) for chains of N elements; None is 1.

    Returns:
        float64 (B,), summed in float64 in one order on all backends.

    Raises:
        ValueError, TypeError: for arguments of the wrong shape, dtype or device.
        RuntimeError: where autograd would record it.

    Source: Neal, "MCMC Using Hamiltonian Dynamics", 2011.

    Example:
        >>> import torch, fastebm
        >>> fastebm.ops.kinetic_energy(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([12.5000,  0.5000], dtype=torch.float64)
    """
    for name, tensor in (("velocity", velocity), ("inverse_mass", inverse_mass)):
        check_tensor(name, tensor, optional=name == "inverse_mass")
    return torch.ops.fastebm.kinetic_energy(velocity, inverse_mass)


def _step(
    scheme: int,
    x: Tensor,
    velocity: Tensor,
    work: Tensor | None,
    grad: Tensor,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None,
    low: float | None,
    high: float | None,
    close: bool,
    open: bool,
) -> None:
    for name, tensor in (("x", x), ("velocity", velocity), ("grad", grad), ("schedule", schedule), ("key", key)):
        check_tensor(name, tensor)
    check_tensor("chain_ids", chain_ids)
    check_tensor("inverse_mass", inverse_mass, optional=True)
    check_tensor("work", work, optional=True)
    walls = (None if wall is None else as_real(name, wall) for name, wall in (("low", low), ("high", high)))
    arguments = (schedule, key, chain_ids, inverse_mass, *walls, scheme, bool(close), bool(open))
    torch.ops.fastebm.kinetic_step_(x, velocity, work, grad, *arguments)


def check_tensor(name: str, value: Any, optional: bool = False) -> None:
    """Raises TypeError for an argument that is no dense tensor, or None where it is optional."""
    if optional and value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor{' or None' if optional else ''}, got {type(value).__name__}")
    check_dense(name, value)


# Operators ----------------------------------------------------------------------------------------------------------


def check_state(x: Tensor) -> None:
    """Raises for positions that the operators of this file and of `mala` can't update in place."""
    if x.dim() == 0:
        raise ValueError("x must be (chains, ...), got a tensor without dimensions")
    if x.dtype not in STATES:
        raise TypeError(f"x must be float32 (or float64), got {x.dtype}")
    check_written("x", x)


def check_written(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that can't be written in place as it lies."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is written in place and must be contiguous, got strides {tuple(tensor.stride())}")


def check_like(name: str, tensor: Tensor, x: Tensor, *dtypes: torch.dtype) -> None:
    """Raises for a tensor that is not of x's shape and device and of one of these dtypes."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted} for x of {x.dtype}, got {tensor.dtype}")
    if tensor.shape != x.shape or tensor.device != x.device:
        raise ValueError(
            f"{name} must have x's shape {tuple(x.shape)} and device {x.device}, "
            f"got {tuple(tensor.shape)} on {tensor.device}"
        )


def check_gradient(name: str, grad: Tensor, x: Tensor) -> None:
    """Raises for a gradient that is not like x."""
    check_like(name, grad, x, *(GRADIENTS if x.dtype == torch.float64 else GRADIENTS[:3]))


def check_by_chain(name: str, tensor: Tensor, x: Tensor, *dtypes: torch.dtype) -> None:
    """Raises for a tensor that is not one number a chain."""
    if tensor.dtype not in dtypes or tensor.shape != x.shape[:1] or tensor.device != x.device:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be {wanted} of shape ({x.shape[0]},) on {x.device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def check_tables(schedule: Tensor, key: Tensor, chain_ids: Tensor, x: Tensor, *columns: str) -> None:
    """Raises ValueError for a schedule, key or chain ids of the wrong form."""
    batch, wide = x.shape[0], len(columns)
    if schedule.dtype != torch.float32 or not (
        (schedule.dim() == 2 or (schedule.dim() == 3 and schedule.shape[1] == batch))
        and schedule.shape[-1] == wide
        and schedule.shape[0] > 0
    ):
        raise ValueError(
            f"schedule must be a float32 table (steps, {wide}) or (steps, {batch}, {wide}) of ({', '.join(columns)}), "
            f"got {schedule.dtype} {tuple(schedule.shape)}"
        )
    check_address(key, chain_ids, batch)
    for name, tensor in (("schedule", schedule), ("key", key)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def check_walls(low: float | None, high: float | None) -> None:
    """Raises ValueError for walls that are not in order."""
    least, most = -math.inf if low is None else low, math.inf if high is None else high
    if not (least < most and in_float32(least) < math.inf and in_float32(most) > -math.inf):
        raise ValueError(f"the walls must be numbers with low < high, got {low} and {high}")


def refuse_shared_memory(**written: Tensor | None) -> None:
    """Raises RuntimeError where two tensors that are both written share memory."""
    tensors = [(name, tensor) for name, tensor in written.items() if tensor is not None]
    for i, (name, tensor) in enumerate(tensors):
        for other_name, other in tensors[:i]:
            if share_memory(tensor, other):
                raise RuntimeError(f"{other_name} and {name} are both written and must not share memory")


def _check_mass(inverse_mass: Tensor, x: Tensor) -> None:
    batch, elements = x.shape[0], math.prod(x.shape[1:])
    if inverse_mass.dtype != x.dtype:
        raise TypeError(f"inverse_mass must be {x.dtype}, as x is, got {inverse_mass.dtype}")
    if not (
        inverse_mass.dim() == 2
        and inverse_mass.shape[0] in (1, batch)
        and inverse_mass.shape[1] in (1, elements)
        and inverse_mass.device == x.device
    ):
        raise ValueError(
            f"inverse_mass must be a table (1 or {batch}, 1 or {elements}) on {x.device}, "
            f"got {tuple(inverse_mass.shape)} on {inverse_mass.device}"
        )


def _check_step(
    x: Tensor,
    velocity: Tensor,
    work: Tensor | None,
    grad: Tensor,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None,
    low: float | None,
    high: float | None,
    scheme: int,
    close: bool,
    open: bool,
) -> None:
    check_state(x)
    refuse_autograd("kinetic_step_", x, velocity, work, grad, schedule, inverse_mass)
    check_like("velocity", velocity, x, x.dtype)
    check_written("velocity", velocity)
    check_gradient("grad", grad, x)
    check_tables(schedule, key, chain_ids, x, "step size", "decay", "noise std")
    check_walls(low, high)
    if work is not None:
        check_by_chain("work", work, x, torch.float64)
        check_written("work", work)
    if inverse_mass is not None:
        _check_mass(inverse_mass, x)
    if scheme not in (BAOAB, OBABO, LEAPFROG):
        raise ValueError(f"scheme must be {BAOAB} (BAOAB), {OBABO} (OBABO) or {LEAPFROG} (leapfrog), got {scheme}")


@register("kinetic_step_", fake=_check_step)
def _kinetic_step_(x: Tensor, velocity: Tensor, work: Tensor | None, grad: Tensor, *arguments: Any) -> None:
    _check_step(x, velocity, work, grad, *arguments)
    refuse_shared_memory(x=x, velocity=velocity, work=work)
    if not x.numel():
        return
    written = (x, velocity) if work is None else (x, velocity, work)
    read = (t if t is None else t.contiguous() for t in (grad, *arguments[:4]))
    launch("kinetic_step", x, velocity, work, *without_aliasing(read, *written), *arguments[4:])


def _empty_energy(velocity: Tensor, inverse_mass: Tensor | None) -> Tensor:
    if velocity.dim() == 0:
        raise ValueError("velocity must be (chains, ...), got a tensor without dimensions")
    if velocity.dtype not in STATES:
        raise TypeError(f"velocity must be float32 (or float64), got {velocity.dtype}")
    refuse_autograd("kinetic_energy", velocity, inverse_mass)
    if inverse_mass is not None:
        _check_mass(inverse_mass, velocity)
    return torch.empty(velocity.shape[0], dtype=torch.float64, device=velocity.device)


@register("kinetic_energy", fake=_empty_energy)
def _kinetic_energy(velocity: Tensor, inverse_mass: Tensor | None) -> Tensor:
    out = _empty_energy(velocity, inverse_mass)
    if not velocity.numel():
        return out.zero_()
    launch("kinetic_energy", velocity.contiguous(), out, None if inverse_mass is None else inverse_mass.contiguous())
    return out


# Reference ----------------------------------------------------------------------------------------------------------


def by_chain(tensor: Tensor) -> Tensor:
    """(B, N) of (B, ...)."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def ordered_sum(terms: Tensor) -> Tensor:
    """(B,) sums of (B, N) in the order of `langevin.ordered_square_sum`."""
    rows = -(-terms.shape[1] // SUM_LANES)
    terms = torch.nn.functional.pad(terms, (0, rows * SUM_LANES - terms.shape[1])).reshape(len(terms), rows, SUM_LANES)
    lanes = terms.new_zeros(terms.shape[0], SUM_LANES)
    for row in range(rows):
        lanes = lanes + terms[:, row]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def schedule_row(schedule: Tensor, index: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The columns, each (B, 1), of a row that is within the table."""
    row = schedule[index.clamp(0, schedule.shape[0] - 1)].to(dtype)
    return tuple(column.expand(batch)[:, None] for column in row.unbind(-1))


def chain_noise(key: Tensor, ids: Tensor, stream: int, elements: int) -> Tensor:
    """float32 normals (B, N)."""
    return normals_from_words(philox_words(key, ids, stream, -(-elements // 4))).flatten(1)[:, :elements]


def _wall(wall: float | None, like: Tensor) -> Tensor | None:
    return None if wall is None else torch.tensor(wall, dtype=like.dtype, device=like.device)


def beyond(x: Tensor, low: float | None, high: float | None) -> tuple[Tensor, Tensor]:
    """(entries beyond a wall, x with those mirrored there once)."""
    below, above = _wall(low, x), _wall(high, x)
    under = torch.zeros_like(x, dtype=torch.bool) if below is None else x < below
    over = torch.zeros_like(under) if above is None else ~under & (x > above)
    mirrored = x if below is None else torch.where(under, (below + below) - x, x)
    return under | over, mirrored if above is None else torch.where(over, (above + above) - x, mirrored)


def _kinetic_sum(v: Tensor, w: Tensor | None) -> Tensor:
    terms = v.double().square()
    if w is not None:
        terms = torch.where(w == 0, 0.0, terms / w.double())
    return ordered_sum(terms) / 2


def reference_kinetic_step(
    x: Tensor,
    velocity: Tensor,
    work: Tensor | None,
    grad: Tensor,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    inverse_mass: Tensor | None,
    low: float | None,
    high: float | None,
    scheme: int,
    close: bool,
    open: bool,
) -> None:
    """Kernel `kinetic_step` in plain PyTorch."""
    if x.numel() == 0:
        return
    batch = x.shape[0]
    position, v, g, w = by_chain(x), by_chain(velocity), by_chain(grad).to(x.dtype), inverse_mass
    ids = expand_chain_ids(chain_ids, batch)
    check_index(key)
    check_closing(key, scheme, close)
    valid = check_addressable(key, ids) & (key[2] >= 0)
    if scheme == OBABO and close:
        valid = valid & (key[1] > 0)
    before, row = (schedule_row(schedule, index, batch, x.dtype) for index in (key[2] - 1, key[2]))
    if scheme == LEAPFROG:
        before, row = ((h, torch.ones_like(h), torch.zeros_like(h)) for h in (before[0], row[0]))
    quiet_before, quiet = ((c == 1) & (sigma == 0) for _, c, sigma in (before, row))

    def kick(v: Tensor, h: Tensor) -> Tensor:
        half = h / 2 if w is None else (h / 2) * w
        return fma(-half, g, v)

    def refresh(v: Tensor, row: tuple[Tensor, ...], stream: rng.Stream, key: Tensor) -> Tensor:
        _, c, sigma = row
        noise = chain_noise(key, ids, stream, v.shape[1]).to(v.dtype)
        scale = sigma if w is None else sigma * rounded_sqrt(w)
        return torch.where(sigma == 0, c * v, fma(scale, noise, c * v))

    def drift(position: Tensor, v: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        outside, mirrored = beyond(fma(distance, v, position), low, high)
        lost, _ = beyond(mirrored, low, high)
        return torch.where(lost, torch.nan, mirrored), torch.where(outside, -v, v)

    # Where no O step lies between closing and opening, what is added to the work is subtracted again: neither is.
    counted = ~(quiet_before & quiet)[:, 0] if scheme == OBABO else torch.zeros_like(valid)
    counted = counted | (not (close and open))
    done = work
    if close:
        v = kick(v, before[0])
        if done is not None:
            done = torch.where(counted, done + _kinetic_sum(v, w), done)
        if scheme == OBABO:
            v = refresh(v, before, rng.Stream.MOMENTUM_END, key - key.new_tensor([0, 1, 0]))
    if open:
        h = row[0]
        if scheme == OBABO:
            v = refresh(v, row, rng.Stream.MOMENTUM, key)
        if done is not None:
            done = torch.where(counted, done - _kinetic_sum(v, w), done)
        v = kick(v, h)
        if scheme == BAOAB:
            half_way, turned = drift(position, v, h / 2)
            moved, last = drift(half_way, refresh(turned, row, rng.Stream.MOMENTUM, key), h / 2)
            at_once, straight = drift(position, v, h)
            position, v = torch.where(quiet, at_once, moved), torch.where(quiet, straight, last)
        else:
            position, v = drift(position, v, h)
    for out, value in ((x, position), (velocity, v)) if open else ((velocity, v),):
        out.copy_(torch.where(valid[:, None], value, torch.nan).reshape(out.shape))
    if work is not None and done is not None:
        work.copy_(done)


def check_closing(key: Tensor, scheme: int, close: bool) -> None:
    """Refuse to close a step of OBABO before the first. On the CPU it raises; a GPU is not read, its states are NaN."""
    if scheme == OBABO and close and key.device.type == "cpu" and int(key[1]) == 0:
        raise RuntimeError("OBABO closes the step before the key's, but the key is that of step 0")


def reference_kinetic_energy(velocity: Tensor, out: Tensor, inverse_mass: Tensor | None) -> None:
    """Kernel `kinetic_energy` in plain PyTorch."""
    out.copy_(_kinetic_sum(by_chain(velocity), inverse_mass))
