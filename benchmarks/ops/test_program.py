"""`run_program` with one convolution against PyTorch's, bfloat16 in channels-last, with what CF-EBM has at each size.

Ours reads samples in float32, as a chain gives them, and does bias and activation in the same pass; the peer does the
convolution, its bias and the activation, on images that lie ready in bfloat16.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.workloads import Workload, images
from fastebm.compiler.cost_model import Cost
from fastebm.evaluation.speed import Candidate, Plan, Row, compare
from fastebm.ops import CompiledProgram
from fastebm.ops.activations import PROGRAM_ACTIVATIONS
from fastebm.ops.instructions import Buffer, Epilogue, EpilogueOp, Instruction, Kind
from fastebm.ops.program import Constant, LoweredProgram

# Case: kernel, stride. Shapes are (channels, size, size), to as many channels.
CASES = {"3x3": (3, 1), "4x4 stride 2": (4, 2)}
SHAPES = ((128, 8, 8), (128, 16, 16), (64, 32, 32))


def workloads(device: str, full: bool) -> list[Workload]:
    batches = (1, 16, 64, 256) if full else (64,)
    return [
        Workload("program", case, shape, batch, "bfloat16") for case in CASES for shape in SHAPES for batch in batches
    ]


def weights(work: Workload) -> tuple[Tensor, Tensor]:
    (kernel, _), channels = CASES[work.case], work.shape[0]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, kernel, kernel, generator=generator) / (kernel * math.sqrt(channels))
    return weight.to(work.device), torch.randn(channels, generator=generator).to(work.device)


def program(work: Workload) -> CompiledProgram:
    """Samples to a buffer, and the convolution of them, with bias and SiLU, to another."""
    kernel, stride = CASES[work.case]
    channels, height, width = work.shape
    target = Buffer(channels, height // stride, width // stride, work.precision.itemsize)
    load = Instruction(Kind.LOAD, source_channels=channels, channels=channels, height=height, width=width, count=1)
    convolution = Instruction(
        Kind.CONVOLUTION,
        source=0,
        source_channels=channels,
        channels=channels,
        height=target.height,
        width=target.width,
        kernel_y=kernel,
        kernel_x=kernel,
        stride_y=stride,
        stride_x=stride,
        pad_y=1,
        pad_x=1,
        constant=1,
        first=1,
        count=3,
    )
    num_steps = (
        Epilogue(EpilogueOp.STORE, 0),
        Epilogue(EpilogueOp.ADD_CONSTANT, number=2),
        Epilogue(EpilogueOp.ACTIVATE, activation=PROGRAM_ACTIVATIONS.index("silu")),
        Epilogue(EpilogueOp.STORE, 1),
    )
    buffers = (Buffer(channels, height, width, target.bytes), target)
    constants = (Constant("convolution"), Constant("image"))
    fused = CompiledProgram(
        LoweredProgram(work.shape, target.bytes, buffers, (load, convolution), num_steps, constants),
        torch.device(work.device),
    )
    weight, bias = weights(work)
    fused.refresh([], [weight, bias[:, None, None]])
    return fused


def test_program(measure, work):
    if measure.base is not None:
        pytest.skip("programs are no part of the public face, which is what another revision is measured by")
    kernel, stride = CASES[work.case]
    x, fused = images(work), program(work)
    ready = x.to(work.precision, memory_format=torch.channels_last)
    weight, bias = (t.to(work.precision) for t in weights(work))
    weight = weight.contiguous(memory_format=torch.channels_last)

    def eager() -> Tensor:
        return F.silu(F.conv2d(ready, weight, bias, stride, 1))

    flops = 2 * math.prod(work.shape) * work.shape[0] * kernel**2 // stride**2
    moved = math.prod(work.shape) * work.precision.itemsize

    def compared(work: Workload, plan: Plan) -> list[Row]:
        baselines = {"eager": [lambda: Candidate("", eager)]}
        with torch.no_grad():
            return compare(
                plan,
                Candidate("", lambda: fused(x)),
                baselines,
                unit="call",
                cost=lambda: Cost(flops, moved + moved // stride**2),
            )

    measure(work, compared)
