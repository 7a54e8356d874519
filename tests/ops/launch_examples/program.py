"""Launches of the Triton kernels of fused programs, and what their machine code must show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastebm.compiler.lowering.layout import phase
from fastebm.ops.activations import PROGRAM_ACTIVATIONS
from fastebm.ops.instructions import Buffer, Epilogue, EpilogueOp, Header, Instruction, Kind, Layout, PlannedProgram
from fastebm.ops.triton.program import _STORED, Facts, calls_in_order, instruction_kernel

from . import LaunchExample


def _integers(values: Sequence[Any]) -> tuple[Any, ...]:
    def kind(value: Any) -> Any:
        return _integers(value) if isinstance(value, tuple) else "i32:16" if value % 16 == 0 else "i32"

    return tuple(map(kind, values))


def _example(
    name: str, instruction: Instruction, size: int, operations: Sequence[Epilogue], *others: Instruction, **shown: Any
) -> LaunchExample:
    """A kernel as its launcher compiles it, for numbers of `size` bytes. `others` are further phases.

    Buffer 0 is the source. Buffers 1 to 3 are of the result's shape, 4 of half of it. Constant 1 is a weight, 2 a bias,
    and those from 3 on are the weights of the others.
    """
    i = instruction
    lanes = {2: 32, 4: 16}[size]

    def buffer(channels: int, height: int, width: int) -> Buffer:
        pixel = 4 if channels <= 4 else -(-channels // lanes) * lanes
        row = width * pixel if pixel > 4 else (width + 8) * pixel
        return Buffer(channels, height, width, size, 64, 0, 0, pixel, row, height * row)

    tall, wide = i.height * i.stride_y * i.step_y, i.width * i.stride_x * i.step_x
    target = buffer(i.channels, i.height * i.step_y, i.width * i.step_x)
    half = buffer(i.channels, max(1, target.height // 2), max(1, target.width // 2))
    source = buffer(i.source_channels, max(1, tall // i.kernel_y), max(1, wide // i.kernel_x))
    if i.kind == Kind.CONVOLUTION:
        source = buffer(i.source_channels, tall, wide)
    header = Header(Layout.PLAIN, 0, size, 64, 0, 1)
    phases = tuple(replace(each, count=len(operations)) for each in (i, *others))
    code = PlannedProgram(header, (source, target, target, target, half), phases, tuple(operations), ())
    weight, *weights = (
        (_STORED[size], (each.kernel_y * each.kernel_x, each.source_channels, each.channels)) for each in phases
    )
    bias = (torch.float32, (1, 1, -(-i.channels // lanes) * lanes))
    facts = Facts((i.channels, target.height, target.width), ((torch.float32, (8,)), weight, bias, *weights))
    (call,) = calls_in_order(code, facts)
    stored = {2: "*bf16", 4: "*fp32"}[size]
    signature = {
        "source": stored if i.source >= 0 else "*fp32",
        "numbers": "*fp32",
        "fill": "i32",
        "operands": tuple(stored if kind == "buffers" else "*fp32" for kind, _ in call.operands),
        "rows": _integers(call.rows),
        "images": _integers(call.images),
        "at": _integers(call.at),
        "batch": "i32",
        "grid": _integers(call.grid),
        "source_strides": _integers(call.source_strides),
    }
    stages = call.num_stages
    # Blocks of 2048 numbers change their layout between reading and writing through shared memory.
    shown = {"shared": True, "most_shared": 98304 if stages else 16384, **shown}
    options: dict[str, Any] = {"SHAPE": call.shape, "OVERLAPS": False}
    signature["weights"] = (stored if i.kind == Kind.CONVOLUTION else "*fp32",) * len(call.weights)
    if i.kind == Kind.CONVOLUTION:
        shown["matrix"] = {2: "bf16", 4: "tf32"}[size]
    activations = (EpilogueOp.ACTIVATE, EpilogueOp.ACTIVATE_KEEPING, EpilogueOp.SLOPE)
    shown["approximate"] = size == 2 and any(operation.op in activations for operation in operations)
    return LaunchExample(
        f"program {name}", instruction_kernel, signature, options, call.num_warps, num_stages=stages, **shown
    )


def _convolution(inner: int, out: int, size: int, kernel: int = 3, **fields: int) -> Instruction:
    """A convolution to a map of size x size pixels."""
    pad = (kernel - 1) // 2
    window = {"kernel_y": kernel, "kernel_x": kernel, "pad_y": pad, "pad_x": pad}
    given = {**window, "height": size, "width": size, "constant": 1, **fields}
    return Instruction(Kind.CONVOLUTION, 0, source_channels=inner, channels=out, **given)


def _phases(inner: int, out: int, size: int, kernel: int) -> list[Instruction]:
    """The derivative of a convolution with stride 2 and padding 1, from a map of size x size pixels."""
    found = []
    for start_y, start_x in itertools.product((0, 1), (0, 1)):
        (_, taps_y, pad_y, _), (_, taps_x, pad_x, _) = (phase(n, kernel, 2, 1, 2 * size) for n in (start_y, start_x))
        window = {"kernel_y": taps_y, "kernel_x": taps_x, "pad_y": pad_y, "pad_x": pad_x}
        grid = {"start_y": start_y, "start_x": start_x, "step_y": 2, "step_x": 2}
        found.append(_convolution(inner, out, size, **window, **grid, constant=2 + len(found) if found else 1))
    return found


def launch_examples() -> list[LaunchExample]:
    """Convolutions as CF-EBM's gradient has them at 32x32 and 8x8, their epilogues, and all other kinds."""
    silu, gelu, elu, softplus = (PROGRAM_ACTIVATIONS.index(name) for name in ("silu", "gelu", "elu", "softplus"))
    bias, store = Epilogue(EpilogueOp.ADD_CONSTANT, number=2), Epilogue(EpilogueOp.STORE, 1)
    keeping = [bias, Epilogue(EpilogueOp.ACTIVATE_KEEPING, 2, activation=silu), store]
    sloped = [Epilogue(EpilogueOp.MULTIPLY, 2), Epilogue(EpilogueOp.ADD, 4, factor_y=2, factor_x=2, number=3), store]
    again = [
        Epilogue(EpilogueOp.SLOPE, 2, activation=gelu),
        Epilogue(EpilogueOp.SCALE, number=1),
        Epilogue(EpilogueOp.ADD, 3),
        store,
    ]
    names = ("mish", "hardswish", "hardsigmoid", "abs", "sqrt", "rsqrt", "reciprocal", "hardtanh")
    others = [
        Epilogue(EpilogueOp.ACTIVATE_KEEPING, 2, number=1, activation=PROGRAM_ACTIVATIONS.index(name)) for name in names
    ]
    others += [Epilogue(EpilogueOp.SLOPE, 3, activation=PROGRAM_ACTIVATIONS.index("mish")), store]
    strided = {"stride_y": 2, "stride_x": 2}
    few = {"source_channels": 10, "channels": 10, "height": 8, "width": 8}
    found = [
        _example("load", Instruction(Kind.LOAD, source_channels=3, channels=4, height=32, width=32), 2, [store]),
        _example("gather", Instruction(Kind.GATHER, 0, **few, kernel_y=2, kernel_x=2, constant=1), 2, [bias, store]),
        _example("pool", Instruction(Kind.POOL, 0, **few, kernel_y=8, kernel_x=8), 2, [store]),
        _example("softmax", Instruction(Kind.SOFTMAX, 0, **few), 2, [store]),
        _example("first maximum", Instruction(Kind.FIRST_MAXIMUM, 0, **few, kernel_y=2, kernel_x=2), 2, [store]),
        _example("activations of small nets", Instruction(Kind.GATHER, 0, **few), 4, others),
        _example(
            "log_sum_exp",
            Instruction(Kind.LOG_SUM_EXP, 0, source_channels=10),
            4,
            [Epilogue(EpilogueOp.STORE_ENERGIES)],
        ),
    ]
    for size, name in ((2, "bf16"), (4, "fp32")):
        found += [
            _example(f"3x3 {name}", _convolution(128, 128, 32), size, keeping),
            _example(f"3x3 of 8x8 {name}", _convolution(256, 256, 8), size, again),
            _example(f"4x4 stride 2 {name}", _convolution(128, 128, 16, 4, **strided), size, keeping),
            *(
                _example(f"phases of {kernel}x{kernel} {name}", phases[0], size, sloped, *phases[1:])
                for kernel, phases in ((kernel, _phases(128, 128, 16, kernel)) for kernel in (3, 4))
            ),
            _example(f"few channels {name}", _convolution(4, 128, 32), size, keeping),
            _example(f"to the gradient {name}", _convolution(128, 3, 32), size, [Epilogue(EpilogueOp.STORE_GRADIENT)]),
            _example(
                f"elu, softplus {name}",
                _convolution(64, 64, 32),
                size,
                [
                    bias,
                    Epilogue(EpilogueOp.ACTIVATE, number=2, activation=elu),
                    Epilogue(EpilogueOp.ACTIVATE_KEEPING, 2, number=5, activation=softplus),
                    store,
                ],
            ),
            _example(f"linear {name}", _convolution(256, 1, 1, 1), size, [bias, Epilogue(EpilogueOp.STORE_ENERGIES)]),
        ]
    return found
