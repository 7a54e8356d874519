"""Many steps of MALA, underdamped dynamics or HMC by a lane program in one call.

    run_lane_sampler(x, energy, gradient, velocity, code, tables, constants, num_steps, kind, ...)
        -> energies (num_steps, B) before each step, accepted (num_steps, B), log_ratio (num_steps, B)

Each step has the bits of the operators that make it one by one: `langevin_step` and `mala_step_`, `baoab_step_`,
`obabo_step_`, or `leapfrog_` and `metropolis_`. State, kept energy and gradient, velocity and key are written in place,
so that a chain may be split into calls anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rng
from .backends import backend, launch, register
from .lanes import CompiledLanes, reference_run_lanes
from .lanes import check as check_program
from .lanes import conditions_of as conditions_of_program
from .mala import mala_step_, metropolis_
from .memory import share_memory, without_aliasing
from .normal import check_address, rounded_sqrt
from .underdamped import baoab_step_, beyond, leapfrog_, obabo_step_

__all__ = ["LaneSampler", "SamplerOptions", "advance_sampler", "sampler_steps"]


class LaneSampler(IntEnum):
    """The samplers, as csrc/cpu/lane_samplers.cpp numbers them."""

    MALA = 0
    BAOAB = 1
    OBABO = 2
    HMC = 3


class SamplerOptions(NamedTuple):
    """The arguments of `run_lane_sampler` behind the program's, in the order of its schema.

    Attributes:
        kind: a `LaneSampler`.
        num_leapfrogs: of a trajectory of HMC.
        schedule: float32 (S, n) or (S, B, n): n = 2, (step size, noise std), of MALA; n = 3, (step size, decay, noise
            std), of the others.
        key, chain_ids: as `langevin_step` takes them.
        temperature: float32 (S,) or (S, B), of HMC.
        inverse_mass: (1 or B, 1 or N), or None for masses of 1.
        mask: bool, x's shape: entries that stay as they are.
        grad_clip: of MALA.
        low, high: walls, or None.
    """

    kind: int
    num_leapfrogs: int
    schedule: Tensor
    key: Tensor
    chain_ids: Tensor
    temperature: Tensor | None
    inverse_mass: Tensor | None
    mask: Tensor | None
    grad_clip: float | None
    low: float | None
    high: float | None


class Steps(NamedTuple):
    """What `advance_sampler` reports of each step: energies before it, and, of samplers with a test, its outcome."""

    energies: Tensor
    accepted: Tensor
    log_ratio: Tensor


def sampler_steps(program: Any, x: Tensor, evaluations: int = 1) -> int:
    """How many steps, each of so many evaluations, one call should make; 0 where the program can't make any."""
    if not isinstance(program, CompiledLanes):
        return 0
    return -(-program.call_steps(x) // evaluations)


def advance_sampler(
    program: CompiledLanes,
    x: Tensor,
    energy: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    num_steps: int,
    options: SamplerOptions,
) -> Steps:
    """Advances chains x by `num_steps` steps, in place with their kept energy and gradient, velocity, and the key."""
    given = (x, energy, gradient, velocity, *program.parts, num_steps)
    return Steps(*torch.ops.fastebm.run_lane_sampler(*given, *options, program.conditions))


# Operator -----------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    energy: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    program: Sequence[Tensor],
    num_steps: int,
    options: SamplerOptions,
) -> None:
    check_program("run_lane_sampler", x, *program)
    if options.kind not in LaneSampler._value2member_map_:
        raise ValueError(f"run_lane_sampler: there is no sampler of kind {options.kind}")
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}")
    if options.kind == LaneSampler.HMC and (options.num_leapfrogs < 1 or options.temperature is None):
        raise ValueError("run_lane_sampler: HMC needs num_leapfrogs >= 1 and temperatures")
    if options.kind in (LaneSampler.BAOAB, LaneSampler.OBABO) and velocity is None:
        raise ValueError("run_lane_sampler: underdamped dynamics need velocities")
    if (options.low is None) != (options.high is None):
        raise ValueError("run_lane_sampler: low and high go together")
    count = x.shape[0]
    columns = 2 if options.kind == LaneSampler.MALA else 3
    schedule = options.schedule
    if (
        schedule.dtype != torch.float32
        or schedule.dim() not in (2, 3)
        or schedule.shape[-1] != columns
        or (schedule.dim() == 3 and schedule.shape[1] != count)
        or schedule.shape[0] < 1
    ):
        raise ValueError(
            f"schedule must be a float32 table (steps, {columns}) or (steps, {count}, {columns}), "
            f"got {schedule.dtype} {tuple(schedule.shape)}"
        )
    check_address(options.key, options.chain_ids, count)
    for name, tensor, shape in (
        ("energy", energy, (count,)),
        ("gradient", gradient, x.shape),
        ("velocity", velocity, x.shape),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous {x.dtype} {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if options.mask is not None and (options.mask.shape != x.shape or options.mask.dtype != torch.bool):
        raise ValueError(f"mask must be torch.bool of x's shape {tuple(x.shape)}, got {options.mask.dtype}")
    if not x.is_contiguous() or not options.key.is_contiguous():
        raise ValueError("x and key are written in place and must be contiguous")


def _room(x: Tensor, num_steps: int, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    tested = num_steps if kind in (LaneSampler.MALA, LaneSampler.HMC) else 0
    count = x.shape[0]
    return (
        x.new_empty(num_steps, count),
        x.new_empty(tested, count, dtype=torch.bool),
        x.new_empty(tested, count, dtype=torch.float64),
    )


def _fake_run_lane_sampler(
    x: Tensor, energy: Tensor, gradient: Tensor, velocity: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = SamplerOptions(*arguments[4 : 4 + len(SamplerOptions._fields)])
    _check(x, energy, gradient, velocity, arguments[:3], arguments[3], options)
    return _room(x, arguments[3], options.kind)


@register("run_lane_sampler", fake=_fake_run_lane_sampler)
def _run_lane_sampler(
    x: Tensor, energy: Tensor, gradient: Tensor, velocity: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    program, num_steps = arguments[:3], arguments[3]
    options = SamplerOptions(*arguments[4 : 4 + len(SamplerOptions._fields)])
    _check(x, energy, gradient, velocity, program, num_steps, options)
    given = arguments[4 + len(options) :]
    conditions = conditions_of_program("run_lane_sampler", x, given[0] if given else None)
    energies, accepted, log_ratio = _room(x, num_steps, options.kind)
    if x.numel() == 0:
        options.key[1:].add_(num_steps)
        return energies, accepted, log_ratio
    written = [each for each in (x, energy, gradient, velocity, options.key) if each is not None]
    for i, one in enumerate(written):
        if any(share_memory(one, other) for other in written[:i]):
            raise ValueError("x, energy, gradient, velocity and key are written in place, but some share memory")
    read = (*program, conditions, options.schedule, options.chain_ids, options.temperature, options.inverse_mass)
    *parts, schedule, chain_ids, temperature, inverse_mass = without_aliasing(read, *written)
    (mask,) = without_aliasing((options.mask,), *written)
    own = options._replace(
        schedule=schedule.contiguous(),
        chain_ids=chain_ids.contiguous(),
        temperature=None if temperature is None else temperature.contiguous(),
        inverse_mass=inverse_mass,
        mask=None if mask is None else mask.contiguous(),
    )
    results = (energies, accepted, log_ratio, x, energy, gradient, velocity)
    if x.dtype == torch.float64:
        reference_run_lane_sampler(*results, *parts, *own)
    else:
        launch("run_lane_sampler", *results, *parts, *own)
    return energies, accepted, log_ratio


# Reference ----------------------------------------------------------------------------------------------------------


def reference_run_lane_sampler(
    energies: Tensor,
    accepted: Tensor,
    log_ratio: Tensor,
    x: Tensor,
    energy: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    code: Tensor,
    tables: Tensor,
    constants: Tensor,
    conditions: Tensor,
    *arguments: Any,
) -> None:
    """Kernel `run_lane_sampler` in plain PyTorch: the references of its parts in turn."""
    options = SamplerOptions(*arguments)

    def evaluate(at: Tensor) -> tuple[Tensor, Tensor]:
        found, slope = energy.new_empty(energy.shape), torch.empty_like(at)
        reference_run_lanes(found, slope, at, code, tables, constants, conditions)
        return found, slope if options.mask is None else slope.masked_fill_(options.mask, 0)

    step: Any = {
        LaneSampler.MALA: _mala,
        LaneSampler.BAOAB: _underdamped,
        LaneSampler.OBABO: _underdamped,
        LaneSampler.HMC: _hmc,
    }[LaneSampler(options.kind)]
    one = torch.arange(3, device=options.key.device).clamp_(max=1)
    with backend("reference"):
        for i, row in enumerate(energies):
            row.copy_(energy)
            tested = step(x, energy, gradient, velocity, evaluate, options, one)
            if tested is not None:
                accepted[i], log_ratio[i] = tested


def _mala(
    x: Tensor,
    energy: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    evaluate: Any,
    options: SamplerOptions,
    one: Tensor,
) -> tuple[Tensor, Tensor]:
    held = (None, None) if options.mask is None else (options.mask, x)
    address: dict[str, Any] = {"schedule": options.schedule, "key": options.key, "chain_ids": options.chain_ids}
    proposal = torch.ops.fastebm.langevin_step(
        x, gradient, *address.values(), None, None, options.grad_clip, None, None, None, *held, None, None, 0.0
    )
    low, high = options.low, options.high
    if low is not None and high is not None:
        _, proposal = beyond(proposal, low, high)
    found, slope = evaluate(proposal)
    tested = mala_step_(
        x, energy, gradient, proposal, found, slope, **address, grad_clip=options.grad_clip, low=low, high=high
    )
    options.key.add_(one)
    return tested


def _underdamped(
    x: Tensor, energy: Tensor, gradient: Tensor, velocity: Tensor, evaluate: Any, options: SamplerOptions, one: Tensor
) -> None:
    assert velocity is not None
    take = baoab_step_ if options.kind == LaneSampler.BAOAB else obabo_step_
    given: dict[str, Any] = {
        "schedule": options.schedule,
        "key": options.key,
        "chain_ids": options.chain_ids,
        "inverse_mass": options.inverse_mass,
        "low": options.low,
        "high": options.high,
    }
    take(x, velocity, gradient, **given, close=False, open=True)
    options.key.add_(one)
    found, slope = evaluate(x)
    energy.copy_(found)
    gradient.copy_(slope)
    take(x, velocity, gradient, **given, close=True, open=False)


def _hmc(
    x: Tensor,
    energy: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    evaluate: Any,
    options: SamplerOptions,
    one: Tensor,
) -> tuple[Tensor, Tensor]:
    count, key = x.shape[0], options.key
    assert options.temperature is not None
    heat = options.temperature[key[2].clamp(max=options.temperature.shape[0] - 1)].expand(count)
    scale = rounded_sqrt(heat.to(x.dtype)).reshape(-1, 1)
    if options.inverse_mass is not None:
        scale = scale * rounded_sqrt(options.inverse_mass)
    noise = torch.ops.fastebm.normal(tuple(x.shape), key, options.chain_ids, int(rng.Stream.REFRESH), x.dtype)
    speed = (noise.reshape(count, -1) * scale).reshape(x.shape)
    given: dict[str, Any] = {
        "schedule": options.schedule[key[2].clamp(max=options.schedule.shape[0] - 1)][None],
        "key": key,
        "inverse_mass": options.inverse_mass,
        "low": options.low,
        "high": options.high,
    }
    proposal, work = x.clone(), torch.zeros(count, dtype=torch.float64, device=x.device)
    leapfrog_(proposal, speed, gradient, **given, work=work, close=False, open=True)
    for k in range(options.num_leapfrogs):
        last = k == options.num_leapfrogs - 1
        found, slope = evaluate(proposal)
        leapfrog_(proposal, speed, slope, **given, work=work if last else None, close=True, open=not last)
    log_ratio = -((found.double() - energy.double()) + work) / heat.double()
    accepted = metropolis_(x, energy, gradient, proposal, found, slope, log_ratio, key=key, chain_ids=options.chain_ids)
    key.add_(one)
    return accepted, log_ratio
