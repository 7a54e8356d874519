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
from .langevin import apart
from .langevin import check as check_update
from .program import Fused, reference_run_program
from .program import check as check_program

__all__ = ["CALL_STEPS", "advance_chain", "in_one_call", "reference_run_chain"]

# The most pixels of an image whose updates take so little that what lies between them counts.
PIXELS = 16 * 16
# Updates in one call: enough that its own cost doesn't count, few enough to be interrupted.
CALL_STEPS = 16


def in_one_call(x: Tensor) -> bool:
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


def advance_chain(x: Tensor, fused: Fused, steps: int, *arguments: Any) -> Tensor:
    """Moves x and the key among the arguments (those of `langevin_step_` behind the gradient) on by `steps` updates.

    Returns the energies before each, (steps, B).
    """
    code = fused.code(x.shape[0])
    return torch.ops.fastebm.run_chain(x, code, fused.constants, fused.workspace, steps, *arguments)


# Operator -----------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    code: Tensor,
    constants: Sequence[Tensor],
    workspace: Tensor,
    steps: int,
    schedule: Tensor,
    key: Tensor,
    *rest: Any,
) -> None:
    check_program("run_chain", x, code, constants, workspace)
    check_update("run_chain", x, x, schedule, key, *rest)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    for name, tensor in (("x", x), ("key", key)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is written in place and must be contiguous, got strides {tensor.stride()}")


def _fake_run_chain(
    x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor, steps: int, *arguments: Any
) -> Tensor:
    _check(x, code, constants, workspace, steps, *arguments)
    return x.new_empty(steps, x.shape[0])


@register("run_chain", fake=_fake_run_chain)
def _run_chain(
    x: Tensor,
    code: Tensor,
    constants: Sequence[Tensor],
    workspace: Tensor,
    steps: int,
    schedule: Tensor,
    key: Tensor,
    chains: Tensor,
    clamp_min: float | None,
    clamp_max: float | None,
    grad_clip: float | None,
    grad_norm_clip: float | None,
    mask: Tensor | None,
    known: Tensor | None,
    anchor: Tensor | None,
    anchor_weight: Tensor | None,
    anchor_hinge: float,
) -> Tensor:
    limits = (clamp_min, clamp_max, grad_clip, grad_norm_clip)
    sides = (mask, known, anchor, anchor_weight)
    _check(x, code, constants, workspace, steps, schedule, key, chains, *limits, *sides, anchor_hinge)
    energies = x.new_empty(steps, x.shape[0])
    if x.numel() == 0:
        key[1:].add_(steps)
        return energies
    # Kernels write x while they still read the others.
    mask, known, anchor, anchor_weight = (None if side is None else apart(side, x).contiguous() for side in sides)
    given = (energies, x, torch.empty_like(x), code, list(constants), workspace)
    address = (schedule.contiguous(), key, chains.contiguous())
    run = step_by_step if x.dtype == torch.float64 else _launched
    run(*given, *address, *limits, mask, known, anchor, anchor_weight, anchor_hinge)
    return energies


def _launched(*arguments: Any) -> None:
    launch("run_chain", *arguments)


def step_by_step(
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
        step_by_step(*arguments)
