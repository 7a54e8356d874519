"""Each instruction of CF-EBM's program: its time, as part of the whole, beside cuDNN's for a convolution of its shape.

An instruction reads what earlier ones wrote, so it is timed as the difference between the program up to it and the one
up to the instruction before. Both are replays of graphs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import fastebm
from benchmarks.gpu.step import DEVICE, REHEARSAL, Rows, graphed, times, uniform
from benchmarks.harness import nets
from fastebm.ops.instructions import Instruction, Kind, PlannedProgram, decode, encode

SIZE, BATCH = (8, 2) if REHEARSAL else (32, 64)


def run(rows: Rows) -> None:
    gradient = fastebm.energy_gradient(
        nets.build("CF-EBM", (3, SIZE, SIZE), DEVICE), dtype=torch.bfloat16, engine="fused"
    )
    x = uniform(BATCH, 3, SIZE, SIZE, seed=0)
    with gradient.chain(), torch.no_grad():
        gradient(x)
        fused = gradient.compiled_program(x)
        assert isinstance(fused, fastebm.ops.CompiledProgram)
        whole = decode(fused.code(BATCH))
        count = len(whole.instructions)
        cases: dict[str, Any] = {}
        for number in range(1, count + 1):
            code = encode(first(whole, number))
            if not REHEARSAL:
                code = code.to(fused.code(BATCH).device)
            cases[str(number)] = graphed(
                lambda code=code: torch.ops.fastebm.run_program(x, code, fused.constants, fused.workspace)
            )
        for number, instruction in enumerate(whole.instructions):
            if instruction.kind == Kind.CONVOLUTION:
                cases[f"cudnn {number}"] = graphed(library(instruction))
        found = times(cases, seconds=12.0)
    before = 0.0
    for number, instruction in enumerate(whole.instructions):
        until, library_seconds = found[str(number + 1)][0], found.get(f"cudnn {number}")
        flops = operations(instruction)
        rows.add(
            instruction=number,
            kind=Kind(instruction.kind).name,
            inputs=instruction.source_channels,
            channels=instruction.channels,
            height=instruction.height,
            width=instruction.width,
            kernel=[instruction.kernel_y, instruction.kernel_x],
            stride=[instruction.stride_y, instruction.stride_x],
            epilogue=instruction.count,
            flops=flops,
            seconds=until - before,
            until=until,
            cudnn_seconds=None if library_seconds is None else library_seconds[0],
        )
        before = until
    total = sum(map(operations, whole.instructions))
    rows.add(case="whole", instructions=count, seconds=before, flops=total, teraflops_a_second=total / before / 1e12)


def first(program: PlannedProgram, count: int) -> PlannedProgram:
    """The first instructions of a program."""
    segments = tuple(
        replace(segment, count=min(segment.count, count - segment.first))
        for segment in program.segments
        if segment.first < count
    )
    return replace(program, instructions=program.instructions[:count], segments=segments)


def operations(i: Instruction) -> int:
    if i.kind != Kind.CONVOLUTION:
        return 0
    return 2 * BATCH * i.channels * i.height * i.width * i.kernel_y * i.kernel_x * i.source_channels


def library(i: Instruction) -> Any:
    """A convolution of the same sizes by PyTorch, on images that lie ready in bfloat16, without what follows it."""
    height = (i.height - 1) * i.stride_y + (i.kernel_y - 1) * i.dilation_y + 1 - 2 * i.pad_y
    width = (i.width - 1) * i.stride_x + (i.kernel_x - 1) * i.dilation_x + 1 - 2 * i.pad_x
    source = torch.randn(BATCH, i.source_channels, max(1, height), max(1, width), device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(i.channels, i.source_channels, i.kernel_y, i.kernel_x, device=DEVICE, dtype=torch.bfloat16)
    source, weight = (t.contiguous(memory_format=torch.channels_last) for t in (source, weight))
    padding, stride, dilation = (i.pad_y, i.pad_x), (i.stride_y, i.stride_x), (i.dilation_y, i.dilation_x)
    return lambda: F.conv2d(source, weight, None, stride, padding, dilation)
