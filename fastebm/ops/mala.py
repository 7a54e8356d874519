"""The Metropolis test of chains in place, and that of the Metropolis-adjusted Langevin algorithm with its ratio.

A chain at x proposes x' by a Langevin step with step size eta and noise std sigma, at temperature
T = sigma^2 / (2 eta). The logarithm of the acceptance ratio is -((E' - E) + s/4) / T with

    s = sum of (eta (g' - g) - 2 (x' - x)) (g + g')

which is what is left of the two proposal densities; nothing of the size of |x - x'|^2 / sigma^2 cancels. Gradients are
those that the proposal used, in the precision that they were stored in, so that a narrow gradient biases nothing.

Walls mirror proposals: the noise leads to y, which is mirrored once to x'. The way back then has the displacement
y - x as well where it was mirrored, and x - y where it was not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..scalars import as_real
from .backends import launch, refuse_autograd, register
from .langevin import check_clip, check_index
from .memory import without_aliasing
from .normal import (
    check_address,
    check_addressable,
    expand_chain_ids,
    fma,
    minus_two_log,
    philox_words,
    uniforms_from_words,
)
from .underdamped import (
    beyond,
    by_chain,
    chain_noise,
    check_by_chain,
    check_gradient,
    check_like,
    check_state,
    check_tables,
    check_tensor,
    check_walls,
    check_written,
    ordered_sum,
    refuse_shared_memory,
    schedule_row,
)

__all__ = ["mala_step_", "metropolis_"]


def mala_step_(
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    proposal: Tensor,
    proposal_energy: Tensor,
    proposal_grad: Tensor,
    *,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    grad_clip: float | None = None,
    low: float | None = None,
    high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Accepts or rejects each chain's Langevin proposal, in place: accepted chains take its x, energy and gradient.

    Args:
        x: states (B, ...), float32, contiguous; float64 on the CPU, and on a GPU through the reference.
        energy: of the states (low = real), float32 or float64 (B,); float64 for float64 x.
        grad: gradient of the energy at x, x's shape; float32, bfloat16 or float16 (any of these or float64 for float64
            x). Both gradients of an entry that a mask holds fixed must be 0.
        proposal: like x, what `langevin_step` made of x and grad at this schedule, key and chain ids; with walls, each
            entry beyond one mirrored there once.
        proposal_energy, proposal_grad: at the proposal, in the dtypes of energy and grad.
        schedule: float32 (S, 2) or (S, B, 2) of (step size eta > 0, noise std sigma); row `min(key[2], S - 1)`.
        key: int64 (seed, step, schedule index), that of the proposal.
        chain_ids: int64 (1,), the id of the first of consecutive chains, or (B,).
        grad_clip: the bound by which the proposal clipped every entry of the gradient.
        low, high: walls, None or low < high. A proposal that does not lie between them all the same is rejected.

    Returns:
        (accepted, log_ratio): bool (B,) and float64 (B,). A ratio of NaN rejects, and so does a proposal_energy that
        is not finite. With walls, log_ratio is -inf for a proposal that does not lie between them.

    Raises:
        ValueError, TypeError: for arguments of the wrong shape, dtype, device or range.
        RuntimeError: where autograd would record the step, which has no derivative; for tensors that share memory
            where both are written; for a key or id that no noise has.

    Source: Roberts & Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations",
    1996; the form of the ratio as in Titsias, "Optimal Preconditioning and Fisher Adaptive Langevin Sampling", 2023.

    Example:
        >>> import torch, fastebm
        >>> schedule, key, ids = torch.tensor([[0.125, 0.5]]), fastebm.rng.make_key(0), torch.tensor([0])
        >>> x = torch.zeros(100, 2)
        >>> energy, grad = x.square().sum(1) / 2, x.clone()
        >>> for _ in range(10):
        ...     proposal = torch.ops.fastebm.langevin_step(x, grad, schedule, key, ids, *(None,) * 10, 0.0)
        ...     at_proposal = (proposal, proposal.square().sum(1) / 2, proposal)
        ...     where = {"schedule": schedule, "key": key, "chain_ids": ids}
        ...     accepted, _ = fastebm.ops.mala_step_(x, energy, grad, *at_proposal, **where)
        ...     key += torch.tensor([0, 1, 0])
        >>> bool(accepted.double().mean() > 0.9)
        True
    """
    states = _states(x, energy, grad, proposal, proposal_energy, proposal_grad)
    for name, tensor in (("schedule", schedule), ("key", key), ("chain_ids", chain_ids)):
        check_tensor(name, tensor)
    walls = (None if wall is None else as_real(name, wall) for name, wall in (("low", low), ("high", high)))
    clip = check_clip("grad_clip", grad_clip)
    accepted, log_ratio = torch.ops.fastebm.mala_step_(*states, schedule, key, chain_ids, clip, *walls)
    return accepted, log_ratio


