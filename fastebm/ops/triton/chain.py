"""Triton: many Langevin updates of small images in one launch.

Each block of threads runs a few images from the first update to the last. Images are independent, so no block waits for
another: it runs the instructions of the fused program on its own images, with a barrier between them, then the update,
and begins again. Buffers are those of `run_program`, in global memory. No other block touches those of these images, so
they stay in the caches. They are not in shared memory, because in Triton none outlives a product.

The kernel is compiled for one program, whose instructions follow one another in it. It calls the device functions of
`run_program` and `langevin_step` with the same blocks and order of summation, so the results have the same bits.
Compiled for GPUs by the tests, not yet run on one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chain import run_chain_unfused
from ..instructions import Buffer, Kind, PlannedProgram
from ..langevin import check_index
from ..options import StepOptions
from ..program_check import LINE
from .langevin import update_rows
from .philox import WARPS, check_readable_address, quads_of
from .program import (
    Call,
    Facts,
    Shape,
    call_of,
    calls_of,
    check_program,
    computed,
    facts_of,
    place_in_buffers,
    place_of_block,
    taps_of,
    view_of,
)
from .program_epilogue import done

# The most instructions of one kernel, and positions of an image. Larger programs need more than one block of threads.
INSTRUCTIONS = 24
POSITIONS = 64
STAGES = 3
_LOAD, _CONVOLUTION = tl.constexpr(int(Kind.LOAD)), tl.constexpr(int(Kind.CONVOLUTION))


class Place(NamedTuple):
    """Where an operation of an epilogue reads or writes: `where` is one of PLACES."""

    where: int
    number: int
    row: int
    image: int
    at: int


PLACES = ("buffers", "constants", "gradient", "energies")


class Part(NamedTuple):
    """One instruction, all of which the compiler knows but the addresses of buffers and constants."""

    shape: Shape
    source: int
    source_channel: int
    constant: int
    grid: tuple[int, ...]
    source_strides: tuple[int, ...]
    places: tuple[Place, ...]
    blocks: int


class Parts(NamedTuple):
    """All instructions of a program."""

    parts: tuple[Part, ...]


@triton.jit
def place_of(
    buffers: tl.tuple,
    constants: tl.tuple,
    gradient: tl.tensor,
    energies: tl.tensor,
    PART: tl.constexpr,
    NUMBER: tl.constexpr,
) -> tl.tensor:
    """What operation NUMBER points to."""
    PLACE: tl.constexpr = PART.places[NUMBER]
    if PLACE.where == 0:
        return buffers[PLACE.number]
    elif PLACE.where == 1:
        return constants[PLACE.number]
    elif PLACE.where == 2:
        return gradient
    else:
        return energies


@triton.jit(noinline=True)
def run_block(
    block: tl.tensor,
    state: tl.tensor,
    energies: tl.tensor,
    gradient: tl.tensor,
    buffers: tl.tuple,
    constants: tl.tuple,
    first: tl.tensor,
    count: tl.tensor,
    PART: tl.constexpr,
) -> None:
    """One block of positions and channels of an instruction, of the images [first, first + count).

    A function that is called: inlined, what the compiler hoists out of all instructions at once fills every register.
    """
    SHAPE: tl.constexpr = PART.shape
    SOURCE_STRIDES: tl.constexpr = PART.source_strides
    HEIGHT: tl.constexpr = PART.grid[0]
    WIDTH: tl.constexpr = PART.grid[1]
    START_Y: tl.constexpr = PART.grid[2]
    START_X: tl.constexpr = PART.grid[3]
    STEP_Y: tl.constexpr = PART.grid[4]
    STEP_X: tl.constexpr = PART.grid[5]
    grid = (count, HEIGHT, WIDTH)
    image, y, x, columns, inside = place_of_block(block, grid, SHAPE)
    place = (image + first, y, x, columns, inside)
    source, weight = state, state
    if SHAPE.kind != _LOAD:
        source = buffers[PART.source] + PART.source_channel
    if SHAPE.kind == _CONVOLUTION:
        weight = constants[PART.constant]
    taps = taps_of(0, SHAPE)
    v = computed(source, weight, constants[0], PART.constant, taps, place, grid, SOURCE_STRIDES, SHAPE)
    place = place_in_buffers(place, (START_Y, START_X), (STEP_Y, STEP_X), SHAPE)
    for i in tl.static_range(len(SHAPE.steps)):
        operand = place_of(buffers, constants, gradient, energies, PART, i)
        v = done(
            *(v, place, constants[0], operand, PART.places[i].row, PART.places[i].image, PART.places[i].at),
            *(SHAPE, i),
        )


@triton.jit
def run_part(
    state: tl.tensor,
    energies: tl.tensor,
    gradient: tl.tensor,
    buffers: tl.tuple,
    constants: tl.tuple,
    first: tl.tensor,
    count: tl.tensor,
    PROGRAM: tl.constexpr,
    NUMBER: tl.constexpr,
) -> None:
    """All blocks of one instruction."""
    PART: tl.constexpr = PROGRAM.parts[NUMBER]
    for block in range(PART.blocks):
        run_block(block, state, energies, gradient, buffers, constants, first, count, PART)


@triton.jit(
    do_not_specialize=["num_steps", "batch", "elements", "schedule_rows", "weight_rows"],
    do_not_specialize_on_alignment=["schedule", "key", "chain_ids", "data_term_weight"],
)
def chain_kernel(
    energies: tl.tensor,
    x: tl.tensor,
    gradient: tl.tensor,
    buffers: tl.tuple,
    constants: tl.tuple,
    schedule: tl.tensor,
    key: tl.tensor,
    chain_ids: tl.tensor,
    mask: tl.tensor,
    known: tl.tensor,
    data_target: tl.tensor,
    lower_bounds: tl.tensor,
    upper_bounds: tl.tensor,
    data_term_weight: tl.tensor,
    num_steps: tl.tensor,
    batch: tl.tensor,
    elements: tl.tensor,
    schedule_rows: tl.tensor,
    weight_rows: tl.tensor,
    clamp_min: tl.tensor,
    clamp_max: tl.tensor,
    grad_clip: tl.tensor,
    PROGRAM: tl.constexpr,
    WHOLE: tl.constexpr,
    PER_CHAIN: tl.constexpr,
    LISTED: tl.constexpr,
    QUADS: tl.constexpr,
    NUM_CHAINS: tl.constexpr,
) -> None:
    """`num_steps` updates of NUM_CHAINS images."""
    first = tl.program_id(0) * NUM_CHAINS
    count = tl.minimum(batch - first, NUM_CHAINS)
    lane = tl.arange(0, QUADS * NUM_CHAINS)
    slot, quad = (first + lane // QUADS).to(tl.int64), (lane % QUADS).to(tl.int64)
    inside = (slot < batch) & (quad < quads_of(elements))
    seed, start, index = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    done_steps = tl.full((), 0, tl.int64)
    while done_steps < num_steps:
        for i in tl.static_range(len(PROGRAM.parts)):
            run_part(x, energies + done_steps * batch, gradient, buffers, constants, first, count, PROGRAM, i)
            tl.debug_barrier()  # what one thread wrote, others read
        address = (seed, start + done_steps, index + done_steps, chain_ids)
        update_rows(
            *(
                (x, x, gradient, mask, known, data_target, lower_bounds, upper_bounds),
                (None, None, None, None, None, None, None, None),
                address,
                schedule,
            ),
            *(data_term_weight, None, (batch, elements, elements, schedule_rows, weight_rows)),
            *((clamp_min, clamp_max, grad_clip), (slot, quad, inside), False, PER_CHAIN, LISTED, WHOLE, False),
        )
        tl.debug_barrier()
        done_steps += 1


# Launcher -----------------------------------------------------------------------------------------------------------


class ChainProgram(NamedTuple):
    """A program as the kernel is compiled for it: its parts, and the images of a block of threads."""

    program: PlannedProgram
    parts: tuple[Part, ...]
    images: int


def run_chain(
    energies: Tensor,
    x: Tensor,
    gradient: Tensor,
    code: Tensor,
    constants: Sequence[Tensor],
    workspace: Tensor,
    *options: Any,
) -> None:
    """Kernel `run_chain` of fastebm.ops.schemas; update by update where a block of threads can't do it alone."""
    step = StepOptions(*options)
    key, schedule, chain_ids, weight = step.key, step.schedule, step.chain_ids, step.data_term_weight
    num_steps, batch = energies.shape
    content = code.numpy().tobytes()
    chain = chain_program(content, facts_of(x, constants))
    if not check_program(content, x, constants, workspace):
        energies.zero_()
        gradient.zero_()
    if not chain.parts or step.grad_norm_clip is not None or step.data_term_hinge > 0:
        run_chain_unfused(energies, x, gradient, code, constants, workspace, *options)
        return
    if not key.is_cuda:
        check_index(key)
        for row in (key, key + torch.tensor([0, max(num_steps - 1, 0), 0], device="cpu")):
            check_readable_address(row, chain_ids, batch)
    elements = x.numel() // batch
    buffers = buffers_apart(chain.program, workspace)
    chain_kernel[(triton.cdiv(batch, chain.images),)](
        *(energies, x, gradient, buffers, tuple(constants), schedule, key, chain_ids),
        *(
            step.mask,
            step.known,
            step.data_target,
            step.lower_bounds,
            step.upper_bounds,
            weight,
            num_steps,
            batch,
            elements,
        ),
        *(schedule.shape[0], 0 if weight is None else weight.shape[0]),
        *(step.clamp_min, step.clamp_max, step.grad_clip),
        PROGRAM=Parts(chain.parts),
        WHOLE=elements % 4 == 0,
        PER_CHAIN=schedule.dim() == 3,
        LISTED=chain_ids.shape[0] > 1,
        QUADS=triton.next_power_of_2(-(-elements // 4)),
        NUM_CHAINS=chain.images,
        num_warps=WARPS,
        num_stages=STAGES,
        enable_fp_fusion=False,
    )
    key[1:].add_(num_steps)


def buffers_apart(program: PlannedProgram, workspace: Tensor) -> tuple[Tensor, ...]:
    """The buffers, none of which shares memory with another as they may in the plan of a program.

    There a buffer takes the place of one that nobody reads any more. Blocks of threads don't wait for each other, so
    the images of another block may still need it.
    """
    *starts, end = itertools.accumulate((-(-_bytes(b) // LINE) * LINE for b in program.buffers), initial=0)
    memory = workspace if end <= len(workspace) else workspace.new_empty(end)
    moved = (replace(buffer, offset=start) for buffer, start in zip(program.buffers, starts, strict=True))
    return tuple(view_of(memory, buffer) for buffer in moved)


def _bytes(buffer: Buffer) -> int:
    return buffer.images * buffer.image_stride * buffer.bytes


@functools.lru_cache(maxsize=64)
def chain_program(code: bytes, facts: Facts) -> ChainProgram:
    """The parts of a program; none where it is too large for one block of threads."""
    program, _ = calls_of(code, facts)
    calls = [call_of(program, facts, i) for i in program.instructions]  # phases save launches, of which there is one
    plane = max((i.height * i.width for i in program.instructions), default=1)
    if len(calls) > INSTRUCTIONS or plane > POSITIONS:
        return ChainProgram(program, (), 1)
    images = POSITIONS // triton.next_power_of_2(plane)
    return ChainProgram(program, tuple(part_of(call, images) for call in calls), images)


def part_of(call: Call, images: int) -> Part:
    """One instruction, for so many images, as a part of the chain's kernel."""
    operands = zip(call.operands, call.rows, call.images, call.at, strict=True)
    (height,), (width,), (start_y,), (start_x,) = call.grid[:4]
    return Part(
        shape=call.shape,
        source=call.source[0],
        source_channel=call.source[1],
        constant=call.weights[0] if call.shape.kind == Kind.CONVOLUTION else call.fill,
        grid=(height, width, start_y, start_x, *call.grid[4:]),
        source_strides=call.source_strides,
        places=tuple(
            Place(PLACES.index(where), number, row, image, at) for (where, number), row, image, at in operands
        ),
        blocks=call.programs(images),
    )
