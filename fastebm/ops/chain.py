"""Many Langevin updates by a fused program in one call.

    run_chain(x, code, constants, workspace, num_steps, ...) -> energies (num_steps, B), each before its update

Each update is `run_program` and then `langevin_step_`, bit for bit. One call saves the way through Python or the
launches between the two: a fifth of an update and more on images of 8x8. x and the key are written in place, so a chain
may be split into calls anywhere.

C++ calls the two in a loop. In Triton one launch runs the chain (`triton/chain.py`), each of its blocks a few images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import backend, launch, register, select_backend
from .lanes import CompiledLanes
from .langevin import NoiseOrder
from .langevin import check as check_update
from .memory import share_memory, without_aliasing
from .options import StepOptions
from .program import CompiledProgram, reference_run_program
from .program import check as check_program

__all__ = ["CALL_STEPS", "advance_chain", "call_steps", "prefer_fused_chain", "reference_run_chain"]

# Images of more pixels take so long that the cost between two updates doesn't count.
PIXELS = 16 * 16
# Updates in one call: enough that its own cost doesn't count, few enough to be interrupted.
CALL_STEPS = 16


def prefer_fused_chain(x: Tensor) -> bool:
    """Whether `advance_chain` is faster for chains like x than updates one by one: on a CPU, for small images.

    Triton's kernel has not run on a GPU yet; there updates are launched one by one or replayed from a CUDA graph.
    """
    return (
        x.is_cpu
        and x.is_contiguous()
        and x.dtype == torch.float32
        and math.prod(x.shape[2:]) <= PIXELS
        and select_backend("cpu", kernel="run_chain") == "cpp"
    )


def call_steps(program: CompiledProgram | CompiledLanes, x: Tensor) -> int:
    """How many updates of chains x one call should make; 0 where single updates are as fast, or it can't make any."""
    if isinstance(program, CompiledLanes):
        return program.call_steps(x)
    return CALL_STEPS if program.takes(x) and prefer_fused_chain(x) else 0


def advance_chain(
    x: Tensor,
    program: CompiledProgram | CompiledLanes,
    num_steps: int,
    *options: Any,
    noise_order: NoiseOrder = NoiseOrder.WITH_GRADIENT,
) -> Tensor:
    """Advances chains x by `num_steps` updates, with the `StepOptions` in order; x and the key are written in place.

    Returns the energies of each update's gradient, (num_steps, B). Only lane programs know another order of noise.
    """
    if isinstance(program, CompiledLanes):
        return program.advance(x, num_steps, StepOptions(*options), noise_order)
    code = program.code(x.shape[0])
    return torch.ops.fastebm.run_chain(x, code, program.constants, program.workspace, num_steps, *options)


# Operator -----------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor, num_steps: int, options: StepOptions
) -> None:
    check_program("run_chain", x, code, constants, workspace)
    check_update("run_chain", x, x, options)
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}")
    for name, tensor in (("x", x), ("key", options.key)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is written in place and must be contiguous, got strides {tensor.stride()}")


def _fake_run_chain(
    x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor, num_steps: int, *options: Any
) -> Tensor:
    _check(x, code, constants, workspace, num_steps, StepOptions(*options))
    return x.new_empty(num_steps, x.shape[0])


@register("run_chain", fake=_fake_run_chain)
def _run_chain(
    x: Tensor, code: Tensor, constants: Sequence[Tensor], workspace: Tensor, num_steps: int, *arguments: Any
) -> Tensor:
    options = StepOptions(*arguments)
    _check(x, code, constants, workspace, num_steps, options)
    energies = x.new_empty(num_steps, x.shape[0])
    if x.numel() == 0:
        options.key[1:].add_(num_steps)
        return energies
    # Kernels write x and the key while they still read the other tensors, which therefore must not share their memory.
    schedule, key, chain_ids, *limits = options[:7]
    if share_memory(x, key):
        raise ValueError("x and key are both written in place, but share memory")
    schedule, chain_ids, *separate = without_aliasing((schedule, chain_ids, *options[7:-1]), x, key)
    separate = [None if tensor is None else tensor.contiguous() for tensor in separate]
    hinge, address = options.data_term_hinge, (schedule.contiguous(), key, chain_ids.contiguous())
    program = (energies, x, torch.empty_like(x), code, list(constants), workspace)
    if x.dtype == torch.float64:
        run_chain_unfused(*program, *address, *limits, *separate, hinge)
    else:
        launch("run_chain", *program, *address, *limits, *separate, hinge)
    return energies


def run_chain_unfused(
    energies: Tensor,
    x: Tensor,
    gradient: Tensor,
    code: Tensor,
    constants: Sequence[Tensor],
    workspace: Tensor,
    *options: Any,
) -> None:
    """Kernel `run_chain` out of the kernels `run_program` and `langevin_step` of the chosen backend."""
    key = StepOptions(*options).key
    one = torch.arange(3, device=key.device).clamp_(max=1)
    for row in energies:
        if x.dtype == torch.float64:
            reference_run_program(row, gradient, x, code, constants, workspace)
        else:
            launch("run_program", row, gradient, x, code, constants, workspace)
        launch("langevin_step", x, x, gradient, *options)
        key.add_(one)


# Reference ----------------------------------------------------------------------------------------------------------


def reference_run_chain(*arguments: Any) -> None:
    """Kernel `run_chain` in plain PyTorch: the references of its two parts in turn."""
    with backend("reference"):
        run_chain_unfused(*arguments)
