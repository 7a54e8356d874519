"""Launches of the Triton kernels of chains in one launch, and what their machine code must show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton

from fastebm.ops.activations import PROGRAM_ACTIVATIONS
from fastebm.ops.instructions import Buffer, Epilogue, EpilogueOp, Header, Instruction, Kind, Layout, PlannedProgram
from fastebm.ops.triton.chain import POSITIONS, STAGES, Parts, chain_kernel, part_of
from fastebm.ops.triton.philox import WARPS
from fastebm.ops.triton.program import Facts, call_of

from . import LaunchExample, typed


def _code(
    images: Sequence[tuple[int, int]], instructions: Sequence[tuple[Instruction, Sequence[Epilogue]]]
) -> PlannedProgram:
    """A program in bfloat16 with buffers of (channels, size)."""
    buffers = []
    for channels, size in images:
        pixel = 4 if channels <= 4 else -(-channels // 32) * 32
        row = size * pixel if pixel > 4 else (size + 8) * pixel
        buffers.append(Buffer(channels, size, size, 2, 64, 0, 0, pixel, row, size * row))
    rows: list[Instruction] = []
    epilogues: list[Epilogue] = []
    for instruction, steps in instructions:
        rows.append(replace(instruction, first=len(epilogues), count=len(steps)))
        epilogues += steps
    return PlannedProgram(Header(Layout.PLAIN, 0, 2, 64, 0, 1), tuple(buffers), tuple(rows), tuple(epilogues), ())


def _convolution(source: int, inner: int, out: int, size: int, kernel: int, pad: int, constant: int) -> Instruction:
    window = {"kernel_y": kernel, "kernel_x": kernel, "pad_y": pad, "pad_x": pad, "constant": constant}
    return Instruction(Kind.CONVOLUTION, source, source_channels=inner, channels=out, height=size, width=size, **window)


def _stage(size: int) -> PlannedProgram:
    """CF-EBM's first stage, its energy and its gradient: 128 channels at size x size. Constants are in `_constants`."""
    bias, silu = Epilogue(EpilogueOp.ADD_CONSTANT, number=7), PROGRAM_ACTIVATIONS.index("silu")
    image = {"height": size, "width": size}

    def keeping(kept: int) -> Epilogue:
        return Epilogue(EpilogueOp.ACTIVATE_KEEPING, kept, activation=silu)

    instructions = [
        (Instruction(Kind.LOAD, source_channels=3, channels=4, constant=1, **image), [Epilogue(EpilogueOp.STORE, 0)]),
        (_convolution(0, 4, 128, size, 3, 1, 1), [bias, keeping(2), Epilogue(EpilogueOp.STORE, 1)]),
        (_convolution(1, 128, 128, 1, size, 0, 2), [bias, keeping(4), Epilogue(EpilogueOp.STORE, 3)]),
        (_convolution(3, 128, 1, 1, 1, 0, 3), [bias, Epilogue(EpilogueOp.STORE_ENERGIES)]),
        (Instruction(Kind.LOAD), [Epilogue(EpilogueOp.STORE, 5)]),
        (_convolution(5, 1, 128, 1, 1, 0, 4), [Epilogue(EpilogueOp.MULTIPLY, 4), Epilogue(EpilogueOp.STORE, 6)]),
        (
            _convolution(6, 128, 128, size, size, size - 1, 5),
            [Epilogue(EpilogueOp.MULTIPLY, 2), Epilogue(EpilogueOp.STORE, 7)],
        ),
        (_convolution(7, 128, 3, size, 3, 1, 6), [Epilogue(EpilogueOp.STORE_GRADIENT)]),
    ]
    images = [(4, size), (128, size), (128, size), (128, 1), (128, 1), (1, 1), (128, 1), (128, size)]
    return _code(images, instructions)


def _constants(size: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    taps = ((9, 4, 128), (size * size, 128, 128), (1, 128, 1), (1, 1, 128), (size * size, 128, 128), (9, 128, 3))
    weights = [(torch.bfloat16, shape) for shape in taps]
    return [(torch.float32, (8,)), *weights, (torch.float32, (1, 1, 128))]


def _others(size: int) -> PlannedProgram:
    """The kinds of instructions that are not in `_stage`."""
    square = {"source_channels": 33, "channels": 33, "height": size, "width": size}
    half = {"source_channels": 33, "channels": 33, "height": size // 2, "width": size // 2}
    window = {"kernel_y": 2, "kernel_x": 2, "stride_y": 2, "stride_x": 2}
    image = {"height": size, "width": size}
    instructions = [
        (Instruction(Kind.LOAD, source_channels=33, channels=33, **image), [Epilogue(EpilogueOp.STORE, 0)]),
        (Instruction(Kind.SOFTMAX, 0, **square), [Epilogue(EpilogueOp.STORE, 1)]),
        (Instruction(Kind.LOG_SUM_EXP, 0, source_channels=33, **image), [Epilogue(EpilogueOp.STORE, 2)]),
        (Instruction(Kind.POOL, 1, **half, **window), [Epilogue(EpilogueOp.STORE, 3)]),
        (
            Instruction(Kind.GATHER, 3, **square, kernel_y=2, kernel_x=2),
            [Epilogue(EpilogueOp.ADD, 2, broadcast=1), Epilogue(EpilogueOp.STORE_GRADIENT)],
        ),
        (
            Instruction(Kind.POOL, 2, source_channels=1, kernel_y=size, kernel_x=size),
            [Epilogue(EpilogueOp.STORE_ENERGIES)],
        ),
    ]
    return _code([(33, size), (33, size), (1, size), (33, size // 2)], instructions)


def _example(
    name: str, code: PlannedProgram, size: int, constants: Sequence[tuple[torch.dtype, tuple[int, ...]]]
) -> LaunchExample:
    channels = code.instructions[0].source_channels
    facts = Facts((channels, size, size), tuple(constants))
    images = POSITIONS // (size * size)
    parts = tuple(part_of(call, images) for call in (call_of(code, facts, i) for i in code.instructions))
    stored = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    types = {
        **typed("*fp32", "energies x gradient schedule"),
        **typed("*i64", "key chain_ids"),
        **typed("i32", "num_steps batch elements schedule_rows weight_rows"),
        **typed("fp32", "clamp_min clamp_max"),
        "buffers": tuple(stored[torch.bfloat16] for _ in code.buffers),
        "constants": tuple(stored[dtype] for dtype, _ in constants),
    }
    options = {"PROGRAM": Parts(parts), "WHOLE": True, "PER_CHAIN": False, "LISTED": False, "NUM_CHAINS": images}
    options["QUADS"] = triton.next_power_of_2(channels * size * size // 4)
    matrix = "bf16" if any(i.kind == Kind.CONVOLUTION for i in code.instructions) else None
    shows: dict[str, Any] = {"shared": True, "most_shared": 73728, "most_spilled": 16, "approximate": True}
    shows["matrix"] = matrix
    return LaunchExample(f"run_chain {name}", chain_kernel, types, options, WARPS, num_stages=STAGES, **shows)


def launch_examples() -> list[LaunchExample]:
    """CF-EBM's first stage at 4x4 and 8x8, and the other kinds of instructions."""
    numbers = [(torch.float32, (8,))]
    return [
        _example("4x4", _stage(4), 4, _constants(4)),
        _example("8x8", _stage(8), 8, _constants(8)),
        _example("other kinds", _others(4), 4, numbers),
    ]