def metropolis_(
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    proposal: Tensor,
    proposal_energy: Tensor,
    proposal_grad: Tensor,
    log_ratio: Tensor,
    *,
    key: Tensor,
    chain_ids: Tensor,
) -> Tensor:
    """The Metropolis test at ratios that are given, in place: accepted chains take the proposal's x, energy, gradient.

    A chain is accepted where `log(u) < log_ratio` for a uniform u in (0, 1], the first number of stream ACCEPTANCE at
    the key's step. A ratio of NaN rejects, and so does a proposal_energy that is not finite.

    Args:
        x, energy, grad, proposal, proposal_energy, proposal_grad, key, chain_ids: as `mala_step_` takes them, but that
            the proposal may come from anywhere.
        log_ratio: float64 (B,), logarithms of the acceptance ratios.

    Returns:
        accepted, bool (B,).

    Raises:
        As `mala_step_`.

    Source: Metropolis et al., "Equation of State Calculations by Fast Computing Machines", 1953.

    Example:
        >>> import torch, fastebm
        >>> x, energy, ratio = torch.zeros(2, 3), torch.zeros(2), torch.tensor([0.5, -1e9], dtype=torch.float64)
        >>> proposal = (torch.ones(2, 3), torch.ones(2), torch.ones(2, 3))
        >>> key, ids = fastebm.rng.make_key(0), torch.tensor([0])
        >>> fastebm.ops.metropolis_(x, energy, x.clone(), *proposal, ratio, key=key, chain_ids=ids)
        tensor([ True, False])
    """
    states = _states(x, energy, grad, proposal, proposal_energy, proposal_grad)
    for name, tensor in (("log_ratio", log_ratio), ("key", key), ("chain_ids", chain_ids)):
        check_tensor(name, tensor)
    accepted: Tensor = torch.ops.fastebm.metropolis_(*states, log_ratio, key, chain_ids)
    return accepted


_STATES = ("x", "energy", "grad", "proposal", "proposal_energy", "proposal_grad")


def _states(*states: Tensor) -> tuple[Tensor, ...]:
    for name, tensor in zip(_STATES, states, strict=True):
        check_tensor(name, tensor)
    return states


# Operators ----------------------------------------------------------------------------------------------------------


def _check_states(operator: str, *states: Tensor) -> None:
    x, energy, grad, proposal, proposal_energy, proposal_grad = states
    check_state(x)
    refuse_autograd(operator, *states)
    check_gradient("grad", grad, x)
    check_like("proposal", proposal, x, x.dtype)
    check_like("proposal_grad", proposal_grad, x, grad.dtype)
    energies = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, torch.float64)
    check_by_chain("energy", energy, x, *energies)
    check_by_chain("proposal_energy", proposal_energy, x, energy.dtype)
    check_written("energy", energy)
    check_written("grad", grad)


def _fake_step(
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    proposal: Tensor,
    proposal_energy: Tensor,
    proposal_grad: Tensor,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    grad_clip: float | None,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, Tensor]:
    _check_states("mala_step_", x, energy, grad, proposal, proposal_energy, proposal_grad)
    refuse_autograd("mala_step_", schedule)
    check_tables(schedule, key, chain_ids, x, "step size", "noise std")
    check_walls(low, high)
    if grad_clip is not None and not grad_clip > 0:
        raise ValueError(f"grad_clip must be positive, got {grad_clip}")
    return x.new_empty(x.shape[0], dtype=torch.bool), x.new_empty(x.shape[0], dtype=torch.float64)


