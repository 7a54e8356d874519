"""Workspaces as fused programs leave them, with numbers that tests choose, for the gradients of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastebm.ops.instructions import (
    Buffer,
    Epilogue,
    EpilogueOp,
    Header,
    Instruction,
    Kind,
    Layout,
    PlannedProgram,
    Segment,
    encode,
)
from fastebm.ops.weight_gradients import buffer_image

STORED = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
LANES = {2: 32, 4: 16, 8: 1}


@dataclass(frozen=True)
class Lying:
    """How the buffers of a workspace lie.

    Attributes:
        bytes: of a number.
        chunk, workers: images of a slot, and slots.
        layout: of the program's weights; PLAIN for Triton.
        margin: pixels of nobody's numbers on both sides of a row.
        dense: whether pixels of at most four channels have four numbers.
        beside: whether images lie pixel by pixel beside each other, as for matrix tiles.
    """

    bytes: int
    chunk: int
    workers: int = 1
    layout: Layout = Layout.PANELS
    margin: int = 0
    dense: bool = False
    beside: bool = False

    def placed(self, shape: tuple[int, int, int], offset: int) -> Buffer:
        channels, height, width = shape
        lanes = LANES[self.bytes]
        pixel = 4 if self.dense and channels <= 4 else -(-channels // lanes) * lanes
        row = (2 * self.margin + width) * pixel
        if self.beside and self.chunk > 1:
            strides = (self.chunk * pixel, self.chunk * row, pixel)
        else:
            strides = (pixel, row, height * row + 64 // self.bytes)
        return Buffer(channels, height, width, self.bytes, self.chunk, self.margin, offset, *strides)


def program_of(shapes: Sequence[tuple[int, int, int]], lying: Lying) -> PlannedProgram:
    """A program that writes ones to buffers (channels, height, width) and keeps them all."""
    buffers: list[Buffer] = []
    instructions, epilogues = [], []
    offset = 0
    for number, (channels, height, width) in enumerate(shapes):
        buffer = lying.placed((channels, height, width), offset)
        whole = buffer.height * buffer.row_stride if lying.beside else buffer.images * buffer.image_stride
        whole = max(whole, buffer.images * buffer.image_stride) if not lying.beside else whole
        offset += -(-whole * lying.bytes // 64) * 64
        buffers.append(buffer)
        size = {"channels": channels, "height": height, "width": width}
        instructions.append(Instruction(Kind.LOAD, first=number, count=1, **size))
        epilogues.append(Epilogue(EpilogueOp.STORE, number))
    panel = 16 if lying.layout == Layout.PANELS else 0
    slot = -(-offset // 4096) * 4096
    header = Header(lying.layout, panel, lying.bytes, lying.chunk, slot, lying.workers)
    segments = (Segment(0, len(instructions), lying.chunk),)
    return PlannedProgram(header, tuple(buffers), tuple(instructions), tuple(epilogues), segments)


def workspace_of(program: PlannedProgram, images: Sequence[Tensor], device: str = "cpu") -> Tensor:
    """The bytes in which every buffer holds its images (n, channels, height, width), and all else is NaN."""
    header = program.header
    size = header.slot * header.workers
    workspace = torch.full((size // header.bytes,), math.nan, dtype=STORED[header.bytes]).view(torch.uint8)
    for number, values in enumerate(images):
        for n, image in enumerate(values):
            buffer_image(program, workspace, number, n).copy_(image.permute(1, 2, 0))
    return workspace.to(device)


def split_into_calls(
    program: PlannedProgram, images: Sequence[Tensor], lengths: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """(code, workspace) of calls that take so many images each, one after the other."""
    calls, at = [], 0
    for length in lengths:
        part = [values[at : at + length] for values in images]
        calls.append((encode(program), workspace_of(program, part)))
        at += length
    return calls


def rounded(values: Tensor, size: int) -> Tensor:
    """The values as buffers of `size` bytes hold them, in float64."""
    return values.to(STORED[size]).double()


def without(program: PlannedProgram, number: int) -> PlannedProgram:
    """The program that does not write one of its buffers."""
    kept = tuple(i for i in program.instructions if i.first != number)
    return replace(program, instructions=kept, segments=(Segment(0, len(kept), program.header.chunk),))
