"""A model of one update of Langevin chains of the CF-EBM net on an H200: what each of its launches waits for.

    python -m benchmarks.gpu_model.update                              prints the launches and what they wait for
    python -m benchmarks.gpu_model.update --entry 'as it stood'        adds them to the page

The launches are those that users make, compiled for sm_90 by a driver without a GPU (`tests/gpu/fake_driver.py`).
Blocks, bytes and machine instructions are counted. The time that follows from them is a model, with the constants of
`Device`, and has not been compared with any measurement. It serves to tell which change matters most.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_model.machine_code import MachineCode, read_machine_code
from benchmarks.harness import nets, pages
from fastebm.ops.instructions import EpilogueOp, Instruction, Kind, PlannedProgram
from fastebm.ops.triton import program as triton_program
from fastebm.ops.triton.program import Call, calls_of, facts_of
from tests.gpu.fake_driver import Launch, fake_gpu
from tests.gpu.launches import code_and_workspace, gpu_program, step_options

SHAPE, BATCHES = (3, 32, 32), (64, 256)
TARGETS = {64: 0.15e-3, 256: 0.5e-3}
PRODUCT = 2 * 64 * 64 * 16  # operations of one product of a warpgroup with 64 columns
READS = (EpilogueOp.ADD, EpilogueOp.MULTIPLY, EpilogueOp.SLOPE)
WRITES = (EpilogueOp.STORE, EpilogueOp.ACTIVATE_KEEPING)
IMAGES = (EpilogueOp.ADD_CONSTANT, EpilogueOp.MULTIPLY_CONSTANT)


@dataclass(frozen=True)
class Device:
    """The constants of the model.

    Numbers of publications are quoted as they are remembered: the texts could not be opened where this was written.

    Attributes:
        multiprocessors, clock, registers, shared, l1_and_shared, threads, blocks, launch_shared: NVIDIA's data sheet of
            the H200 and the table of compute capabilities in the CUDA programming guide, with the clock of the H100
            that Chips and Cheese measured. `launch_shared` is what CUDA takes of shared memory in each block.
        flops: of bfloat16 on tensor cores in one cycle of a multiprocessor: 989 TFLOP/s are 132 x 4096 at 1.83 GHz.
        without_warpgroups: the share of it that `mma.sync` reaches on an H100, by Luo et al., arXiv:2501.12084.
        shared_bytes: that a multiprocessor's shared memory reads or writes in a cycle (CUDA programming guide).
        l2, l2_bytes: bytes a second that all multiprocessors read from the L2 cache together, 5.5e12 on an H100 (Chips
            and Cheese, "Nvidia's H100: Funny L2, and Tons of Bandwidth"), and what one reads in a cycle at most.
        l2_size, hbm: of the L2 cache, and bytes a second of the memory, by the data sheet.
        latency: cycles until a read from L2 is there, about 270 on an H100 (Luo et al.).
        launch: seconds from the end of a kernel to the beginning of the next in a replayed graph: 1.3e-6 on an H100
            (Hazy Research, "Look Ma, No Bubbles!").
        cycles_an_instruction: of a warp that has its scheduler for itself. An assumption: four cycles pass until a
            result can be used, and half of the instructions are independent.
    """

    multiprocessors: int = 132
    clock: float = 1.755e9
    registers: int = 65536
    shared: int = 228 * 1024
    l1_and_shared: int = 256 * 1024
    launch_shared: int = 1024
    threads: int = 2048
    blocks: int = 32
    flops: int = 4096
    without_warpgroups: float = 0.62
    shared_bytes: int = 128
    l2: float = 5.5e12
    l2_bytes: int = 64
    l2_size: int = 50 << 20
    hbm: float = 4.8e12
    latency: int = 270
    launch: float = 1.3e-6
    cycles_an_instruction: float = 2.0


H200 = Device()


@dataclass(frozen=True)
class Work:
    """What one launch does, counted.

    Attributes:
        name: of the launch.
        blocks, warps, registers, shared, stack: of its grid, and of one block or thread.
        code: machine instructions.
        stages: how many steps of the loop have their operands under way or in use at a time.
        steps: of the loop in each block.
        elements: of a block's result.
        flops: of all products, with those of a block that lie outside of its result.
        useful: of those within.
        copied: bytes of A and B that come to shared memory.
        operands: of these, bytes that come from L2 and not from the L1 cache of the multiprocessor.
        through_l1: bytes of A where A comes through the L1 cache.
        pointwise: bytes that loads and stores of the epilogue, of pools and of samples move.
        hbm: bytes from and to the memory.
    """

    name: str
    blocks: int
    warps: int
    registers: int
    shared: int
    stack: int
    code: MachineCode
    stages: int = 1
    steps: int = 0
    elements: int = 1
    flops: int = 0
    useful: int = 0
    copied: int = 0
    operands: float = 0
    through_l1: int = 0
    pointwise: int = 0
    hbm: int = 0


@dataclass(frozen=True)
class Times:
    """Seconds that each part of the device would need for a launch; the longest is what it waits for."""

    tensor_cores: float
    issue: float
    shared_memory: float
    l2: float
    hbm: float
    latency: float

    @property
    def longest(self) -> str:
        return max(asdict(self), key=lambda name: getattr(self, name))


def blocks_at_a_time(work: Work, device: Device) -> int:
    """How many blocks of a launch one multiprocessor holds."""
    threads = 32 * work.warps
    registers = -(-work.registers // 8) * 8 * threads
    shared = work.shared + device.launch_shared
    return min(device.registers // registers, device.shared // shared, device.threads // threads, device.blocks)


def waves(work: Work, device: Device) -> float:
    """Of all blocks that the device holds at a time."""
    return work.blocks / (device.multiprocessors * blocks_at_a_time(work, device))


def times(work: Work, device: Device = H200) -> Times:
    """What the busiest multiprocessor needs, or the caches and the memory for all of them."""
    most = -(-work.blocks // device.multiprocessors)  # blocks of the busiest multiprocessor
    cycle = 1 / device.clock
    code, warps, steps = work.code, work.warps, work.steps

    def whole(what: str) -> float:
        return sum(getattr(s, what) * n for s, n in ((code.before, 1), (code.loop, steps), (code.after, 1)))

    flops = device.flops * (1 if code.loop.warpgroup or code.after.warpgroup else device.without_warpgroups)
    tensor = whole("flops") * warps / flops
    issue = max(whole("instructions") / 4, whole("special") * 2) * warps
    shared = (whole("shared") * warps + (work.copied + work.through_l1) / work.blocks) / device.shared_bytes
    step = max(
        code.loop.flops * warps / flops,
        code.loop.instructions * max(device.cycles_an_instruction, warps / 4),
        device.latency / max(1, work.stages - 1),
    )
    alone = max(device.cycles_an_instruction, warps / 4)
    chain = (code.before.instructions + code.after.instructions) * alone + 2 * device.latency + steps * step
    rounds = -(-most // blocks_at_a_time(work, device))
    each = (work.operands + work.pointwise) / work.blocks
    return Times(
        tensor_cores=most * tensor * cycle,
        issue=most * issue * cycle,
        shared_memory=most * shared * cycle,
        l2=max((work.operands + work.pointwise) / device.l2, most * each / device.l2_bytes * cycle),
        hbm=work.hbm / device.hbm,
        latency=rounds * chain * cycle,
    )


def issued(work: Work) -> float:
    """Instructions of all warps of a launch."""
    code = work.code
    each = code.before.instructions + code.loop.instructions * work.steps + code.after.instructions
    return each * work.warps * work.blocks


def split(work: Work, parts: int, device: Device = H200) -> Work | None:
    """A launch whose steps are divided among so many times the blocks; None where they can't be.

    Each block writes float32 sums, and the last one of a group reads those of all in their order before its epilogue.
    What the others leave out of the epilogue is not counted in its favour, because the last one has to wait for it all.
    Its reads and the counter that tells which one is last are two more waits for L2.
    """
    if work.steps < 2 * parts:
        return None
    sums = 2 * 4 * work.elements * work.blocks * parts
    waits = int(2 * device.latency / max(device.cycles_an_instruction, work.warps / 4))
    saved = work.code.unrolled * (parts - 1) // parts
    after = work.code.after
    after = replace(after, instructions=after.instructions + waits - saved, flops=after.flops // parts)
    return replace(
        work,
        blocks=work.blocks * parts,
        steps=-(-work.steps // parts),
        code=replace(work.code, after=after),
        pointwise=work.pointwise + sums,
    )


def seconds(work: Work, device: Device = H200) -> float:
    """Of a launch, with the pause before it."""
    return max(asdict(times(work, device)).values()) + device.launch


# Counting -----------------------------------------------------------------------------------------------------------


def works_of_an_update(batch: int) -> list[Work]:
    """All launches of one update in bfloat16, in their order. Compiles each kernel once."""
    x = torch.zeros(batch, *SHAPE)
    with fake_gpu(90) as gpu:
        program = gpu_program(nets.build("CF-EBM", SHAPE, "cpu"), SHAPE, torch.bfloat16)
        code, workspace = code_and_workspace(program, batch)
        planned, calls = calls_of(code.numpy().tobytes(), facts_of(x, program.constants))
        torch.ops.fastebm.run_program(x, code, program.constants, workspace)
        instructions = list(gpu.launches)
        torch.ops.fastebm.langevin_step_(x, x, *step_options(batch))
        (update,) = gpu.launches[len(instructions) :]
    phases = phases_of(planned, calls)
    works = [
        work_of_phases(planned, call, run, launch, batch)
        for call, run, launch in zip(calls, phases, instructions, strict=True)
    ]
    works.append(work_of_update(update, x.numel()))
    touched = [dict.fromkeys(place for i in run for place in touched_by(planned, i, batch)) for run in phases]
    touched.append(
        [("x", 0, 4 * x.numel(), False), ("gradient", 0, 4 * x.numel(), False), ("x", 0, 4 * x.numel(), True)]
    )
    moved = hbm_bytes(touched, H200.l2_size)
    return [replace(work, hbm=bytes_) for work, bytes_ in zip(works, moved, strict=True)]


def phases_of(program: PlannedProgram, calls: Sequence[Call]) -> list[tuple[Instruction, ...]]:
    """The instructions of each launch."""
    left = iter(program.instructions)
    return [tuple(itertools.islice(left, call.shape.phases)) for call in calls]


def work_of_phases(
    program: PlannedProgram, call: Call, phases: Sequence[Instruction], launch: Launch, batch: int
) -> Work:
    """The counts of one launch: those of its phases, each of which has as many blocks."""
    works = [work_of(program, call, i, launch, batch) for i in phases]
    added = ("blocks", "flops", "useful", "copied", "operands", "through_l1", "pointwise")
    return replace(
        works[0],
        name=works[0].name + (f", {len(phases)} phases" if len(phases) > 1 else ""),
        steps=max(work.steps for work in works),
        **{name: sum(getattr(work, name) for work in works) for name in added},  # type: ignore[arg-type]
    )


OTHER_BLOCKS = {
    (16, 3): (
        *((128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 128, 8, 2)),
        *((256, 128, 64, 8, 3), (256, 128, 64, 16, 3)),
    ),
    (8, 3): ((64, 64, 64, 4, 3), (64, 64, 64, 8, 3), (64, 128, 64, 8, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3)),
    (8, 2): ((64, 64, 64, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
    (4, 2): ((64, 64, 64, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
}
"""Blocks that were considered, by the height of the map and the taps: (rows, columns, depth, warps, stages)."""


def works_of_other_blocks(batch: int) -> list[tuple[tuple[int, ...], Work]]:
    """The first convolution of 128 channels of each kind in `OTHER_BLOCKS`, in each of its blocks."""
    x, found = torch.zeros(batch, *SHAPE), []
    with fake_gpu(90) as gpu:
        program = gpu_program(nets.build("CF-EBM", SHAPE, "cpu"), SHAPE, torch.bfloat16)
        code, workspace = code_and_workspace(program, batch)
        planned, calls = calls_of(code.numpy().tobytes(), facts_of(x, program.constants))
        for (height, taps), others in OTHER_BLOCKS.items():
            call, phases = next(
                (call, phases)
                for call, phases in zip(calls, phases_of(planned, calls), strict=True)
                if call.shape.kind == Kind.CONVOLUTION
                and (phases[0].height, phases[0].kernel_y, phases[0].source_channels) == (height, taps, 128)
            )
            for rows, columns, depth, warps, stages in others:
                shape = call.shape._replace(rows=rows, columns=columns, depth=depth)
                call = replace(call, shape=shape, num_warps=warps, num_stages=stages)
                with mock.patch.object(triton_program, "calls_of", return_value=(planned, (call,))):
                    torch.ops.fastebm.run_program(x, code, program.constants, workspace)
                work = work_of_phases(planned, call, phases, gpu.launches[-1], batch)
                found.append(((rows, columns, depth, warps, stages), work))
    return found


def work_of(program: PlannedProgram, call: Call, i: Instruction, launch: Launch, batch: int) -> Work:
    """The counts of one instruction, whose launch it may share with other phases."""
    kind, positions, size = Kind(i.kind), batch * i.height * i.width, program.header.bytes
    name = f"{kind.name.lower()} {i.source_channels} to {i.channels}, {i.height}x{i.width}"
    work = bare_work(name, launch)
    work = replace(work, blocks=work.blocks // call.shape.phases)
    work = replace(work, stages=call.num_stages or 1, elements=call.shape.rows * call.shape.columns)
    pointwise = sum(bytes_of(program, i, operation, positions) for operation in program.epilogue(i))
    if kind == Kind.CONVOLUTION:
        return replace(with_products(work, program, call, i, batch), pointwise=pointwise)
    if kind == Kind.LOAD:
        pointwise += positions * i.source_channels * 4
    elif kind == Kind.POOL:
        pointwise += positions * i.kernel_y * i.kernel_x * i.channels * size
    else:
        pointwise += positions * (1 if i.broadcast else i.source_channels) * size
    return replace(work, pointwise=pointwise)


def bare_work(name: str, launch: Launch) -> Work:
    """What every launch shows of itself."""
    kernel = launch.kernel
    return Work(
        name,
        blocks=math.prod(launch.grid),
        warps=kernel.metadata.num_warps,
        registers=kernel.n_regs,
        shared=kernel.metadata.shared,
        stack=kernel.n_spills,
        code=read_machine_code(kernel.asm["cubin"]),
    )


def with_products(work: Work, program: PlannedProgram, call: Call, i: Instruction, batch: int) -> Work:
    """A convolution's counts: of the loop, and of what is copied to shared memory for it."""
    shape, size, taps = call.shape, program.header.bytes, i.kernel_y * i.kernel_x
    name = f"{work.name}, taps {i.kernel_y}x{i.kernel_x}" + (f", stride {i.stride_y}" if i.stride_y > 1 else "")
    panels = -(-i.channels // shape.columns)
    seen = batch * taps_inside(i, program)
    inner = i.source_channels if taps_in_turn(call) else taps * i.source_channels
    in_turn = taps if taps_in_turn(call) and not shape.one_pixel else 1
    steps = -(-inner // shape.depth) * in_turn
    a, b = seen * panels * i.source_channels * size, work.blocks // panels * inner * in_turn * i.channels * size
    if shape.paired:  # all taps from one product of the positions of a block and those around it
        steps = -(-i.source_channels // shape.depth)
        a, b = (
            work.blocks * shape.rows * i.source_channels * size,
            work.blocks * taps * i.source_channels * i.channels * size,
        )
    cached = any(part.cached for part in (work.code.before, work.code.loop, work.code.after))
    missed = a
    if cached and not shape.paired:
        at_a_time = min(blocks_at_a_time(work, H200), -(-work.blocks // H200.multiprocessors))
        l1 = H200.l1_and_shared - at_a_time * (work.shared + H200.launch_shared)
        missed = batch * panels * missed_pixels(i, program, call, l1 // at_a_time) * i.source_channels * size
    flops = sum(part.flops for part in (work.code.before, work.code.after)) + work.code.loop.flops * steps
    return replace(
        work,
        name=name,
        steps=steps,
        flops=flops * work.warps * work.blocks,
        useful=2 * seen * i.source_channels * i.channels,
        copied=a + b,
        operands=missed + b,
        through_l1=a if cached else 0,
    )


def missed_pixels(i: Instruction, program: PlannedProgram, call: Call, cache: int) -> float:
    """Pixels of one image's source that come from L2 while a block goes through its taps, by a cache of so many bytes.

    The cache keeps what was read last. Each panel of outputs reads them anew. The loop goes through all taps of a part
    of the inputs before the next part.
    """
    source, rows, plane = program.buffers[i.source], call.shape.rows, i.height * i.width
    room = max(1, cache // (min(call.shape.depth, i.source_channels) * program.header.bytes))
    missed, images = 0, math.lcm(rows, plane) // plane
    for first in range(0, images * plane, rows):
        kept: OrderedDict[tuple[int, int, int], None] = OrderedDict()
        for tap in range(i.kernel_y * i.kernel_x):
            for position in range(first, first + rows):
                image, (y, x) = position // plane, divmod(position % plane, i.width)
                y = y * i.stride_y - i.pad_y + tap // i.kernel_x * i.dilation_y
                x = x * i.stride_x - i.pad_x + tap % i.kernel_x * i.dilation_x
                if 0 <= y < source.height and 0 <= x < source.width:
                    missed += (image, y, x) not in kept
                    kept[image, y, x] = kept.pop((image, y, x), None)
                    if len(kept) > room:
                        kept.popitem(last=False)
    return missed / images


def work_of_update(launch: Launch, elements: int) -> Work:
    """Of the Langevin step, which reads state and gradient and writes the state."""
    work = bare_work("langevin_step", launch)
    return replace(work, elements=elements // work.blocks, pointwise=12 * elements)


def taps_in_turn(call: Call) -> bool:
    """Whether the loop goes through taps, and within each through inputs."""
    return call.shape.one_pixel or call.shape.inputs > 16


def taps_inside(i: Instruction, program: PlannedProgram) -> int:
    """Pairs of a pixel of one image's grid and a tap that lies within the source."""
    source = program.buffers[i.source]
    counts = []
    for size, kernel, stride, pad, dilation, bound in (
        (i.height, i.kernel_y, i.stride_y, i.pad_y, i.dilation_y, source.height),
        (i.width, i.kernel_x, i.stride_x, i.pad_x, i.dilation_x, source.width),
    ):
        at = [y * stride - pad + tap * dilation for y in range(size) for tap in range(kernel)]
        counts.append(sum(0 <= place < bound for place in at))
    return counts[0] * counts[1]


def bytes_of(program: PlannedProgram, i: Instruction, operation: Any, positions: int) -> int:
    """Bytes that one operation of an epilogue reads or writes."""
    do = EpilogueOp(operation.op)
    if do in READS + WRITES:
        return positions * (1 if operation.broadcast else i.channels) * program.buffers[operation.buffer].bytes
    if do == EpilogueOp.STORE_GRADIENT:
        return positions * i.channels * 4
    return positions * 4 if do == EpilogueOp.STORE_ENERGIES else 0


Touched = tuple[str, int, int, bool]
"""What lies in memory from one byte to another and is read or written: (place, first, end, written)."""


def touched_by(program: PlannedProgram, i: Instruction, batch: int) -> list[Touched]:
    def buffer(number: int, written: bool) -> Touched:
        lies = program.buffers[number]
        return ("workspace", lies.offset, lies.offset + lies.bytes * lies.image_stride * batch, written)

    found = [buffer(i.source, False)] if i.source >= 0 else [("x", 0, batch * 4 * math.prod(SHAPE), False)]
    if i.kind == Kind.CONVOLUTION:
        taps = i.kernel_y * i.kernel_x
        found.append((f"weight {i.constant}", 0, taps * i.source_channels * i.channels * program.header.bytes, False))
    for operation in program.epilogue(i):
        do = EpilogueOp(operation.op)
        if do in READS + WRITES:
            found.append(buffer(operation.buffer, do in WRITES))
        elif do == EpilogueOp.STORE_GRADIENT:
            found.append(("gradient", 0, batch * 4 * math.prod(SHAPE), True))
    return found


def hbm_bytes(launches: Sequence[Iterable[Touched]], size: int, page: int = 1 << 16) -> list[int]:
    """Bytes that each launch moves from and to memory, where a cache keeps what was touched last, in a second update.

    Pages that were written are written back as a whole, so what writes every other pixel counts for more than it is.
    """
    kept: OrderedDict[tuple[str, int], bool] = OrderedDict()  # whether a page has to be written back
    moved = [0] * len(launches)
    for _ in range(2):
        for number, touched in enumerate(launches):
            moved[number] = 0
            for place, first, end, written in touched:
                for at in range(first // page, -(-end // page)):
                    share = min(end, (at + 1) * page) - max(first, at * page)
                    moved[number] += 0 if written or (place, at) in kept else share
                    kept[place, at] = kept.pop((place, at), False) or written
                    if len(kept) * page > size:
                        moved[number] += page * kept.popitem(last=False)[1]
    return moved


# The page -----------------------------------------------------------------------------------------------------------


def row(work: Work, device: Device = H200) -> dict[str, Any]:
    """What is written down of a launch."""
    found = times(work, device)
    lanes = 32 * work.warps
    return {
        "launch": work.name,
        "blocks": work.blocks,
        "waves": round(waves(work, device), 2),
        "blocks a multiprocessor": blocks_at_a_time(work, device),
        "warps": work.warps,
        "registers": work.registers,
        "spilled bytes": work.stack,
        "shared bytes": work.shared,
        "gflop": round(work.useful / 1e9, 3),
        "gflop with padding": round(work.flops / 1e9, 3),
        "copied megabytes": round(work.copied / 1e6, 2),
        "l2 megabytes of operands": round(work.operands / 1e6, 2),
        "l2 megabytes pointwise": round(work.pointwise / 1e6, 2),
        "hbm megabytes": round(work.hbm / 1e6, 2),
        "steps": work.steps,
        "instructions a step": work.code.loop.instructions,
        "instructions a product": round(issued(work) / (work.flops / PRODUCT)) if work.flops else None,
        "instructions an element": round(work.code.after.instructions * lanes / work.elements, 1),
        "microseconds": round(seconds(work, device) * 1e6, 2),
        "waits for": found.longest.replace("_", " "),
        **{f"{name.replace('_', ' ')}, us": round(value * 1e6, 2) for name, value in asdict(found).items()},
    }


def without(works: Sequence[Work], limit: str | None) -> float:
    """Seconds of an update on a device on which one limit costs nothing: the most that any change of it can save.

    `limit` is a field of `Times`, or "launch".
    """
    total = 0.0
    for work in works:
        found = {name: value for name, value in asdict(times(work)).items() if name != limit}
        total += max(found.values()) + (0.0 if limit == "launch" else H200.launch)
    return total


def ranking(works: Sequence[Work]) -> list[tuple[str, float]]:
    """Each limit and the seconds that an update would take without it, the most valuable first."""
    limits = [*Times.__dataclass_fields__, "launch"]
    return sorted(((limit.replace("_", " "), without(works, limit)) for limit in limits), key=lambda found: found[1])


def entry_of(batch: int) -> dict[str, Any]:
    works = works_of_an_update(batch)
    whole = sum(map(seconds, works))
    return {
        "batch": batch,
        "launches": len(works),
        "milliseconds": round(whole * 1e3, 4),
        "target_milliseconds": TARGETS[batch] * 1e3,
        "teraflops_a_second": round(sum(work.useful for work in works) / whole / 1e12),
        "without": {name: round(value * 1e3, 4) for name, value in ranking(works)},
        "rows": [row(work) for work in works],
        "blocks": [{"block": block, **row(work)} for block, work in works_of_other_blocks(batch)],
        "split": [found for work in works if work.blocks < H200.multiprocessors and (found := split_row(work))],
    }


def split_row(work: Work) -> dict[str, Any] | None:
    """The modelled microseconds of a launch by the parts that its inner dimension is split into."""
    parts = {str(n): found for n in (2, 4, 8) if (found := split(work, n)) is not None}
    if not parts:
        return None
    times_of = {"1": work, **parts}
    return {"launch": work.name, "blocks": work.blocks, **{n: round(seconds(w) * 1e6, 2) for n, w in times_of.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each launch and what the update waits for, and writes them down where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, choices=BATCHES)
    parser.add_argument(
        "--entry", default=None, help="a name for the state of the sources in docs/results/gpu-model/update"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = [entry_of(batch) for batch in given.batch]
    for entry in found:
        for line in entry["rows"]:
            print("; ".join(f"{name} {value}" for name, value in line.items()))
        print(f"batch {entry['batch']}: {entry['milliseconds']} ms modelled, target {entry['target_milliseconds']} ms")
        for name, value in entry["without"].items():
            print(f"    {value} ms if {name} cost nothing")
    if given.entry is not None:
        page = "gpu-model/update"
        pages.add_entry(pages.RESULTS / page, given.entry, {"batches": found}, pages.PAGES[page])
    return 0


if __name__ == "__main__":
    sys.exit(main())
