"""A whole chain in one call: run a fused program, update the state by it, move the key on, and so on.

    run_chain(x, code, constants, workspace, steps, ...) -> energies (steps, B), each before its update

It is `run_program` and `langevin_step_` one after the other, bit for bit, and does nothing else; what it saves is the
way through Python or the launches between them, a fifth of an update and more on images of 8x8. x and key are written
in place, so that calls follow on one another: a chain may be cut anywhere.

C++ calls the two in a loop. In Triton one launch runs the chain (`triton/chain.py`), each of its blocks a few images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import backend, chosen, launch, register
from .langevin import check as check_update
from .langevin import without_aliasing
from .program import CompiledProgram, reference_run_program
from .program import check as check_program

__all__ = ["CALL_STEPS", "advance_chain", "prefer_fused_chain", "reference_run_chain"]

# The most pixels of an image whose updates take so little that what lies between them counts.
PIXELS = 16 * 16
# Updates in one call: enough that its own cost doesn't count, few enough to be interrupted.
CALL_STEPS = 16


def prefer_fused_chain(x: Tensor) -> bool:
    """Whether chains like x that a fused program moves are better run by `advance_chain`, some updates in a call.

    On a CPU, for small images; not on a GPU, where Triton's kernel has not run yet, and elsewhere updates are launched
    one by one or replayed from a graph.
    """
    return (
        x.is_cpu
        and x.is_contiguous()
        and x.dtype == torch.float32
        and math.prod(x.shape[2:]) <= PIXELS
        and chosen("cpu", kernel="run_chain") == "cpp"
    )


def advance_chain(x: Tensor, fused: CompiledProgram, num_steps: int, *arguments: Any) -> Tensor:
    """Moves x and the key among the arguments (those of `langevin_step_` behind the gradient) on by `num_steps` updates.

    Returns the energies before each, (steps, B).
    """
    code = fused.code(x.shape[0])
    return torch.ops.fastebm.run_chain(x, code, fused.constants, fused.workspace, num_steps, *arguments)


# Operator -----------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    code: Tensor,
    constants: Sequence[Tensor],
    workspace: Tensor,
    num_steps: int,
    schedule: Tensor,
    key: Tensor,
    *rest: Any,
) -> None:
    check_program("run_chain", x, code, constants, workspace)
    check_update("run_chain", x, x, schedule, key, *rest)
    if num_steps < 0:
        raise ValueError(f"steps must not be negative, got {num_steps}")
    for name, tensor in (("x", x), ("key", key)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is written in place and must be contiguous, got strides {tensor.stride()}")


def _fake_run_chain(
    x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor, num_steps: int, *arguments: Any
) -> Tensor:
    _check(x, code, constants, workspace, num_steps, *arguments)
    return x.new_empty(num_steps, x.shape[0])


@register("run_chain", fake=_fake_run_chain)
def _run_chain(
    x: Tensor,
    code: Tensor,
    constants: Sequence[Tensor],
    workspace: Tensor,
    num_steps: int,
    schedule: Tensor,
    key: Tensor,
    chain_ids: Tensor,
    clamp_min: float | None,
    clamp_max: float | None,
    grad_clip: float | None,
    grad_norm_clip: float | None,
    mask: Tensor | None,
    known: Tensor | None,
    data_target: Tensor | None,
    data_term_weight: Tensor | None,
    data_term_hinge: float,
) -> Tensor:
    limits = (clamp_min, clamp_max, grad_clip, grad_norm_clip)
    sides = (mask, known, data_target, data_term_weight)
    _check(x, code, constants, workspace, num_steps, schedule, key, chain_ids, *limits, *sides, data_term_hinge)
    energies = x.new_empty(num_steps, x.shape[0])
    if x.numel() == 0:
        key[1:].add_(num_steps)
        return energies
    # Kernels write x while they still read the others.
    mask, known, data_target, data_term_weight = (
        None if side is None else without_aliasing(side, x).contiguous() for side in sides
    )
    given = (energies, x, torch.empty_like(x), code, list(constants), workspace)
    address = (schedule.contiguous(), key, chain_ids.contiguous())
    run = run_chain_unfused if x.dtype == torch.float64 else _launched
    run(*given, *address, *limits, mask, known, data_target, data_term_weight, data_term_hinge)
    return energies


def _launched(*arguments: Any) -> None:
    launch("run_chain", *arguments)


def run_chain_unfused(
    energies: Tensor,
    x: Tensor,
    gradient: Tensor,
    code: Tensor,
    constants: Sequence[Tensor],
    workspace: Tensor,
    schedule: Tensor,
    key: Tensor,
    *rest: Any,
) -> None:
    """Kernel `run_chain` out of the kernels `run_program` and `langevin_step` of the chosen backend."""
    one = torch.arange(3, device=key.device).clamp_(max=1)
    for row in energies:
        if x.dtype == torch.float64:
            reference_run_program(row, gradient, x, code, constants, workspace)
        else:
            launch("run_program", row, gradient, x, code, constants, workspace)
        launch("langevin_step", x, x, gradient, schedule, key, *rest)
        key.add_(one)


# Reference ----------------------------------------------------------------------------------------------------------


def reference_run_chain(*arguments: Any) -> None:
    """Kernel `run_chain` in plain PyTorch: the references of its two parts in turn."""
    with backend("reference"):
        run_chain_unfused(*arguments)