@register("mala_step_", fake=_fake_step)
def _mala_step_(x: Tensor, energy: Tensor, grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    accepted, log_ratio = _fake_step(x, energy, grad, *arguments)
    read = _apart(x, energy, grad, *arguments[:6])
    if x.shape[0]:
        launch("mala_step", x, energy, grad, accepted, log_ratio, *read, *arguments[6:])
    return accepted, log_ratio


def _fake_metropolis(
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    proposal: Tensor,
    proposal_energy: Tensor,
    proposal_grad: Tensor,
    log_ratio: Tensor,
    key: Tensor,
    chain_ids: Tensor,
) -> Tensor:
    _check_states("metropolis_", x, energy, grad, proposal, proposal_energy, proposal_grad)
    refuse_autograd("metropolis_", log_ratio)
    check_by_chain("log_ratio", log_ratio, x, torch.float64)
    check_address(key, chain_ids, x.shape[0])
    if key.device != x.device:
        raise ValueError(f"key must be on x's device {x.device}, got {key.device}")
    return x.new_empty(x.shape[0], dtype=torch.bool)


@register("metropolis_", fake=_fake_metropolis)
def _metropolis_(x: Tensor, energy: Tensor, grad: Tensor, *arguments: Any) -> Tensor:
    accepted = _fake_metropolis(x, energy, grad, *arguments)
    read = _apart(x, energy, grad, *arguments)
    if x.shape[0]:
        launch("metropolis", x, energy, grad, accepted, *read)
    return accepted


def _apart(x: Tensor, energy: Tensor, grad: Tensor, *read: Tensor) -> list[Tensor]:
    """What is read, contiguous and apart from what is written."""
    refuse_shared_memory(x=x, energy=energy, grad=grad)
    return without_aliasing([tensor.contiguous() for tensor in read], x, energy, grad)


# Reference ----------------------------------------------------------------------------------------------------------


def log_uniforms(key: Tensor, ids: Tensor) -> Tensor:
    """float32 (B,) logarithms of the uniforms of stream ACCEPTANCE, by the polynomial of csrc/normal.h."""
    uniforms = uniforms_from_words(philox_words(key, ids, rng.Stream.ACCEPTANCE, 1)[:, 0, 0])
    return minus_two_log(uniforms) * -0.5


def reference_metropolis(
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    accepted: Tensor,
    proposal: Tensor,
    proposal_energy: Tensor,
    proposal_grad: Tensor,
    log_ratio: Tensor,
    key: Tensor,
    chain_ids: Tensor,
) -> None:
    """Kernel `metropolis` in plain PyTorch."""
    if x.shape[0] == 0:
        return
    ids = expand_chain_ids(chain_ids, x.shape[0])
    valid = check_addressable(key, ids)
    accepted.copy_(valid & (log_uniforms(key, ids).double() < log_ratio) & proposal_energy.isfinite())
    for state, proposed in ((x, proposal), (energy, proposal_energy), (grad, proposal_grad)):
        chosen = accepted.reshape(-1, *(1,) * (state.dim() - 1))
        state.copy_(torch.where(chosen, proposed, state))
    energy.copy_(torch.where(valid, energy, torch.nan))


def reference_mala_step(
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    accepted: Tensor,
    log_ratio: Tensor,
    proposal: Tensor,
    proposal_energy: Tensor,
    proposal_grad: Tensor,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    grad_clip: float | None,
    low: float | None,
    high: float | None,
) -> None:
    """Kernel `mala_step` in plain PyTorch."""
    batch = x.shape[0]
    if batch == 0:
        return
    check_index(key)
    ids = expand_chain_ids(chain_ids, batch)
    valid = check_addressable(key, ids) & (key[2] >= 0)
    step_size, noise_std = schedule_row(schedule, key[2], batch, x.dtype)
    here, there = by_chain(x), by_chain(proposal)
    g, back = (_clipped(by_chain(each).to(x.dtype), grad_clip) for each in (grad, proposal_grad))
    difference, total = back.double() - g.double(), back.double() + g.double()
    outside = torch.zeros_like(valid)
    if low is None and high is None:
        straight = there.double() - here.double()
        terms = (step_size.double() * difference - 2 * straight) * total
    else:
        drifted = fma(-step_size, g, here)
        noise = chain_noise(key, ids, rng.Stream.LANGEVIN, here.shape[1]).to(x.dtype)
        unfolded = torch.where(noise_std == 0, drifted, fma(noise_std, noise, drifted))
        turned, _ = beyond(unfolded, low, high)
        outside = (beyond(there, low, high)[0] | there.isnan()).any(1)
        way = 2 * (unfolded.double() - here.double())
        first, second = torch.where(turned, total, difference), torch.where(turned, difference, total)
        terms = (step_size.double() * first + torch.where(turned, way, -way)) * second
    step_size, noise_std = step_size[:, 0].double(), noise_std[:, 0].double()
    temperature = noise_std * noise_std / (2 * step_size)
    rise = proposal_energy.double() - energy.double()
    ratio = -(rise + ordered_sum(terms) / 4) / temperature
    ratio = torch.where(outside, -torch.inf, ratio)
    log_ratio.copy_(torch.where(valid, ratio, torch.nan))
    reference_metropolis(x, energy, grad, accepted, proposal, proposal_energy, proposal_grad, log_ratio, key, chain_ids)


def _clipped(g: Tensor, bound: float | None) -> Tensor:
    if bound is None:
        return g
    limit = torch.tensor(bound, dtype=g.dtype, device=g.device)
    return torch.where(g < -limit, -limit, torch.where(g > limit, limit, g))
