"""The programs that an energy may run by for one kind of samples, in the order of preference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastebm.compiler.capture import UnsupportedError, capture
from fastebm.compiler.cost_model import Machine
from fastebm.compiler.executor import AtenExecutor, CompiledExecutor
from fastebm.compiler.faults import CompilerFaultError
from fastebm.compiler.lanes import LaneError, LaneExecutor, multiplies
from fastebm.compiler.lowering import LoweringError, lower
from fastebm.compiler.own_code import Conditions
from fastebm.compiler.process_state import exporting
from fastebm.compiler.program import Program
from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program
from fastebm.ops.backends import has_matrix_units, refusal_of_programs, runs_compiled
from fastebm.ops.instructions import Kind
from fastebm.ops.program import LoweredProgram

__all__ = ["Candidate", "Executor", "ProgramKey", "candidates"]

LANES, FUSED, STOCK = "lane program", "fused program", "PyTorch operations"

# Numbers of an image above which a lane program takes longer to make than most chains to run.
LARGE_IMAGE = 3 * 64 * 64

# Products for each value of a step behind a convolution below which lane programs are the faster, for images. On a CPU
# with AVX512-BF16 a lane program took 0.035 ns for each product. A fused one took 0.004 in bfloat16, 0.008 in float32
# and 0.25 for each value of a step. In float32 lane programs took 0.3 to 0.7 of a fused one's time at 2.9, 4.1 and 9.4
# products for each value, 0.9 to 2 at 16, and 1.9 to 2.8 from 128 on.
FEW_PRODUCTS = 10
# Channels that such steps work on at a time.
BLOCK = 32

# Arithmetic of shorter whole numbers wraps around, which that of float32 doesn't.
CONDITIONS = (torch.float32, torch.bool, torch.int32, torch.int64)

Executor = AtenExecutor | CompiledExecutor | LaneExecutor


@dataclass(frozen=True)
class ProgramKey:
    """What a program is specialised for."""

    sample: torch.Size
    dtype: torch.dtype
    device: torch.device
    compute_dtype: torch.dtype
    conditions: tuple[tuple[torch.Size, torch.dtype, bool], ...] = ()  # shape, dtype, whether too large for float32
    batch: int | None = None  # where the choice may depend on it


@dataclass(frozen=True)
class Candidate:
    """A program that has not been checked yet.

    Attributes:
        executor: runs it.
        captured: the program before it was differentiated, where there is one.
        fallback_reason: why it runs on PyTorch's operations, if it does.
    """

    executor: Executor
    captured: Program | None = None
    fallback_reason: str = ""

    @property
    def name(self) -> str:
        return {LaneExecutor: LANES, CompiledExecutor: FUSED, AtenExecutor: STOCK}[type(self.executor)]

    @property
    def batch_invariant(self) -> bool:
        return not isinstance(self.executor, AtenExecutor)


def candidates(
    energy: Callable[..., Tensor],
    module: nn.Module | None,
    key: ProgramKey,
    x: Tensor,
    conditions: Conditions = (),
    function: str = "",
) -> Iterator[Candidate | UnsupportedError]:
    """Programs one after the other, best first, each made when it is asked for; or why there is none.

    The order only depends on the energy and the kind of samples, not on the batch, the time or the load of the machine:
    so do the bits. Lane programs come first for all that is no image. Images run as fused programs, in 16 bits on
    matrix units where there are any, unless those would do little but move values (`FEW_PRODUCTS`) and images are
    small: for large ones a lane program takes long to make. An energy without any product needs no export for that.
    Only lane programs have conditions, and can have the backward pass of an `autograd.Function`, which `function` tells
    of, because they are traced through autograd.
    """
    lanes = _lanes_take(key)
    if function or conditions:
        for _, dtype, large in key.conditions:
            if large or dtype not in CONDITIONS:
                what = "whole numbers above 2**24" if large else str(dtype)
                yield UnsupportedError("conditions", f"a program takes no {what} as a condition")
                return
        why = ("backward", function) if function else ("conditions", "only lane programs take them, and none can run")
        yield _lane_candidate(energy, module, x, conditions) if lanes else UnsupportedError(*why)
        return
    small = key.sample.numel() <= LARGE_IMAGE
    lanes_first = len(key.sample) != 3
    if lanes and small and not lanes_first:
        with exporting():
            lanes_first = not multiplies(energy, module, x[:1])
    if lanes and lanes_first:
        yield _lane_candidate(energy, module, x)
    try:
        captured = capture(energy, module, x)
        machine = Machine.of(key.device, key.compute_dtype)
        reason = _refusal(key)
        if not reason:
            try:
                program = build_gradient_program(captured, replace(machine, strided_adjoint=1.0), WITHOUT_POLYPHASE)
                lowered = lower(program, key.compute_dtype.itemsize)
                if lanes and not lanes_first and small and products_per_value(lowered.program) < FEW_PRODUCTS:
                    lanes_first = True
                    yield _lane_candidate(energy, module, x)
                yield Candidate(CompiledExecutor(program, lowered, key.compute_dtype, key.device), captured)
            except LoweringError as error:
                reason = str(error)
    except Exception as error:
        captured = None
        yield error if isinstance(error, UnsupportedError) else CompilerFaultError(FUSED, error)
    if lanes and not lanes_first:
        yield _lane_candidate(energy, module, x)
    if captured is not None:
        reason = reason or "asked for beside the programs on kernels of its own"
        yield Candidate(AtenExecutor(build_gradient_program(captured, machine), key.compute_dtype), captured, reason)


def products_per_value(program: LoweredProgram) -> float:
    """The products of a program's convolutions for each value of the steps behind instructions, in whole blocks.

    A linear layer is a convolution to one pixel, and its gradient one of a single pixel: lane programs multiply those
    as fast.
    """
    products = values = 0
    for i in program.instructions:
        pixels = i.height * i.width
        values += i.count * pixels * -(-i.channels // BLOCK) * BLOCK
        if i.kind == Kind.CONVOLUTION and pixels > 1:
            source = program.buffers[i.source]
            taps = min(i.kernel_y, source.height) * min(i.kernel_x, source.width)
            products += pixels * i.channels * i.source_channels * taps
    return products / max(values, 1)


def _lane_candidate(
    energy: Callable[..., Tensor], module: nn.Module | None, x: Tensor, conditions: Conditions = ()
) -> Candidate | UnsupportedError:
    try:
        with exporting():
            return Candidate(LaneExecutor.of(energy, module, x[:1].detach(), [each[:1] for each in conditions]))
    except LaneError as error:
        return UnsupportedError(LANES, str(error))
    except Exception as error:
        return CompilerFaultError(LANES, error)


def _refusal(key: ProgramKey) -> str:
    """Why fused programs don't take samples of this kind, or don't run on the backend asked for; "" if they do."""
    if key.dtype is not torch.float32 or key.compute_dtype not in (torch.float32, torch.bfloat16):
        return f"fused kernels take float32 samples in float32 or bfloat16, not {key.dtype} in {key.compute_dtype}"
    if not key.sample.numel():
        return "samples hold no numbers"
    return refusal_of_programs(key.device)


def _lanes_take(key: ProgramKey) -> bool:
    """Whether lane programs are for samples of this kind: float32 on the CPU, with the compiled operators.

    They compute in float32 also where bfloat16 is allowed. Matrix units for bfloat16 are faster than that.
    """
    if key.device.type != "cpu" or key.dtype is not torch.float32 or not key.sample.numel():
        return False
    if not runs_compiled("run_lanes"):
        return False
    return key.compute_dtype is torch.float32 or (key.compute_dtype is torch.bfloat16 and not has_matrix_units())
